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

  MUSICLM_FAST_BLOCK Point load_window(int n) const {
    return {2 * n < taps_ ? window_[2 * n] : 0.0f, 2 * n + 1 < taps_ ? window_[2 * n + 1] : 0.0f};
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
        kept_window_[i][k] = load_window(j + k * Fft::kSpan);
        if (k > 0) kept_first_[i][k] = first_[(k - 1) * Fft::kSpan + j];
      }
    }
    MUSICLM_FAST_UNROLL
    for (int i = 0; i < kSecond; ++i) {
      const int j = Fft::column((lane + i * kLanes) % Fft::kSecondTasks);
      MUSICLM_FAST_UNROLL
      for (int q = 1; q < Fft::kSecond; ++q) {
        kept_second_[i][q] = second_[(q - 1) * Fft::kThird + j];
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
  // Half the window's values for entry n = j + k * kSpan of the packed frame.
  MUSICLM_FAST_BLOCK Point window(int i, int j, int k) const {
    if constexpr (kKeep) return kept_window_[i][k];
    return load_window(j + k * Fft::kSpan);
  }
  MUSICLM_FAST_BLOCK Point first(int i, int j, int q) const {
    if constexpr (kKeep) return kept_first_[i][q];
    return first_[(q - 1) * Fft::kSpan + j];
  }
  MUSICLM_FAST_BLOCK Point second(int i, int j, int q) const {
    if constexpr (kKeep) return kept_second_[i][q];
    return second_[(q - 1) * Fft::kThird + j];
  }
  MUSICLM_FAST_BLOCK Point split(int i, int task, int pair) const {
    if constexpr (kKeep) return kept_split_[i][pair];
    return split_point(task, pair);
  }
};

// First two passes of a warp's transform of one frame, and their exchanges.
template <int kLength, class Team>
MUSICLM_FAST_BLOCK void fixed_passes(const ClipView& view, const Team& team,
                                     const LaneTables<kLength, Team::lanes>& tables, int64_t frame,
                                     Point* points) {
  using Fft = FixedFft<kLength>;
  const int taps = view.c.transform.taps;
  const int64_t start = view.c.framing.first(frame);
  const bool silent = frame >= view.frames;  // only a stretch asks for such a frame
  const bool inside =
      !silent && start >= 0 && start + taps <= view.samples && view.c.sample_stride == 1;
  const float* wav = view.wav + start;
  const bool direct = inside && reinterpret_cast<uintptr_t>(wav) % sizeof(Point) == 0;
  if (!direct) {  // gather the taps first, in the order of the packed frame
    float* gathered = reinterpret_cast<float*>(points);
    for (int n = team.lane; n < taps; n += Team::lanes) {
      gathered[n] = silent ? 0.0f : inside ? wav[n] : view.sample(start + n);
    }
    wav = gathered;
    team.sync_warp();
  }
  constexpr int kTasks = per_lane(Fft::kFirstTasks, Team::lanes);
  float all_re[kTasks][Fft::kFirst], all_im[kTasks][Fft::kFirst];
  MUSICLM_FAST_UNROLL
  for (int i = 0; i < kTasks; ++i) {
    const int j = team.lane + i * Team::lanes;
    const bool mine = Fft::kFirstTasks % Team::lanes == 0 || j < Fft::kFirstTasks;
    MUSICLM_FAST_UNROLL
    for (int k = 0; k < Fft::kFirst; ++k) {
      const int n = 2 * (j + k * Fft::kSpan);
      Point x{0.0f, 0.0f};
      if (mine && n + 1 < taps) {
        x = *reinterpret_cast<const Point*>(wav + n);
      } else if (mine && n < taps) {
        x.re = wav[n];
      }
      all_re[i][k] = x.re;
      all_im[i][k] = x.im;
    }
  }
  if (!direct) team.sync_warp();
  MUSICLM_FAST_UNROLL
  for (int i = 0; i < kTasks; ++i) {
    const int j = team.lane + i * Team::lanes;
    if (Fft::kFirstTasks % Team::lanes != 0 && j >= Fft::kFirstTasks) continue;
    float *re = all_re[i], *im = all_im[i];
    MUSICLM_FAST_UNROLL
    for (int k = 0; k < Fft::kFirst; ++k) {
      const Point w = tables.window(i, j, k);
      re[k] *= 0.5f * w.re;
      im[k] *= 0.5f * w.im;
    }
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
  fixed_passes<kLength>(view, team, tables, frame, points);
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

inline constexpr int kFixedFrames = 32;  // a tile's frames make whole cache lines of output
inline constexpr int kFixedStep = kFixedFrames + 1;

// Words of shared memory: each warp's points, the tile's power (bins, kFixedStep), and the masks.
struct FixedLayout {
  int warps, points, power, live, masked;
  int64_t total;

  static FixedLayout make(const Call& c, int warps) {
    FixedLayout l{warps, c.transform.length * 2 + 32, 0, 0, 0, 0};  // 2 * kFirst gaps
    l.power = warps * l.points;
    l.live = l.power + c.transform.bins * kFixedStep;
    l.masked = l.live + kFixedFrames;
    l.total = l.masked + c.out_bands;
    return l;
  }
};

// Writes a tile of finished bands: a warp per band, a lane per frame.
template <class Team>
MUSICLM_FAST_BLOCK void write_fixed_tile(const ClipView& view, const Team& team, int64_t begin,
                                         const float* power, const float* live,
                                         const float* masked, float* out) {
  const Call& c = view.c;
  const int bands = static_cast<int>(c.out_bands);
  for (int f = team.lane; f < kFixedFrames; f += Team::lanes) {
    const int64_t frame = begin + f;
    if (frame >= c.out_frames) continue;
    const bool computed = live[f] != 0.0f;
    const float other = frame < view.frames ? c.mask_value : 0.0f;
    float* to = out + (view.clip * c.out_bands + team.warp) * c.out_frames + frame;
    const int64_t step = team.warps * c.out_frames;
    const float* own = power + f;
    const auto rows = [&](auto logarithm) {
      for (int band = team.warp; band < bands; band += team.warps) {
        float value = other;
        if (computed && masked[band] == 0.0f) {
          value = view.band_value(band, own, kFixedStep);
          if constexpr (logarithm()) value = logf(value + c.log_offset);
          value = (value - c.mean) * c.scale;
        }
        *to = value;
        to += step;
      }
    };
    if (c.logarithm) {
      rows(std::true_type{});
    } else {
      rows(std::false_type{});
    }
  }
}

template <int kLength, int kSides, class Team>
MUSICLM_FAST_BLOCK void forward_fixed(const Call& c, const Team& team, int64_t clip, int64_t begin,
                                      const FixedLayout& layout, float* shared, float* out) {
  const ClipView view(c, clip);
  Point* points = reinterpret_cast<Point*>(shared + team.warp * FixedFft<kLength>::kWords);
  float* power = shared + layout.power;
  float *live = shared + layout.live, *masked = shared + layout.masked;
  const LaneTables<kLength, Team::lanes> tables(c, team.lane);
  for (int f = team.thread; f < kFixedFrames; f += team.threads) {
    live[f] = view.live(begin + f) ? 1.0f : 0.0f;
  }
  for (int band = team.thread; band < c.out_bands; band += team.threads) {
    masked[band] = frequency_masked(c, clip, band) ? 1.0f : 0.0f;
  }
  team.sync();
  for (int f = team.warp; f < kFixedFrames; f += team.warps) {
    if (live[f] == 0.0f) continue;
    float* column = power + f;
    Place place{begin + f, 0.0f};
    if constexpr (kSides == 2) place = stretched(begin + f, view.rate);
    for (int side = 0; side < kSides; ++side) {
      fixed_spectrum<kLength>(
          view, team, tables, place.left + side, points, [&](int bin, float a, float b) {
            float& entry = column[bin * kFixedStep];
            if constexpr (kSides == 1) {
              entry = c.magnitude ? magnitude(a, b) : a * a + b * b;
            } else if (side == 0) {
              entry = magnitude(a, b);
            } else {
              const float value = entry + (magnitude(a, b) - entry) * place.fraction;
              entry = c.magnitude ? value : value * value;
            }
          });
    }
  }
  team.sync();
  write_fixed_tile(view, team, begin, power, live, masked, out);
}

// Calls f with the length of a fixed transform and the number of a place's frames as constants.
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
    default: return sides(std::integral_constant<int, 512>{});
  }
}

}  // namespace musiclm_fast::spectrogram
