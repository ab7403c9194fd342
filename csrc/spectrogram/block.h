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

// The same of 32 bands, a bit each.
MUSICLM_FAST_BLOCK inline unsigned frequency_masks(const Call& c, int64_t clip, int64_t band) {
  const int64_t* spans = c.freq_spans + clip * c.freq_step;
  const auto place = [&](int64_t at) { return at < band ? 0 : at > band + 32 ? 32 : at - band; };
  uint64_t bits = 0;
  for (int64_t s = 0; s < c.freq_count; ++s) {
    const int64_t first = place(spans[2 * s]), last = place(spans[2 * s + 1]);
    if (first < last) bits |= (uint64_t{1} << last) - (uint64_t{1} << first);
  }
  return static_cast<unsigned>(bits);
}

MUSICLM_FAST_BLOCK inline bool time_masked(const Call& c, int64_t clip, int64_t frame) {
  return in_spans(c.time_spans + clip * c.time_step, c.time_count, frame);
}

MUSICLM_FAST_BLOCK inline float finished(const Call& c, float value) {
  if (c.logarithm) value = logf(value + c.log_offset);
  return (value - c.mean) * c.scale;
}

// A load of what no kernel writes. Of a pointer that a loop moves along nvcc may forget that it is
// to global memory.
MUSICLM_FAST_BLOCK inline float global_load(const float* at) {
#ifdef __CUDACC__
  return __ldg(at);
#else
  return *at;
#endif
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

  // Whether positions first .. first + count - 1 are neighbouring samples.
  MUSICLM_FAST_BLOCK bool inside(int64_t first, int count) const {
    return first >= 0 && first + count <= samples && c.sample_stride == 1;
  }

  // A band's value before the logarithm; power[bin * step].
  MUSICLM_FAST_BLOCK float band_value(int band, const float* power, int step) const {
    if (c.mel == nullptr) return power[band * step];
    const int first = c.mel_ranges[2 * band], count = c.mel_ranges[2 * band + 1] - first;
    const float* weight = c.mel + first * c.mel_bin_stride + band * c.mel_band_stride;
    float sum = 0.0f;
    power += first * step;
    for (int i = 0; i < count; ++i) {
      sum += *power * global_load(weight);
      power += step;
      weight += c.mel_bin_stride;
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

// Writes a tile of finished bands from power (bins, tile_frames + 1): a warp per band, a lane per
// frame.
template <class Team>
MUSICLM_FAST_BLOCK void write_tile(const ClipView& view, const Team& team, int64_t begin,
                                   int tile_frames, const float* power, float* out) {
  const Call& c = view.c;
  const int bands = static_cast<int>(c.out_bands);
  for (int f = team.lane; f < tile_frames; f += Team::lanes) {
    const int64_t frame = begin + f;
    if (frame >= c.out_frames) continue;
    const bool live = view.live(frame);
    const float other = frame < view.frames ? c.mask_value : 0.0f;
    float* to = out + view.clip * c.out_bands * c.out_frames + frame;
    for (int word = 0; word < bands; word += 32) {
      const unsigned masked = frequency_masks(c, view.clip, word);
      for (int i = team.warp; i < 32 && word + i < bands; i += team.warps) {
        const int band = word + i;
        float value = other;
        if (live && !(masked >> i & 1u)) {
          value = finished(c, view.band_value(band, power + f, tile_frames + 1));
        }
        to[band * c.out_frames] = value;
      }
    }
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

// A bin of the frame whose gradient is wanted and, of a stretch, of the frame on the other side.
struct Bin {
  Complex<float> own, other;
};

// Power (or magnitude) of a bin, and its derivative by the own spectrum, over that spectrum.
template <int kSides>
MUSICLM_FAST_BLOCK void bin_power(const Call& c, const Bin& bin, bool left, float fraction,
                                  float& power, float& factor) {
  if constexpr (kSides == 1) {
    power = power_of<1>(c, &bin.own, 0.0f);
    factor = c.magnitude ? inverse_or_zero(power) : 2.0f;
  } else {
    const float own = magnitude(bin.own.re, bin.own.im);
    const float other = magnitude(bin.other.re, bin.other.im);
    const float from = left ? own : other, to = left ? other : own;
    const float value = from + (to - from) * fraction;
    power = c.magnitude ? value : value * value;
    factor = (left ? 1.0f - fraction : fraction) * inverse_or_zero(own);
    if (!c.magnitude) factor *= 2.0f * value;
  }
}

// A distance within a block; one that does not fit is as good as the largest.
MUSICLM_FAST_BLOCK inline int near(int64_t distance) {
  constexpr int64_t kFar = 1 << 30;
  return static_cast<int>(distance < -kFar ? -kFar : distance > kFar ? kFar : distance);
}

// Adds `count` frames' tap gradients, in their order, to a segment: rows[w * stride + tap] to
// position firsts[w] + tap of it. firsts ascend, by the hop if no stretch gives a frame two sides.
template <int kSides, class Team>
MUSICLM_FAST_BLOCK void add_rows(const Team& team, const Call& c, float* segment, int length,
                                 int count, const float* rows, int stride, const int* firsts) {
  const int taps = c.transform.taps, hop = near(c.framing.hop);
  const int low = firsts[0] < 0 ? 0 : firsts[0], high = firsts[count - 1] + taps;
  for (int i = low + team.thread; i < high && i < length; i += team.threads) {
    float sum = segment[i];
    if constexpr (kSides == 1) {
      const int after = i - taps - firsts[0];  // the last frame that ends before position i
      int w = after < 0 ? 0 : static_cast<int>(static_cast<unsigned>(after) / hop + 1);
      int tap = i - firsts[0] - w * hop;
      const float* at = rows + w * stride + tap;
      for (; w < count && tap >= 0; ++w) {
        sum += *at;
        tap -= hop;
        at += stride - hop;
      }
    } else {
      int w = 0;  // the first frame that reaches position i
      for (int bound = count; w < bound;) {
        const int middle = (w + bound) / 2;
        if (firsts[middle] + taps > i) {
          bound = middle;
        } else {
          w = middle + 1;
        }
      }
      for (; w < count && firsts[w] <= i; ++w) sum += rows[w * stride + i - firsts[w]];
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
