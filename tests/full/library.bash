# Sourced by the scripts that build the library in a way of their own and test it.
PYTHON=${PYTHON:-python3}
PATH="$(dirname "$(command -v "$PYTHON")"):$PATH" # cmake and ninja of the same environment

# configure FOLDER [CMAKE ARGUMENTS]
configure() {
  cmake -S . -B "$1" -G Ninja -DMUSICLM_FAST_CUDA=0 \
    -DPython_EXECUTABLE="$("$PYTHON" -c 'import sys; print(sys.executable)')" "${@:2}" >/dev/null
}

# has_simd LEVEL: does this processor run it? The same features as csrc/common/cpu.cpp
has_simd() {
  local flag flags=
  case $1 in
    avx2) flags="avx2 fma" ;;
    avx512) flags="avx2 fma avx512f avx512bw avx512dq avx512vl" ;;
  esac
  for flag in $flags; do grep -qw "$flag" /proc/cpuinfo || return 1; done
}

# simd_levels FOLDER: those that it was built for and that this processor has
simd_levels() {
  local level
  for level in baseline avx2 avx512; do
    if [ -x "$1/simd_test_$level" ] && has_simd "$level"; then echo "$level"; fi
  done
}

# run_checks FOLDER [EMULATOR]: the programs of tests/cpp, at every level
run_checks() {
  local level program
  for level in $(simd_levels "$1"); do "${@:2}" "$1/simd_test_$level"; done
  for program in "$1"/*_test; do "${@:2}" "$program"; done
}

# package_copy FOLDER: the package and its tests in FOLDER/tree, with the library built in FOLDER
package_copy() {
  rm -rf "$1/tree"
  mkdir -p "$1/tree"
  cp -r musiclm_fast tests pyproject.toml "$1/tree"
  rm -f "$1"/tree/musiclm_fast/*.so
  cmake --install "$1" --prefix "$1/tree/musiclm_fast" >/dev/null
}

# passed_checks LEVEL: how many, from what run_checks printed
passed_checks() {
  awk -v level="$1" '$1 == level { count += $3 } END { print count + 0 }'
}

table_head="| compiler | architecture | SIMD level | cases in C++ | tests of the C++ backends |
|---|---|---|---|---|"
