#include "common/arena.h"
#include "common/simd.h"
#include "spectrogram/cpu.h"

namespace musiclm_fast::MUSICLM_FAST_SIMD_NS {
namespace {

using spectrogram::BinPair;
using spectrogram::Call;
using spectrogram::Complex;
using spectrogram::FoldedSums;
using spectrogram::Framing;
using spectrogram::Transform;

// Rows of the folded table that are worked on together: four sums each, all in registers.
constexpr int kRows = kWidth == 16 ? 4 : 2;

constexpr int64_t padded(int64_t n) { return round_up(n, kWidth); }

MUSICLM_FAST_INLINE vfloat vsqrt(vfloat x) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  return (vfloat)_mm256_sqrt_ps((__m256)x);
#else
  for (int i = 0; i < kWidth; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

// ln(x) within 2 units in the last place; -inf at 0, NaN below and where x is NaN.
MUSICLM_FAST_INLINE vfloat vlog(vfloat x) {
  const vfloat smallest = vset(1.17549435e-38f);
  const vfloat y = x < smallest ? x * 8388608.0f : x;  // a denormal times 2^23
  const vint bits = (vint)y;
  vfloat e = __builtin_convertvector((bits >> 23) - 126, vfloat);
  e = x < smallest ? e - 23.0f : e;
  vfloat m = (vfloat)((bits & 0x007fffff) | 0x3f000000);  // y = m * 2^e, m in [0.5, 1)
  const vint low = m < vset(0.707106781f);
  e = low ? e - 1.0f : e;
  m = (low ? m + m : m) - 1.0f;
  // Cephes' logf: ln(1 + m) = m - m^2 / 2 + m^3 p(m)
  const vfloat z = m * m;
  vfloat p = vset(7.0376836292e-2f);
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  // e ln(2), with ln(2) in two parts so that e times the first is exact
  vfloat result = p * m * z - e * 2.12194440e-4f - z * 0.5f + m + e * 0.693359375f;
  result = x < vset(kInfinity) ? result : x;  // infinity, NaN
  result = x > vzero() ? result : x == vzero() ? vset(-kInfinity) : x - x + __builtin_nanf("");
  return result;
}

// 1 / |X|, 0 where X is 0: the gradient of a magnitude at 0 is 0.
MUSICLM_FAST_INLINE vfloat inverse_or_zero(vfloat x) { return x > vzero() ? 1.0f / x : vzero(); }

// Frames of one group, one per lane. Lanes from `count` on repeat the last.
struct Group {
  int64_t frame[kWidth];
  int count;
};

struct Scratch {
  uint8_t* band_live;  // (bands): inside the crop and not masked
  uint8_t* bin_live;   // (bins): a live band needs it
  float* rows;         // (kWidth, padded taps)
  vfloat *re, *im;     // transform, or the taps and their even and odd parts
  vfloat *even, *odd;
  vfloat* power;     // (bins)
  vfloat* right;     // stretched, forward: magnitudes of the right frames, (bins)
  vfloat* x[2][2];   // backward: spectra of the left and right frame, re and im, (bins) each
  vfloat* slope;     // backward: gradient of power, (bins)
  float* segment;    // backward: gradient of positions
  int64_t bytes;

  Scratch(const Call& c, char* memory, int64_t segment_length) {
    const Transform& t = c.transform;
    const bool backward = segment_length > 0;
    Arena arena{memory};
    band_live = arena.take<uint8_t>(c.bands);
    bin_live = arena.take<uint8_t>(t.bins);
    rows = arena.take<float>(kWidth * padded(t.taps));
    const int64_t length = t.folded ? padded(t.taps) : t.length > t.taps ? t.length : t.taps;
    re = arena.take<vfloat>(length);
    im = arena.take<vfloat>(t.folded ? 0 : length);
    even = arena.take<vfloat>(t.folded ? t.terms : 0);
    odd = arena.take<vfloat>(t.folded ? t.terms : 0);
    power = arena.take<vfloat>(t.bins);
    right = arena.take<vfloat>(c.rates != nullptr && !backward ? t.bins : 0);
    for (int side = 0; side < 2; ++side) {
      const bool used = backward && (side == 0 || c.rates != nullptr);
      x[side][0] = arena.take<vfloat>(used ? t.bins : 0);
      x[side][1] = arena.take<vfloat>(used ? t.bins : 0);
    }
    slope = arena.take<vfloat>(backward ? t.bins : 0);
    segment = arena.take<float>(segment_length);
    bytes = arena.used;
  }
};

class Kernel {
 public:
  Kernel(const Call& call, int64_t clip, const Scratch& scratch)
      : c(call), t(call.transform), s(scratch), clip(clip) {
    samples = c.length(clip);
    frames = c.framing.frames(samples);
    wav = c.wav + clip * c.clip_stride;
    rate = c.rates == nullptr ? 1.0 : c.rates[clip * c.rate_step];
    const int64_t* spans = c.freq_spans + clip * c.freq_step;
    for (int bin = 0; bin < t.bins; ++bin) s.bin_live[bin] = 0;
    for (int band = 0; band < c.bands; ++band) {
      const bool live = band < c.out_bands && !spectrogram::in_spans(spans, c.freq_count, band);
      s.band_live[band] = live;
      if (!live) continue;
      const int first = c.mel == nullptr ? band : c.mel_ranges[2 * band];
      const int last = c.mel == nullptr ? band + 1 : c.mel_ranges[2 * band + 1];
      for (int bin = first; bin < last; ++bin) s.bin_live[bin] = 1;
    }
  }

  void forward(int64_t begin, int64_t end, float* out) {
    out += clip * c.out_bands * c.out_frames;
    const int64_t own = frames < begin ? begin : frames < end ? frames : end;
    for (int64_t band = 0; band < c.out_bands; ++band) {
      float* row = out + band * c.out_frames;
      for (int64_t f = own; f < end; ++f) row[f] = 0.0f;
      if (s.band_live[band]) continue;
      for (int64_t f = begin; f < own; ++f) row[f] = c.mask_value;
    }
    for (int64_t f = begin; f < own;) {
      const bool masked = time_masked(f);
      int64_t stop = f + 1;
      while (stop < own && time_masked(stop) == masked) ++stop;
      if (masked) {
        for (int64_t band = 0; band < c.out_bands; ++band) {
          float* row = out + band * c.out_frames;
          for (int64_t i = f; i < stop && s.band_live[band]; ++i) row[i] = c.mask_value;
        }
      } else {
        for (int64_t i = f; i < stop; i += kWidth) {
          forward_group(i, static_cast<int>(stop - i < kWidth ? stop - i : kWidth), out);
        }
      }
      f = stop;
    }
  }

  void backward(const float* grad, int64_t begin, int64_t end, float* grad_wav, float* margins) {
    grad += clip * c.out_bands * c.out_frames;
    segment_begin = begin;
    segment_end = end;
    for (int64_t i = 0; i < end - begin; ++i) s.segment[i] = 0.0f;
    const int64_t own = frames < c.out_frames ? frames : c.out_frames;
    // frames that touch the segment, then the places that read those frames
    int64_t low = floor_div(begin - c.framing.first(0) - t.taps, c.framing.hop) + 1;
    int64_t high = floor_div(end - 1 - c.framing.first(0), c.framing.hop);
    if (c.rates != nullptr) {
      low = static_cast<int64_t>(static_cast<double>(low - 1) / rate) - 2;
      const double last = static_cast<double>(high + 1) / rate + 2.0;
      high = last < static_cast<double>(own) ? static_cast<int64_t>(last) : own - 1;
    }
    low = low < 0 ? 0 : low;
    high = high < own ? high : own - 1;
    for (int64_t f = low; f <= high;) {
      const bool masked = time_masked(f);
      int64_t stop = f + 1;
      while (stop <= high && time_masked(stop) == masked) ++stop;
      for (int64_t i = f; i < stop && !masked; i += kWidth) {
        backward_group(i, static_cast<int>(stop - i < kWidth ? stop - i : kWidth), grad);
      }
      f = stop;
    }
    const int64_t margin = c.framing.margin();
    for (int64_t i = begin; i < end; ++i) {
      const float value = s.segment[i - begin];
      if (i < 0) {
        margins[i + margin] = value;
      } else if (i < samples) {
        grad_wav[i] = value;
      } else {
        margins[i - samples + margin] = value;
      }
    }
  }

 private:
  static int64_t floor_div(int64_t a, int64_t b) {
    return a >= 0 ? a / b : -((-a + b - 1) / b);
  }

  bool time_masked(int64_t frame) const {
    return spectrogram::in_spans(c.time_spans + clip * c.time_step, c.time_count, frame);
  }

  static Group group(int64_t first, int count) {
    Group g{{}, count};
    for (int lane = 0; lane < kWidth; ++lane) {
      g.frame[lane] = first + (lane < count ? lane : count - 1);
    }
    return g;
  }

  // The left frames that a stretched group is read from, and how far to the right ones.
  Group stretched(Group g, vfloat* fraction) const {
    for (int lane = 0; lane < kWidth; ++lane) {
      const spectrogram::Place place = spectrogram::stretched(g.frame[lane], rate);
      g.frame[lane] = place.left;
      (*fraction)[lane] = place.fraction;
    }
    return g;
  }

  // Pointers to the frames' taps: into the clip where they lie inside it, else copied.
  // Reads of up to a vector's width beyond the taps are within reach of every pointer.
  void tap_rows(const Group& g, const float** rows) const {
    const int64_t width = padded(t.taps);
    for (int lane = 0; lane < kWidth; ++lane) {
      const int64_t frame = g.frame[lane], first = c.framing.first(frame);
      // frames beyond the clip's own, which only a stretch asks for, are silent: uncentred, the
      // window of one may still lie inside the clip, though its n_fft samples do not
      const bool silent = frame >= frames;
      if (!silent && c.sample_stride == 1 && first >= 0 && first + t.taps <= samples &&
          first + width <= c.samples) {
        rows[lane] = wav + first;
        continue;
      }
      float* row = s.rows + lane * width;
      rows[lane] = row;
      for (int64_t i = 0; i < width; ++i) {
        const int64_t at = i < t.taps && !silent ? c.framing.source(first + i, samples) : -1;
        row[i] = at < 0 ? 0.0f : wav[at * c.sample_stride];
      }
    }
  }

  // Calls store(tap, values of all lanes), window applied, for every tap.
  template <class Store>
  MUSICLM_FAST_INLINE void load_taps(const Group& g, float scale, Store store) const {
    const float* rows[kWidth];
    tap_rows(g, rows);
    for (int first = 0; first < t.taps; first += kWidth) {
      vfloat block[kWidth];
      for (int lane = 0; lane < kWidth; ++lane) block[lane] = vload(rows[lane] + first);
      transpose(block);
      const int count = t.taps - first < kWidth ? t.taps - first : kWidth;
      for (int i = 0; i < count; ++i) store(first + i, block[i] * (c.window[first + i] * scale));
    }
  }

  // Spectra of a group: emit(bin, re, im) once for every live bin and perhaps others.
  template <class Emit>
  MUSICLM_FAST_INLINE void spectra(const Group& g, Emit emit) const {
    if (t.folded) {
      folded_spectra(g, emit);
    } else {
      fft_spectra(g, emit);
    }
  }

  template <class Emit>
  void folded_spectra(const Group& g, Emit emit) const {
    load_taps(g, 1.0f, [&](int tap, vfloat value) { s.re[tap] = value; });
    const int middle = t.taps / 2;
    for (int m = 0; m < t.terms; ++m) {
      const vfloat after = middle + m < t.taps ? s.re[middle + m] : vzero();
      const vfloat before = m > 0 && m <= middle ? s.re[middle - m] : vzero();
      s.even[m] = after + before;
      s.odd[m] = after - before;
    }
    const int half = t.n_fft % 2 == 0 ? t.n_fft / 2 : -1;
    for (int row = 0; row < t.rows; row += kRows) {
      const int count = t.rows - row < kRows ? t.rows - row : kRows;
      bool live = false;
      for (int i = row; i < row + count; ++i) {
        live |= s.bin_live[i] || (half >= 0 && s.bin_live[half - i]);
      }
      if (!live) continue;
      const float* table = t.numbers + t.table + row * 2 * t.terms;
      FoldedSums<vfloat> sums[kRows];
      if (count == kRows) {
        spectrogram::folded_sums<kRows>(s.even, s.odd, t.terms, table, sums);
      } else {
        for (int i = 0; i < count; ++i) {
          spectrogram::folded_sums<1>(s.even, s.odd, t.terms, table + i * 2 * t.terms, sums + i);
        }
      }
      for (int i = 0; i < count; ++i) {
        const BinPair<vfloat> pair = spectrogram::folded_pair(sums[i]);
        emit(row + i, pair.low.re, pair.low.im);
        const int mate = half - row - i;
        if (half >= 0 && mate != row + i) emit(mate, pair.high.re, pair.high.im);
      }
    }
  }

  // Packed transform: even taps are real parts, odd ones imaginary. A call, because g++ 12 with
  // -fsanitize=undefined compiles (a ? b : c)[i / 2] wrong; see the op's README.
  MUSICLM_FAST_INLINE vfloat* packed_part(int tap) const { return tap % 2 == 0 ? s.re : s.im; }

  void fft(vfloat* re, vfloat* im) const {
    for (int stage = 0; stage < t.stages; ++stage) {
      spectrogram::fft_stage(re, im, t, stage);
    }
  }

  template <class Emit>
  void fft_spectra(const Group& g, Emit emit) const {
    if (!t.packed) {
      load_taps(g, 1.0f, [&](int tap, vfloat value) { s.re[tap] = value; });
      for (int n = t.taps; n < t.length; ++n) s.re[n] = vzero();
      for (int n = 0; n < t.length; ++n) s.im[n] = vzero();
      fft(s.re, s.im);
      for (int bin = 0; bin < t.bins; ++bin) {
        if (s.bin_live[bin]) emit(bin, s.re[t.order[bin]], s.im[t.order[bin]]);
      }
      return;
    }
    for (int n = t.taps / 2; n < t.length; ++n) s.re[n] = s.im[n] = vzero();
    load_taps(g, 0.5f, [&](int tap, vfloat value) { packed_part(tap)[tap / 2] = value; });
    fft(s.re, s.im);
    const float* turns = t.numbers + t.split;
    for (int k = 0; k <= t.length / 2; ++k) {
      const int m = t.length - k;
      if (!s.bin_live[k] && !s.bin_live[m]) continue;
      const int at_k = t.order[k], at_m = t.order[k == 0 ? 0 : m];
      const BinPair<vfloat> pair =
          spectrogram::split_pair<vfloat>({s.re[at_k], s.im[at_k]}, {s.re[at_m], s.im[at_m]},
                                          turns[2 * k], turns[2 * k + 1]);
      emit(k, pair.low.re, pair.low.im);
      if (m != k) emit(m, pair.high.re, pair.high.im);
    }
  }

  void magnitudes(const Group& g, vfloat* into) const {
    spectra(g, [&](int bin, vfloat re, vfloat im) { into[bin] = vsqrt(re * re + im * im); });
  }

  // Power (or magnitude) of a group's frames at the live bins.
  void powers(Group g, vfloat* power) const {
    if (c.rates == nullptr && c.magnitude) return magnitudes(g, power);
    if (c.rates == nullptr) {
      return spectra(g, [&](int bin, vfloat re, vfloat im) { power[bin] = re * re + im * im; });
    }
    vfloat fraction;
    g = stretched(g, &fraction);
    magnitudes(g, power);
    for (int lane = 0; lane < kWidth; ++lane) ++g.frame[lane];
    magnitudes(g, s.right);
    for (int bin = 0; bin < t.bins; ++bin) {
      const vfloat value = power[bin] + (s.right[bin] - power[bin]) * fraction;
      power[bin] = c.magnitude ? value : value * value;
    }
  }

  // A band's value before the logarithm.
  vfloat band_value(int64_t band, const vfloat* power) const {
    if (c.mel == nullptr) return power[band];
    const float* weight = c.mel + band * c.mel_band_stride;
    vfloat sum = vzero();
    for (int bin = c.mel_ranges[2 * band]; bin < c.mel_ranges[2 * band + 1]; ++bin) {
      sum += power[bin] * weight[bin * c.mel_bin_stride];
    }
    return sum;
  }

  void forward_group(int64_t first, int count, float* out) const {
    powers(group(first, count), s.power);
    for (int64_t band = 0; band < c.out_bands; ++band) {
      if (!s.band_live[band]) continue;
      vfloat value = band_value(band, s.power);
      if (c.logarithm) value = vlog(value + c.log_offset);
      value = (value - c.mean) * c.scale;
      float* at = out + band * c.out_frames + first;
      if (count == kWidth) {
        vstore(at, value);
      } else {
        vstore_partial(at, value, count);
      }
    }
  }

  // Gradient of the power at every bin into s.slope.
  void power_gradient(int64_t first, int count, const float* grad) const {
    for (int bin = 0; bin < t.bins; ++bin) s.slope[bin] = vzero();
    for (int64_t band = 0; band < c.out_bands; ++band) {
      if (!s.band_live[band]) continue;
      vfloat g = vload_partial(grad + band * c.out_frames + first, count) * c.scale;
      if (c.logarithm) g /= band_value(band, s.power) + c.log_offset;
      if (c.mel == nullptr) {
        s.slope[band] = g;
        continue;
      }
      const float* weight = c.mel + band * c.mel_band_stride;
      for (int bin = c.mel_ranges[2 * band]; bin < c.mel_ranges[2 * band + 1]; ++bin) {
        s.slope[bin] += g * weight[bin * c.mel_bin_stride];
      }
    }
  }

  void backward_group(int64_t first, int count, const float* grad) const {
    Group left = group(first, count);
    vfloat fraction = vzero();
    if (c.rates != nullptr) left = stretched(left, &fraction);
    Group right = left;
    for (int lane = 0; lane < kWidth; ++lane) ++right.frame[lane];
    const int sides = c.rates == nullptr ? 1 : 2;
    for (int side = 0; side < sides; ++side) {
      vfloat *re = s.x[side][0], *im = s.x[side][1];
      for (int bin = 0; bin < t.bins; ++bin) re[bin] = im[bin] = vzero();
      spectra(side == 0 ? left : right, [&](int bin, vfloat a, vfloat b) {
        re[bin] = a;
        im[bin] = b;
      });
    }
    vfloat *re = s.x[0][0], *im = s.x[0][1];
    if (sides == 1) {
      for (int bin = 0; bin < t.bins; ++bin) {
        const vfloat power = re[bin] * re[bin] + im[bin] * im[bin];
        s.power[bin] = c.magnitude ? vsqrt(power) : power;
      }
      power_gradient(first, count, grad);
      for (int bin = 0; bin < t.bins; ++bin) {
        const vfloat slope = c.magnitude ? s.slope[bin] * inverse_or_zero(s.power[bin])
                                         : s.slope[bin] * 2.0f;
        re[bin] *= slope;
        im[bin] *= slope;
      }
      return scatter(left);
    }
    vfloat *other_re = s.x[1][0], *other_im = s.x[1][1];
    for (int bin = 0; bin < t.bins; ++bin) {
      const vfloat a = vsqrt(re[bin] * re[bin] + im[bin] * im[bin]);
      const vfloat b = vsqrt(other_re[bin] * other_re[bin] + other_im[bin] * other_im[bin]);
      const vfloat value = a + (b - a) * fraction;
      s.power[bin] = c.magnitude ? value : value * value;
    }
    power_gradient(first, count, grad);
    for (int bin = 0; bin < t.bins; ++bin) {
      const vfloat a = vsqrt(re[bin] * re[bin] + im[bin] * im[bin]);
      const vfloat b = vsqrt(other_re[bin] * other_re[bin] + other_im[bin] * other_im[bin]);
      const vfloat value = a + (b - a) * fraction;
      const vfloat slope = c.magnitude ? s.slope[bin] : s.slope[bin] * value * 2.0f;
      const vfloat to_left = slope * (1.0f - fraction) * inverse_or_zero(a);
      const vfloat to_right = slope * fraction * inverse_or_zero(b);
      re[bin] *= to_left;
      im[bin] *= to_left;
      other_re[bin] *= to_right;
      other_im[bin] *= to_right;
    }
    scatter(left);
    for (int bin = 0; bin < t.bins; ++bin) {
      re[bin] = other_re[bin];
      im[bin] = other_im[bin];
    }
    scatter(right);
  }

  // Gradients of a group's spectra, in s.x[0], to its taps and onto the segment, frame by frame.
  void scatter(const Group& g) const {
    const vfloat *re = s.x[0][0], *im = s.x[0][1];
    const int64_t width = padded(t.taps);
    // the window's factor, and back from one tap of all lanes to one lane's taps
    const auto to_rows = [&](float scale, auto tap_gradient) {
      for (int first = 0; first < t.taps; first += kWidth) {
        vfloat block[kWidth];
        for (int i = 0; i < kWidth; ++i) {
          const int tap = first + i;
          block[i] = tap < t.taps ? tap_gradient(tap) * (c.window[tap] * scale) : vzero();
        }
        transpose(block);
        for (int lane = 0; lane < kWidth; ++lane) vstore(s.rows + lane * width + first, block[lane]);
      }
    };
    if (t.folded) {
      folded_adjoint(re, im);
      const int middle = t.taps / 2;
      to_rows(1.0f, [&](int tap) {
        const int m = tap < middle ? middle - tap : tap - middle;
        if (m == 0) return s.even[0] + s.odd[0];  // odd[0]'s sines are zero
        return tap < middle ? s.even[m] - s.odd[m] : s.even[m] + s.odd[m];
      });
    } else if (t.packed) {
      packed_adjoint(re, im);
      to_rows(0.5f, [&](int tap) { return packed_part(tap)[t.order[tap / 2]]; });
    } else {
      for (int n = 0; n < t.length; ++n) s.re[n] = n < t.bins ? re[n] : vzero();
      for (int n = 0; n < t.length; ++n) s.im[n] = n < t.bins ? im[n] : vzero();
      fft(s.im, s.re);  // the inverse, unscaled: real and imaginary part exchanged before and after
      to_rows(1.0f, [&](int tap) { return s.re[t.order[tap]]; });
    }
    for (int lane = 0; lane < g.count; ++lane) {
      if (g.frame[lane] >= frames) continue;
      const int64_t first = c.framing.first(g.frame[lane]) - segment_begin;
      const int64_t from = first < 0 ? -first : 0;
      const int64_t room = segment_end - segment_begin - first;
      const int64_t to = room < t.taps ? room : t.taps;
      const float* row = s.rows + lane * width;
      for (int64_t i = from; i < to; ++i) s.segment[first + i] += row[i];
    }
  }

  void folded_adjoint(const vfloat* re, const vfloat* im) const {
    for (int m = 0; m < t.terms; ++m) s.even[m] = s.odd[m] = vzero();
    const int half = t.n_fft % 2 == 0 ? t.n_fft / 2 : -1;
    for (int row = 0; row < t.rows; row += kRows) {
      const int count = t.rows - row < kRows ? t.rows - row : kRows;
      FoldedSums<vfloat> sums[kRows];
      for (int i = 0; i < count; ++i) {
        const int bin = row + i, mate = half - bin;
        const bool pair = half >= 0 && mate != bin;
        const Complex<vfloat> low{re[bin], im[bin]};
        const Complex<vfloat> high{pair ? re[mate] : vzero(), pair ? im[mate] : vzero()};
        sums[i] = spectrogram::folded_pair_adjoint(low, high);
      }
      const float* table = t.numbers + t.table + row * 2 * t.terms;
      if (count == kRows) {
        spectrogram::folded_sums_adjoint<kRows>(sums, t.terms, table, s.even, s.odd);
      } else {
        for (int i = 0; i < count; ++i) {
          spectrogram::folded_sums_adjoint<1>(sums + i, t.terms, table + i * 2 * t.terms, s.even,
                                              s.odd);
        }
      }
    }
  }

  void packed_adjoint(const vfloat* re, const vfloat* im) const {
    const float* turns = t.numbers + t.split;
    for (int k = 0; k <= t.length / 2; ++k) {
      const int m = t.length - k;
      const Complex<vfloat> mate{m == k ? vzero() : re[m], m == k ? vzero() : im[m]};
      const BinPair<vfloat> z = spectrogram::split_pair_adjoint<vfloat>(
          {re[k], im[k]}, mate, turns[2 * k], turns[2 * k + 1]);
      if (k == 0 || m == k) {  // both entries are the same one
        s.re[k] = z.low.re + z.high.re;
        s.im[k] = z.low.im + z.high.im;
      } else {
        s.re[k] = z.low.re;
        s.im[k] = z.low.im;
        s.re[m] = z.high.re;
        s.im[m] = z.high.im;
      }
    }
    fft(s.im, s.re);
  }

  const Call& c;
  const Transform& t;
  const Scratch& s;
  int64_t clip, samples, frames;
  const float* wav;
  double rate;
  int64_t segment_begin = 0, segment_end = 0;
};

}  // namespace

int64_t spectrogram_scratch(const Call& call, int64_t segment) {
  return Scratch(call, nullptr, segment).bytes;
}

void spectrogram_forward(const Call& call, int64_t clip, int64_t begin, int64_t end, void* scratch,
                         float* out) {
  const Scratch parts(call, static_cast<char*>(scratch), 0);
  Kernel(call, clip, parts).forward(begin, end, out);
}

void spectrogram_backward(const Call& call, const float* grad, int64_t clip, int64_t begin,
                          int64_t end, void* scratch, float* grad_wav, float* margins) {
  const Scratch parts(call, static_cast<char*>(scratch), end - begin);
  Kernel(call, clip, parts).backward(grad, begin, end, grad_wav, margins);
}

}  // namespace musiclm_fast::MUSICLM_FAST_SIMD_NS
