// Kernels of the contrastive losses: one tile of similarities at a time, never more. Torch-free.
//
// A tile is m rows (audio) by n columns (text). Both sides are packed once into float: `rows` and
// `columns` are (m, ld) and (n, ld) with ld a multiple of kAlign and zeros beyond depth; `panels`
// holds the columns again, transposed in panels of kPanel: (ceil(n / kPanel), depth, kPanel).
// Gradients of rows and columns come without the factor `temperature`.
#pragma once

#include <cstdint>

#include "common/bf16.h"
#include "common/cpu.h"

namespace musiclm_fast {

inline constexpr int64_t kPanel = 64;  // columns per panel, a multiple of four vectors at any level
inline constexpr int64_t kAlign = 16;  // floats in the widest vector

// Where similarities lie within +-kBounded, exp needs no shift, and one exp serves rows and columns:
// e^40 times a million terms is far from overflow, e^-40 far from underflow.
inline constexpr float kBounded = 40.0f;

struct ContrastiveTile {
  const float* rows;     // (m, ld)
  const float* columns;  // (n, ld)
  const float* panels;   // (ceil(n / kPanel), depth, kPanel)
  int64_t m, n, depth, ld;
  int64_t positive;     // column of row 0's positive in this tile; row i's is positive + i
  // Not null: pairs with equal labels are the positives instead. (m) and (round_up(n, kPanel)), -1
  // in columns beyond n, else not below 0.
  const int32_t* row_labels;
  const int32_t* column_labels;
  bool inclusive;  // with labels: whether the softmax sums include the positives
  float temperature;
  float* similarities;  // workspace (m, round_up(n, kPanel))
  float* scratch;       // workspace of 4 * (m + round_up(n, kPanel))
};

// Running sums of e^(s - shift) over the pairs that are not positives, or all if tile.inclusive.
struct ContrastiveSums {
  float* shift;
  float* sum;
};

MUSICLM_FAST_DECLARE_SIMD(
    // Packs `count` rows of stride `stride` into out (count, ld); returns the largest squared norm
    // of a row (NaN where a row has a NaN).
    float contrastive_pack(const float* x, int64_t count, int64_t depth, int64_t stride,
                           int64_t ld, float* out))
MUSICLM_FAST_DECLARE_SIMD(float contrastive_pack(const bf16* x, int64_t count, int64_t depth,
                                                 int64_t stride, int64_t ld, float* out))
MUSICLM_FAST_DECLARE_SIMD(
    // One panel of at most kPanel packed columns, transposed to (depth, kPanel), zeros beyond count.
    void contrastive_panel(const float* columns, int64_t count, int64_t depth, int64_t ld,
                           float* panel))
MUSICLM_FAST_DECLARE_SIMD(
    // Adds the tile to the sums of its m rows and n columns; writes the positives it holds, or with
    // labels adds them.
    void contrastive_stats(const ContrastiveTile& tile, bool bounded, ContrastiveSums of_rows,
                           ContrastiveSums of_columns, float* positive))
MUSICLM_FAST_DECLARE_SIMD(
    // ds = row_weight_i e^(s - row_shift_i) + column_weight_j e^(s - column_shift_j). At the
    // positives positive_grad_i takes its place, or is added if tile.inclusive. Adds ds @ columns
    // to d_rows (m, ld) and ds^T @ rows to d_columns (n, ld). Where `bounded`, shifts are not read:
    // the weights hold them.
    void contrastive_grad(const ContrastiveTile& tile, bool bounded, const float* row_weight,
                          const float* row_shift, const float* column_weight,
                          const float* column_shift, const float* positive_grad, float* d_rows,
                          float* d_columns))
MUSICLM_FAST_DECLARE_SIMD(
    // Adds softplus(s) (softplus(-s) at the positives) to row_loss (m). With d_rows not null also
    // ds = sigmoid(s) (-sigmoid(-s) at the positives): its row sums to row_grad (m), ds @ columns
    // to d_rows and ds^T @ rows to d_columns.
    void contrastive_sigmoid(const ContrastiveTile& tile, float bias, float* row_loss,
                             float* row_grad, float* d_rows, float* d_columns))

}  // namespace musiclm_fast
