#include <algorithm>

#include "spectrogram/arguments.h"
#include "spectrogram/cpu.h"

namespace musiclm_fast {
namespace {

using spectrogram::Arguments;
using spectrogram::Call;

constexpr int64_t kTileFrames = 128;

// First bin and last + 1 with a weight, for every band: mel filters are mostly zero.
std::vector<int32_t> mel_ranges(const Call& c) {
  std::vector<int32_t> ranges(c.mel == nullptr ? 0 : 2 * c.bands, 0);
  for (int band = 0; band < c.bands && c.mel != nullptr; ++band) {
    for (int bin = 0; bin < c.transform.bins; ++bin) {
      if (c.mel[bin * c.mel_bin_stride + band * c.mel_band_stride] == 0.0f) continue;
      if (ranges[2 * band + 1] == 0) ranges[2 * band] = bin;
      ranges[2 * band + 1] = bin + 1;
    }
  }
  return ranges;
}

// Gradients of the positions outside of a clip belong to the samples that they show.
void fold_margins(const Call& c, int64_t clip, const float* margins, float* grad_wav) {
  const int64_t n = c.length(clip), margin = c.framing.margin();
  std::fill(grad_wav + n, grad_wav + c.samples, 0.0f);
  for (int64_t i = 0; i < 2 * margin && n > 0; ++i) {
    const int64_t source = c.framing.source(i < margin ? i - margin : n + i - margin, n);
    if (source >= 0) grad_wav[source] += margins[i];
  }
}

Tensor spectrogram_forward_cpu(MUSICLM_FAST_SPECTROGRAM_PARAMETERS) {
  check_cpu(wav, "wav");
  Call c = spectrogram::make_call(Arguments MUSICLM_FAST_SPECTROGRAM_ARGUMENTS);
  c.transform = spectrogram::plan_for(n_fft, window.size(0)).transform;
  const std::vector<int32_t> ranges = mel_ranges(c);
  c.mel_ranges = ranges.data();
  Tensor out = empty_as(wav, {c.clips, c.out_bands, c.out_frames});
  float* to = out.mutable_data_ptr<float>();
  const int64_t scratch_bytes = MUSICLM_FAST_SIMD_CALL(spectrogram_scratch, c, 0);
  const int64_t tiles = divide_up(c.out_frames, kTileFrames);
  torch::stable::parallel_for(0, c.clips * tiles, 1, [&](int64_t first, int64_t last) {
    const Buffer<char> scratch(scratch_bytes);
    for (int64_t task = first; task < last; ++task) {
      const int64_t begin = task % tiles * kTileFrames;
      const int64_t end = std::min(begin + kTileFrames, c.out_frames);
      MUSICLM_FAST_SIMD_CALL(spectrogram_forward, c, task / tiles, begin, end, scratch.get(), to);
    }
  });
  return out;
}

Tensor spectrogram_backward_cpu(const Tensor& grad, MUSICLM_FAST_SPECTROGRAM_PARAMETERS) {
  check_cpu(wav, "wav");
  Call c = spectrogram::make_call(Arguments MUSICLM_FAST_SPECTROGRAM_ARGUMENTS);
  check_grad(grad, c);
  c.transform = spectrogram::plan_for(n_fft, window.size(0)).transform;
  const std::vector<int32_t> ranges = mel_ranges(c);
  c.mel_ranges = ranges.data();
  const int64_t margin = c.framing.margin();
  Tensor grad_wav = empty_as(wav, {c.clips, c.samples});
  Tensor margins = zeros_as(wav, {c.clips, 2 * margin});
  const float* from = grad.const_data_ptr<float>();
  float* to = grad_wav.mutable_data_ptr<float>();
  float* edges = margins.mutable_data_ptr<float>();
  // Frames that reach over a segment's end are computed twice: a segment is many frames, and many
  // windows, long. Segments do not depend on the number of threads, so neither does the result.
  const int64_t taps = c.framing.taps;
  const int64_t segment =
      std::max(std::min(kTileFrames * hop_length, int64_t{1} << 16), 16 * taps);
  const int64_t segments = divide_up(c.samples + 2 * margin, segment);
  const int64_t scratch_bytes = MUSICLM_FAST_SIMD_CALL(spectrogram_scratch, c, segment);
  torch::stable::parallel_for(0, c.clips * segments, 1, [&](int64_t first, int64_t last) {
    const Buffer<char> scratch(scratch_bytes);
    for (int64_t task = first; task < last; ++task) {
      const int64_t clip = task / segments, n = c.length(clip);
      const int64_t begin = task % segments * segment - margin;
      const int64_t end = std::min(begin + segment, n + margin);
      if (begin >= end) continue;
      MUSICLM_FAST_SIMD_CALL(spectrogram_backward, c, from, clip, begin, end, scratch.get(),
                             to + clip * c.samples, edges + clip * 2 * margin);
    }
  });
  torch::stable::parallel_for(0, c.clips, 1, [&](int64_t first, int64_t last) {
    for (int64_t clip = first; clip < last; ++clip) {
      fold_margins(c, clip, edges + clip * 2 * margin, to + clip * c.samples);
    }
  });
  return grad_wav;
}

STABLE_TORCH_LIBRARY_IMPL(musiclm_fast, CPU, m) {
  m.impl("spectrogram_forward", TORCH_BOX(&spectrogram_forward_cpu));
  m.impl("spectrogram_backward", TORCH_BOX(&spectrogram_backward_cpu));
}

}  // namespace
}  // namespace musiclm_fast
