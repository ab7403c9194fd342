#!/usr/bin/env bash
# The compiled library with every C++ compiler that is installed: no warning, and at every SIMD level
# that this processor has the programs of tests/cpp and the tests of the ops' C++ backends (`-k cpp`) on a
# copy of the package. Ends with a table. Needs a g++ and a clang++.
set -euo pipefail
cd "$(dirname "$0")/../.."
source tests/full/library.bash
table=build/compilers/table
mkdir -p build/compilers
: >$table

trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
declare -A tested # "g++ 12.2.0" -> 1: g++ and g++-12 are often the same
missing=""
for compiler in g++ g++-{12..16} clang++ clang++-{14..22}; do
  if [ -z "$(command -v $compiler)" ]; then
    missing+=" $compiler"
    continue
  fi
  name="${compiler%%-[0-9]*} $($compiler -dumpfullversion -dumpversion)"
  [ -z "${tested[$name]:-}" ] || continue
  tested[$name]=1
  case $name in
    "g++ "[1-9].* | "g++ 1"[01].* | "clang++ "[1-9].* | "clang++ 1"[0-3].*)
      echo "== $name: too old"
      continue
      ;;
  esac
  build=build/compilers/$compiler
  echo "== $name"
  configure $build -DCMAKE_CXX_COMPILER=$compiler -DCMAKE_CXX_FLAGS=-Werror
  cmake --build $build --target all cpp_tests -- --quiet
  run_checks $build | tee $build/checks
  package_copy $build
  runs=() # a process per level, all at once: each has parts that keep one core busy only
  for level in $(simd_levels $build); do
    (
      cd $build/tree
      export PYTHONPATH=$PWD OMP_NUM_THREADS=1 MUSICLM_FAST_SIMD=$level
      "$PYTHON" -c "from musiclm_fast import _extension as e; assert e.simd_level() == '$level', e.why_missing()"
      "$PYTHON" -m pytest -q -p no:cacheprovider tests/ops -k "cpp and not opcheck and not compile" \
        -m "not gpu and not slow" --ignore tests/ops/test_contrastive_distributed.py
    ) >$build/$level.log 2>&1 &
    runs+=("$level $!")
  done
  for run in "${runs[@]}"; do
    read -r level process <<<"$run"
    wait "$process" || { cat $build/$level.log && exit 1; }
    echo "| $name | $(uname -m) | $level | $(passed_checks $level <$build/checks)" \
      "| $(grep -oE '[0-9]+ passed' $build/$level.log) |" | tee -a $table
  done
done

echo "== not installed:$missing"
echo "$table_head"
cat $table
for kind in g++ clang++; do
  if ! grep -qF "| $kind " $table; then
    echo "no $kind ran: apt-get install ${kind/clang++/clang}" >&2
    exit 1
  fi
done
