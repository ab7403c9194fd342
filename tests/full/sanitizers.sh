#!/usr/bin/env bash
# The compiled kernels under the address and undefined-behaviour sanitizers: the checks in C++ at
# every level, then every test of an op's C++ backend (`-k cpp`) on a copy of the package that holds
# the instrumented library. The first finding ends the run.
set -euo pipefail
cd "$(dirname "$0")/../.."
source tests/full/library.bash
build=build/sanitize

configure $build -DMUSICLM_FAST_SANITIZE=address,undefined
cmake --build $build --target all cpp_tests

# Python is not instrumented, so the runtime comes first in the process, with libstdc++, whose throw
# it wraps. Python and torch leave memory to the end of the process: leaks are not looked for.
compiler=$(sed -n 's/^CMAKE_CXX_COMPILER:[A-Z]*=//p' $build/CMakeCache.txt)
runtime="$("$compiler" -print-file-name=libasan.so) $("$compiler" -print-file-name=libstdc++.so.6)"
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1

run_checks $build
package_copy $build
cd $build/tree
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
