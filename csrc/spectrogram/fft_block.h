// A block of the FFT: a warp per frame, its transform in shared memory. Forward, power is collected
// in a (bins, frames) tile, then written with frames contiguous. Torch-free; see block.h for what a
// team is.
#pragma once

#include "spectrogram/fixed_fft.h"

namespace musiclm_fast::spectrogram {

// Shared memory with a gap after every 32 words: entries 4, 8, 32, ... apart lie in other banks.
struct Banked {
  float* at;
  MUSICLM_FAST_HD float& operator[](int i) const { return at[i + (i >> 5)]; }
  MUSICLM_FAST_HD static int words(int n) { return n + (n >> 5) + 1; }
};

// A warp's complex entries. `next` is where a pass writes that cannot work in place; nowhere if the
// transform has none.
struct WarpPoints {
  Banked re, im, next_re, next_im;

  // Whether an odd radix above 5 is among a transform's. Its pass reads all entries for each one.
  static bool needs_next(const Transform& t) {
    bool found = false;
    for (int i = 0; i < t.stages; ++i) found |= t.stage[i].radix > 5 && t.stage[i].radix != 8;
    return found;
  }
  static int words(const Transform& t) {
    return (needs_next(t) ? 4 : 2) * Banked::words(t.length);
  }
  MUSICLM_FAST_BLOCK WarpPoints(float* at, const Transform& t) {
    const int n = Banked::words(t.length);
    re = {at};
    im = {at + n};
    next_re = {at + 2 * n};
    next_im = {at + 3 * n};
  }
};

// Words of shared memory of each kernel, and its parts.
struct FftLayout {
  int tile_frames, warps;
  int bins, warp_words;
  int64_t total;

  static FftLayout make(const Call& c, int tile_frames, int warps) {
    FftLayout l{tile_frames, warps, c.transform.bins, WarpPoints::words(c.transform), 0};
    l.total = int64_t{l.bins} * (tile_frames + 1) + int64_t{warps} * l.warp_words;
    return l;
  }
};

struct FftBackwardLayout {
  int segment, warps;
  int grads, masked, firsts, warp;             // where they begin; the segment is at 0
  int spectra, power, bands, row, warp_words;  // of a warp; its points are at 0
  int64_t total;

  static FftBackwardLayout make(const Call& c, int segment, int warps) {
    const Transform& t = c.transform;
    FftBackwardLayout l{};
    l.segment = segment;
    l.warps = warps;
    l.grads = segment;
    l.masked = l.grads + static_cast<int>(c.out_bands) * (warps + 1);
    l.firsts = l.masked + static_cast<int>(c.out_bands);
    l.warp = (l.firsts + warps + 1) / 2 * 2;
    const int sides = c.rates == nullptr ? 1 : 2;
    l.spectra = has_fixed_fft(t) ? fixed_words(t.length) : WarpPoints::words(t);
    l.power = l.spectra + 2 * sides * t.bins;
    l.bands = l.power + t.bins;
    l.row = l.bands + c.bands;
    l.warp_words = (l.row + t.taps + 1) / 2 * 2;
    l.total = l.warp + int64_t{warps} * l.warp_words;
    return l;
  }
};

// A pass of an odd radix above 5, from re and im to the next ones. An output and its mirror image
// are a task: sum and difference of two entries serve both.
template <class Team>
MUSICLM_FAST_BLOCK void warp_odd_stage(const WarpPoints& p, const Team& team, const Transform& t,
                                       const Stage& stage) {
  const int radix = stage.radix, span = stage.span, butterflies = t.length / radix;
  const float* roots = t.numbers + stage.roots;
  for (int task = team.lane; task < butterflies * (radix / 2 + 1); task += Team::lanes) {
    const int k = task / butterflies, i = task - k * butterflies;
    const int block = i / span, j = i - block * span, first = block * span * radix + j;
    float even_re = p.re[first], even_im = p.im[first], odd_re = 0.0f, odd_im = 0.0f;
    for (int n = 1, root = k; n <= radix / 2; ++n) {
      const int low = first + n * span, high = first + (radix - n) * span;
      const float c = roots[2 * root], s = -roots[2 * root + 1];
      even_re += (p.re[low] + p.re[high]) * c;
      even_im += (p.im[low] + p.im[high]) * c;
      odd_re += (p.re[low] - p.re[high]) * s;
      odd_im += (p.im[low] - p.im[high]) * s;
      root = root + k >= radix ? root + k - radix : root + k;
    }
    const auto put = [&](int q, float re, float im) {
      const float* w = t.numbers + stage.twiddles + 2 * ((q - 1) * span + j);
      const float c = q == 0 ? 1.0f : w[0], s = q == 0 ? 0.0f : w[1];
      p.next_re[first + q * span] = re * c - im * s;
      p.next_im[first + q * span] = re * s + im * c;
    };
    put(k, even_re + odd_im, even_im - odd_re);
    if (k > 0) put(radix - k, even_re - odd_im, even_im + odd_re);
  }
}

// All passes. The result is in p.re and p.im, which may be others than before.
template <class Team>
MUSICLM_FAST_BLOCK void warp_transform(WarpPoints& p, const Team& team, const Transform& t) {
  for (int i = 0; i < t.stages; ++i) {
    const Stage& stage = t.stage[i];
    if (!small_stage(p.re, p.im, t, stage, team.lane, Team::lanes)) {
      warp_odd_stage(p, team, t, stage);
      const Banked re = p.re, im = p.im;
      p.re = p.next_re;
      p.im = p.next_im;
      p.next_re = re;
      p.next_im = im;
    }
    team.sync_warp();
  }
}

// A warp's transform of one frame: emit(bin, re, im) once for every bin. The points are free for
// the next frame afterwards.
template <class Team, class Emit>
MUSICLM_FAST_BLOCK void warp_spectrum(const ClipView& view, const Team& team, int64_t frame,
                                      WarpPoints p, Emit emit) {
  const Transform& t = view.c.transform;
  const float* window = view.c.window;
  const int64_t first = view.c.framing.first(frame);
  const bool silent = frame >= view.frames;  // only a stretch asks for such a frame
  const bool inside = view.inside(first, t.taps);
  const float* taps = view.wav + first;
  const auto tap = [&](int i) {
    if (i >= t.taps || silent) return 0.0f;
    return window[i] * (inside ? taps[i] : view.sample(first + i));
  };
  for (int n = team.lane; n < t.length; n += Team::lanes) {
    p.re[n] = t.packed ? 0.5f * tap(2 * n) : tap(n);
    p.im[n] = t.packed ? 0.5f * tap(2 * n + 1) : 0.0f;
  }
  team.sync_warp();
  warp_transform(p, team, t);
  if (t.packed) {
    const float* turns = t.numbers + t.split;
    for (int k = team.lane; k <= t.length / 2; k += Team::lanes) {
      const int m = t.length - k, at_k = t.order[k], at_m = t.order[k == 0 ? 0 : m];
      const BinPair<float> pair = split_pair<float>({p.re[at_k], p.im[at_k]},
                                                    {p.re[at_m], p.im[at_m]},
                                                    turns[2 * k], turns[2 * k + 1]);
      emit(k, pair.low.re, pair.low.im);
      if (m != k) emit(m, pair.high.re, pair.high.im);
    }
  } else {
    for (int bin = team.lane; bin < t.bins; bin += Team::lanes) {
      emit(bin, p.re[t.order[bin]], p.im[t.order[bin]]);
    }
  }
  team.sync_warp();
}

// A warp's inverse transform, unscaled, of points in their order: emit(n, re, im) once for every n.
template <class Team, class Emit>
MUSICLM_FAST_BLOCK void warp_inverse(const Team& team, const Transform& t, WarpPoints p,
                                     Emit emit) {
  WarpPoints exchanged = p;  // real and imaginary parts, here and below: the inverse
  exchanged.re = p.im;
  exchanged.im = p.re;
  exchanged.next_re = p.next_im;
  exchanged.next_im = p.next_re;
  warp_transform(exchanged, team, t);
  for (int n = team.lane; n < t.length; n += Team::lanes) {
    emit(n, exchanged.im[t.order[n]], exchanged.re[t.order[n]]);
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
  const WarpPoints points(own, c.transform);
  for (int f = team.warp; f < layout.tile_frames; f += team.warps) {
    if (!view.live(begin + f)) continue;
    float* column = power + f;
    if (c.rates == nullptr) {
      warp_spectrum(view, team, begin + f, points, [&](int bin, float a, float b) {
        column[bin * step] = c.magnitude ? magnitude(a, b) : a * a + b * b;
      });
      continue;
    }
    const Place place = stretched(begin + f, view.rate);
    warp_spectrum(view, team, place.left, points, [&](int bin, float a, float b) {
      column[bin * step] = magnitude(a, b);
    });
    warp_spectrum(view, team, place.left + 1, points, [&](int bin, float a, float b) {
      const float left = column[bin * step];
      const float value = left + (magnitude(a, b) - left) * place.fraction;
      column[bin * step] = c.magnitude ? value : value * value;
    });
  }
  team.sync();
  write_tile(view, team, begin, layout.tile_frames, power, out);
}

// What backward_fft asks of a transform: of any length, and of one known when it is compiled.
template <int kLength, class Team>
struct WarpFft {
  const ClipView& view;
  const Team& team;
  LaneTables<kLength, Team::lanes> tables;
  Point* points;

  MUSICLM_FAST_BLOCK WarpFft(const ClipView& v, const Team& member, float* at)
      : view(v), team(member), tables(v.c, member.lane), points(reinterpret_cast<Point*>(at)) {}
  template <class Emit>
  MUSICLM_FAST_BLOCK void spectrum(int64_t frame, Emit emit) {
    fixed_spectrum<kLength>(view, team, tables, frame, points, emit);
  }
  MUSICLM_FAST_BLOCK void put(int n, float re, float im) { points[n] = {re, im}; }
  template <class Emit>
  MUSICLM_FAST_BLOCK void inverse(Emit emit) {
    fixed_inverse<kLength>(team, tables, points, emit);
  }
};

template <class Team>
struct WarpFft<0, Team> {
  const ClipView& view;
  const Team& team;
  WarpPoints points;

  MUSICLM_FAST_BLOCK WarpFft(const ClipView& v, const Team& member, float* at)
      : view(v), team(member), points(at, v.c.transform) {}
  template <class Emit>
  MUSICLM_FAST_BLOCK void spectrum(int64_t frame, Emit emit) {
    warp_spectrum(view, team, frame, points, emit);
  }
  MUSICLM_FAST_BLOCK void put(int n, float re, float im) {
    points.re[n] = re;
    points.im[n] = im;
  }
  template <class Emit>
  MUSICLM_FAST_BLOCK void inverse(Emit emit) {
    warp_inverse(team, view.c.transform, points, emit);
  }
};

// kLength: complex entries of the transform, 0 where it is not a fixed one.
template <int kLength, int kSides, class Team>
MUSICLM_FAST_BLOCK void backward_fft(const Call& c, const Team& team, int64_t clip, int64_t begin,
                                     const FftBackwardLayout& layout, float* shared,
                                     const float* grad, float* grad_wav, float* margins) {
  const ClipView view(c, clip);
  const Transform& t = c.transform;
  const int64_t limit = view.samples + c.framing.margin();
  const int64_t end = begin + layout.segment < limit ? begin + layout.segment : limit;
  if (begin >= end) return;  // the whole block
  const int bands_out = static_cast<int>(c.out_bands), grad_step = team.warps + 1;
  float *segment = shared, *grads = shared + layout.grads;  // grads: (out_bands, warps + 1)
  int* masked = reinterpret_cast<int*>(shared + layout.masked);
  int* firsts = reinterpret_cast<int*>(shared + layout.firsts);
  float* own = shared + layout.warp + team.warp * layout.warp_words;
  float *spectra = own + layout.spectra, *power = own + layout.power;
  float *bands = own + layout.bands, *row = own + layout.row;
  WarpFft<kLength, Team> fft(view, team, own);
  for (int i = team.thread; i < layout.segment; i += team.threads) segment[i] = 0.0f;
  for (int i = team.thread; i < bands_out; i += team.threads) {
    masked[i] = frequency_masked(c, clip, i);
  }
  team.sync();

  const auto bin_at = [&](int bin, int side) {
    const float* x = spectra + side * 2 * t.bins + bin;
    const float* y = spectra + (1 - side) * 2 * t.bins + bin;
    Bin found{{x[0], x[t.bins]}, {0.0f, 0.0f}};
    if constexpr (kSides == 2) found.other = {y[0], y[t.bins]};
    return found;
  };
  int64_t low, high;
  view.touching(begin, end, low, high);
  for (int64_t base = low; base <= high; base += team.warps) {
    {  // the gradients of all warps' frames: neighbours in memory
      const int w = team.thread % team.warps;
      const bool live = base + w <= high && view.live(base + w);
      const float* from = grad + clip * c.out_bands * c.out_frames + base + w;
      for (int band = team.thread / team.warps; band < bands_out; band += Team::lanes) {
        grads[band * grad_step + w] =
            live && !masked[band] ? from[band * c.out_frames] * c.scale : 0.0f;
      }
    }
    team.sync();
    const int64_t frame = base + team.warp;
    const bool live = frame <= high && view.live(frame);
    Place place{frame, 0.0f};
    if constexpr (kSides == 2) place = stretched(frame, view.rate);
    if (live) {
      for (int side = 0; side < kSides; ++side) {
        float* x = spectra + side * 2 * t.bins;
        fft.spectrum(place.left + side, [&](int bin, float re, float im) {
          x[bin] = re;
          x[t.bins + bin] = im;
        });
      }
      if (c.logarithm) {
        for (int bin = team.lane; bin < t.bins; bin += Team::lanes) {
          float factor;
          bin_power<kSides>(c, bin_at(bin, 0), true, place.fraction, power[bin], factor);
        }
        team.sync_warp();
      }
      for (int band = team.lane; band < c.bands; band += Team::lanes) {
        float g = band < bands_out ? grads[band * grad_step + team.warp] : 0.0f;
        if (c.logarithm && g != 0.0f) g /= view.band_value(band, power, 1) + c.log_offset;
        bands[band] = g;
      }
      team.sync_warp();
    }
    for (int side = 0; side < kSides; ++side) {
      if (team.lane == 0) firsts[team.warp] = near(c.framing.first(place.left + side) - begin);
      if (live && place.left + side < view.frames) {
        const auto gradient = [&](int bin) {
          float slope = 0.0f;
          if (c.mel == nullptr) {
            slope = bands[bin];
          } else {
            const float* weights = c.mel + bin * c.mel_bin_stride;
            MUSICLM_FAST_NO_UNROLL
            for (int band = c.mel_bands[2 * bin]; band < c.mel_bands[2 * bin + 1]; ++band) {
              slope += bands[band] * weights[band * c.mel_band_stride];
            }
          }
          const Bin x = bin_at(bin, side);
          float value, factor;
          bin_power<kSides>(c, x, side == 0, place.fraction, value, factor);
          return Complex<float>{x.own.re * slope * factor, x.own.im * slope * factor};
        };
        if (t.packed) {
          const float* turns = t.numbers + t.split;
          MUSICLM_FAST_NO_UNROLL
          for (int k = team.lane; k <= t.length / 2; k += Team::lanes) {
            const int m = t.length - k;
            const Complex<float> mate = m == k ? Complex<float>{0.0f, 0.0f} : gradient(m);
            const BinPair<float> z =
                split_pair_adjoint<float>(gradient(k), mate, turns[2 * k], turns[2 * k + 1]);
            if (k == 0 || m == k) {  // both entries are the same one
              fft.put(k, z.low.re + z.high.re, z.low.im + z.high.im);
            } else {
              fft.put(k, z.low.re, z.low.im);
              fft.put(m, z.high.re, z.high.im);
            }
          }
        } else {
          for (int n = team.lane; n < t.length; n += Team::lanes) {
            const Complex<float> x = n < t.bins ? gradient(n) : Complex<float>{0.0f, 0.0f};
            fft.put(n, x.re, x.im);
          }
        }
        team.sync_warp();
        fft.inverse([&](int n, float re, float im) {
          if (!t.packed) {
            if (n < t.taps) row[n] = c.window[n] * re;
            return;
          }
          if (2 * n < t.taps) row[2 * n] = 0.5f * c.window[2 * n] * re;
          if (2 * n + 1 < t.taps) row[2 * n + 1] = 0.5f * c.window[2 * n + 1] * im;
        });
      } else {
        for (int tap = team.lane; tap < t.taps; tap += Team::lanes) row[tap] = 0.0f;
      }
      team.sync();
      add_rows<kSides>(team, c, segment, static_cast<int>(end - begin), team.warps,
                       shared + layout.warp + layout.row, layout.warp_words, firsts);
      team.sync();
    }
  }
  team.sync();
  write_segment(view, team, segment, begin, end, grad_wav, margins);
}

}  // namespace musiclm_fast::spectrogram
