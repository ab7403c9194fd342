// A block of the folded DFT: a thread per frame, its terms in registers. Torch-free; see block.h
// for what a team is.
#pragma once

#include "spectrogram/block.h"

namespace musiclm_fast::spectrogram {

// A tile of power spectra as they are: no magnitudes, stretch, mel bands, logarithm or scale.
MUSICLM_FAST_HD bool plain(const Call& c) {
  return c.rates == nullptr && c.mel == nullptr && !c.magnitude && !c.logarithm && c.mean == 0.0f &&
         c.scale == 1.0f;
}
inline constexpr int kPlainThreads = 128;

// A thread holds two sets of terms, so that the table is read once for both: two frames, or the
// two sides of a stretched one.
MUSICLM_FAST_HD constexpr int frames_a_thread(int sides) { return 3 - sides; }

// What a row of the table gives: bits of its flags.
inline constexpr int kLowMasked = 1, kHighMasked = 2, kLowAbsent = 4, kHighAbsent = 8;

// Samples of `frames` neighbouring frames; 0 if shared memory is not to hold them.
inline int staged_samples(const Call& c, int frames) {
  const int64_t span = (frames - 1) * c.framing.hop + c.transform.taps;
  return c.rates == nullptr && span <= 8192 ? static_cast<int>(span) : 0;
}

// Words of shared memory of each kernel, and its parts. The table moves there `rows` at a time.
struct FoldedLayout {
  int threads, tile_frames;
  int rows;
  int flags, window, chunk, power;  // where they begin
  int staged;                       // samples of the tile; 0 where they are read from global memory
  int64_t total;

  static FoldedLayout make(const Call& c, int threads) {
    const Transform& t = c.transform;
    FoldedLayout l{};
    l.threads = plain(c) ? kPlainThreads : threads;
    l.tile_frames = l.threads * frames_a_thread(c.rates == nullptr ? 1 : 2);
    l.rows = 4096 / (2 * t.terms) < t.rows ? 4096 / (2 * t.terms) : t.rows;
    l.staged = staged_samples(c, l.tile_frames);
    l.flags = l.rows * 2 * t.terms;
    l.window = l.flags + l.rows;
    l.chunk = l.window + t.taps;
    l.power = l.chunk + l.staged;
    l.total = l.power + (c.mel == nullptr ? 0 : int64_t{t.bins} * (l.tile_frames + 1));
    return l;
  }
};

// A thread per frame. Of a stretch with many terms these lie in shared memory: registers hold the
// gradients of one side's.
struct FoldedBackwardLayout {
  int threads, segment;
  int stride;  // from one frame's row to the next's
  // Where they begin; the segment is at 0.
  int rows, firsts, flags, window, chunk, terms, power, slope;
  int staged;  // samples of a round's frames; 0 where they are read from global memory
  int64_t total;

  static FoldedBackwardLayout make(const Call& c, int threads, int segment) {
    const Transform& t = c.transform;
    FoldedBackwardLayout l{};
    l.threads = threads;
    l.segment = segment;
    l.stride = t.taps | 1;
    const int columns = c.mel == nullptr ? 0 : t.bins * (threads + 1);
    l.rows = segment;
    l.firsts = l.rows + threads * l.stride;
    l.flags = l.firsts + threads;
    l.window = l.flags + t.rows;
    l.chunk = l.window + t.taps;
    l.staged = staged_samples(c, threads);
    l.terms = l.chunk + l.staged;
    l.power = l.terms + (c.rates != nullptr && terms_shared(t.terms) ? 4 * t.terms * threads : 0);
    l.slope = l.power + columns;
    l.total = l.slope + columns;
    return l;
  }

  static constexpr bool terms_shared(int terms) { return terms > 14; }
};

// Terms below the last one on both sides of the middle tap, whatever the taps: fewer would have
// taken a shorter kernel.
template <int kTerms>
constexpr int sure_terms() {
  int shorter = 0;
  for (const int terms : kFoldedTerms) shorter = terms < kTerms ? terms : shorter;
  return shorter;
}

// A thread's frame as even and odd parts about the middle tap; at(i) is tap i before the window.
template <int kTerms, class At, class Terms>
MUSICLM_FAST_BLOCK void fold(int taps, const float* window, At at, Terms even, Terms odd) {
  const int middle = taps / 2;
  MUSICLM_FAST_UNROLL
  for (int m = 0; m < kTerms; ++m) {
    const int hi = middle + m, lo = middle - m;
    const bool sure = m < sure_terms<kTerms>();
    const float after = sure || hi < taps ? window[hi] * at(hi) : 0.0f;
    const float before = m > 0 && (sure || lo >= 0) ? window[lo] * at(lo) : 0.0f;
    even[m] = after + before;
    odd[m] = after - before;
  }
}

// Bins f and n_fft / 2 - f of a row of the table. kTerms is 0 for terms in memory: an unrolled sum
// would load them all at once.
template <int kTerms, class Terms>
MUSICLM_FAST_BLOCK BinPair<float> row_pair(const float* row, Terms even, Terms odd,
                                           int terms = kTerms) {
  FoldedSums<float> sums;
  folded_sums<1, kTerms>(even, odd, terms, row, &sums);
  return folded_pair(sums);
}

// Loads kCount numbers that begin on a boundary of 16 bytes: a row of the table.
template <int kCount>
MUSICLM_FAST_BLOCK void load_row(const float* from, float* to) {
  static_assert(kCount % 4 == 0);
#ifdef __CUDACC__
  MUSICLM_FAST_UNROLL
  for (int i = 0; i < kCount; i += 4) {
    const float4 x = *reinterpret_cast<const float4*>(from + i);
    to[i] = x.x;
    to[i + 1] = x.y;
    to[i + 2] = x.z;
    to[i + 3] = x.w;
  }
#else
  for (int i = 0; i < kCount; ++i) to[i] = from[i];
#endif
}

// Moves the samples that frames share to shared memory.
template <class Team>
MUSICLM_FAST_BLOCK void stage_samples(const ClipView& view, const Team& team, int64_t origin,
                                      int count, float* to) {
  if (view.inside(origin, count)) {
    const float* from = view.wav + origin;
    for (int i = team.thread; i < count; i += team.threads) to[i] = from[i];
  } else {
    for (int i = team.thread; i < count; i += team.threads) to[i] = view.sample(origin + i);
  }
}

// Terms of a frame whose samples are in global memory.
template <int kTerms, class Terms>
MUSICLM_FAST_BLOCK void load_terms(const ClipView& view, int64_t frame, const float* window,
                                   Terms even, Terms odd) {
  const int taps = view.c.transform.taps;
  const int64_t first = view.c.framing.first(frame);
  if (frame < view.frames && view.inside(first, taps)) {
    const float* at = view.wav + first;
    fold<kTerms>(taps, window, [&](int i) { return at[i]; }, even, odd);
  } else {
    const bool silent = frame >= view.frames;  // only a stretch asks for such a frame
    fold<kTerms>(
        taps, window, [&](int i) { return silent ? 0.0f : view.sample(first + i); }, even, odd);
  }
}

// The flags of a row: of the bins `row` and n_fft / 2 - `row`, or of whether the latter exists, if
// these go on to mel bands.
MUSICLM_FAST_BLOCK inline int row_flags(const ClipView& view, int row) {
  const Call& c = view.c;
  const int n_fft = c.transform.n_fft, mate = n_fft % 2 == 0 ? n_fft / 2 - row : -1;
  int flags = mate <= row ? kHighAbsent : 0;
  if (c.mel != nullptr) return flags;
  if (row >= c.out_bands) flags |= kLowAbsent;
  if (mate >= c.out_bands) flags |= kHighAbsent;
  if (frequency_masked(c, view.clip, row)) flags |= kLowMasked;
  if (frequency_masked(c, view.clip, mate)) flags |= kHighMasked;
  return flags;
}

// The values of one bin, of all frames of a thread.
template <int kSides, bool kPlain>
MUSICLM_FAST_BLOCK void folded_values(const Call& c, const BinPair<float>* pair, bool low,
                                      float fraction, float* values) {
  Complex<float> x[2];
  for (int i = 0; i < 2; ++i) x[i] = low ? pair[i].low : pair[i].high;
  if constexpr (kPlain) {
    for (int i = 0; i < 2; ++i) values[i] = x[i].re * x[i].re + x[i].im * x[i].im;
  } else if constexpr (kSides == 1) {
    for (int i = 0; i < 2; ++i) values[i] = power_of<1>(c, x + i, 0.0f);
  } else {
    values[0] = power_of<2>(c, x, fraction);
  }
}

template <int kTerms, int kSides, bool kPlain, class Team>
MUSICLM_FAST_BLOCK void forward_folded(const Call& c, const Team& team, int64_t clip, int64_t begin,
                                       const FoldedLayout& layout, float* shared, float* out) {
  constexpr int kFrames = frames_a_thread(kSides);
  const ClipView view(c, clip);
  const Transform& t = c.transform;
  const int half = t.n_fft % 2 == 0 ? t.n_fft / 2 : -1;
  const int gap = kPlain ? kPlainThreads : layout.threads, step = layout.tile_frames + 1;
  const int64_t origin = c.framing.first(begin);
  int* flags = reinterpret_cast<int*>(shared + layout.flags);
  float *window = shared + layout.window, *chunk = shared + layout.chunk;
  float* power = shared + layout.power;  // (bins, tile_frames + 1) for mel
  for (int i = team.thread; i < t.taps; i += team.threads) window[i] = c.window[i];
  stage_samples(view, team, origin, layout.staged, chunk);
  for (int row = 0; row < t.rows; row += layout.rows) {
    const int rows = row + layout.rows < t.rows ? layout.rows : t.rows - row;
    const float* table = t.numbers + t.table + row * 2 * kTerms;
    if (row > 0) team.sync();
    for (int i = team.thread; i < rows * 2 * kTerms; i += team.threads) shared[i] = table[i];
    for (int i = team.thread; i < rows; i += team.threads) flags[i] = row_flags(view, row + i);
    team.sync();
    for (int f = team.thread; f < gap; f += team.threads) {
      bool live[kFrames], any = false;
      float* low = out + (clip * c.out_bands + row) * c.out_frames + begin + f;
      MUSICLM_FAST_UNROLL
      for (int i = 0; i < kFrames; ++i) {
        const int64_t frame = begin + f + i * gap;
        live[i] = view.live(frame);
        any |= live[i];
        if (live[i] || frame >= c.out_frames || c.mel != nullptr) continue;
        const float value = frame < view.frames ? c.mask_value : 0.0f;
        for (int r = 0; r < rows; ++r) {
          if (!(flags[r] & kLowAbsent)) low[r * c.out_frames + i * gap] = value;
          if (!(flags[r] & kHighAbsent)) {
            low[(half - 2 * row - r) * c.out_frames + i * gap] = value;
          }
        }
      }
      if (!any) continue;
      float even[2][kTerms], odd[2][kTerms];
      float fraction = 0.0f;
      if constexpr (kSides == 1) {
        MUSICLM_FAST_UNROLL
        for (int i = 0; i < 2; ++i) {
          if (layout.staged > 0) {
            const float* taps = chunk + (f + i * gap) * static_cast<int>(c.framing.hop);
            const auto at = [&](int m) { return taps[m]; };
            fold<kTerms, decltype(at), float*>(t.taps, window, at, even[i], odd[i]);
          } else {
            load_terms<kTerms, float*>(view, begin + f + i * gap, window, even[i], odd[i]);
          }
        }
      } else {
        const Place place = stretched(begin + f, view.rate);
        fraction = place.fraction;
        MUSICLM_FAST_UNROLL
        for (int i = 0; i < 2; ++i) {
          load_terms<kTerms, float*>(view, place.left + i, window, even[i], odd[i]);
        }
      }
      float* high = low + (half - 2 * row) * c.out_frames;
      for (int r = 0; r < rows; ++r) {
        float numbers[2 * kTerms];
        load_row<2 * kTerms>(shared + r * 2 * kTerms, numbers);
        BinPair<float> pair[2];
        MUSICLM_FAST_UNROLL
        for (int i = 0; i < 2; ++i) {
          pair[i] = row_pair<kTerms, const float*>(numbers, even[i], odd[i]);
        }
        float lows[kFrames], highs[kFrames];
        folded_values<kSides, kPlain>(c, pair, true, fraction, lows);
        folded_values<kSides, kPlain>(c, pair, false, fraction, highs);
        const int flag = flags[r];
        if (!kPlain && c.mel != nullptr) {
          MUSICLM_FAST_UNROLL
          for (int i = 0; i < kFrames; ++i) {
            power[(row + r) * step + f + i * gap] = lows[i];
            if (flag == 0) power[(half - row - r) * step + f + i * gap] = highs[i];
          }
          continue;
        }
        if constexpr (!kPlain) {
          MUSICLM_FAST_UNROLL
          for (int i = 0; i < kFrames; ++i) {
            lows[i] = finished(c, lows[i]);
            highs[i] = finished(c, highs[i]);
          }
        }
        if (flag == 0) {  // most rows
          MUSICLM_FAST_UNROLL
          for (int i = 0; i < kFrames; ++i) {
            if (!live[i]) continue;
            low[i * gap] = lows[i];
            high[i * gap] = highs[i];
          }
        } else {
          MUSICLM_FAST_UNROLL
          for (int i = 0; i < kFrames; ++i) {
            if (!live[i]) continue;
            if (!(flag & kLowAbsent)) low[i * gap] = flag & kLowMasked ? c.mask_value : lows[i];
            if (!(flag & kHighAbsent)) high[i * gap] = flag & kHighMasked ? c.mask_value : highs[i];
          }
        }
        low += c.out_frames;
        high -= c.out_frames;
      }
    }
  }
  if (kPlain || c.mel == nullptr) return;
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

// A thread's terms of one frame in shared memory.
struct TermColumn {
  float* at;
  int step;
  MUSICLM_FAST_BLOCK float& operator[](int m) const { return at[m * step]; }
};

template <int kTerms, int kSides, class Team>
MUSICLM_FAST_BLOCK void backward_folded(const Call& c, const Team& team, int64_t clip,
                                        int64_t begin, const FoldedBackwardLayout& layout,
                                        float* shared, const float* grad, float* grad_wav,
                                        float* margins) {
  constexpr bool kShared = kSides == 2 && FoldedBackwardLayout::terms_shared(kTerms);
  const ClipView view(c, clip);
  const Transform& t = c.transform;
  const int64_t limit = view.samples + c.framing.margin();
  const int64_t end = begin + layout.segment < limit ? begin + layout.segment : limit;
  if (begin >= end) return;
  const float* table = t.numbers + t.table;
  const int step = layout.threads + 1, half = t.n_fft % 2 == 0 ? t.n_fft / 2 : -1;
  const bool log_mel = c.mel != nullptr;
  float *segment = shared, *rows = shared + layout.rows, *window = shared + layout.window;
  float *powers = shared + layout.power, *slopes = shared + layout.slope;
  int* firsts = reinterpret_cast<int*>(shared + layout.firsts);
  int* flags = reinterpret_cast<int*>(shared + layout.flags);
  for (int i = team.thread; i < layout.segment; i += team.threads) segment[i] = 0.0f;
  for (int i = team.thread; i < t.taps; i += team.threads) window[i] = c.window[i];
  for (int i = team.thread; i < t.rows; i += team.threads) flags[i] = row_flags(view, i);
  team.sync();

  int64_t first_frame, last_frame;
  view.touching(begin, end, first_frame, last_frame);
  for (int64_t base = first_frame; base <= last_frame; base += layout.threads) {
    if (kSides == 1 && layout.staged > 0) {
      stage_samples(view, team, c.framing.first(base), layout.staged, shared + layout.chunk);
      team.sync();
    }
    for (int side = 0; side < kSides; ++side) {
      for (int f = team.thread; f < layout.threads; f += team.threads) {
        const int64_t frame = base + f;
        Place place{frame, 0.0f};
        if constexpr (kSides == 2) place = stretched(frame, view.rate);
        float* row = rows + f * layout.stride;
        firsts[f] = near(c.framing.first(place.left + side) - begin);
        if (frame > last_frame || !view.live(frame) || place.left + side >= view.frames) {
          for (int tap = 0; tap < t.taps; ++tap) row[tap] = 0.0f;
          continue;
        }
        float even[kTerms], odd[kTerms], more_even[kTerms], more_odd[kTerms];
        const auto column = [&](int of_side, int part) {
          return TermColumn{
              shared + layout.terms + (2 * of_side + part) * kTerms * layout.threads + f,
              layout.threads};
        };
        if constexpr (kShared) {
          for (int s = 0; s < 2 && side == 0; ++s) {
            load_terms<kTerms>(view, place.left + s, window, column(s, 0), column(s, 1));
          }
        } else if (kSides == 1 && layout.staged > 0) {
          const float* taps = shared + layout.chunk + f * static_cast<int>(c.framing.hop);
          const auto at = [&](int m) { return taps[m]; };
          fold<kTerms, decltype(at), float*>(t.taps, window, at, even, odd);
        } else {
          load_terms<kTerms, float*>(view, place.left + side, window, even, odd);
          if constexpr (kSides == 2) {
            load_terms<kTerms, float*>(view, place.left + 1 - side, window, more_even, more_odd);
          }
        }
        const auto bins = [&](const float* numbers, Bin& low, Bin& high) {
          const auto put = [&](const BinPair<float>& own, const BinPair<float>& other) {
            low = {own.low, other.low};
            high = {own.high, other.high};
          };
          if constexpr (kShared) {
            put(row_pair<0>(numbers, column(side, 0), column(side, 1), t.terms),
                row_pair<0>(numbers, column(1 - side, 0), column(1 - side, 1), t.terms));
          } else if constexpr (kSides == 2) {
            put(row_pair<kTerms, const float*>(numbers, even, odd),
                row_pair<kTerms, const float*>(numbers, more_even, more_odd));
          } else {
            put(row_pair<kTerms, const float*>(numbers, even, odd), {});
          }
        };
        const auto power_at = [&](const Bin& bin, float& power, float& factor) {
          bin_power<kSides>(c, bin, side == 0, place.fraction, power, factor);
        };
        if (log_mel) {
          float *own = powers + f, *slope = slopes + f;  // this thread's columns
          for (int r = 0; r < t.rows; ++r) {
            Bin low, high;
            float factor;
            const float* from = table + r * 2 * kTerms;
            float numbers[2 * kTerms];
            if constexpr (!kShared) load_row<2 * kTerms>(from, numbers);
            bins(kShared ? from : numbers, low, high);
            power_at(low, own[r * step], factor);
            if (flags[r] == 0) power_at(high, own[(half - r) * step], factor);
          }
          for (int bin = 0; bin < t.bins; ++bin) slope[bin * step] = 0.0f;
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
        const bool simple = kSides == 1 && !log_mel && !c.magnitude && !c.logarithm;
        const float* low_grad = grad + clip * c.out_bands * c.out_frames + frame;
        const float* high_grad = low_grad + half * c.out_frames;
        for (int r = 0; r < t.rows; ++r) {
          const float* from = table + r * 2 * kTerms;
          float numbers[2 * kTerms];
          if constexpr (!kShared) load_row<2 * kTerms>(from, numbers);
          const int flag = flags[r];
          float low_slope = 0.0f, high_slope = 0.0f;
          if (log_mel) {
            low_slope = slopes[r * step + f];
            if (flag == 0) high_slope = slopes[(half - r) * step + f];
          } else {
            if (!(flag & (kLowMasked | kLowAbsent))) low_slope = *low_grad * c.scale;
            if (!(flag & (kHighMasked | kHighAbsent))) high_slope = *high_grad * c.scale;
          }
          low_grad += c.out_frames;
          high_grad -= c.out_frames;
          Bin low, high;
          bins(kShared ? from : numbers, low, high);
          if (simple) {
            low_slope *= 2.0f;
            high_slope *= 2.0f;
          } else {
            const auto turn = [&](const Bin& bin, float& slope) {
              float power, factor;
              power_at(bin, power, factor);
              if (c.logarithm && !log_mel) slope /= power + c.log_offset;
              slope *= factor;
            };
            turn(low, low_slope);
            // A mate that does not exist has no slope, and a power that may be anything.
            if (!(flag & kHighAbsent)) turn(high, high_slope);
          }
          const FoldedSums<float> sums = folded_pair_adjoint<float>(
              {low.own.re * low_slope, low.own.im * low_slope},
              {high.own.re * high_slope, high.own.im * high_slope});
          folded_sums_adjoint<1, kTerms>(&sums, kTerms, kShared ? from : numbers, even_bar,
                                         odd_bar);
        }
        const int middle = t.taps / 2;
        MUSICLM_FAST_UNROLL
        for (int m = 0; m < kTerms; ++m) {
          const int hi = middle + m, lo = middle - m;
          const bool sure = m < sure_terms<kTerms>();
          if (sure || hi < t.taps) row[hi] = window[hi] * (even_bar[m] + odd_bar[m]);
          if (m > 0 && (sure || lo >= 0)) row[lo] = window[lo] * (even_bar[m] - odd_bar[m]);
        }
      }
      team.sync();
      add_rows<kSides>(team, c, segment, static_cast<int>(end - begin), layout.threads, rows,
               layout.stride, firsts);
      team.sync();
    }
  }
  team.sync();
  write_segment(view, team, segment, begin, end, grad_wav, margins);
}

}  // namespace musiclm_fast::spectrogram
