#!/usr/bin/env bash
# Tests of the ops, the models and their parity as other machines run them: another BLAS under numpy, other
# instructions in torch and in our kernels, other numbers of threads. A row sets all columns at once:
# six rows hold every value of each, and each of torch's instruction sets beside several of ours. A
# value that needs instructions which this processor lacks is left unset, and named: the libraries
# take it at its word and crash.
#
#   blas     OPENBLAS_CORETYPE: numpy's BLAS, which Triton's interpreter multiplies with
#   torch    ATEN_CPU_CAPABILITY: torch's kernels; its BLAS and oneDNN are held to the same set
#   simd     MUSICLM_FAST_SIMD: our kernels
#   threads  OMP_NUM_THREADS: torch's and ours
#
# Left out where a row cannot reach them: compilers and what they make (compile, aot, opcheck, block
# programs), sizes of memory, processes that talk. Interpreted kernels see the first two columns
# alone and take minutes: the first row runs them all, the others the cases that rounding decides.
set -euo pipefail
cd "$(dirname "$0")/../.."
source tests/full/library.bash
unset OPENBLAS_CORETYPE ATEN_CPU_CAPABILITY MKL_CBWR ONEDNN_MAX_CPU_ISA MUSICLM_FAST_SIMD
export OMP_WAIT_POLICY=passive # more threads than cores must not spin

#      blas         torch    simd      threads
rows=("Haswell      default  avx2      2"
      "Nehalem      avx2     baseline  1"
      "Sandybridge  avx512   avx512    3"
      "Zen          default  avx512    1"
      "SkylakeX     avx2     avx2      3"
      "-            avx512   baseline  2")

here() { # does this processor have what the value needs?
  case $1 in
    Nehalem) grep -qw sse4_2 /proc/cpuinfo ;;
    Sandybridge) grep -qw avx /proc/cpuinfo ;;
    Haswell | Zen) has_simd avx2 ;;
    SkylakeX) has_simd avx512 ;;
    *) has_simd "$1" ;;
  esac
}

core="not compile and not opcheck and not memory and not import and not cuda_blocks and not spill"
core="$core and not interpreter and not gpu_benchmark and not hugging_face and not 4096"
rounding="radius0 or extreme or unnormalised or won_positive or commute or rectangular"
common=(-q -n auto --dist worksteal -p no:cacheprovider -m "not slow and not gpu and not aot"
  --ignore tests/ops/test_contrastive_distributed.py)
pytest() { env "${settings[@]}" "$PYTHON" -m pytest "${common[@]}" "$@" || result=failed; }
report=()
failed=0
for row in "${rows[@]}"; do
  read -r blas torch simd threads <<<"$row"
  missing=
  for name in blas torch simd; do
    here "${!name}" || { missing+=" ${!name}" && printf -v $name -- -; }
  done
  settings=(OMP_NUM_THREADS="$threads")
  [ "$blas" = - ] || settings+=(OPENBLAS_CORETYPE="$blas")
  [ "$simd" = - ] || settings+=(MUSICLM_FAST_SIMD="$simd")
  case $torch in
    default) settings+=(ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE ONEDNN_MAX_CPU_ISA=SSE41) ;;
    avx2) settings+=(ATEN_CPU_CAPABILITY=avx2 MKL_CBWR=AVX2 ONEDNN_MAX_CPU_ISA=AVX2) ;;
    avx512) settings+=(ATEN_CPU_CAPABILITY=avx512 MKL_CBWR=AVX512) ;;
  esac
  echo "== ${settings[*]}${missing:+ (not on this processor:$missing)}"
  start=$SECONDS result=passed
  pytest -k "$core" tests/ops tests/models
  pytest tests/upstream/test_parity_{audio,mulan,audiolm,text}.py
  interpreted=$rounding
  [ "${#report[@]}" -gt 0 ] || interpreted="not interpreter"
  settings+=(TRITON_INTERPRET=1)
  pytest -m "gpu and not slow" -k "$interpreted" \
    tests/ops/test_attention_triton.py tests/ops/test_contrastive.py
  [ $result = passed ] || failed=1
  report+=("$(printf '%-12s %-8s %-9s %7s %6d s  %s' "$blas" "$torch" "$simd" "$threads" \
    $((SECONDS - start)) "$result${missing:+, without$missing}")")
done
printf '\n%-12s %-8s %-9s %7s\n' blas torch simd threads
printf '%s\n' "${report[@]}"
exit $failed
