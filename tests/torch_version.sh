#!/usr/bin/env bash
# The tests on another torch than the lock's, in an environment of its own, with the library that is
# built: one file serves every torch. Most indexes only have builds with CUDA: gigabytes.
#
#   TORCH=torch==2.14.1 tests/torch_version.sh [pytest's arguments]     without: pip's newest
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
TORCH=${TORCH:-torch}
folder=$PWD/.venvs/${TORCH//==/-}
python=$folder/bin/python

if [ ! -e "$folder/.complete" ]; then
  "$PYTHON" -m venv --clear "$folder"
  pip=("$python" -m pip --disable-pip-version-check install --quiet --no-compile)
  "${pip[@]}" "$TORCH"
  "${pip[@]}" -r <(grep -v '^torch==' requirements/dev.txt)
  # A build with CUDA brings its own.
  "$python" -c 'import triton' 2>/dev/null || "${pip[@]}" -r requirements/triton.txt
  "${pip[@]}" --no-deps -r requirements/upstream.txt -r requirements/demo.txt
  touch "$folder/.complete"
fi
"$python" -c "
import torch
from musiclm_fast import _extension
print('torch', torch.__version__)
status = _extension.extension_status()
assert status.loaded, status.reason"
OMP_NUM_THREADS=1 "$python" -m pytest -n auto --dist worksteal "$@"
