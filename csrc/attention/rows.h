// Rows of heads: in and out of float, l2-norm, transposition. For *.simd.cpp only.
#pragma once

#include <cmath>
#include <cstdint>

#include "attention/attention.h"
#include "common/integers.h"
#include "common/simd.h"

namespace musiclm_fast::MUSICLM_FAST_SIMD_NS::attention {

// Row i of a head; `out` is padded to dp (D rounded up to W) with zeros.
void load_row(const HeadRows& x, int64_t b, int64_t h, int64_t i, int64_t d, float* out);
void store_row(const HeadRows& x, int64_t b, int64_t h, int64_t i, int64_t d, const float* row);

// Rows of one head lie far apart, so the processor does not see the next one coming.
inline constexpr int64_t kAhead = 8;

MUSICLM_FAST_INLINE void prefetch_row(const HeadRows& x, int64_t b, int64_t h, int64_t i,
                                      int64_t d) {
  const int64_t size = x.half ? sizeof(bf16) : sizeof(float);
  const char* row = static_cast<const char*>(x.data) +
                    (b * x.batch_stride + h * x.head_stride + i * x.row_stride) * size;
  for (int64_t c = 0; c < d * size; c += 64) __builtin_prefetch(row + c);
}

inline constexpr float kSmallestNorm = 1e-12f;  // torch.nn.functional.normalize's eps

inline float norm_of(const float* row, int64_t dp) {
  vfloat squares = vzero();
  for (int64_t c = 0; c < dp; c += kWidth) squares += vload(row + c) * vload(row + c);
  return std::sqrt(vsum(squares));
}

// row = l2norm(row) * scale; nothing without a scale
inline void normalise(float* row, int64_t dp, const float* scale) {
  if (scale == nullptr) return;
  const float norm = larger(norm_of(row, dp), kSmallestNorm);
  for (int64_t c = 0; c < dp; c += kWidth) {
    vstore(row + c, vload(row + c) / norm * vload(scale + c));
  }
}

// grad of l2norm(row) * scale  ->  grad of row, in place; dscale += its part
void normalise_backward(const float* row, int64_t dp, const float* scale, float* grad,
                        float* dscale);

// W rows of length dp (stride dp) -> columns: out[d * kPanel + i] = rows[i][d] for d < D.
void transpose_rows(const float* rows, int64_t d, int64_t dp, float* out);

// <a, b> for each of W rows of length dp, summed in the order in which block() sums: where a row's
// output is one value exactly, delta then equals that value's gradient exactly.
vfloat row_products(const float* a, const float* b, int64_t dp);

}  // namespace musiclm_fast::MUSICLM_FAST_SIMD_NS::attention
