// Small matrix products: C += A B from blocks in registers. For *.simd.cpp only.
#pragma once

#include <cstdint>

#include "common/simd.h"

namespace musiclm_fast::MUSICLM_FAST_SIMD_NS::attention {

// A register block of C += A B is kBlockRows x (kBlockVectors * W): 24 accumulators in 32
// registers, 12 in 16, or 8 in 16 where multiply-add needs a temporary.
#if defined(__AVX512F__)
inline constexpr int kBlockRows = 6, kBlockVectors = 4;
#elif defined(__AVX2__)
inline constexpr int kBlockRows = 6, kBlockVectors = 2;
#else
inline constexpr int kBlockRows = 4, kBlockVectors = 2;
#endif
inline constexpr int kPanel = kBlockVectors * kWidth;  // columns of a panel of B

enum class Start { zero, add, scaled };  // C = A B, C += A B, C = alpha[row] * C + A B

// A copy for each file that includes this: the compiler then drops what is the same in all calls.
namespace {

// One register block; A is (rows, depth), or stored as (depth, rows) if kTransposed.
template <int kRows, int kVectors, bool kTransposed>
void block(int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
           int64_t ldc, Start start, const float* alpha) {
  vfloat sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      sum[r][v] = start == Start::zero ? vzero() : vload(c + r * ldc + v * kWidth);
    }
  }
  if (start == Start::scaled) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] *= alpha[r];
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    vfloat right[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) right[v] = vload(b + v * kWidth);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const vfloat left = vset(kTransposed ? a[r] : a[r * lda]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] += left * right[v];
    }
    a += kTransposed ? lda : 1;
    b += ldb;
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) vstore(c + r * ldc + v * kWidth, sum[r][v]);
  }
}

using Block = void (*)(int64_t, const float*, int64_t, const float*, int64_t, float*, int64_t,
                       Start, const float*);

template <int kVectors, bool kTransposed>
MUSICLM_FAST_INLINE void rows_of_blocks(int64_t rows, int64_t depth, const float* a, int64_t lda,
                                        const float* b, int64_t ldb, float* c, int64_t ldc,
                                        Start start, const float* alpha) {
  static constexpr Block rest[] = {
      nullptr,
      block<1, kVectors, kTransposed>,
      block<2, kVectors, kTransposed>,
      block<3, kVectors, kTransposed>,
#if defined(__AVX2__)
      block<4, kVectors, kTransposed>,
      block<5, kVectors, kTransposed>,
#endif
  };
  int64_t r = 0;
  for (; r + kBlockRows <= rows; r += kBlockRows) {
    block<kBlockRows, kVectors, kTransposed>(depth, a + (kTransposed ? r : r * lda), lda, b, ldb,
                                             c + r * ldc, ldc, start,
                                             start == Start::scaled ? alpha + r : nullptr);
  }
  if (r < rows) {
    rest[rows - r](depth, a + (kTransposed ? r : r * lda), lda, b, ldb, c + r * ldc, ldc, start,
                   start == Start::scaled ? alpha + r : nullptr);
  }
}

// C (rows, vectors * W) from A (rows, depth) and B, which comes in panels of (depth, kPanel):
// consecutive columns of a row-major matrix (panel = kPanel) or panels of transposed keys. Not
// inlined, so that its caller's loops keep their registers.
template <bool kTransposed>
[[gnu::noinline]] void multiply(int64_t rows, int64_t vectors, int64_t depth, const float* a,
                                int64_t lda, const float* b, int64_t ldb, int64_t panel, float* c,
                                int64_t ldc, Start start, const float* alpha = nullptr) {
  for (; vectors >= kBlockVectors; vectors -= kBlockVectors) {
    rows_of_blocks<kBlockVectors, kTransposed>(rows, depth, a, lda, b, ldb, c, ldc, start, alpha);
    b += panel;
    c += kPanel;
  }
  switch (vectors) {
#if defined(__AVX512F__)
    case 3:
      rows_of_blocks<3, kTransposed>(rows, depth, a, lda, b, ldb, c, ldc, start, alpha);
      break;
    case 2:
      rows_of_blocks<2, kTransposed>(rows, depth, a, lda, b, ldb, c, ldc, start, alpha);
      break;
#endif
    case 1:
      rows_of_blocks<1, kTransposed>(rows, depth, a, lda, b, ldb, c, ldc, start, alpha);
      break;
    default:
      break;
  }
}

}  // namespace
}  // namespace musiclm_fast::MUSICLM_FAST_SIMD_NS::attention
