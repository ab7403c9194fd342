// What one CUDA block does, in terms of a team of threads: what both transforms share. Torch-free.
//
// Between two barriers each thread works on entries of its own, so a team of one thread whose
// barriers do nothing computes the same: that is how the tests run these files on the CPU.
//
//   forward    a tile of frames
//   backward   a segment of positions: spectra of the frames that touch it are computed again, and
//              their gradients are added in a fixed order: no atomics
//
// How a team transforms its frames: folded_block.h, fft_block.h and, for some n_fft, fixed_fft.h.
#pragma once

#include "spectrogram/spectrogram.h"

#ifdef __CUDACC__
#define MUSICLM_FAST_BLOCK __device__
#else
#define MUSICLM_FAST_BLOCK
#include <cmath>
#endif

namespace musiclm_fast::spectrogram {

MUSICLM_FAST_BLOCK inline float magnitude(float re, float im) {
  return sqrtf(re * re + im * im);
}

MUSICLM_FAST_BLOCK inline float inverse_or_zero(float x) { return x > 0.0f ? 1.0f / x : 0.0f; }

MUSICLM_FAST_BLOCK inline bool frequency_masked(const Call& c, int64_t clip, int64_t band) {
  return in_spans(c.freq_spans + clip * c.freq_step, c.freq_count, band);
}

MUSICLM_FAST_BLOCK inline bool time_masked(const Call& c, int64_t clip, int64_t frame) {
  return in_spans(c.time_spans + clip * c.time_step, c.time_count, frame);
}

MUSICLM_FAST_BLOCK inline float finished(const Call& c, float value) {
  if (c.logarithm) value = logf(value + c.log_offset);
  return (value - c.mean) * c.scale;
}

// A clip as one block sees it.
struct ClipView {
  const Call& c;
  int64_t clip, samples, frames;
  const float* wav;
  double rate;

  MUSICLM_FAST_BLOCK ClipView(const Call& call, int64_t index) : c(call), clip(index) {
    samples = c.length(clip);
    frames = c.framing.frames(samples);
    wav = c.wav + clip * c.clip_stride;
    rate = c.rates == nullptr ? 1.0 : c.rates[clip * c.rate_step];
  }

  // Whether an output frame is computed at all.
  MUSICLM_FAST_BLOCK bool live(int64_t frame) const {
    return frame < frames && frame < c.out_frames && !time_masked(c, clip, frame);
  }

  MUSICLM_FAST_BLOCK float sample(int64_t position) const {
    const int64_t at = c.framing.source(position, samples);
    return at < 0 ? 0.0f : wav[at * c.sample_stride];
  }

  // A band's value before the logarithm; power[bin * step].
  MUSICLM_FAST_BLOCK float band_value(int band, const float* power, int step) const {
    if (c.mel == nullptr) return power[band * step];
    float sum = 0.0f;
    for (int bin = c.mel_ranges[2 * band]; bin < c.mel_ranges[2 * band + 1]; ++bin) {
      sum += power[bin * step] * c.mel[bin * c.mel_bin_stride + band * c.mel_band_stride];
    }
    return sum;
  }

  // Output frames [low, high] that may touch positions [begin, end).
  MUSICLM_FAST_BLOCK void touching(int64_t begin, int64_t end, int64_t& low, int64_t& high) const {
    const int64_t hop = c.framing.hop, first = c.framing.first(0);
    const int64_t own = frames < c.out_frames ? frames : c.out_frames;
    const int64_t before = begin - first - c.framing.taps;  // frames up to before / hop end there
    low = before < 0 ? 0 : before / hop + 1;
    high = end - 1 - first < 0 ? -1 : (end - 1 - first) / hop;
    if (c.rates != nullptr && high >= 0) {
      low = static_cast<int64_t>(static_cast<double>(low - 1) / rate) - 2;
      low = low < 0 ? 0 : low;
      const double last = static_cast<double>(high + 1) / rate + 2.0;
      high = last < static_cast<double>(own) ? static_cast<int64_t>(last) : own - 1;
    }
    high = high < own ? high : own - 1;
  }
};

// Writes a tile of finished bands from power (bins, tile_frames + 1).
template <class Team>
MUSICLM_FAST_BLOCK void write_tile(const ClipView& view, const Team& team, int64_t begin,
                                   int tile_frames, const float* power, float* out) {
  const Call& c = view.c;
  const int count = static_cast<int>(c.out_bands) * tile_frames;
  for (int i = team.thread; i < count; i += team.threads) {
    const int band = i / tile_frames, f = i - band * tile_frames;
    const int64_t frame = begin + f;
    if (frame >= c.out_frames) continue;
    float value = 0.0f;
    if (frame < view.frames) {
      value = frequency_masked(c, view.clip, band) || time_masked(c, view.clip, frame)
                  ? c.mask_value
                  : finished(c, view.band_value(band, power + f, tile_frames + 1));
    }
    out[(view.clip * c.out_bands + band) * c.out_frames + frame] = value;
  }
}

// Power (or magnitude) from the spectra of one bin at one place, or at the two it lies between.
template <int kSides>
MUSICLM_FAST_BLOCK float power_of(const Call& c, const Complex<float>* x, float fraction) {
  if constexpr (kSides == 1) {
    return c.magnitude ? magnitude(x[0].re, x[0].im) : x[0].re * x[0].re + x[0].im * x[0].im;
  } else {
    const float left = magnitude(x[0].re, x[0].im);
    const float value = left + (magnitude(x[1].re, x[1].im) - left) * fraction;
    return c.magnitude ? value : value * value;
  }
}

// Replaces the spectra by their gradients, given the power's.
template <int kSides>
MUSICLM_FAST_BLOCK void spectra_gradient(const Call& c, float slope, float fraction,
                                         Complex<float>* x) {
  if constexpr (kSides == 1) {
    const float factor =
        c.magnitude ? slope * inverse_or_zero(magnitude(x[0].re, x[0].im)) : 2.0f * slope;
    x[0] = {x[0].re * factor, x[0].im * factor};
  } else {
    const float left = magnitude(x[0].re, x[0].im), right = magnitude(x[1].re, x[1].im);
    if (!c.magnitude) slope *= 2.0f * (left + (right - left) * fraction);
    const float to_left = slope * (1.0f - fraction) * inverse_or_zero(left);
    const float to_right = slope * fraction * inverse_or_zero(right);
    x[0] = {x[0].re * to_left, x[0].im * to_left};
    x[1] = {x[1].re * to_right, x[1].im * to_right};
  }
}

// Gradient of a band before the logarithm.
MUSICLM_FAST_BLOCK inline float band_gradient(const ClipView& view, int band, int64_t frame,
                                              const float* grad, const float* power, int step) {
  const Call& c = view.c;
  if (band >= c.out_bands || frequency_masked(c, view.clip, band)) return 0.0f;
  float g = grad[(view.clip * c.out_bands + band) * c.out_frames + frame] * c.scale;
  if (c.logarithm) g /= view.band_value(band, power, step) + c.log_offset;
  return g;
}

// Adds `count` frames' tap gradients, in their order, to a segment starting at `begin`:
// rows[w * stride + tap], of the frame that first(w) gives the position of, where live(w).
template <class Team, class Live, class First>
MUSICLM_FAST_BLOCK void add_rows(const Team& team, const Call& c, float* segment, int64_t begin,
                                 int length, int count, const float* rows, int stride, Live live,
                                 First first) {
  const int64_t taps = c.framing.taps;
  for (int i = team.thread; i < length; i += team.threads) {
    const int64_t position = begin + i;
    int low = 0, high = count;
    if (c.rates == nullptr) {  // first(w) = first(0) + w * hop
      const int64_t back = position - first(0);
      if (back < 0) continue;
      const int64_t before = back - taps;
      low = before < 0 ? 0 : static_cast<int>(before / c.framing.hop + 1);
      const int64_t last = back / c.framing.hop + 1;
      high = last < count ? static_cast<int>(last) : count;
    }
    float sum = segment[i];
    for (int w = low; w < high; ++w) {
      const int64_t tap = position - first(w);
      if (tap >= 0 && tap < taps && live(w)) sum += rows[w * stride + tap];
    }
    segment[i] = sum;
  }
}

// Moves a finished segment to the clip's gradient, or to its margins.
template <class Team>
MUSICLM_FAST_BLOCK void write_segment(const ClipView& view, const Team& team, const float* segment,
                                      int64_t begin, int64_t end, float* grad_wav,
                                      float* margins) {
  const Call& c = view.c;
  const int64_t margin = c.framing.margin();
  grad_wav += view.clip * c.samples;
  margins += view.clip * 2 * margin;
  for (int64_t i = begin + team.thread; i < end; i += team.threads) {
    const float value = segment[i - begin];
    if (i >= 0 && i < view.samples) {
      grad_wav[i] = value;
    } else {
      margins[i < 0 ? i + margin : i - view.samples + margin] = value;
    }
  }
}

// Gradients of the positions outside of a clip belong to the samples that they show. Samples beyond
// the clip's length get zero. One block per clip.
template <class Team>
MUSICLM_FAST_BLOCK void fold_margins(const Call& c, const Team& team, int64_t clip,
                                     const float* margins, float* grad_wav) {
  const int64_t n = c.length(clip), margin = c.framing.margin();
  grad_wav += clip * c.samples;
  margins += clip * 2 * margin;
  for (int64_t i = n + team.thread; i < c.samples; i += team.threads) grad_wav[i] = 0.0f;
  if (n == 0) return;
  // Before and after the clip: within one side reflection and rotation show each sample once.
  const bool alone = c.framing.mode == PadMode::replicate;
  for (int side = 0; side < 2; ++side) {
    team.sync();
    if (alone && team.thread != 0) continue;
    for (int64_t i = alone ? 0 : team.thread; i < margin; i += alone ? 1 : team.threads) {
      const int64_t source = c.framing.source(side == 0 ? i - margin : n + i, n);
      if (source >= 0) grad_wav[source] += margins[side * margin + i];
    }
  }
}

}  // namespace musiclm_fast::spectrogram
