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
  // contrastive: one block of pairs, m rows of audio (L, m, d) by n columns of text (L, n, d); row i's
  // positive is column i + offset or, with int32 labels (m,) and (n,), every column of its label. Sums
  // of exponentials have positives if inclusive (labels alone). Statistics and gradients are float32.
  m.def(
      "contrastive_logsumexp(Tensor audio, Tensor text, Tensor temperature, int offset, "
      "Tensor? audio_labels=None, Tensor? text_labels=None, bool inclusive=False) "
      "-> (Tensor row_lse, Tensor column_lse, Tensor positive)");
  m.def(
      "contrastive_logsumexp_backward(Tensor grad_row, Tensor grad_column, Tensor grad_positive, "
      "Tensor audio, Tensor text, Tensor temperature, Tensor row_lse, Tensor column_lse, int offset, "
      "Tensor? audio_labels=None, Tensor? text_labels=None, bool inclusive=False) "
      "-> (Tensor d_audio, Tensor d_text, Tensor d_temperature)");
  m.def(
      "contrastive_sigmoid(Tensor audio, Tensor text, Tensor temperature, Tensor? bias, int offset, "
      "bool gradients, Tensor? audio_labels=None, Tensor? text_labels=None) "
      "-> (Tensor loss, Tensor d_audio, Tensor d_text, Tensor d_temperature, Tensor d_bias)");
  // decode: sizes are depth, dim, heads, dim_head, hidden, streams, null keys, and as 0 or 1 cross
  // attention, norm of the self attention's context, value residual.
  m.def("decode_pack(Tensor[] parameters, int[] sizes) -> Tensor");
  m.def(
      "decode_step(Tensor x, Tensor packed, Tensor(a!) keys_values, int length, Tensor? context, "
      "Tensor? context_mask, Tensor? bias_table, Tensor? q_code, Tensor? k_codes, "
      "Tensor? key_padding_mask, int[] sizes) -> Tensor");
  // hyper_connection: the two last results of the forward are for the backward.
  m.def(
      "hyper_connection_forward(Tensor streams, Tensor? beta, Tensor? branch, Tensor weights, "
      "Tensor scales, Tensor offsets) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "hyper_connection_backward(Tensor grad_input, Tensor grad_mixed, Tensor grad_beta, "
      "Tensor streams, Tensor? beta, Tensor? branch, Tensor weights, Tensor scales, "
      "Tensor offsets, Tensor z, Tensor inverse_norm) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("geglu_norm_forward(Tensor x, Tensor gamma, Tensor beta) -> (Tensor, Tensor, Tensor)");
  m.def(
      "geglu_norm_backward(Tensor grad, Tensor x, Tensor gamma, Tensor beta, Tensor mean, "
      "Tensor rstd) -> (Tensor, Tensor, Tensor)");
}
