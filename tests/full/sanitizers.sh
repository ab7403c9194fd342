#!/usr/bin/env bash
# The compiled kernels under the address and undefined-behaviour sanitizers: the SIMD helpers' own
# checks at every level, then every test of an op's C++ backend (`-k cpp`) on a copy of the package
# that holds the instrumented library. The first finding ends the run.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
PATH="$(dirname "$(command -v "$PYTHON")"):$PATH" # cmake and ninja of the same environment
build=build/sanitize
tree=$build/tree

cmake -S . -B $build -G Ninja \
  -DPython_EXECUTABLE="$("$PYTHON" -c 'import sys; print(sys.executable)')" \
  -DMUSICLM_FAST_SANITIZE=address,undefined -DMUSICLM_FAST_CUDA=0 >/dev/null
cmake --build $build

# Python is not instrumented, so the runtime comes first in the process, with libstdc++, whose throw
# it wraps. Python and torch leave memory to the end of the process: leaks are not looked for.
compiler=$(sed -n 's/^CMAKE_CXX_COMPILER:[A-Z]*=//p' $build/CMakeCache.txt)
runtime="$("$compiler" -print-file-name=libasan.so) $("$compiler" -print-file-name=libstdc++.so.6)"
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1

for level in $(sed -n 's/^simd_levels=//p' $build/build_facts.cpp); do
  cmake --build $build --target simd_test_$level
  case $level in
    avx2) needs=avx2 ;;
    avx512) needs=avx512dq ;;
    *) needs= ;;
  esac
  if [ -z "$needs" ] || grep -qw "$needs" /proc/cpuinfo; then
    $build/simd_test_$level
  else
    echo "simd_test_$level: built, not run: this processor has no $needs"
  fi
done

rm -rf $tree
mkdir -p $tree
cp -r musiclm_fast tests pyproject.toml $tree
rm -f $tree/musiclm_fast/*.so
cmake --install $build --prefix $tree/musiclm_fast >/dev/null
cd $tree
export PYTHONPATH=$PWD OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
LD_PRELOAD=$runtime "$PYTHON" -c "
from musiclm_fast import _extension
status = _extension.extension_status()
assert status.loaded, status.reason
assert status.facts['sanitize'] == 'address,undefined', status.facts
print('instrumented library at SIMD level', _extension.simd_level())"
# pytest ends with 5 where no test of a C++ backend exists.
LD_PRELOAD=$runtime "$PYTHON" -m pytest -p no:cacheprovider tests/ops -k cpp -m "not gpu" \
  --timeout 1200 || [ $? -eq 5 ]
