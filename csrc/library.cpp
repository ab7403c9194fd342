// Every op's schema, on one page. Kernels are registered in csrc/<op>/<op>.cpp and <op>.cu; fake
// kernels and gradients in musiclm_fast/ops/<op>/.

#include "common/stable.h"

STABLE_TORCH_LIBRARY_FRAGMENT(musiclm_fast, m) {
  m.def(
      "attention_forward(Tensor q, Tensor k, Tensor v, Tensor? bias_table, Tensor? q_codes, "
      "Tensor? k_codes, Tensor? key_padding_mask, Tensor? key_lengths, Tensor? q_scale, "
      "Tensor? k_scale, Tensor? dropout_seed, float scale, bool causal, float dropout_p) "
      "-> (Tensor, Tensor)");
  m.def(
      "attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, "
      "Tensor logsumexp, Tensor? bias_table, Tensor? q_codes, Tensor? k_codes, "
      "Tensor? key_padding_mask, Tensor? key_lengths, Tensor? q_scale, Tensor? k_scale, "
      "Tensor? dropout_seed, float scale, bool causal, float dropout_p) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}
