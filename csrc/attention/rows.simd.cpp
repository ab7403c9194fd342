#include "attention/rows.h"

#include "attention/products.h"

namespace musiclm_fast::MUSICLM_FAST_SIMD_NS::attention {
namespace {

template <typename T>
MUSICLM_FAST_INLINE void load_values(const T* x, int64_t d, float* out) {
  int64_t c = 0;
  for (; c + kWidth <= d; c += kWidth) vstore(out + c, vload(x + c));
  if (c < d) vstore(out + c, vload_partial(x + c, static_cast<int>(d - c)));
}

template <typename T>
MUSICLM_FAST_INLINE void store_values(T* x, int64_t d, const float* row) {
  int64_t c = 0;
  for (; c + kWidth <= d; c += kWidth) vstore(x + c, vload(row + c));
  if (c < d) vstore_partial(x + c, vload(row + c), static_cast<int>(d - c));
}

}  // namespace

void load_row(const HeadRows& x, int64_t b, int64_t h, int64_t i, int64_t d, float* out) {
  const int64_t at = b * x.batch_stride + h * x.head_stride + i * x.row_stride;
  if (x.half) {
    load_values(static_cast<const bf16*>(x.data) + at, d, out);
  } else {
    load_values(static_cast<const float*>(x.data) + at, d, out);
  }
}

void store_row(const HeadRows& x, int64_t b, int64_t h, int64_t i, int64_t d, const float* row) {
  const int64_t at = b * x.batch_stride + h * x.head_stride + i * x.row_stride;
  if (x.half) {
    store_values(static_cast<bf16*>(x.data) + at, d, row);
  } else {
    store_values(static_cast<float*>(x.data) + at, d, row);
  }
}

void normalise_backward(const float* row, int64_t dp, const float* scale, float* grad,
                        float* dscale) {
  const float norm = norm_of(row, dp);
  const float inverse = 1.0f / larger(norm, kSmallestNorm);
  vfloat along = vzero();  // <unit, grad of unit>
  for (int64_t c = 0; c < dp; c += kWidth) {
    const vfloat unit = vload(row + c) * inverse, g = vload(grad + c);
    vstore(dscale + c, vload(dscale + c) + g * unit);
    along += g * vload(scale + c) * unit;
  }
  // Below the smallest norm the division is by a constant.
  const float projection = norm < kSmallestNorm ? 0.0f : vsum(along);
  for (int64_t c = 0; c < dp; c += kWidth) {
    const vfloat unit = vload(row + c) * inverse;
    vstore(grad + c, (vload(grad + c) * vload(scale + c) - unit * projection) * inverse);
  }
}

void transpose_rows(const float* rows, int64_t d, int64_t dp, float* out) {
  for (int64_t c = 0; c < dp; c += kWidth) {
    vfloat x[kWidth];
    for (int i = 0; i < kWidth; ++i) x[i] = vload(rows + i * dp + c);
    transpose(x);
    const int64_t end = smaller<int64_t>(kWidth, d - c);
    for (int64_t i = 0; i < end; ++i) vstore(out + (c + i) * kPanel, x[i]);
  }
}

vfloat row_products(const float* a, const float* b, int64_t dp) {
  vfloat sum = vzero();
  for (int64_t c = 0; c < dp; c += kWidth) {
    vfloat x[kWidth], y[kWidth];
    for (int i = 0; i < kWidth; ++i) {
      x[i] = vload(a + i * dp + c);
      y[i] = vload(b + i * dp + c);
    }
    transpose(x);
    transpose(y);
    for (int i = 0; i < kWidth; ++i) sum += x[i] * y[i];
  }
  return sum;
}

}  // namespace musiclm_fast::MUSICLM_FAST_SIMD_NS::attention
