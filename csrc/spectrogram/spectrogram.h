// The spectrogram's inner maths, one source for the CPU's vectors and for a CUDA thread. Torch-free.
//
// V is float (one frame) or a vector of floats (as many frames as it has lanes): no step mixes
// lanes, so a frame's result does not depend on its neighbours.
//
// Two transforms share everything around them:
//   folded   few taps (win_length < 64): a direct DFT of the window's taps alone, folded about the
//            middle tap into even and odd parts (half the products) and, for even n_fft, giving the
//            bins f and n_fft/2 - f together (half again). Any n_fft.
//   fft      in place, mixed radix, decimation in frequency; a real frame of even n_fft is one
//            complex transform of half the length. Prime factors up to kMaxRadix.
// A power spectrum does not see where in the transform the window lies, so taps start at 0.
#pragma once

#include <cstdint>
#include <type_traits>

#ifdef __CUDACC__
#define MUSICLM_FAST_HD __host__ __device__ __forceinline__
// Of loops over arrays that a GPU is to keep in registers.
#define MUSICLM_FAST_UNROLL _Pragma("unroll")
// Of loops whose copies would need registers.
#define MUSICLM_FAST_NO_UNROLL _Pragma("unroll 1")
#else
#define MUSICLM_FAST_HD [[gnu::always_inline]] inline
#define MUSICLM_FAST_UNROLL
#define MUSICLM_FAST_NO_UNROLL
#endif

namespace musiclm_fast::spectrogram {

inline constexpr int kMaxFoldedTaps = 63;
// Lengths of the folded sums: few, so that a GPU keeps a frame's terms in registers.
inline constexpr int kFoldedTerms[] = {2, 8, 14, 20, 32};
inline constexpr int kMaxFoldedFft = 1 << 13;
inline constexpr int kMaxFft = 1 << 20;
inline constexpr int kMaxRadix = 31;
inline constexpr int kMaxStages = 32;

enum class PadMode : int { reflect = 0, constant = 1, replicate = 2, circular = 3 };

// Where frames lie in a clip. Positions are relative to the clip's first sample.
struct Framing {
  int64_t n_fft;
  int64_t taps;  // win_length
  int64_t hop;
  int64_t pad;    // zeros on both sides
  int64_t reach;  // n_fft / 2 if centred, else 0: padding outside of those zeros
  PadMode mode;   // of that padding

  // Frames of a clip of n samples.
  MUSICLM_FAST_HD int64_t frames(int64_t n) const {
    const int64_t room = n + 2 * (pad + reach) - n_fft;
    return room < 0 ? 0 : room / hop + 1;
  }

  // Position of a frame's first tap.
  MUSICLM_FAST_HD int64_t first(int64_t frame) const {
    return frame * hop + (n_fft - taps) / 2 - reach - pad;
  }

  // Positions before sample 0, and as many after the last, that frames may touch.
  MUSICLM_FAST_HD int64_t margin() const { return pad + reach; }

  // The sample that a position within the margins shows, -1 where it shows zero.
  MUSICLM_FAST_HD int64_t source(int64_t position, int64_t n) const {
    if (position >= 0 && position < n) return position;
    const int64_t padded = n + 2 * pad;
    int64_t at = position + pad;
    if (at >= 0 && at < padded) return -1;
    if (mode == PadMode::constant) return -1;
    if (mode == PadMode::reflect) at = at < 0 ? -at : 2 * (padded - 1) - at;
    if (mode == PadMode::circular) at += at < 0 ? padded : -padded;
    // replicate; and whatever a clip that is too short would ask for
    at = at < 0 ? 0 : at >= padded ? padded - 1 : at;
    at -= pad;
    return at >= 0 && at < n ? at : -1;
  }
};

// Where a stretched frame is read: between frames `left` and `left + 1`.
struct Place {
  int64_t left;
  float fraction;
};

MUSICLM_FAST_HD Place stretched(int64_t frame, double rate) {
  const double at = static_cast<double>(frame) * rate;
  const int64_t left = static_cast<int64_t>(at);
  return {left, static_cast<float>(at - static_cast<double>(left))};
}

// Whether i lies in one of `count` spans (start, end).
MUSICLM_FAST_HD bool in_spans(const int64_t* spans, int64_t count, int64_t i) {
  for (int64_t s = 0; s < count; ++s) {
    if (i >= spans[2 * s] && i < spans[2 * s + 1]) return true;
  }
  return false;
}

// One pass of the FFT over the whole array: butterflies of `radix` entries `span` apart.
struct Stage {
  int radix;
  int span;
  int shift;     // log2(span), or -1 where span is no power of two
  int twiddles;  // offset of (radix - 1, span) complex numbers e^(-2 pi i q j / (radix span))
  int roots;     // offset of `radix` complex numbers e^(-2 pi i k / radix), for odd radices above 5
};

// A transform: its tables lie in two arrays, so that they move to a device in two copies.
struct Transform {
  int n_fft;
  int taps;
  int bins;  // n_fft / 2 + 1
  bool folded;
  bool packed;  // fft: n_fft is even, entry n is (tap 2n, tap 2n + 1)
  int length;   // fft: complex entries
  int stages;
  Stage stage[kMaxStages];
  int split;  // packed: offset of length / 2 + 1 complex numbers (cos, sin)(2 pi k / n_fft)
  int terms;  // folded: taps / 2 + 1, rounded up to one of kFoldedTerms
  int rows;   // folded: rows of its table, each `terms` cosines, then `terms` sines
  int table;  // folded: its offset
  const float* numbers;
  const int32_t* order;  // fft: where frequency k lies afterwards
};

template <class V>
struct Complex {
  V re, im;
};

// Small transforms in place: a[k] <- sum_n a[n] e^(-2 pi i n k / R).
template <int R, class V>
MUSICLM_FAST_HD void small_dft(V* re, V* im) {
  if constexpr (R == 2) {
    const V r = re[1], i = im[1];
    re[1] = re[0] - r;
    im[1] = im[0] - i;
    re[0] = re[0] + r;
    im[0] = im[0] + i;
  } else if constexpr (R == 3) {
    constexpr float kSin = 0.866025403784438647f;  // sin(2 pi / 3)
    const V sr = re[1] + re[2], si = im[1] + im[2];
    const V dr = (re[1] - re[2]) * kSin, di = (im[1] - im[2]) * kSin;
    const V cr = re[0] - sr * 0.5f, ci = im[0] - si * 0.5f;
    re[0] = re[0] + sr;
    im[0] = im[0] + si;
    re[1] = cr + di;
    im[1] = ci - dr;
    re[2] = cr - di;
    im[2] = ci + dr;
  } else if constexpr (R == 4) {
    const V ar = re[0] + re[2], ai = im[0] + im[2], br = re[0] - re[2], bi = im[0] - im[2];
    const V cr = re[1] + re[3], ci = im[1] + im[3], dr = re[1] - re[3], di = im[1] - im[3];
    re[0] = ar + cr;
    im[0] = ai + ci;
    re[1] = br + di;
    im[1] = bi - dr;
    re[2] = ar - cr;
    im[2] = ai - ci;
    re[3] = br - di;
    im[3] = bi + dr;
  } else if constexpr (R == 5) {
    constexpr float kCos1 = 0.309016994374947424f, kCos2 = -0.809016994374947424f;
    constexpr float kSin1 = 0.951056516295153572f, kSin2 = 0.587785252292473129f;
    const V s1r = re[1] + re[4], s1i = im[1] + im[4], d1r = re[1] - re[4], d1i = im[1] - im[4];
    const V s2r = re[2] + re[3], s2i = im[2] + im[3], d2r = re[2] - re[3], d2i = im[2] - im[3];
    const V e1r = re[0] + s1r * kCos1 + s2r * kCos2, e1i = im[0] + s1i * kCos1 + s2i * kCos2;
    const V e2r = re[0] + s1r * kCos2 + s2r * kCos1, e2i = im[0] + s1i * kCos2 + s2i * kCos1;
    const V o1r = d1r * kSin1 + d2r * kSin2, o1i = d1i * kSin1 + d2i * kSin2;
    const V o2r = d1r * kSin2 - d2r * kSin1, o2i = d1i * kSin2 - d2i * kSin1;
    re[0] = re[0] + s1r + s2r;
    im[0] = im[0] + s1i + s2i;
    re[1] = e1r + o1i;
    im[1] = e1i - o1r;
    re[4] = e1r - o1i;
    im[4] = e1i + o1r;
    re[2] = e2r + o2i;
    im[2] = e2i - o2r;
    re[3] = e2r - o2i;
    im[3] = e2i + o2r;
  } else {
    static_assert(R == 8);
    constexpr float kHalf = 0.707106781186547524f;  // cos(pi / 4)
    V er[4] = {re[0] + re[4], re[1] + re[5], re[2] + re[6], re[3] + re[7]};
    V ei[4] = {im[0] + im[4], im[1] + im[5], im[2] + im[6], im[3] + im[7]};
    V dr[4] = {re[0] - re[4], re[1] - re[5], re[2] - re[6], re[3] - re[7]};
    V di[4] = {im[0] - im[4], im[1] - im[5], im[2] - im[6], im[3] - im[7]};
    // d[n] *= e^(-2 pi i n / 8)
    const V r1 = (dr[1] + di[1]) * kHalf, i1 = (di[1] - dr[1]) * kHalf;
    const V r3 = (di[3] - dr[3]) * kHalf, i3 = (dr[3] + di[3]) * -kHalf;
    const V r2 = di[2], i2 = V{} - dr[2];
    dr[1] = r1;
    di[1] = i1;
    dr[2] = r2;
    di[2] = i2;
    dr[3] = r3;
    di[3] = i3;
    small_dft<4>(er, ei);
    small_dft<4>(dr, di);
    for (int k = 0; k < 4; ++k) {
      re[2 * k] = er[k];
      im[2 * k] = ei[k];
      re[2 * k + 1] = dr[k];
      im[2 * k + 1] = di[k];
    }
  }
}

// Any odd radix; roots[k] = e^(-2 pi i k / radix).
template <class V>
MUSICLM_FAST_HD void odd_dft(V* re, V* im, int radix, const float* roots) {
  V sum_re[kMaxRadix / 2 + 1], sum_im[kMaxRadix / 2 + 1];
  V dif_re[kMaxRadix / 2 + 1], dif_im[kMaxRadix / 2 + 1];
  const int half = radix / 2;
  V all_re = re[0], all_im = im[0];
  for (int n = 1; n <= half; ++n) {
    sum_re[n] = re[n] + re[radix - n];
    sum_im[n] = im[n] + im[radix - n];
    dif_re[n] = re[n] - re[radix - n];
    dif_im[n] = im[n] - im[radix - n];
    all_re = all_re + sum_re[n];
    all_im = all_im + sum_im[n];
  }
  for (int k = 1; k <= half; ++k) {
    V er = re[0], ei = im[0], or_ = V{}, oi = V{};
    int at = 0;
    for (int n = 1; n <= half; ++n) {
      at += k;
      if (at >= radix) at -= radix;
      const float c = roots[2 * at], s = -roots[2 * at + 1];
      er = er + sum_re[n] * c;
      ei = ei + sum_im[n] * c;
      or_ = or_ + dif_re[n] * s;
      oi = oi + dif_im[n] * s;
    }
    re[k] = er + oi;
    im[k] = ei - or_;
    // entry radix - k of the input was read above into the sums, entry 0 not yet replaced
    re[radix - k] = er - oi;
    im[radix - k] = ei + or_;
  }
  re[0] = all_re;
  im[0] = all_im;
}

// Butterflies first, first + step, ... of one stage. They touch disjoint entries. An Array is
// anything indexed: a pointer, or a GPU's shared memory with gaps against bank conflicts.
template <int R, class Array>
MUSICLM_FAST_HD void run_stage(Array re, Array im, int length, const Stage& stage,
                               const float* numbers, int first, int step) {
  using V = std::remove_cvref_t<decltype(re[0])>;
  const int span = stage.span;
  const float* twiddles = numbers + stage.twiddles;
  for (int i = first; i < length / R; i += step) {
    const int block = stage.shift >= 0 ? i >> stage.shift : i / span;
    const int j = i - block * span, at = block * span * R + j;
    V a[R], b[R];
    for (int k = 0; k < R; ++k) {
      a[k] = re[at + k * span];
      b[k] = im[at + k * span];
    }
    small_dft<R>(a, b);
    re[at] = a[0];
    im[at] = b[0];
    for (int q = 1; q < R; ++q) {
      if (span > 1) {
        const float* w = twiddles + 2 * ((q - 1) * span + j);
        const float c = w[0], s = w[1];
        re[at + q * span] = a[q] * c - b[q] * s;
        im[at + q * span] = a[q] * s + b[q] * c;
      } else {
        re[at + q] = a[q];
        im[at + q] = b[q];
      }
    }
  }
}

template <class V>
MUSICLM_FAST_HD void run_odd_stage(V* re, V* im, int length, const Stage& stage,
                                   const float* numbers) {
  const int span = stage.span, radix = stage.radix;
  for (int i = 0; i < length / radix; ++i) {
    const int block = i / span, j = i - block * span, at = block * span * radix + j;
    V a[kMaxRadix], b[kMaxRadix];
    a[0] = re[at];  // apart: g++ does not know that a radix is not 0, and warns
    b[0] = im[at];
    for (int k = 1; k < radix; ++k) {
      a[k] = re[at + k * span];
      b[k] = im[at + k * span];
    }
    odd_dft(a, b, radix, numbers + stage.roots);
    re[at] = a[0];
    im[at] = b[0];
    for (int q = 1; q < radix; ++q) {
      const float* w = numbers + stage.twiddles + 2 * ((q - 1) * span + j);
      const float c = w[0], s = w[1];
      re[at + q * span] = a[q] * c - b[q] * s;
      im[at + q * span] = a[q] * s + b[q] * c;
    }
  }
}

// One thread's share of a stage, butterflies first, first + step, ...; false for an odd radix above
// 5, of which it does nothing.
template <class Array>
MUSICLM_FAST_HD bool small_stage(Array re, Array im, const Transform& t, const Stage& stage,
                                 int first, int step) {
  switch (stage.radix) {
    case 2: run_stage<2>(re, im, t.length, stage, t.numbers, first, step); return true;
    case 3: run_stage<3>(re, im, t.length, stage, t.numbers, first, step); return true;
    case 4: run_stage<4>(re, im, t.length, stage, t.numbers, first, step); return true;
    case 5: run_stage<5>(re, im, t.length, stage, t.numbers, first, step); return true;
    case 8: run_stage<8>(re, im, t.length, stage, t.numbers, first, step); return true;
    default: return false;
  }
}

template <class V>
MUSICLM_FAST_HD void fft_stage(V* re, V* im, const Transform& t, int index) {
  const Stage& stage = t.stage[index];
  if (!small_stage(re, im, t, stage, 0, 1)) run_odd_stage(re, im, t.length, stage, t.numbers);
}

// Packed transform: two bins of the real frame from two entries of the half-length one.
//   X[k] = E + W O, X[H - k] = conj(E - W O) with E = z_k + conj(z_m), O = -i (z_k - conj(z_m)),
// z_m = z[(H - k) mod H] and W = c - i s. The frame was halved beforehand.
template <class V>
struct BinPair {
  Complex<V> low, high;
};

template <class V>
MUSICLM_FAST_HD BinPair<V> split_pair(Complex<V> zk, Complex<V> zm, float c, float s) {
  const V even_re = zk.re + zm.re, even_im = zk.im - zm.im;
  const V odd_re = zk.im + zm.im, odd_im = zm.re - zk.re;
  const V turned_re = odd_re * c + odd_im * s, turned_im = odd_im * c - odd_re * s;
  return {{even_re + turned_re, even_im + turned_im}, {even_re - turned_re, turned_im - even_im}};
}

// Its adjoint: gradients of z_k (low) and z_m (high) from those of X[k] and X[H - k].
template <class V>
MUSICLM_FAST_HD BinPair<V> split_pair_adjoint(Complex<V> xk, Complex<V> xm, float c, float s) {
  const V even_re = xk.re + xm.re, even_im = xk.im - xm.im;
  const V turned_re = xk.re - xm.re, turned_im = xk.im + xm.im;
  const V odd_re = turned_re * c - turned_im * s, odd_im = turned_im * c + turned_re * s;
  return {{even_re - odd_im, even_im + odd_re}, {even_re + odd_im, odd_re - even_im}};
}

// Folded transform: kRows rows of the table at once, so that a term is read once for all.
//   even_re = sum over even m of e[m] cos, odd_re over odd m; even_im, odd_im with o[m] and sin
template <class V>
struct FoldedSums {
  V even_re, odd_re, even_im, odd_im;
};

// Terms are anything indexed.
template <int kRows, int kTerms = 0, class Terms, class V>
MUSICLM_FAST_HD void folded_sums(const Terms& e, const Terms& o, int terms, const float* table,
                                 FoldedSums<V>* sums) {
  if constexpr (kTerms > 0) terms = kTerms;
  FoldedSums<V> total[kRows];
  for (int r = 0; r < kRows; ++r) total[r] = {V{}, V{}, V{}, V{}};
  MUSICLM_FAST_UNROLL
  for (int m = 0; m < terms; m += 2) {
    for (int r = 0; r < kRows; ++r) {
      const float* cosines = table + r * 2 * terms;
      const float* sines = cosines + terms;
      total[r].even_re = total[r].even_re + e[m] * cosines[m];
      total[r].even_im = total[r].even_im + o[m] * sines[m];
      total[r].odd_re = total[r].odd_re + e[m + 1] * cosines[m + 1];
      total[r].odd_im = total[r].odd_im + o[m + 1] * sines[m + 1];
    }
  }
  for (int r = 0; r < kRows; ++r) sums[r] = total[r];
}

// Bins f and n_fft / 2 - f (for even n_fft) of a row, up to a common phase.
template <class V>
MUSICLM_FAST_HD BinPair<V> folded_pair(const FoldedSums<V>& s) {
  return {{s.even_re + s.odd_re, s.even_im + s.odd_im},
          {s.even_re - s.odd_re, s.odd_im - s.even_im}};
}

template <class V>
MUSICLM_FAST_HD FoldedSums<V> folded_pair_adjoint(Complex<V> low, Complex<V> high) {
  return {low.re + high.re, low.re - high.re, low.im - high.im, low.im + high.im};
}

template <int kRows, int kTerms = 0, class V>
MUSICLM_FAST_HD void folded_sums_adjoint(const FoldedSums<V>* sums, int terms, const float* table,
                                         V* e, V* o) {
  if constexpr (kTerms > 0) terms = kTerms;
  MUSICLM_FAST_UNROLL
  for (int m = 0; m < terms; m += 2) {
    V e0 = e[m], e1 = e[m + 1], o0 = o[m], o1 = o[m + 1];
    for (int r = 0; r < kRows; ++r) {
      const float* cosines = table + r * 2 * terms;
      const float* sines = cosines + terms;
      e0 = e0 + sums[r].even_re * cosines[m];
      o0 = o0 + sums[r].even_im * sines[m];
      e1 = e1 + sums[r].odd_re * cosines[m + 1];
      o1 = o1 + sums[r].odd_im * sines[m + 1];
    }
    e[m] = e0;
    e[m + 1] = e1;
    o[m] = o0;
    o[m + 1] = o1;
  }
}

// One call: inputs and parameters of forward and backward. Null pointers are absent arguments.
struct Call {
  Framing framing;
  Transform transform;
  const float* wav;
  int64_t clips, samples, clip_stride, sample_stride;
  const int64_t* lengths;  // (clips)
  const float* window;     // (taps)
  bool magnitude;          // |X|, else |X|^2
  const double* rates;     // of the time stretch, one or one per clip
  int64_t rate_step;       // 0 or 1
  const float* mel;        // (bins, bands)
  int64_t mel_bin_stride, mel_band_stride;
  const int32_t* mel_ranges;  // (bands, 2): first bin and last + 1 with a weight
  const int32_t* mel_bands;   // (bins, 2): first band and last + 1 with a weight; CUDA only
  int bands;                  // bins without mel
  bool logarithm;
  float log_offset, mean, scale;  // ln(x + log_offset), (x - mean) * scale
  const int64_t* freq_spans;      // (one or clips, freq_count, 2)
  int64_t freq_count, freq_step;  // freq_step: entries from one clip's spans to the next's
  const int64_t* time_spans;
  int64_t time_count, time_step;
  float mask_value;
  int64_t out_bands, out_frames;

  // Samples of a clip; within the tensor whatever the caller's lengths say.
  MUSICLM_FAST_HD int64_t length(int64_t clip) const {
    const int64_t n = lengths == nullptr ? samples : lengths[clip];
    return n < 0 ? 0 : n > samples ? samples : n;
  }
};

}  // namespace musiclm_fast::spectrogram
