// What one CUDA block does, in terms of a team of threads. Torch-free.
//
// Between two barriers each thread works on entries of its own, so a team of one thread whose
// barriers do nothing computes the same: that is how the tests run this file on the CPU.
//
//   forward_fft       a tile of frames; a warp per frame, its transform in shared memory, power
//                     collected in a (bins, frames) tile, then written with frames contiguous
//                     (fixed_fft.h has the same for n_fft 256, 512 and 1,024, points in registers)
//   forward_folded    a tile of frames; a thread per frame, its terms in registers
//   backward_fft      a segment of positions: spectra of the frames that touch it are computed
//   backward_folded   again, and their gradients are added in a fixed order: no atomics
#pragma once

#include "spectrogram/spectrogram.h"

#ifdef __CUDACC__
#define MUSICLM_FAST_BLOCK __device__
#else
#define MUSICLM_FAST_BLOCK
#include <cmath>
#endif

namespace musiclm_fast::spectrogram {

// Shared memory with a gap after every 32 words: entries 4, 8, 32, ... apart lie in other banks.
struct Banked {
  float* at;
  MUSICLM_FAST_HD float& operator[](int i) const { return at[i + (i >> 5)]; }
  MUSICLM_FAST_HD static int words(int n) { return n + (n >> 5) + 1; }
};

// Words of shared memory of each kernel, and its parts.
struct FftLayout {
  int tile_frames, warps;
  int bins, words, warp_words;
  int64_t total;

  static FftLayout make(const Call& c, int tile_frames, int warps) {
    FftLayout l{tile_frames, warps, c.transform.bins, Banked::words(c.transform.length), 0, 0};
    l.warp_words = 2 * l.words;
    l.total = int64_t{l.bins} * (tile_frames + 1) + int64_t{warps} * l.warp_words;
    return l;
  }
};

struct FftBackwardLayout {
  int segment, warps;
  int bins, words, taps, warp_words;
  int64_t total;

  static FftBackwardLayout make(const Call& c, int segment, int warps) {
    const Transform& t = c.transform;
    FftBackwardLayout l{segment, warps, t.bins, Banked::words(t.length), t.taps, 0, 0};
    const int sides = c.rates == nullptr ? 1 : 2;
    l.warp_words = 2 * l.words + 2 * sides * t.bins + 2 * t.bins + c.bands + t.taps;
    l.total = segment + int64_t{warps} * l.warp_words;
    return l;
  }
};

struct FoldedLayout {
  int tile_frames;
  int table, chunk, bins;  // words; 0 where it is read from global memory or not needed
  int64_t total;

  static FoldedLayout make(const Call& c, int tile_frames) {
    const Transform& t = c.transform;
    FoldedLayout l{tile_frames, 2 * t.rows * t.terms, 0, c.mel == nullptr ? 0 : t.bins, 0};
    if (l.table > 8192) l.table = 0;
    const int64_t chunk = (tile_frames - 1) * c.framing.hop + t.taps;
    if (c.rates == nullptr && chunk <= 8192) l.chunk = static_cast<int>(chunk);
    l.total = l.table + l.chunk + int64_t{l.bins} * (tile_frames + 1);
    return l;
  }
};

struct FoldedBackwardLayout {
  int tile_frames, segment, taps;
  int bins;
  int64_t total;

  static FoldedBackwardLayout make(const Call& c, int tile_frames, int segment) {
    FoldedBackwardLayout l{tile_frames, segment, c.transform.taps | 1,
                           c.mel == nullptr ? 0 : c.transform.bins, 0};
    l.total = segment + int64_t{tile_frames} * l.taps + 2 * int64_t{l.bins} * (tile_frames + 1);
    return l;
  }
};

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

// A warp's transform of one frame: emit(bin, re, im) once for every bin. re and im are free for
// the next frame afterwards.
template <class Team, class Emit>
MUSICLM_FAST_BLOCK void warp_spectrum(const ClipView& view, const Team& team, int64_t frame,
                                      Banked re, Banked im, Emit emit) {
  const Transform& t = view.c.transform;
  const float* window = view.c.window;
  const int64_t first = view.c.framing.first(frame);
  const bool silent = frame >= view.frames;  // only a stretch asks for such a frame
  const bool inside = first >= 0 && first + t.taps <= view.samples && view.c.sample_stride == 1;
  const float* taps = view.wav + first;
  const auto tap = [&](int i) {
    if (i >= t.taps || silent) return 0.0f;
    return window[i] * (inside ? taps[i] : view.sample(first + i));
  };
  for (int n = team.lane; n < t.length; n += team.lanes) {
    re[n] = t.packed ? 0.5f * tap(2 * n) : tap(n);
    im[n] = t.packed ? 0.5f * tap(2 * n + 1) : 0.0f;
  }
  team.sync_warp();
  for (int stage = 0; stage < t.stages; ++stage) {
    fft_stage(re, im, t, stage, team.lane, team.lanes);
    team.sync_warp();
  }
  if (t.packed) {
    const float* turns = t.numbers + t.split;
    for (int k = team.lane; k <= t.length / 2; k += team.lanes) {
      const int m = t.length - k, at_k = t.order[k], at_m = t.order[k == 0 ? 0 : m];
      const BinPair<float> pair = split_pair<float>({re[at_k], im[at_k]}, {re[at_m], im[at_m]},
                                                    turns[2 * k], turns[2 * k + 1]);
      emit(k, pair.low.re, pair.low.im);
      if (m != k) emit(m, pair.high.re, pair.high.im);
    }
  } else {
    for (int bin = team.lane; bin < t.bins; bin += team.lanes) {
      emit(bin, re[t.order[bin]], im[t.order[bin]]);
    }
  }
  team.sync_warp();
}

template <class Team>
MUSICLM_FAST_BLOCK void forward_fft(const Call& c, const Team& team, int64_t clip, int64_t begin,
                                    const FftLayout& layout, float* shared, float* out) {
  const ClipView view(c, clip);
  const int step = layout.tile_frames + 1;
  float* power = shared;  // (bins, tile_frames + 1)
  float* own = shared + layout.bins * step + team.warp * layout.warp_words;
  const Banked re{own}, im{own + layout.words};
  for (int f = team.warp; f < layout.tile_frames; f += team.warps) {
    if (!view.live(begin + f)) continue;
    float* column = power + f;
    if (c.rates == nullptr) {
      warp_spectrum(view, team, begin + f, re, im, [&](int bin, float a, float b) {
        column[bin * step] = c.magnitude ? magnitude(a, b) : a * a + b * b;
      });
      continue;
    }
    const Place place = stretched(begin + f, view.rate);
    warp_spectrum(view, team, place.left, re, im, [&](int bin, float a, float b) {
      column[bin * step] = magnitude(a, b);
    });
    warp_spectrum(view, team, place.left + 1, re, im, [&](int bin, float a, float b) {
      const float left = column[bin * step];
      const float value = left + (magnitude(a, b) - left) * place.fraction;
      column[bin * step] = c.magnitude ? value : value * value;
    });
  }
  team.sync();
  write_tile(view, team, begin, layout.tile_frames, power, out);
}

// A thread's frame as even and odd parts about the middle tap; at(i) is tap i before the window.
template <int kTerms, class At>
MUSICLM_FAST_BLOCK void fold(const Call& c, At at, float* even, float* odd) {
  const int taps = c.transform.taps, middle = taps / 2;
  MUSICLM_FAST_UNROLL
  for (int m = 0; m < kTerms; ++m) {
    const int hi = middle + m, lo = middle - m;
    const float after = hi < taps ? c.window[hi] * at(hi) : 0.0f;
    const float before = m > 0 && lo >= 0 ? c.window[lo] * at(lo) : 0.0f;
    even[m] = after + before;
    odd[m] = after - before;
  }
}

// Every row of the table in turn: each(bin, mate or -1, pair of spectra for both sides).
template <int kTerms, int kSides, class Each>
MUSICLM_FAST_BLOCK void folded_rows(const Transform& t, const float* table,
                                    const float (*even)[kTerms], const float (*odd)[kTerms],
                                    Each each) {
  const int half = t.n_fft % 2 == 0 ? t.n_fft / 2 : -1;
  for (int row = 0; row < t.rows; ++row) {
    BinPair<float> pair[kSides];
    MUSICLM_FAST_UNROLL
    for (int side = 0; side < kSides; ++side) {
      FoldedSums<float> sums;
      folded_sums<1, kTerms>(even[side], odd[side], kTerms, table + row * 2 * kTerms, &sums);
      pair[side] = folded_pair(sums);
    }
    each(row, half >= 0 && half != 2 * row ? half - row : -1, pair);
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

// Terms of output frame `frame`, both sides of its place if stretched.
template <int kTerms, int kSides>
MUSICLM_FAST_BLOCK void load_terms(const ClipView& view, const Place& place,
                                   float (*even)[kTerms], float (*odd)[kTerms]) {
  MUSICLM_FAST_UNROLL
  for (int side = 0; side < kSides; ++side) {
    const int64_t frame = place.left + side, first = view.c.framing.first(frame);
    const bool silent = frame >= view.frames;
    fold<kTerms>(
        view.c, [&](int i) { return silent ? 0.0f : view.sample(first + i); }, even[side],
        odd[side]);
  }
}

template <int kTerms, int kSides, class Team>
MUSICLM_FAST_BLOCK void forward_folded(const Call& c, const Team& team, int64_t clip, int64_t begin,
                                       const FoldedLayout& layout, float* shared, float* out) {
  const ClipView view(c, clip);
  const Transform& t = c.transform;
  const float* table = t.numbers + t.table;
  const float* chunk = nullptr;
  const int64_t origin = c.framing.first(begin);
  if (layout.table > 0) {
    for (int i = team.thread; i < layout.table; i += team.threads) shared[i] = table[i];
    table = shared;
  }
  if (layout.chunk > 0) {
    float* samples = shared + layout.table;
    for (int i = team.thread; i < layout.chunk; i += team.threads) {
      samples[i] = view.sample(origin + i);
    }
    chunk = samples;
  }
  float* power = shared + layout.table + layout.chunk;  // (bins, tile_frames + 1) for mel
  const int step = layout.tile_frames + 1;
  team.sync();
  for (int f = team.thread; f < layout.tile_frames; f += team.threads) {
    const int64_t frame = begin + f;
    if (frame >= c.out_frames) continue;
    const bool live = view.live(frame);
    if (!live) {
      if (c.mel != nullptr) continue;
      const float value = frame < view.frames ? c.mask_value : 0.0f;
      for (int64_t band = 0; band < c.out_bands; ++band) {
        out[(clip * c.out_bands + band) * c.out_frames + frame] = value;
      }
      continue;
    }
    float even[kSides][kTerms], odd[kSides][kTerms];
    Place place{frame, 0.0f};
    if constexpr (kSides == 2) place = stretched(frame, view.rate);
    if (kSides == 1 && chunk != nullptr) {
      const float* taps = chunk + static_cast<int64_t>(f) * c.framing.hop;
      fold<kTerms>(c, [&](int i) { return taps[i]; }, even[0], odd[0]);
    } else {
      load_terms<kTerms, kSides>(view, place, even, odd);
    }
    const auto put = [&](int bin, const Complex<float>* x) {
      const float value = power_of<kSides>(c, x, place.fraction);
      if (c.mel != nullptr) {
        power[bin * step + f] = value;
      } else if (bin < c.out_bands) {
        out[(clip * c.out_bands + bin) * c.out_frames + frame] =
            frequency_masked(c, clip, bin) ? c.mask_value : finished(c, value);
      }
    };
    folded_rows<kTerms, kSides>(t, table, even, odd,
                                [&](int bin, int mate, const BinPair<float>* pair) {
                                  Complex<float> x[kSides];
                                  for (int s = 0; s < kSides; ++s) x[s] = pair[s].low;
                                  put(bin, x);
                                  if (mate < 0) return;
                                  for (int s = 0; s < kSides; ++s) x[s] = pair[s].high;
                                  put(mate, x);
                                });
  }
  if (c.mel == nullptr) return;
  team.sync();
  write_tile(view, team, begin, layout.tile_frames, power, out);
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

template <int kSides, class Team>
MUSICLM_FAST_BLOCK void backward_fft(const Call& c, const Team& team, int64_t clip, int64_t begin,
                                     const FftBackwardLayout& layout, float* shared,
                                     const float* grad, float* grad_wav, float* margins) {
  const ClipView view(c, clip);
  const Transform& t = c.transform;
  const int64_t limit = view.samples + c.framing.margin();
  const int64_t end = begin + layout.segment < limit ? begin + layout.segment : limit;
  if (begin >= end) return;  // the whole block
  float* segment = shared;
  float* warp_memory = shared + layout.segment;
  float* own = warp_memory + team.warp * layout.warp_words;
  const Banked re{own}, im{own + layout.words};
  own += 2 * layout.words;
  float* x_re[kSides];
  float* x_im[kSides];
  for (int side = 0; side < kSides; ++side) {
    x_re[side] = own;
    x_im[side] = own + t.bins;
    own += 2 * t.bins;
  }
  float* power = own;
  float* slope = own + t.bins;
  float* bands = slope + t.bins;
  float* row = bands + c.bands;
  for (int i = team.thread; i < layout.segment; i += team.threads) segment[i] = 0.0f;

  int64_t low, high;
  view.touching(begin, end, low, high);
  for (int64_t base = low; base <= high; base += team.warps) {
    const int64_t frame = base + team.warp;
    const bool live = frame <= high && view.live(frame);
    Place place{frame, 0.0f};
    if constexpr (kSides == 2) place = stretched(frame, view.rate);
    if (live) {
      for (int side = 0; side < kSides; ++side) {
        float *a = x_re[side], *b = x_im[side];
        warp_spectrum(view, team, place.left + side, re, im, [&](int bin, float p, float q) {
          a[bin] = p;
          b[bin] = q;
        });
      }
      const auto load = [&](int bin, Complex<float>* x) {
        for (int side = 0; side < kSides; ++side) x[side] = {x_re[side][bin], x_im[side][bin]};
      };
      for (int bin = team.lane; bin < t.bins; bin += team.lanes) {
        Complex<float> x[kSides];
        load(bin, x);
        power[bin] = power_of<kSides>(c, x, place.fraction);
      }
      team.sync_warp();
      for (int band = team.lane; band < c.bands; band += team.lanes) {
        bands[band] = band_gradient(view, band, frame, grad, power, 1);
      }
      team.sync_warp();
      for (int bin = team.lane; bin < t.bins; bin += team.lanes) {
        float sum = 0.0f;
        if (c.mel == nullptr) {
          sum = bands[bin];
        } else {
          for (int band = 0; band < c.bands; ++band) {
            if (bin < c.mel_ranges[2 * band] || bin >= c.mel_ranges[2 * band + 1]) continue;
            sum += bands[band] * c.mel[bin * c.mel_bin_stride + band * c.mel_band_stride];
          }
        }
        Complex<float> x[kSides];
        load(bin, x);
        spectra_gradient<kSides>(c, sum, place.fraction, x);
        for (int side = 0; side < kSides; ++side) {
          x_re[side][bin] = x[side].re;
          x_im[side][bin] = x[side].im;
        }
      }
      team.sync_warp();
    }
    for (int side = 0; side < kSides; ++side) {
      if (live) {
        const float *a = x_re[side], *b = x_im[side];
        if (t.packed) {
          const float* turns = t.numbers + t.split;
          for (int k = team.lane; k <= t.length / 2; k += team.lanes) {
            const int m = t.length - k;
            const Complex<float> mate{m == k ? 0.0f : a[m], m == k ? 0.0f : b[m]};
            const BinPair<float> z =
                split_pair_adjoint<float>({a[k], b[k]}, mate, turns[2 * k], turns[2 * k + 1]);
            const bool same = k == 0 || m == k;  // both entries are the same one
            re[k] = same ? z.low.re + z.high.re : z.low.re;
            im[k] = same ? z.low.im + z.high.im : z.low.im;
            if (!same) {
              re[m] = z.high.re;
              im[m] = z.high.im;
            }
          }
        } else {
          for (int n = team.lane; n < t.length; n += team.lanes) {
            re[n] = n < t.bins ? a[n] : 0.0f;
            im[n] = n < t.bins ? b[n] : 0.0f;
          }
        }
        team.sync_warp();
        for (int stage = 0; stage < t.stages; ++stage) {
          fft_stage(im, re, t, stage, team.lane, team.lanes);  // exchanged: the inverse, unscaled
          team.sync_warp();
        }
        for (int tap = team.lane; tap < t.taps; tap += team.lanes) {
          const float value = t.packed ? 0.5f * (tap % 2 == 0 ? re : im)[t.order[tap / 2]]
                                       : re[t.order[tap]];
          row[tap] = c.window[tap] * value;
        }
      }
      team.sync();
      const auto place_of = [&](int w) {
        return kSides == 1 ? base + w : stretched(base + w, view.rate).left + side;
      };
      add_rows(
          team, c, segment, begin, static_cast<int>(end - begin), team.warps,
          warp_memory + (row - (warp_memory + team.warp * layout.warp_words)), layout.warp_words,
          [&](int w) {
            return base + w <= high && view.live(base + w) && place_of(w) < view.frames;
          },
          [&](int w) { return c.framing.first(place_of(w)); });
      team.sync();
    }
  }
  team.sync();
  write_segment(view, team, segment, begin, end, grad_wav, margins);
}

template <int kTerms, int kSides, class Team>
MUSICLM_FAST_BLOCK void backward_folded(const Call& c, const Team& team, int64_t clip,
                                        int64_t begin, const FoldedBackwardLayout& layout,
                                        float* shared, const float* grad, float* grad_wav,
                                        float* margins) {
  const ClipView view(c, clip);
  const Transform& t = c.transform;
  const int64_t limit = view.samples + c.framing.margin();
  const int64_t end = begin + layout.segment < limit ? begin + layout.segment : limit;
  if (begin >= end) return;
  const float* table = t.numbers + t.table;
  const int step = layout.tile_frames + 1;
  float* segment = shared;
  float* rows = shared + layout.segment;
  float* power = rows + int64_t{layout.tile_frames} * layout.taps;
  float* slopes = power + int64_t{layout.bins} * step;
  for (int i = team.thread; i < layout.segment; i += team.threads) segment[i] = 0.0f;

  int64_t low, high;
  view.touching(begin, end, low, high);
  for (int64_t base = low; base <= high; base += layout.tile_frames) {
    for (int side = 0; side < kSides; ++side) {
      for (int f = team.thread; f < layout.tile_frames; f += team.threads) {
        const int64_t frame = base + f;
        if (frame > high || !view.live(frame)) continue;
        Place place{frame, 0.0f};
        if constexpr (kSides == 2) place = stretched(frame, view.rate);
        float even[kSides][kTerms], odd[kSides][kTerms];
        load_terms<kTerms, kSides>(view, place, even, odd);
        if (c.mel != nullptr) {
          float *own = power + f, *slope = slopes + f;  // this thread's columns
          for (int bin = 0; bin < t.bins; ++bin) slope[bin * step] = 0.0f;
          folded_rows<kTerms, kSides>(
              t, table, even, odd, [&](int bin, int mate, const BinPair<float>* pair) {
                Complex<float> x[kSides];
                for (int s = 0; s < kSides; ++s) x[s] = pair[s].low;
                own[bin * step] = power_of<kSides>(c, x, place.fraction);
                for (int s = 0; s < kSides; ++s) x[s] = pair[s].high;
                if (mate >= 0) own[mate * step] = power_of<kSides>(c, x, place.fraction);
              });
          for (int band = 0; band < c.bands; ++band) {
            const float g = band_gradient(view, band, frame, grad, own, step);
            for (int bin = c.mel_ranges[2 * band]; bin < c.mel_ranges[2 * band + 1]; ++bin) {
              slope[bin * step] += g * c.mel[bin * c.mel_bin_stride + band * c.mel_band_stride];
            }
          }
        }
        float even_bar[kTerms], odd_bar[kTerms];
        MUSICLM_FAST_UNROLL
        for (int m = 0; m < kTerms; ++m) even_bar[m] = odd_bar[m] = 0.0f;
        const auto turn = [&](int bin, Complex<float>* x) {
          float g;
          if (c.mel != nullptr) {
            g = slopes[bin * step + f];
          } else {
            // power at [bin] for the logarithm's derivative: one value, read with step 0
            const float value = power_of<kSides>(c, x, place.fraction);
            g = band_gradient(view, bin, frame, grad, &value, 0);
          }
          spectra_gradient<kSides>(c, g, place.fraction, x);
        };
        folded_rows<kTerms, kSides>(
            t, table, even, odd, [&](int bin, int mate, const BinPair<float>* pair) {
              Complex<float> x[kSides], y[kSides];
              for (int s = 0; s < kSides; ++s) {
                x[s] = pair[s].low;
                y[s] = pair[s].high;
              }
              turn(bin, x);
              if (mate >= 0) turn(mate, y);
              const Complex<float> none{0.0f, 0.0f};
              // Not [side]: registers have no addresses.
              const Complex<float> low = side == 0 ? x[0] : x[kSides - 1];
              const Complex<float> high = side == 0 ? y[0] : y[kSides - 1];
              const FoldedSums<float> sums = folded_pair_adjoint(low, mate >= 0 ? high : none);
              folded_sums_adjoint<1, kTerms>(&sums, kTerms, table + bin * 2 * kTerms, even_bar,
                                             odd_bar);
            });
        const int middle = t.taps / 2;
        float* row = rows + int64_t{f} * layout.taps;
        MUSICLM_FAST_UNROLL
        for (int m = 0; m < kTerms; ++m) {
          const int hi = middle + m, lo = middle - m;
          if (hi < t.taps) row[hi] = c.window[hi] * (even_bar[m] + odd_bar[m]);
          if (m > 0 && lo >= 0) row[lo] = c.window[lo] * (even_bar[m] - odd_bar[m]);
        }
      }
      team.sync();
      const auto place_of = [&](int w) {
        return kSides == 1 ? base + w : stretched(base + w, view.rate).left + side;
      };
      add_rows(
          team, c, segment, begin, static_cast<int>(end - begin), layout.tile_frames, rows,
          layout.taps,
          [&](int w) {
            return base + w <= high && view.live(base + w) && place_of(w) < view.frames;
          },
          [&](int w) { return c.framing.first(place_of(w)); });
      team.sync();
    }
  }
  team.sync();
  write_segment(view, team, segment, begin, end, grad_wav, margins);
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
