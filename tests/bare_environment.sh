#!/usr/bin/env bash
# What a machine with a GPU may have: torch 2.11 with its Triton 3.6, pytest and numpy, and nothing
# else. There, without a GPU: the GPU tests are collected, some run in Triton's interpreter, and every
# stage of `make gpu` runs at the smallest sizes. The library that is built serves. Gigabytes: this
# torch brings CUDA's libraries. numpy 2.4 refuses what the interpreter of Triton 3.6 does with it; on
# a GPU, where nothing is interpreted, any numpy does.
#
#   PYTHON=python3.12 tests/bare_environment.sh [arguments of benchmarks.harvest]
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3.12}
folder=$PWD/.venvs/bare
python=$folder/bin/python

if [ ! -e "$folder/.complete" ]; then
  "$PYTHON" -m venv --clear "$folder"
  "$python" -m pip --disable-pip-version-check install --quiet torch==2.11.0 pytest "numpy<2.4"
  touch "$folder/.complete"
fi
"$python" -c "
import sys, torch, triton
print('Python', sys.version.split()[0], 'torch', torch.__version__, 'Triton', triton.__version__)
assert triton.__version__ == '3.6.0', triton.__version__"
"$python" -m pytest --collect-only -q -p no:cacheprovider -m gpu tests/ops | tail -1
TRITON_INTERPRET=1 "$python" -m benchmarks.harvest --tiny --deadline 3000 \
  --output "$folder/harvest-output" --triton-cache "$folder/triton-cache" "$@"
