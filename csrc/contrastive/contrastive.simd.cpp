#include "contrastive/contrastive.h"

#include "common/integers.h"
#include "common/simd.h"

#include <limits>

namespace musiclm_fast::MUSICLM_FAST_SIMD_NS {
namespace {

static_assert(kPanel % (4 * kWidth) == 0 && kAlign % kWidth == 0);

// Terms of a dot product that are summed in one go: shorter sums of long products round less, and
// their operands stay in the cache.
constexpr int64_t kSlice = 128;
constexpr float kLowest = std::numeric_limits<float>::lowest();

int64_t padded(int64_t columns) { return round_up(columns, kPanel); }

// Rows of the register block. Four vectors wide, 6, 3 and 2 rows leave registers for the operands:
// 24 of 32 (AVX-512), 12 of 16 (AVX2), 8 of 16 (SSE, which needs one for each product).
constexpr int kBlockRows = kWidth == 16 ? 6 : kWidth == 8 ? 3 : 2;

// c (kRows, kVectors * kWidth) = or += factor * a @ b over depth. a's entry (r, k) lies at
// r * a_stride + k where kAlongDepth, else at k * a_stride + r.
template <int kRows, int kVectors, bool kAlongDepth, bool kAdd>
void block(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t depth,
           float factor, float* c, int64_t c_stride) {
  vfloat sum[kRows][kVectors];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[r][v] = vzero();
  }
  for (int64_t k = 0; k < depth; ++k) {
    vfloat right[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) right[v] = vload(b + k * b_stride + v * kWidth);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const vfloat left = vset(kAlongDepth ? a[r * a_stride + k] : a[k * a_stride + r]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] = left * right[v] + sum[r][v];
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      float* out = c + r * c_stride + v * kWidth;
      vstore(out, factor * sum[r][v] + (kAdd ? vload(out) : vzero()));
    }
  }
}

template <int kRows, int kVectors, bool kAlongDepth, bool kAdd>
void last_rows(int64_t rows, const float* a, int64_t a_stride, const float* b, int64_t b_stride,
               int64_t depth, float factor, float* c, int64_t c_stride) {
  if (rows == kRows) {
    block<kRows, kVectors, kAlongDepth, kAdd>(a, a_stride, b, b_stride, depth, factor, c, c_stride);
  } else if constexpr (kRows > 1) {
    last_rows<kRows - 1, kVectors, kAlongDepth, kAdd>(rows, a, a_stride, b, b_stride, depth, factor,
                                                      c, c_stride);
  }
}

template <int kVectors, bool kAlongDepth, bool kAdd>
void strip(const float* a, int64_t a_stride, int64_t rows, const float* b, int64_t b_stride,
           int64_t depth, float factor, float* c, int64_t c_stride) {
  const int64_t next = kAlongDepth ? a_stride : 1;
  int64_t r = 0;
  for (; r + kBlockRows <= rows; r += kBlockRows) {
    block<kBlockRows, kVectors, kAlongDepth, kAdd>(a + r * next, a_stride, b, b_stride, depth,
                                                   factor, c + r * c_stride, c_stride);
  }
  last_rows<kBlockRows, kVectors, kAlongDepth, kAdd>(rows - r, a + r * next, a_stride, b, b_stride,
                                                     depth, factor, c + r * c_stride, c_stride);
}

// c (rows, columns) = or += factor * a @ b (depth, columns); columns is a multiple of kWidth.
template <bool kAlongDepth, bool kAdd>
void product(const float* a, int64_t a_stride, int64_t rows, const float* b, int64_t b_stride,
             int64_t columns, int64_t depth, float factor, float* c, int64_t c_stride) {
  int64_t j = 0;
  for (; j + 4 * kWidth <= columns; j += 4 * kWidth) {
    strip<4, kAlongDepth, kAdd>(a, a_stride, rows, b + j, b_stride, depth, factor, c + j,
                                   c_stride);
  }
  for (; j + 2 * kWidth <= columns; j += 2 * kWidth) {
    strip<2, kAlongDepth, kAdd>(a, a_stride, rows, b + j, b_stride, depth, factor, c + j,
                                   c_stride);
  }
  for (; j < columns; j += kWidth) {
    strip<1, kAlongDepth, kAdd>(a, a_stride, rows, b + j, b_stride, depth, factor, c + j,
                                   c_stride);
  }
}

struct Range {
  int64_t begin, end;  // rows of the tile whose positive lies in it
};

Range positives(const ContrastiveTile& t) {
  const int64_t begin = larger<int64_t>(-t.positive, 0);
  const int64_t end = smaller(t.n - t.positive, t.m);
  return {begin, end};
}

// With labels: -1 in the lanes of columns [j, j + kWidth) that are positives of row i.
MUSICLM_FAST_INLINE vint same_label(const ContrastiveTile& t, int64_t i, int64_t j) {
  vint labels;
  std::memcpy(&labels, t.column_labels + j, sizeof labels);
  return labels == vint{} + t.row_labels[i];
}

// Fills t.similarities. Padding columns become -inf, whose exp is 0, so that nothing after this has
// to mask.
void fill(const ContrastiveTile& t) {
  const int64_t stride = padded(t.n);
  for (int64_t j = 0; j < stride; j += kPanel) {
    const float* panel = t.panels + j * t.depth;
    float* out = t.similarities + j;
    const int64_t first = smaller(t.depth, kSlice);
    product<true, false>(t.rows, t.ld, t.m, panel, kPanel, kPanel, first, t.temperature, out,
                         stride);
    for (int64_t k = first; k < t.depth; k += kSlice) {
      const int64_t depth = smaller(t.depth - k, kSlice);
      product<true, true>(t.rows + k, t.ld, t.m, panel + k * kPanel, kPanel, kPanel, depth,
                          t.temperature, out, stride);
    }
  }
  if (stride != t.n) {
    for (int64_t i = 0; i < t.m; ++i) {
      for (int64_t j = t.n; j < stride; ++j) t.similarities[i * stride + j] = -kInfinity;
    }
  }
}

// Fills t.similarities; the positives become -inf, too, unless t.inclusive. They go to positive[row]
// if that is not null; with labels their sum is added.
void similarities(const ContrastiveTile& t, float* positive) {
  fill(t);
  const int64_t stride = padded(t.n);
  if (t.row_labels != nullptr) {
    if (positive == nullptr && t.inclusive) return;
    for (int64_t i = 0; i < t.m; ++i) {
      float* s = t.similarities + i * stride;
      vfloat sum = vzero();
      for (int64_t j = 0; j < stride; j += kWidth) {
        const vint same = same_label(t, i, j);
        const vfloat x = vload(s + j);
        sum += same ? x : vzero();
        if (!t.inclusive) vstore(s + j, same ? vset(-kInfinity) : x);
      }
      if (positive != nullptr) positive[i] += vsum(sum);
    }
    return;
  }
  const Range range = positives(t);
  for (int64_t i = range.begin; i < range.end; ++i) {
    float* entry = t.similarities + i * stride + t.positive + i;
    if (positive != nullptr) positive[i] = *entry;
    *entry = -kInfinity;
  }
}

// d_rows += ds @ columns and d_columns += ds^T @ rows, with ds in t.similarities.
void push(const ContrastiveTile& t, float* d_rows, float* d_columns) {
  const int64_t stride = padded(t.n);
  product<true, true>(t.similarities, stride, t.m, t.columns, t.ld, t.ld, t.n, 1.0f, d_rows, t.ld);
  product<false, true>(t.similarities, stride, t.n, t.rows, t.ld, t.ld, t.m, 1.0f, d_columns,
                       t.ld);
}

// Merges a tile's (shift, sum) into the running one, for `count` rows or columns.
void merge(int64_t count, const float* shift, const float* sum, ContrastiveSums running) {
  for (int64_t i = 0; i < count; i += kWidth) {
    const int n = static_cast<int>(smaller<int64_t>(count - i, kWidth));
    const vfloat s0 = vload_partial(running.shift + i, n), s1 = vload_partial(shift + i, n);
    const vfloat higher = vmax(s0, s1);
    const vfloat total = vload_partial(running.sum + i, n) * vexp(s0 - higher) +
                         vload_partial(sum + i, n) * vexp(s1 - higher);
    vstore_partial(running.shift + i, higher, n);
    vstore_partial(running.sum + i, total, n);
  }
}

void stats_bounded(const ContrastiveTile& t, ContrastiveSums of_rows, ContrastiveSums of_columns) {
  const int64_t stride = padded(t.n);
  float* column_sum = t.scratch;
  for (int64_t j = 0; j < stride; j += kWidth) vstore(column_sum + j, vzero());
  for (int64_t i = 0; i < t.m; ++i) {
    const float* s = t.similarities + i * stride;
    vfloat total = vzero();
    for (int64_t j = 0; j < stride; j += kWidth) {
      const vfloat e = vexp(vload(s + j));
      vstore(column_sum + j, vload(column_sum + j) + e);
      total += e;
    }
    of_rows.sum[i] += vsum(total);
  }
  for (int64_t j = 0; j < t.n; ++j) of_columns.sum[j] += column_sum[j];
}

void stats_shifted(const ContrastiveTile& t, ContrastiveSums of_rows, ContrastiveSums of_columns) {
  const int64_t stride = padded(t.n);
  float* column_shift = t.scratch;
  float* column_sum = column_shift + stride;
  float* row_shift = column_sum + stride;
  float* row_sum = row_shift + t.m;
  for (int64_t j = 0; j < stride; j += kWidth) {
    vstore(column_shift + j, vset(kLowest));
    vstore(column_sum + j, vzero());
  }
  for (int64_t i = 0; i < t.m; ++i) {
    const float* s = t.similarities + i * stride;
    vfloat highest = vset(kLowest);
    for (int64_t j = 0; j < stride; j += kWidth) {
      const vfloat x = vload(s + j);
      highest = vmax(x, highest);
      vstore(column_shift + j, vmax(x, vload(column_shift + j)));
    }
    row_shift[i] = vmaximum(highest);
  }
  for (int64_t i = 0; i < t.m; ++i) {
    const float* s = t.similarities + i * stride;
    const vfloat shift = vset(row_shift[i]);
    vfloat total = vzero();
    for (int64_t j = 0; j < stride; j += kWidth) {
      const vfloat x = vload(s + j);
      total += vexp(x - shift);
      vstore(column_sum + j, vload(column_sum + j) + vexp(x - vload(column_shift + j)));
    }
    row_sum[i] = vsum(total);
  }
  merge(t.m, row_shift, row_sum, of_rows);
  merge(t.n, column_shift, column_sum, of_columns);
}

// 2 atanh(z) / z, whose argument is z^2 in [0, 1/9]: log1p(t) = 2 atanh(t / (2 + t)), t in [0, 1].
// Chebyshev fit, relative error 4e-9.
MUSICLM_FAST_INLINE vfloat twice_atanh_over(vfloat square) {
  vfloat p = vset(2 * 0.14087329f);
  p = p * square + 2 * 0.13980709f;
  p = p * square + 2 * 0.20012427f;
  p = p * square + 2 * 0.33333158f;
  return p * square + 2.0f;
}

// softplus(s) = max(s, 0) + log1p(e^-|s|) and sigmoid(s), accurate to the last bits of small values.
MUSICLM_FAST_INLINE vfloat softplus(vfloat s, vfloat* sigmoid) {
  const vfloat positive = s > 0.0f ? s : vzero();
  const vfloat t = vexp(s - 2.0f * positive);  // s - 2 max(s, 0) = -|s|
  // One division for both: r = 1 / ((1 + t)(2 + t)).
  const vfloat once = 1.0f + t;
  const vfloat r = 1.0f / (once * (2.0f + t));
  const vfloat z = t * once * r;  // t / (2 + t)
  *sigmoid = (s > 0.0f ? vset(1.0f) : t) * (2.0f + t) * r;
  return positive + z * twice_atanh_over(z * z);
}

// Losses and ds of the rows; with labels from all similarities, else from those without positives,
// which lie in `positive`.
template <bool kLabelled>
void sigmoid_rows(const ContrastiveTile& t, const float* positive, float bias, float* row_loss,
                  float* row_grad) {
  const int64_t stride = padded(t.n);
  for (int64_t i = 0; i < t.m; ++i) {
    float* s = t.similarities + i * stride;
    vfloat loss = vzero(), grad = vzero(), sigmoid;
    for (int64_t j = 0; j < stride; j += kWidth) {
      vfloat x = vload(s + j) + bias;
      vint same{};
      if constexpr (kLabelled) {
        same = same_label(t, i, j);
        x = same ? -x : x;
      }
      loss += softplus(x, &sigmoid);
      if (row_grad != nullptr) {
        if constexpr (kLabelled) sigmoid = same ? -sigmoid : sigmoid;
        grad += sigmoid;
        vstore(s + j, sigmoid);
      }
    }
    float loss_sum = vsum(loss), grad_sum = vsum(grad);
    if constexpr (!kLabelled) {
      const int64_t own = t.positive + i;
      if (own >= 0 && own < t.n) {
        loss_sum += softplus(vset(-positive[i] - bias), &sigmoid)[0];
        if (row_grad != nullptr) {
          grad_sum -= sigmoid[0];
          s[own] = -sigmoid[0];
        }
      }
    }
    row_loss[i] += loss_sum;
    if (row_grad != nullptr) row_grad[i] += grad_sum;
  }
}

template <typename T>
float pack(const T* x, int64_t count, int64_t depth, int64_t stride, int64_t ld,
           float* out) {
  float largest = 0.0f;
  for (int64_t i = 0; i < count; ++i) {
    vfloat square = vzero();
    for (int64_t k = 0; k < ld; k += kWidth) {
      const vfloat value = vload_up_to(x + i * stride + k, larger<int64_t>(depth - k, 0));
      square = value * value + square;
      vstore(out + i * ld + k, value);
    }
    const float norm = vsum(square);
    largest = norm <= largest ? largest : norm;  // takes a NaN, and keeps it
    if (largest != largest) return largest;
  }
  return largest;
}

}  // namespace

float contrastive_pack(const float* x, int64_t count, int64_t depth, int64_t stride,
                       int64_t ld, float* out) {
  return pack(x, count, depth, stride, ld, out);
}

float contrastive_pack(const bf16* x, int64_t count, int64_t depth, int64_t stride,
                       int64_t ld, float* out) {
  return pack(x, count, depth, stride, ld, out);
}

void contrastive_panel(const float* columns, int64_t count, int64_t depth, int64_t ld,
                       float* panel) {
  for (int64_t k = 0; k < depth; ++k) {
    for (int64_t j = 0; j < count; ++j) panel[k * kPanel + j] = columns[j * ld + k];
    for (int64_t j = count; j < kPanel; ++j) panel[k * kPanel + j] = 0.0f;
  }
}

void contrastive_stats(const ContrastiveTile& tile, bool bounded, ContrastiveSums of_rows,
                       ContrastiveSums of_columns, float* positive) {
  similarities(tile, positive);
  if (bounded) {
    stats_bounded(tile, of_rows, of_columns);
  } else {
    stats_shifted(tile, of_rows, of_columns);
  }
}

void contrastive_grad(const ContrastiveTile& tile, bool bounded, const float* row_weight,
                      const float* row_shift, const float* column_weight,
                      const float* column_shift, const float* positive_grad, float* d_rows,
                      float* d_columns) {
  similarities(tile, nullptr);
  const int64_t stride = padded(tile.n);
  float* weight = tile.scratch;
  float* shift = weight + stride;
  for (int64_t j = 0; j < stride; ++j) {
    weight[j] = j < tile.n ? column_weight[j] : 0.0f;
    shift[j] = j < tile.n && !bounded ? column_shift[j] : 0.0f;
  }
  for (int64_t i = 0; i < tile.m; ++i) {
    float* s = tile.similarities + i * stride;
    const vfloat mine = vset(row_weight[i]);
    if (bounded) {
      for (int64_t j = 0; j < stride; j += kWidth) {
        vstore(s + j, vexp(vload(s + j)) * (mine + vload(weight + j)));
      }
    } else {
      const vfloat own_shift = vset(row_shift[i]);
      for (int64_t j = 0; j < stride; j += kWidth) {
        const vfloat x = vload(s + j);
        vstore(s + j,
               mine * vexp(x - own_shift) + vload(weight + j) * vexp(x - vload(shift + j)));
      }
    }
  }
  if (tile.row_labels != nullptr) {
    for (int64_t i = 0; i < tile.m; ++i) {
      float* ds = tile.similarities + i * stride;
      const vfloat own = vset(positive_grad[i]);
      for (int64_t j = 0; j < stride; j += kWidth) {
        // Positives that are left out have e^-inf = 0 there.
        vstore(ds + j, vload(ds + j) + (same_label(tile, i, j) ? own : vzero()));
      }
    }
    push(tile, d_rows, d_columns);
    return;
  }
  const Range range = positives(tile);
  for (int64_t i = range.begin; i < range.end; ++i) {
    tile.similarities[i * stride + tile.positive + i] = positive_grad[i];
  }
  push(tile, d_rows, d_columns);
}

void contrastive_sigmoid(const ContrastiveTile& tile, float bias, float* row_loss, float* row_grad,
                         float* d_rows, float* d_columns) {
  if (tile.row_labels != nullptr) {
    fill(tile);
    sigmoid_rows<true>(tile, nullptr, bias, row_loss, row_grad);
  } else {
    float* positive = tile.scratch;
    similarities(tile, positive);
    sigmoid_rows<false>(tile, positive, bias, row_loss, row_grad);
  }
  if (d_rows != nullptr) push(tile, d_rows, d_columns);
}

}  // namespace musiclm_fast::MUSICLM_FAST_SIMD_NS
