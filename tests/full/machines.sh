#!/usr/bin/env bash
# Tests of the ops and the models as other machines run them: another BLAS under numpy, other
# instructions in torch and in our kernels, other numbers of threads. Each row sets all of these at
# once, so that six runs hold every value of every column, and every pair of instruction sets of
# torch and of ours. A value that needs instructions which this processor lacks is replaced by the
# best that it has, and named: such a library would not fall back, it would crash.
#
#   OPENBLAS_CORETYPE       reaches numpy, hence Triton's interpreter: these tests are in every row
#   ATEN_CPU_CAPABILITY     torch's own kernels; its BLAS (MKL) and oneDNN are held to the same set
#   MUSICLM_FAST_SIMD       level of the compiled kernels
#   OMP_NUM_THREADS         torch's and our threads
#
# Not in every row: interpreted kernels (`-k triton`) take minutes and only see the first column and
# torch as the reference, so rows but the first two run the interpreter's cases of extreme values.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
