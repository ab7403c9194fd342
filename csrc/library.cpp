// Every op's schema, on one page. Kernels are registered in csrc/<op>/<op>.cpp and <op>.cu; fake
// kernels and gradients in musiclm_fast/ops/<op>/.

#include "common/stable.h"

STABLE_TORCH_LIBRARY_FRAGMENT(musiclm_fast, m) {
  // contrastive: one block of pairs, m rows of audio (L, m, d) by n columns of text (L, n, d); row i's
  // positive is column i + offset. Statistics and gradients are float32.
  m.def(
      "contrastive_logsumexp(Tensor audio, Tensor text, Tensor temperature, int offset) "
      "-> (Tensor row_lse, Tensor column_lse, Tensor positive)");
  m.def(
      "contrastive_logsumexp_backward(Tensor grad_row, Tensor grad_column, Tensor grad_positive, "
      "Tensor audio, Tensor text, Tensor temperature, Tensor row_lse, Tensor column_lse, int offset) "
      "-> (Tensor d_audio, Tensor d_text, Tensor d_temperature)");
  m.def(
      "contrastive_sigmoid(Tensor audio, Tensor text, Tensor temperature, Tensor? bias, int offset, "
      "bool gradients) -> (Tensor loss, Tensor d_audio, Tensor d_text, Tensor d_temperature, "
      "Tensor d_bias)");
}
