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
  m.def(
      "spectrogram_forward(Tensor wav, Tensor window, Tensor? mel, Tensor? freq_mask,"
      " Tensor? time_mask, Tensor? lengths, Tensor? rates, int n_fft, int hop_length, int pad,"
      " bool center, int pad_mode, bool magnitude, float? log_offset, float mean, float std,"
      " float mask_value, int crop_bands, int crop_frames) -> Tensor");
  m.def(
      "spectrogram_backward(Tensor grad, Tensor wav, Tensor window, Tensor? mel, Tensor? freq_mask,"
      " Tensor? time_mask, Tensor? lengths, Tensor? rates, int n_fft, int hop_length, int pad,"
      " bool center, int pad_mode, bool magnitude, float? log_offset, float mean, float std,"
      " float mask_value, int crop_bands, int crop_frames) -> Tensor");
}
