#!/usr/bin/env bash
# The kernels compiled for aarch64, without a warning, by g++ and the oldest clang here, and their
# checks in C++ run in an emulator. The registrations are compiled too, with the headers of this
# processor's torch, but no library is linked: that takes an aarch64 libtorch_cpu.
set -euo pipefail
cd "$(dirname "$0")/../.."
source tests/full/library.bash
table=build/aarch64/table
mkdir -p build/aarch64
: >$table

for needed in aarch64-linux-gnu-g++:g++-aarch64-linux-gnu qemu-aarch64:qemu-user; do
  if [ -z "$(command -v ${needed%:*})" ]; then
    echo "${needed%:*} not found: apt-get install ${needed#*:}" >&2
    exit 1
  fi
done

try() { # NAME COMPILER [CMAKE ARGUMENTS]
  local build=build/aarch64/$2 name
  name="$1 $("$2" -dumpfullversion -dumpversion)"
  echo "== $name"
  configure $build -DCMAKE_CXX_COMPILER="$2" -DCMAKE_CXX_FLAGS=-Werror \
    -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 "${@:3}"
  cmake --build $build --target core cpp_tests -- --quiet
  run_checks $build qemu-aarch64 -L /usr/aarch64-linux-gnu | tee $build/checks
  echo "| $name | aarch64 | baseline | $(passed_checks baseline <$build/checks) | not linked |" >>$table
}

try g++ aarch64-linux-gnu-g++
for compiler in clang++-{14..22} clang++; do
  if [ -n "$(command -v $compiler)" ]; then
    try clang++ $compiler -DCMAKE_CXX_COMPILER_TARGET=aarch64-linux-gnu
    break
  fi
done
echo "$table_head"
cat $table
