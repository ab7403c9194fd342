// A block of the folded DFT: a thread per frame, its terms in registers. Torch-free; see block.h
// for what a team is.
#pragma once

#include "spectrogram/block.h"

namespace musiclm_fast::spectrogram {

// Words of shared memory of each kernel, and its parts.
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

}  // namespace musiclm_fast::spectrogram
