// A block of the FFT: a warp per frame, its transform in shared memory. Forward, power is collected
// in a (bins, frames) tile, then written with frames contiguous. Torch-free; see block.h for what a
// team is.
#pragma once

#include "spectrogram/block.h"

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

}  // namespace musiclm_fast::spectrogram
