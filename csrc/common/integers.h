// Arithmetic of sizes. In kernels smaller and larger stand for std::min and std::max, whose copies
// from all SIMD levels the linker would merge. Torch-free.
#pragma once

#include <cstdint>

namespace musiclm_fast {

template <typename T>
[[gnu::always_inline]] constexpr T smaller(T a, T b) {
  return a < b ? a : b;
}

template <typename T>
[[gnu::always_inline]] constexpr T larger(T a, T b) {
  return a < b ? b : a;
}

[[gnu::always_inline]] constexpr int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

[[gnu::always_inline]] constexpr int64_t round_up(int64_t a, int64_t b) {
  return divide_up(a, b) * b;
}

}  // namespace musiclm_fast
