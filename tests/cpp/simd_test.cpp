// Checks common/simd.h and common/bf16.h at the SIMD level that this file is compiled for; built and
// run once per level by tests/test_extension.py and tests/full. Exit status 1: a check failed, as
// printed.

#include "common/simd.h"

#include <cmath>
#include <cstdio>
#include <limits>
#include <vector>

namespace simd = musiclm_fast::MUSICLM_FAST_SIMD_NS;
using musiclm_fast::bf16;
using musiclm_fast::to_bf16;
using musiclm_fast::to_float;

namespace {

constexpr int kWidth = simd::kWidth;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
int failures = 0;

void check(bool ok, const char* what, double detail) {
  if (ok) return;
  ++failures;
  std::printf("FAILED: %s (%.9g)\n", what, detail);
}

float exp_of(float x) { return simd::vexp(simd::vset(x))[kWidth - 1]; }
float weight_of(float x) { return simd::vexp_weight(simd::vset(x))[kWidth - 1]; }

void test_exp() {
  double worst = 0, worst_weight = 0;  // units in the last place
  for (int i = 0; i <= 1'000'000; ++i) {
    const float x = -87.33f + 175.7f * static_cast<float>(i) / 1e6f;
    const double exact = std::exp(static_cast<double>(x));
    const double unit = std::ldexp(1.0, std::ilogb(exact) - 23);
    worst = std::fmax(worst, std::fabs(exp_of(x) - exact) / unit);
    if (x >= -87.3f && x <= 0.0f) {
      worst_weight = std::fmax(worst_weight, std::fabs(weight_of(x) - exact) / unit);
    }
  }
  check(worst <= 2, "vexp within 2 units in the last place", worst);
  check(worst_weight <= 1.2, "vexp_weight within 1.2 units in the last place", worst_weight);
  check(weight_of(0.0f) == 1.0f, "vexp_weight(0) is 1", weight_of(0.0f));
  for (const float x : {-kInfinity, -1e30f, -87.31f}) {
    check(weight_of(x) == 0, "vexp_weight underflows", x);
  }
  check(exp_of(0.0f) == 1.0f, "vexp(0) is 1", exp_of(0.0f));
  for (const float x : {-kInfinity, -1e30f, -104.0f, -87.4f}) check(exp_of(x) == 0, "vexp underflows", x);
  for (const float x : {kInfinity, 1e30f, 89.0f}) check(exp_of(x) == kInfinity, "vexp overflows", x);
  check(std::isnan(exp_of(kNaN)), "vexp keeps NaN", exp_of(kNaN));
  for (int i = -1000; i <= 1000; ++i) {
    const float x = static_cast<float>(i) / 100;
    const double tanh_error = simd::vtanh(simd::vset(x))[0] - std::tanh(static_cast<double>(x));
    check(std::fabs(tanh_error) <= 2e-7, "vtanh", x);
    const double below = 0.5 * std::erfc(-x * std::sqrt(0.5));
    check(std::fabs(simd::vnormal(simd::vset(x))[0] - below) <= 4e-7, "vnormal", x);
  }
}

// Partial loads and stores touch no element beyond n: the vectors end there, which the address
// sanitizer sees, and what lies behind stays as it was.
void test_partial() {
  for (int n = 0; n <= kWidth; ++n) {
    std::vector<float> source(n);
    std::vector<bf16> source_half(n);
    for (int i = 0; i < n; ++i) {
      source[i] = static_cast<float>(i + 1);
      source_half[i] = to_bf16(source[i]);
    }
    const simd::vfloat v = simd::vload_partial(source.data(), n);
    const simd::vfloat h = simd::vload_partial(source_half.data(), n);
    for (int i = 0; i < kWidth; ++i) {
      check(v[i] == (i < n ? i + 1 : 0), "vload_partial of float", i);
      check(h[i] == (i < n ? i + 1 : 0), "vload_partial of bf16", i);
    }
    std::vector<float> target(n);
    std::vector<bf16> target_half(n);
    simd::vstore_partial(target.data(), v, n);
    simd::vstore_partial(target_half.data(), v, n);
    for (int i = 0; i < n; ++i) {
      check(target[i] == source[i], "vstore_partial of float", i);
      check(target_half[i].bits == source_half[i].bits, "vstore_partial of bf16", i);
    }
    float beyond[kWidth + 1];
    for (float& x : beyond) x = -1;
    simd::vstore_partial(beyond, simd::vset(7), n);
    for (int i = 0; i <= kWidth; ++i) check(beyond[i] == (i < n ? 7 : -1), "elements beyond n", i);
    const simd::vint first = simd::vfirst(n);
    for (int i = 0; i < kWidth; ++i) check(first[i] == (i < n ? -1 : 0), "vfirst", i);
  }
  for (int n = 0; n <= 2 * kWidth; ++n) {  // more than a vector's lanes are a vector's lanes
    std::vector<float> source(n, 3.0f), target(n, -1.0f);
    const simd::vfloat v = simd::vload_up_to(source.data(), n);
    simd::vstore_up_to(target.data(), v, n);
    for (int i = 0; i < kWidth; ++i) check(v[i] == (i < n ? 3 : 0), "vload_up_to", i);
    for (int i = 0; i < n; ++i) check(target[i] == (i < kWidth ? 3 : -1), "vstore_up_to", i);
  }
}

void test_reductions() {
  float values[kWidth];
  float sum = 0;
  for (int i = 0; i < kWidth; ++i) {
    values[i] = static_cast<float>((i * 7) % kWidth) - 3;
    sum += values[i];
  }
  check(simd::vsum(simd::vload(values)) == sum, "vsum", sum);
  for (int i = 0; i < kWidth; ++i) {
    values[i] = 100;
    check(simd::vmaximum(simd::vload(values)) == 100, "vmaximum sees every lane", i);
    values[i] = -1000;
  }
  check(simd::vmax(simd::vset(1), simd::vset(2))[0] == 2, "vmax", 0);
}

// bf16: the vector conversion equals the scalar one, and both round to nearest even.
void test_bf16() {
  const float half_up = 1.0f + 3.0f / 256;  // between 1 + 2/256 and 1 + 4/256: to the even one
  check(to_float(to_bf16(half_up)) == 1.0f + 4.0f / 256, "bf16 rounds up to even", half_up);
  const float half_down = 1.0f + 1.0f / 256;
  check(to_float(to_bf16(half_down)) == 1.0f, "bf16 rounds down to even", half_down);
  check(std::isnan(to_float(to_bf16(kNaN))), "bf16 keeps NaN", 0);
  check(to_float(to_bf16(kInfinity)) == kInfinity, "bf16 keeps infinity", 0);
  check(to_float(to_bf16(3.4028235e38f)) == kInfinity, "bf16 overflows to infinity", 0);
  uint32_t state = 1;
  for (int round = 0; round < 100'000; ++round) {
    float values[kWidth];
    for (float& x : values) {
      state = state * 1664525u + 1013904223u;
      std::memcpy(&x, &state, sizeof x);
    }
    bf16 stored[kWidth];
    simd::vstore(stored, simd::vload(values));
    const simd::vfloat back = simd::vload(stored);
    for (int i = 0; i < kWidth; ++i) {
      check(stored[i].bits == to_bf16(values[i]).bits, "vstore to bf16", values[i]);
      const bool same = back[i] == to_float(stored[i]) || std::isnan(values[i]);
      check(same, "vload from bf16", values[i]);
    }
  }
}

// Every index in every lane: both vectors' lanes, whatever a compiler knows of the second.
void test_permute2() {
  float a[kWidth], b[kWidth];
  for (int i = 0; i < kWidth; ++i) {
    a[i] = static_cast<float>(i + 1);
    b[i] = static_cast<float>(-i - 1);
  }
  for (int shift = 0; shift < 2 * kWidth; ++shift) {
    simd::vint index;
    for (int i = 0; i < kWidth; ++i) index[i] = (5 * i + shift) % (2 * kWidth);
    const simd::vfloat both = simd::vpermute2(simd::vload(a), simd::vload(b), index);
    const simd::vfloat first = simd::vpermute2(simd::vload(a), simd::vzero(), index);
    for (int i = 0; i < kWidth; ++i) {
      const int at = index[i];
      check(both[i] == (at < kWidth ? a[at] : b[at - kWidth]), "vpermute2", at);
      check(first[i] == (at < kWidth ? a[at] : 0), "vpermute2 with zeros", at);
    }
  }
}

void test_transpose() {
  simd::vfloat x[kWidth];
  for (int i = 0; i < kWidth; ++i) {
    for (int j = 0; j < kWidth; ++j) x[i][j] = static_cast<float>(i * kWidth + j);
  }
  simd::transpose(x);
  for (int i = 0; i < kWidth; ++i) {
    for (int j = 0; j < kWidth; ++j) check(x[i][j] == j * kWidth + i, "transpose", i);
  }
}

}  // namespace

int main() {
  test_exp();
  test_partial();
  test_reductions();
  test_bf16();
  test_permute2();
  test_transpose();
  const char* level = kWidth == 16 ? "avx512" : kWidth == 8 ? "avx2" : "baseline";
  std::printf("%s simd 6 cases, %d failures\n", level, failures);
  return failures != 0;
}
