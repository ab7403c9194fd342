// The ops' arguments, checked and gathered into a Call; the same for CPU and CUDA tensors.
#pragma once

#include "common/stable.h"
#include "spectrogram/plan.h"

namespace musiclm_fast::spectrogram {

// Arguments of both ops after the tensor(s) that they differ in; see csrc/library.cpp.
struct Arguments {
  const Tensor& wav;
  const Tensor& window;
  const std::optional<Tensor>& mel;
  const std::optional<Tensor>& freq_mask;
  const std::optional<Tensor>& time_mask;
  const std::optional<Tensor>& lengths;
  const std::optional<Tensor>& rates;
  int64_t n_fft, hop_length, pad;
  bool center;
  int64_t pad_mode;
  bool magnitude;
  std::optional<double> log_offset;
  double mean, std, mask_value;
  int64_t crop_bands, crop_frames;
};

inline const int64_t* spans(const std::optional<Tensor>& mask, const char* name, int64_t clips,
                            int64_t& count, int64_t& step) {
  count = step = 0;
  if (!mask.has_value()) return nullptr;
  check_dim(*mask, name, 3);
  const bool shared = mask->size(0) == 1;
  count = mask->size(1);
  step = shared ? 0 : 2 * count;
  return contiguous_data<int64_t>(*mask, name, {shared ? 1 : clips, count, 2});
}

// Everything but the transform's tables and mel's ranges, which lie where the kernel reads them.
inline Call make_call(const Arguments& a) {
  check_dim(a.wav, "wav", 2);
  check_dtype(a.wav, "wav", ScalarType::Float);
  check_dim(a.window, "window", 1);
  const int64_t taps = a.window.size(0);
  STD_TORCH_CHECK(a.n_fft > 0 && taps > 0 && taps <= a.n_fft && a.hop_length > 0 && a.pad >= 0 &&
                      a.pad_mode >= 0 && a.pad_mode <= 3 && a.crop_bands > 0 && a.crop_frames > 0 &&
                      a.std > 0,
                  "spectrogram: sizes out of range");
  STD_TORCH_CHECK(plannable(a.n_fft, taps), "n_fft: ", a.n_fft, " has a prime factor above ",
                  kMaxRadix);
  Call c{};
  c.framing = {a.n_fft,
               taps,
               a.hop_length,
               a.pad,
               a.center ? a.n_fft / 2 : 0,
               static_cast<PadMode>(a.pad_mode)};
  c.wav = a.wav.const_data_ptr<float>();
  c.clips = a.wav.size(0);
  c.samples = a.wav.size(1);
  c.clip_stride = a.wav.stride(0);
  c.sample_stride = a.wav.stride(1);
  c.window = contiguous_data<float>(a.window, "window", {taps});
  c.magnitude = a.magnitude;
  c.bands = static_cast<int>(a.n_fft / 2 + 1);
  if (a.lengths.has_value()) {
    c.lengths = contiguous_data<int64_t>(*a.lengths, "lengths", {c.clips});
  }
  if (a.rates.has_value()) {
    check_dim(*a.rates, "rates", 1);
    c.rate_step = a.rates->size(0) != 1;
    c.rates = contiguous_data<double>(*a.rates, "rates", {c.rate_step == 0 ? 1 : c.clips});
  }
  if (a.mel.has_value()) {
    check_dim(*a.mel, "mel", 2);
    check_size(*a.mel, "mel", 0, c.bands);
    check_dtype(*a.mel, "mel", ScalarType::Float);
    c.mel = a.mel->const_data_ptr<float>();
    c.mel_bin_stride = a.mel->stride(0);
    c.mel_band_stride = a.mel->stride(1);
    c.bands = static_cast<int>(a.mel->size(1));
  }
  c.logarithm = a.log_offset.has_value();
  c.log_offset = static_cast<float>(a.log_offset.value_or(0.0));
  c.mean = static_cast<float>(a.mean);
  c.scale = static_cast<float>(1.0 / a.std);
  c.freq_spans = spans(a.freq_mask, "freq_mask", c.clips, c.freq_count, c.freq_step);
  c.time_spans = spans(a.time_mask, "time_mask", c.clips, c.time_count, c.time_step);
  c.mask_value = static_cast<float>(a.mask_value);
  c.out_bands = c.bands / a.crop_bands * a.crop_bands;
  c.out_frames = c.framing.frames(c.samples) / a.crop_frames * a.crop_frames;
  return c;
}

inline void check_grad(const Tensor& grad, const Call& c) {
  contiguous_data<float>(grad, "grad", {c.clips, c.out_bands, c.out_frames});
}

}  // namespace musiclm_fast::spectrogram

// The parameters of an op in the schema's order, and the Arguments made of them.
#define MUSICLM_FAST_SPECTROGRAM_PARAMETERS                                                       \
  const Tensor &wav, const Tensor &window, const std::optional<Tensor>&mel,                       \
      const std::optional<Tensor>&freq_mask, const std::optional<Tensor>&time_mask,               \
      const std::optional<Tensor>&lengths, const std::optional<Tensor>&rates, int64_t n_fft,      \
      int64_t hop_length, int64_t pad, bool center, int64_t pad_mode, bool magnitude,             \
      std::optional<double> log_offset, double mean, double std, double mask_value,               \
      int64_t crop_bands, int64_t crop_frames
#define MUSICLM_FAST_SPECTROGRAM_ARGUMENTS                                                        \
  {wav,    window,   mel,       freq_mask,  time_mask, lengths, rates,      n_fft,      hop_length, \
   pad,    center,   pad_mode,  magnitude,  log_offset, mean,   std,        mask_value, crop_bands, \
   crop_frames}
