#!/usr/bin/env bash
# The ahead-of-time compilation of the Triton kernels (tests marked `aot`, the slow ones among them)
# with the oldest Triton that is supported, that of torch 2.11, with that of torch 2.14 and with the
# newest that pip finds, except the environment's own, which has run them already. Rare calls (every
# variant) are compiled for Hopper alone: minutes for each target.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
export PIP_DISABLE_PIP_VERSION_CHECK=1
newest=$("$PYTHON" -m pip index versions triton 2>/dev/null | sed -n '1s/.*(\(.*\)).*/\1/p')

own=$("$PYTHON" -c "import triton; print(triton.__version__)")

for version in $(printf '%s\n' 3.6.0 3.8.0 "$newest" | sort -uV | grep -vxF "$own"); do
  folder=$PWD/.venvs/triton-$version
  if [ ! -e "$folder/.complete" ]; then
    rm -rf "$folder"
    "$PYTHON" -m pip install --quiet --no-deps --target "$folder" "triton==$version"
    touch "$folder/.complete"
  fi
  (
    export PYTHONPATH=$folder:$PWD TRITON_CACHE_DIR=$folder/cache
    "$PYTHON" -c "
import triton
assert triton.__version__ == '$version', triton.__version__
print('Triton', triton.__version__)"
    "$PYTHON" -m pytest -n auto --dist worksteal tests/ops tests/test_sass.py -m "aot and not gpu" \
      -k "not every_variant or sm_90"
  )
done
