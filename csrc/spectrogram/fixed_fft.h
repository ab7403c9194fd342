// The packed FFT of 128, 256 or 512 complex points (n_fft 256, 512 or 1,024) with sizes known when
// it is compiled. Torch-free; see block.h for what a team is.
//
// Three passes, decimation in frequency, points in registers; two exchanges through a warp's own
// shared memory. It uses the plan's tables, whose radices are the same. In the last pass a lane
// takes the butterflies of the frequencies f and M - f (M = kFirst * kSecond), modulo M, so that
// both entries that give the bins k and H - k are its own.
//
// A lane's state that outlives a barrier lies in arrays over the tasks of that lane, so a team of
// one lane runs the same source.
#pragma once

#include "spectrogram/block.h"

namespace musiclm_fast::spectrogram {

// Complex numbers that move as one word of 8 bytes.
struct alignas(8) Point {
  float re, im;
};

// Words of a warp's points: see FixedFft::kWords.
MUSICLM_FAST_HD constexpr int fixed_words(int length) { return 2 * length + 32; }

MUSICLM_FAST_HD bool has_fixed_fft(const Transform& t) {
  return !t.folded && t.packed && (t.length == 128 || t.length == 256 || t.length == 512);
}

template <int kLength>
struct FixedFft {
  static constexpr int kFirst = 8, kThird = kLength == 512 ? 8 : 4;
  static constexpr int kSecond = kLength / (kFirst * kThird);
  static constexpr int kSpan = kLength / kFirst;
  static constexpr int kLow = kFirst * kSecond;  // M: frequencies below the last radix
  static constexpr int kFirstTasks = kSpan, kSecondTasks = kFirst * kThird, kLastTasks = kLow / 2;
  // Two points of gap after every span: all three passes then hit different banks.
  static constexpr int kStride = kSpan + 2;
  static constexpr int kWords = 2 * kFirst * kStride;
  static_assert(kWords == fixed_words(kLength));
  static_assert(kFirst * kSecond * kThird == kLength && kThird % 2 == 0);

  // Second pass: its butterfly `task` has the entries at + k * kThird, and twiddles of column j.
  MUSICLM_FAST_HD static int column(int task) { return task % 2 + task / 16 * 2; }
  MUSICLM_FAST_HD static int second_at(int task) {
    return task / 2 % kFirst * kStride + column(task);
  }
  // Last pass: its butterfly for the frequencies f (mod M) has kThird neighbouring entries.
  MUSICLM_FAST_HD static int last_at(int f) {
    return f % kFirst * kStride + f / kFirst * kThird;
  }
  MUSICLM_FAST_HD static int mate(int task) { return task == 0 ? kLow / 2 : kLow - task; }
  // The lower bin of a pair of a task of the last pass. Task 0 has the frequencies 0 and M / 2,
  // each its own mate.
  MUSICLM_FAST_HD static int bin(int task, int pair) {
    return task + pair * kLow - (task == 0 && pair >= kThird / 2 ? (kThird - 1) * kLow / 2 : 0);
  }
};

// Tasks of a pass for each lane.
MUSICLM_FAST_HD constexpr int per_lane(int tasks, int lanes) { return (tasks + lanes - 1) / lanes; }

// Window and twiddles of one lane. Up to 256 points they stay in registers from frame to frame.
template <int kLength, int kLanes>
class LaneTables {
  using Fft = FixedFft<kLength>;
  static constexpr bool kKeep = kLength <= 256;
  static constexpr int kFirst = kKeep ? per_lane(Fft::kFirstTasks, kLanes) : 0;
  static constexpr int kSecond = kKeep ? per_lane(Fft::kSecondTasks, kLanes) : 0;
  static constexpr int kLast = kKeep ? per_lane(Fft::kLastTasks, kLanes) : 0;
  const float* window_;
  const Point *first_, *second_, *split_;
  int taps_;
  Point kept_window_[kFirst + 1][Fft::kFirst];
  Point kept_first_[kFirst + 1][Fft::kFirst], kept_second_[kSecond + 1][Fft::kSecond];
  Point kept_split_[kLast + 1][Fft::kThird];

  // Half the window's values for entry j + n of the packed frame.
  MUSICLM_FAST_BLOCK Point load_window(int j, int n) const {
    const float* at = window_ + 2 * j;
    const int left = taps_ - 2 * j;
    return {2 * n < left ? 0.5f * at[2 * n] : 0.0f, 2 * n + 1 < left ? 0.5f * at[2 * n + 1] : 0.0f};
  }

 public:
  MUSICLM_FAST_BLOCK LaneTables(const Call& c, int lane) {
    const Transform& t = c.transform;
    window_ = c.window;
    taps_ = t.taps;
    first_ = reinterpret_cast<const Point*>(t.numbers + t.stage[0].twiddles);
    second_ = reinterpret_cast<const Point*>(t.numbers + t.stage[1].twiddles);
    split_ = reinterpret_cast<const Point*>(t.numbers + t.split);
    MUSICLM_FAST_UNROLL
    for (int i = 0; i < kFirst; ++i) {
      const int j = (lane + i * kLanes) % Fft::kFirstTasks;
      MUSICLM_FAST_UNROLL
      for (int k = 0; k < Fft::kFirst; ++k) {
        kept_window_[i][k] = load_window(j, k * Fft::kSpan);
        if (k > 0) kept_first_[i][k] = (first_ + j)[(k - 1) * Fft::kSpan];
      }
    }
    MUSICLM_FAST_UNROLL
    for (int i = 0; i < kSecond; ++i) {
      const int j = Fft::column((lane + i * kLanes) % Fft::kSecondTasks);
      MUSICLM_FAST_UNROLL
      for (int q = 1; q < Fft::kSecond; ++q) {
        kept_second_[i][q] = (second_ + j)[(q - 1) * Fft::kThird];
      }
    }
    MUSICLM_FAST_UNROLL
    for (int i = 0; i < kLast; ++i) {
      MUSICLM_FAST_UNROLL
      for (int q = 0; q < Fft::kThird; ++q) {
        kept_split_[i][q] = split_point((lane + i * kLanes) % Fft::kLastTasks, q);
      }
    }
  }

  // cos and sin of the split of a pair. The table ends at H / 2, and W(H - k) = -conj(W(k)).
  MUSICLM_FAST_BLOCK Point split_point(int task, int pair) const {
    const int k = Fft::bin(task, pair);
    const Point w = split_[k <= kLength / 2 ? k : kLength - k];
    return {k <= kLength / 2 ? w.re : -w.re, w.im};
  }
  MUSICLM_FAST_BLOCK Point window(int i, int j, int k) const {
    if constexpr (kKeep) return kept_window_[i][k];
    return load_window(j, k * Fft::kSpan);
  }
  MUSICLM_FAST_BLOCK Point first(int i, int j, int q) const {
    if constexpr (kKeep) return kept_first_[i][q];
    return (first_ + j)[(q - 1) * Fft::kSpan];
  }
  MUSICLM_FAST_BLOCK Point second(int i, int j, int q) const {
    if constexpr (kKeep) return kept_second_[i][q];
    return (second_ + j)[(q - 1) * Fft::kThird];
  }
  MUSICLM_FAST_BLOCK Point split(int i, int task, int pair) const {
    if constexpr (kKeep) return kept_split_[i][pair];
    return split_point(task, pair);
  }
};

// A lane's entries of the first pass.
template <int kLength, int kLanes>
struct LanePoints {
  using Fft = FixedFft<kLength>;
  static constexpr int kTasks = per_lane(Fft::kFirstTasks, kLanes);
  float re[kTasks][Fft::kFirst], im[kTasks][Fft::kFirst];

  // Entry lane + n of the transform is at(n), n known when it is compiled.
  template <class At>
  MUSICLM_FAST_BLOCK void load(int lane, At at) {
    MUSICLM_FAST_UNROLL
    for (int i = 0; i < kTasks; ++i) {
      const int j = i * kLanes;
      const bool mine = Fft::kFirstTasks % kLanes == 0 || lane + j < Fft::kFirstTasks;
      MUSICLM_FAST_UNROLL
      for (int k = 0; k < Fft::kFirst; ++k) {
        const Point x = mine ? at(j + k * Fft::kSpan) : Point{0.0f, 0.0f};
        re[i][k] = x.re;
        im[i][k] = x.im;
      }
    }
  }

  // The taps of a frame, before the window. `points` are free before and afterwards.
  template <class Team>
  MUSICLM_FAST_BLOCK void load_frame(const ClipView& view, const Team& team, int64_t frame,
                                     Point* points) {
    const int taps = view.c.transform.taps;
    const int64_t start = view.c.framing.first(frame);
    const bool silent = frame >= view.frames;  // only a stretch asks for such a frame
    const float* wav = view.wav + start;
    if (!silent && view.inside(start, taps) && taps % 2 == 0 &&
        reinterpret_cast<uintptr_t>(wav) % sizeof(Point) == 0) {
      const Point* pairs = reinterpret_cast<const Point*>(wav) + team.lane;
      const int count = taps / 2 - team.lane;
      load(team.lane, [&](int n) { return n < count ? pairs[n] : Point{0.0f, 0.0f}; });
      return;
    }
    float* gathered = reinterpret_cast<float*>(points);
    for (int n = team.lane; n < 2 * kLength; n += Team::lanes) {
      gathered[n] = silent || n >= taps ? 0.0f : view.sample(start + n);
    }
    team.sync_warp();
    load(team.lane, [&](int n) { return points[team.lane + n]; });
    team.sync_warp();
  }

  // Times half the window.
  MUSICLM_FAST_BLOCK void window(int lane, const LaneTables<kLength, kLanes>& tables) {
    MUSICLM_FAST_UNROLL
    for (int i = 0; i < kTasks; ++i) {
      MUSICLM_FAST_UNROLL
      for (int k = 0; k < Fft::kFirst; ++k) {
        const Point w = tables.window(i, lane + i * kLanes, k);
        re[i][k] *= w.re;
        im[i][k] *= w.im;
      }
    }
  }
};

// First two passes of a warp's transform, and their exchanges.
template <int kLength, class Team>
MUSICLM_FAST_BLOCK void fixed_passes(const Team& team,
                                     const LaneTables<kLength, Team::lanes>& tables,
                                     LanePoints<kLength, Team::lanes>& entries, Point* points) {
  using Fft = FixedFft<kLength>;
  MUSICLM_FAST_UNROLL
  for (int i = 0; i < per_lane(Fft::kFirstTasks, Team::lanes); ++i) {
    const int j = team.lane + i * Team::lanes;
    if (Fft::kFirstTasks % Team::lanes != 0 && j >= Fft::kFirstTasks) continue;
    float *re = entries.re[i], *im = entries.im[i];
    small_dft<Fft::kFirst>(re, im);
    points[j] = {re[0], im[0]};
    MUSICLM_FAST_UNROLL
    for (int q = 1; q < Fft::kFirst; ++q) {
      const Point w = tables.first(i, j, q);
      points[j + q * Fft::kStride] = {re[q] * w.re - im[q] * w.im, re[q] * w.im + im[q] * w.re};
    }
  }
  team.sync_warp();
  MUSICLM_FAST_UNROLL
  for (int i = 0; i < per_lane(Fft::kSecondTasks, Team::lanes); ++i) {
    const int task = team.lane + i * Team::lanes;
    Point* at = points + Fft::second_at(task);
    float re[Fft::kSecond], im[Fft::kSecond];
    MUSICLM_FAST_UNROLL
    for (int k = 0; k < Fft::kSecond; ++k) {
      const Point x = at[k * Fft::kThird];
      re[k] = x.re;
      im[k] = x.im;
    }
    small_dft<Fft::kSecond>(re, im);
    at[0] = {re[0], im[0]};
    MUSICLM_FAST_UNROLL
    for (int q = 1; q < Fft::kSecond; ++q) {
      const Point w = tables.second(i, Fft::column(task), q);
      at[q * Fft::kThird] = {re[q] * w.re - im[q] * w.im, re[q] * w.im + im[q] * w.re};
    }
  }
  team.sync_warp();
}

// Last pass of task `task`: the entries of frequencies task and mate(task).
template <int kLength>
MUSICLM_FAST_BLOCK void fixed_last(const Point* points, int task, float* low_re, float* low_im,
                                   float* high_re, float* high_im) {
  using Fft = FixedFft<kLength>;
  const Point* low = points + Fft::last_at(task);
  const Point* high = points + Fft::last_at(Fft::mate(task));
  MUSICLM_FAST_UNROLL
  for (int k = 0; k < Fft::kThird; ++k) {
    const Point a = low[k], b = high[k];
    low_re[k] = a.re;
    low_im[k] = a.im;
    high_re[k] = b.re;
    high_im[k] = b.im;
  }
  small_dft<Fft::kThird>(low_re, low_im);
  small_dft<Fft::kThird>(high_re, high_im);
}

// The entries of pair `pair` of a task of the last pass.
template <int kLength>
MUSICLM_FAST_BLOCK void fixed_pair(int task, int pair, const float* low_re, const float* low_im,
                                   const float* high_re, const float* high_im, Complex<float>& a,
                                   Complex<float>& b) {
  constexpr int kThird = FixedFft<kLength>::kThird, kHalf = kThird / 2;
  const bool own = task == 0;
  const int last = kThird - 1 - pair;
  if (pair < kHalf) {
    const int self = (kThird - pair) % kThird;
    a = {low_re[pair], low_im[pair]};
    b = {own ? low_re[self] : high_re[last], own ? low_im[self] : high_im[last]};
  } else {
    const int first = pair - kHalf, self = kThird - 1 - first;
    a = {own ? high_re[first] : low_re[pair], own ? high_im[first] : low_im[pair]};
    b = {own ? high_re[self] : high_re[last], own ? high_im[self] : high_im[last]};
  }
}

// A warp's transform of one frame: emit(bin, re, im) once for every bin. `points` are free for the
// next frame afterwards.
template <int kLength, class Team, class Emit>
MUSICLM_FAST_BLOCK void fixed_spectrum(const ClipView& view, const Team& team,
                                       const LaneTables<kLength, Team::lanes>& tables,
                                       int64_t frame, Point* points, Emit emit) {
  using Fft = FixedFft<kLength>;
  LanePoints<kLength, Team::lanes> entries;
  entries.load_frame(view, team, frame, points);
  entries.window(team.lane, tables);
  fixed_passes<kLength>(team, tables, entries, points);
  MUSICLM_FAST_UNROLL
  for (int i = 0; i < per_lane(Fft::kLastTasks, Team::lanes); ++i) {
    const int task = team.lane + i * Team::lanes;
    if (Fft::kLastTasks % Team::lanes != 0 && task >= Fft::kLastTasks) continue;
    float low_re[Fft::kThird], low_im[Fft::kThird], high_re[Fft::kThird], high_im[Fft::kThird];
    fixed_last<kLength>(points, task, low_re, low_im, high_re, high_im);
    MUSICLM_FAST_UNROLL
    for (int pair = 0; pair < Fft::kThird; ++pair) {
      Complex<float> a, b;
      fixed_pair<kLength>(task, pair, low_re, low_im, high_re, high_im, a, b);
      const Point w = tables.split(i, task, pair);
      const BinPair<float> x = split_pair<float>(a, b, w.re, w.im);
      const int bin = Fft::bin(task, pair);
      emit(bin, x.low.re, x.low.im);
      emit(kLength - bin, x.high.re, x.high.im);
    }
    if (task == 0) emit(kLength / 2, 2.0f * low_re[Fft::kThird / 2], -2.0f * low_im[Fft::kThird / 2]);
  }
  team.sync_warp();
}

// A warp's inverse transform, unscaled, of `points` in their order: emit(n, re, im) once for every
// n. `points` are free afterwards.
template <int kLength, class Team, class Emit>
MUSICLM_FAST_BLOCK void fixed_inverse(const Team& team,
                                      const LaneTables<kLength, Team::lanes>& tables,
                                      Point* points, Emit emit) {
  using Fft = FixedFft<kLength>;
  LanePoints<kLength, Team::lanes> entries;
  // real and imaginary parts exchanged, here and below: the inverse
  const Point* own = points + team.lane;
  entries.load(team.lane, [&](int n) { return Point{own[n].im, own[n].re}; });
  team.sync_warp();
  fixed_passes<kLength>(team, tables, entries, points);
  MUSICLM_FAST_UNROLL
  for (int i = 0; i < per_lane(Fft::kLastTasks, Team::lanes); ++i) {
    const int task = team.lane + i * Team::lanes;
    if (Fft::kLastTasks % Team::lanes != 0 && task >= Fft::kLastTasks) continue;
    float low_re[Fft::kThird], low_im[Fft::kThird], high_re[Fft::kThird], high_im[Fft::kThird];
    fixed_last<kLength>(points, task, low_re, low_im, high_re, high_im);
    MUSICLM_FAST_UNROLL
    for (int q = 0; q < Fft::kThird; ++q) {
      emit(task + q * Fft::kLow, low_im[q], low_re[q]);
      emit(Fft::mate(task) + q * Fft::kLow, high_im[q], high_re[q]);
    }
  }
  team.sync_warp();
}

inline constexpr int kFixedFrames = 32;  // a tile's frames make whole cache lines of output
inline constexpr int kFixedStep = kFixedFrames + 1;
inline constexpr int kFixedWarps = 4;

// Words of shared memory: each warp's points, the tile's power (bins, kFixedStep), and the masks.
struct FixedLayout {
  int tiles;  // of a block, one after the other: more of them load a lane's tables less often
  int points, power, live, masked;
  int64_t total;

  static FixedLayout make(const Call& c, int warps, int tiles) {
    FixedLayout l{tiles, fixed_words(c.transform.length), 0, 0, 0, 0};
    l.power = warps * l.points;
    l.live = l.power + c.transform.bins * kFixedStep;
    l.masked = l.live + kFixedFrames;
    l.total = l.masked + (c.out_bands + 31) / 32;
    return l;
  }
};

// Writes a tile of finished bands: a warp per band, a lane per frame. A bit of `masked` is a band.
template <class Team>
MUSICLM_FAST_BLOCK void write_fixed_tile(const ClipView& view, const Team& team, int64_t begin,
                                         const float* power, const int* live,
                                         const unsigned* masked, float* out) {
  const Call& c = view.c;
  const int bands = static_cast<int>(c.out_bands);
  for (int f = team.lane; f < kFixedFrames; f += Team::lanes) {
    const int64_t frame = begin + f;
    if (frame >= c.out_frames) continue;
    const unsigned dead = live[f] ? 0u : ~0u;
    const float other = frame < view.frames ? c.mask_value : 0.0f;
    float* to = out + (view.clip * c.out_bands + team.warp) * c.out_frames + frame;
    const int64_t step = team.warps * c.out_frames;
    const float* own = power + f;
    const auto rows = [&](auto value) {
      for (int word = 0; 32 * word < bands; ++word) {
        const unsigned bits = (masked[word] | dead) >> team.warp;
        const int first = 32 * word + team.warp;
        if (32 * word + 32 <= bands) {
          MUSICLM_FAST_UNROLL
          for (int j = 0; j < 32; j += team.warps) {
            const float found = value(first + j);
            *to = bits >> j & 1u ? other : found;
            to += step;
          }
        } else {
          MUSICLM_FAST_NO_UNROLL
          for (int j = 0; first + j < bands; j += team.warps) {
            *to = bits >> j & 1u ? other : value(first + j);
            to += step;
          }
        }
      }
    };
    if (c.mel == nullptr && !c.logarithm && c.mean == 0.0f && c.scale == 1.0f) {
      rows([&](int band) { return own[band * kFixedStep]; });
    } else if (c.mel == nullptr && !c.logarithm) {
      rows([&](int band) { return (own[band * kFixedStep] - c.mean) * c.scale; });
    } else {
      for (int band = team.warp; band < bands; band += team.warps) {
        *to = (masked[band / 32] | dead) >> band % 32 & 1u
                  ? other
                  : finished(c, view.band_value(band, own, kFixedStep));
        to += step;
      }
    }
  }
}

template <int kLength, int kSides, class Team>
MUSICLM_FAST_BLOCK void forward_fixed(const Call& c, const Team& team, int64_t clip, int64_t begin,
                                      const FixedLayout& layout, float* shared, float* out) {
  const ClipView view(c, clip);
  Point* points = reinterpret_cast<Point*>(shared + team.warp * FixedFft<kLength>::kWords);
  float* power = shared + layout.power;
  int* live = reinterpret_cast<int*>(shared + layout.live);
  unsigned* masked = reinterpret_cast<unsigned*>(shared + layout.masked);
  const LaneTables<kLength, Team::lanes> tables(c, team.lane);
  for (int word = team.thread; 32 * word < c.out_bands; word += team.threads) {
    masked[word] = frequency_masks(c, clip, 32 * word);
  }
  for (int tile = 0; tile < layout.tiles && begin < c.out_frames; ++tile) {
    for (int f = team.thread; f < kFixedFrames; f += team.threads) live[f] = view.live(begin + f);
    team.sync();
    for (int f = team.warp; f < kFixedFrames; f += team.warps) {
      if (!live[f]) continue;
      float* column = power + f;
      if constexpr (kSides == 1) {
        fixed_spectrum<kLength>(view, team, tables, begin + f, points,
                                [&](int bin, float a, float b) {
                                  column[bin * kFixedStep] = a * a + b * b;
                                });
        if (!c.magnitude) continue;
        for (int bin = team.lane; bin < c.transform.bins; bin += Team::lanes) {
          column[bin * kFixedStep] = sqrtf(column[bin * kFixedStep]);
        }
      } else {
        const Place place = stretched(begin + f, view.rate);
        for (int side = 0; side < kSides; ++side) {
          fixed_spectrum<kLength>(
              view, team, tables, place.left + side, points, [&](int bin, float a, float b) {
                float& entry = column[bin * kFixedStep];
                if (side == 0) {
                  entry = magnitude(a, b);
                } else {
                  const float value = entry + (magnitude(a, b) - entry) * place.fraction;
                  entry = c.magnitude ? value : value * value;
                }
              });
        }
      }
    }
    team.sync();
    write_fixed_tile(view, team, begin, power, live, masked, out);
    begin += kFixedFrames;
    team.sync();
  }
}

// Calls f with the length of a fixed transform, 0 for others, and the number of a place's frames as
// constants.
template <class F>
void with_fixed_length(const Call& c, const F& f) {
  const auto sides = [&](auto length) {
    if (c.rates == nullptr) {
      f(length, std::integral_constant<int, 1>{});
    } else {
      f(length, std::integral_constant<int, 2>{});
    }
  };
  switch (c.transform.length) {
    case 128: return sides(std::integral_constant<int, 128>{});
    case 256: return sides(std::integral_constant<int, 256>{});
    case 512: return sides(std::integral_constant<int, 512>{});
    default: return sides(std::integral_constant<int, 0>{});
  }
}

}  // namespace musiclm_fast::spectrogram
