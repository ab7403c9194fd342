// Vectors of float at the level that this file is compiled for; for *.simd.cpp only. Torch-free.
//
// Arithmetic and comparisons are the compiler's own on vector types: a * b + c (contracted to one
// FMA where there is one), a < b ? a : b. Everything lies in the level's own namespace, so that the
// same function at two levels is never merged into one.
#pragma once

#ifndef MUSICLM_FAST_SIMD_NS
#error "common/simd.h is for *.simd.cpp files, which are compiled once per SIMD level"
#endif

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "common/bf16.h"

namespace musiclm_fast::MUSICLM_FAST_SIMD_NS {

#if defined(__AVX512F__)
inline constexpr int kWidth = 16;
#elif defined(__AVX2__)
inline constexpr int kWidth = 8;
#else
inline constexpr int kWidth = 4;
#endif

inline constexpr float kInfinity = __builtin_inff();

typedef float vfloat __attribute__((vector_size(kWidth * 4)));
typedef int32_t vint __attribute__((vector_size(kWidth * 4)));
typedef uint32_t vuint __attribute__((vector_size(kWidth * 4)));
typedef uint16_t vhalfword __attribute__((vector_size(kWidth * 2)));

#define MUSICLM_FAST_INLINE [[gnu::always_inline]] inline

// Not x + 0, which is an addition: it turns -0 into 0.
MUSICLM_FAST_INLINE vfloat vset(float x) { return x - vfloat{}; }
MUSICLM_FAST_INLINE vfloat vzero() { return vfloat{}; }

MUSICLM_FAST_INLINE vfloat vload(const float* p) {
  vfloat v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

MUSICLM_FAST_INLINE void vstore(float* p, vfloat v) { std::memcpy(p, &v, sizeof v); }

// The first n of kWidth lanes, 0 <= n <= kWidth; the others are 0 and their memory is not read.
MUSICLM_FAST_INLINE vfloat vload_partial(const float* p, int n) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
#else
  vfloat v{};
  for (int i = 0; i < n; ++i) v[i] = p[i];
  return v;
#endif
}

// Writes the first n of kWidth lanes, 0 <= n <= kWidth.
MUSICLM_FAST_INLINE void vstore_partial(float* p, vfloat v, int n) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), (__m512)v);
#else
  for (int i = 0; i < n; ++i) p[i] = v[i];
#endif
}

// -1 in the first n lanes, 0 in the others.
MUSICLM_FAST_INLINE vint vfirst(int32_t n) {
  vint lane;
  for (int i = 0; i < kWidth; ++i) lane[i] = i;
  return lane < (vint{} + n);
}

// bfloat16 in memory, float in registers; stores round to nearest even and keep NaN.
MUSICLM_FAST_INLINE vfloat vload(const bf16* p) {
  vhalfword h;
  std::memcpy(&h, p, sizeof h);
  return (vfloat)(__builtin_convertvector(h, vuint) << 16);
}

MUSICLM_FAST_INLINE void vstore(bf16* p, vfloat v) {
  const vuint bits = (vuint)v;
  const vuint rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const vuint quiet = (bits >> 16) | 0x40u;
  const vhalfword h = __builtin_convertvector(v != v ? quiet : rounded, vhalfword);
  std::memcpy(p, &h, sizeof h);
}

MUSICLM_FAST_INLINE vfloat vload_partial(const bf16* p, int n) {
  bf16 lanes[kWidth] = {};
  if (n > 0) std::memcpy(lanes, p, static_cast<size_t>(n) * sizeof(bf16));
  return vload(lanes);
}

MUSICLM_FAST_INLINE void vstore_partial(bf16* p, vfloat v, int n) {
  bf16 lanes[kWidth];
  vstore(lanes, v);
  if (n > 0) std::memcpy(p, lanes, static_cast<size_t>(n) * sizeof(bf16));
}

// The first min(n, kWidth) lanes, n >= 0, of float or bf16.
template <typename T>
MUSICLM_FAST_INLINE vfloat vload_up_to(const T* p, int64_t n) {
  return n >= kWidth ? vload(p) : vload_partial(p, static_cast<int>(n));
}

template <typename T>
MUSICLM_FAST_INLINE void vstore_up_to(T* p, vfloat v, int64_t n) {
  if (n >= kWidth) {
    vstore(p, v);
  } else {
    vstore_partial(p, v, static_cast<int>(n));
  }
}

// The larger of two; b where a is NaN.
MUSICLM_FAST_INLINE vfloat vmax(vfloat a, vfloat b) { return a > b ? a : b; }

// v with its lanes moved down by kStep, the lowest ones to the top.
template <int kStep, int... kLane>
MUSICLM_FAST_INLINE vfloat rotated(vfloat v, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(v, v, ((kLane + kStep) % kWidth)...);
}

// Sum over the lanes.
template <int kStep = kWidth / 2>
MUSICLM_FAST_INLINE float vsum(vfloat v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  v += rotated<kStep>(v, std::make_integer_sequence<int, kWidth>{});
  if constexpr (kStep > 1) return vsum<kStep / 2>(v);
  return v[0];
#endif
}

// Largest lane.
template <int kStep = kWidth / 2>
MUSICLM_FAST_INLINE float vmaximum(vfloat v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  v = vmax(v, rotated<kStep>(v, std::make_integer_sequence<int, kWidth>{}));
  if constexpr (kStep > 1) return vmaximum<kStep / 2>(v);
  return v[0];
#endif
}

// x = n * ln(2) + r with r in [-ln(2)/2, ln(2)/2]: r, and n in the low bits of `shifted`.
MUSICLM_FAST_INLINE vfloat reduce_exponent(vfloat x, vfloat& shifted) {
  const vfloat magic = vset(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  shifted = x * 1.44269504f + magic;
  const vfloat n = shifted - magic;
  // ln(2) in two parts, so that n times the first is exact
  return (x - n * 0.693359375f) + n * 2.12194440e-4f;
}

// e^x within 2 units in the last place. 0 where the result is below 2^-126 (x < -87.33, -inf),
// infinite above 88.37, NaN where x is NaN.
MUSICLM_FAST_INLINE vfloat vexp(vfloat x) {
  const vfloat lowest = vset(-87.336544f);
  const vfloat highest = vset(88.7f);
  vfloat y = x < lowest ? lowest : x;
  y = y > highest ? highest : y;
  vfloat shifted;
  const vfloat r = reduce_exponent(y, shifted);
  // Cephes' expf polynomial: e^r = 1 + r + r^2 * p(r)
  vfloat p = vset(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const vint exponent = (vint)shifted - 0x4B400000 + 127;
  const vfloat scale = (vfloat)(exponent << 23);
  return x < lowest ? vzero() : p * scale;
}

// e^x for x <= 0 (and above it by rounding) within 1.2 units in the last place; 0 below -87.3. Weights
// of a softmax need no more range. More exact than vexp, and without its clamps.
MUSICLM_FAST_INLINE vfloat vexp_weight(vfloat x) {
  vfloat shifted;
  const vfloat r = reduce_exponent(x, shifted);
  // minimax: e^r = 1 + r + r^2 * q(r), relative error 3e-9
  vfloat p = vset(1.3814540579915047e-3f);
  p = p * r + 8.36874544620514e-3f;
  p = p * r + 4.166838899254799e-2f;
  p = p * r + 1.666652113199234e-1f;
  p = p * r + 4.999999403953552e-1f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const vfloat scaled = (vfloat)((vuint)p + ((vuint)shifted << 23));
  return x < -87.3f ? vzero() : scaled;
}

MUSICLM_FAST_INLINE vfloat vtanh(vfloat x) {
  const vfloat e = vexp((x < vzero() ? x : -x) * 2.0f);
  const vfloat t = (1.0f - e) / (1.0f + e);
  return x < vzero() ? -t : t;
}

// erf as a quotient of polynomials on [-4, 4], beyond which it is 1 in float; error 4e-7 at most.
MUSICLM_FAST_INLINE vfloat verf(vfloat x) {
  vfloat y = x < -4.0f ? vset(-4.0f) : x;
  y = y > 4.0f ? vset(4.0f) : y;
  const vfloat z = y * y;
  vfloat p = vset(-2.72614225801306e-10f);
  p = p * z + 2.77068142495902e-08f;
  p = p * z - 2.10102402082508e-06f;
  p = p * z - 5.69250639462346e-05f;
  p = p * z - 7.34990630326855e-04f;
  p = p * z - 2.95459980854025e-03f;
  p = p * z - 1.60960333262415e-02f;
  vfloat q = vset(-1.45660718464996e-05f);
  q = q * z - 2.13374055278905e-04f;
  q = q * z - 1.68282697438203e-03f;
  q = q * z - 7.37332916720468e-03f;
  q = q * z - 1.42647390514189e-02f;
  return y * p / q;
}

// The normal distribution's probability of a smaller value: gelu(x) = x * vnormal(x).
MUSICLM_FAST_INLINE vfloat vnormal(vfloat x) { return 0.5f * (1.0f + verf(x * 0.70710678f)); }

// Lane i of the result is lane index[i] of a (from 0 on) and b (from W on); 0 <= index[i] < 2W.
MUSICLM_FAST_INLINE vfloat vpermute2(vfloat a, vfloat b, vint index) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_permutex2var_ps((__m512)a, (__m512i)index, (__m512)b);
#elif defined(__AVX2__)
  const __m256 from_a = _mm256_permutevar8x32_ps((__m256)a, (__m256i)index);
  const __m256 from_b = _mm256_permutevar8x32_ps((__m256)b, (__m256i)index);
  return (vfloat)_mm256_blendv_ps(from_a, from_b, (__m256)(index << 28));  // by 8's bit
#elif defined(__aarch64__)
  const uint8x16x2_t table = {(uint8x16_t)a, (uint8x16_t)b};
  return (vfloat)vqtbl2q_u8(table, (uint8x16_t)(index * 0x04040404 + 0x03020100));
#else
  float lanes[2 * kWidth];
  vstore(lanes, a);
  vstore(lanes + kWidth, b);
  vfloat v;
  for (int i = 0; i < kWidth; ++i) v[i] = lanes[index[i]];
  return v;
#endif
}

// Rows i (a) and i + kStep (b) of a transposition, of which one is returned: the lower keeps its lanes
// whose number lacks the bit kStep and takes the upper's in place of the others; the upper likewise.
template <int kStep, bool kUpper, int... kLane>
MUSICLM_FAST_INLINE vfloat exchange(vfloat a, vfloat b, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(
      a, b,
      (kUpper ? ((kLane & kStep) != 0 ? kWidth + kLane : kLane + kStep)
              : ((kLane & kStep) != 0 ? kWidth + kLane - kStep : kLane))...);
}

// x[i] lane j <-> x[j] lane i, in log2(W) steps, a bit of i and j in each.
template <int kStep = 1>
MUSICLM_FAST_INLINE void transpose(vfloat (&x)[kWidth]) {
  if constexpr (kStep < kWidth) {
    constexpr auto lanes = std::make_integer_sequence<int, kWidth>{};
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) {
      if ((i & kStep) != 0) continue;
      const vfloat a = x[i], b = x[i + kStep];
      x[i] = exchange<kStep, false>(a, b, lanes);
      x[i + kStep] = exchange<kStep, true>(a, b, lanes);
    }
    transpose<2 * kStep>(x);
  }
}

}  // namespace musiclm_fast::MUSICLM_FAST_SIMD_NS
