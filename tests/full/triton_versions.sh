#!/usr/bin/env bash
# The ahead-of-time compilation of the Triton kernels (tests marked `aot`) with the oldest Triton that
# is supported, that of torch 2.11; `make test` runs them with the environment's own.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
version=3.6.0
folder=$PWD/.venvs/triton-$version

if [ ! -e "$folder/.complete" ]; then
  rm -rf "$folder"
  "$PYTHON" -m pip --disable-pip-version-check install --quiet --no-deps --target "$folder" \
    "triton==$version"
  touch "$folder/.complete"
fi
export PYTHONPATH=$folder:$PWD TRITON_CACHE_DIR=$folder/cache
"$PYTHON" -c "
import triton
assert triton.__version__ == '$version', triton.__version__
print('Triton', triton.__version__)"
# pytest ends with 5 where no test is marked.
"$PYTHON" -m pytest tests/ops -m "aot and not gpu and not slow" || [ $? -eq 5 ]
