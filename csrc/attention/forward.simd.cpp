// Flash attention, forward: a tile of queries meets its keys tile by tile.
#include <cmath>
#include <cstring>

#include "attention/bias_table.h"
#include "attention/dropout.h"
#include "attention/packing.h"
#include "attention/products.h"
#include "attention/rows.h"

namespace musiclm_fast::MUSICLM_FAST_SIMD_NS {
using namespace attention;
namespace {

// Largest similarity of a row. Lanes beyond its limit become -inf.
MUSICLM_FAST_INLINE float find_highest(const Tile& tile, int64_t limit, float* s) {
  vfloat highest = vset(-kInfinity);
  if (limit >= tile.key + tile.groups * kWidth) {
    for (int g = 0; g < tile.groups; ++g) highest = vmax(highest, vload(s + g * kWidth));
  } else {
    for (int g = 0; g < tile.groups; ++g) {
      const vfloat x = seen_lanes(tile, limit, g) ? vload(s + g * kWidth) : vset(-kInfinity);
      vstore(s + g * kWidth, x);
      highest = vmax(highest, x);
    }
  }
  return vmaximum(highest);
}

// s = exp(s - highest), dropped; returns the sum before dropout, per lane.
template <bool kDropout>
MUSICLM_FAST_INLINE vfloat exponentiate(const Tile& tile, const AttentionCall& call,
                                        uint32_t row_key, float highest, float* s) {
  vfloat sum = vzero();
  for (int g = 0; g < tile.groups; ++g) {
    vfloat p = vexp_weight(vload(s + g * kWidth) - highest);
    sum += p;
    if constexpr (kDropout) {
      p = kept(row_key, tile.columns + g * kWidth, call.drop_below) ? p : vzero();
    }
    vstore(s + g * kWidth, p);
  }
  return sum;
}

void attend(const State& s, const Head& head, int64_t g, int64_t block, const Scratch& scratch) {
  const AttentionCall& call = *s.call;
  const KeyPlan& plan = head.plan;
  const int64_t b = head.b, h = head.kv * s.group + g;
  const int64_t d = call.head_dim, dp = s.dp, vectors = dp / kWidth;
  const int64_t first = block * kForwardRows;
  const int rows = static_cast<int>(smaller<int64_t>(kForwardRows, call.queries - first));
  const float* table = s.table + h * s.table_columns;
  const int32_t* q_codes =
      call.table == nullptr ? nullptr : call.q_codes + b * call.q_codes_stride + first;

  for (int r = 0; r < rows; ++r) {
    if (r + kAhead < rows) prefetch_row(call.q, b, h, first + r + kAhead, d);
    load_row(call.q, b, h, first + r, d, scratch.q + r * dp);
    normalise(scratch.q + r * dp, dp, scale_or_null(s, s.q_scale));
    scratch.limit[r] = visible(call, plan, first + r);
    scratch.highest[r] = -kInfinity;
    vstore(scratch.weights_sum + r * kWidth, vzero());
  }
  const int64_t end = scratch.limit[rows - 1];  // limits do not fall from row to row
  for (int64_t key = 0; key < end; key += kKeyRows) {
    const Tile tile = make_tile(call, plan, key);
    multiply<false>(rows, tile.groups, d, scratch.q, dp, head.memory.keys_t + key * d, kPanel,
                    kPanel * d, scratch.s, kKeyRows, Start::zero);
    finish_similarities(call, tile, table, q_codes, rows, scratch.s);
    for (int r = 0; r < rows; ++r) {
      const float highest = find_highest(tile, scratch.limit[r], scratch.s + r * kKeyRows);
      scratch.higher[r] = larger(scratch.highest[r], highest);
      // A row that has seen no key yet subtracts 0, so that its weights are 0 rather than NaN.
      const float shift = scratch.higher[r] == -kInfinity ? 0.0f : scratch.higher[r];
      scratch.rescale[r] = scratch.highest[r] - shift;
      scratch.highest[r] = scratch.higher[r];
      scratch.higher[r] = shift;
    }
    for (int r = 0; r < kForwardRows; r += kWidth) {
      vstore(scratch.rescale + r, vexp_weight(vload(scratch.rescale + r)));
    }
    for (int r = 0; r < rows; ++r) {
      float* row = scratch.s + r * kKeyRows;
      const vfloat sum =
          call.dropout
              ? exponentiate<true>(tile, call, row_key_of(call, b, h, first + r),
                                   scratch.higher[r], row)
              : exponentiate<false>(tile, call, 0, scratch.higher[r], row);
      float* total = scratch.weights_sum + r * kWidth;
      vstore(total, vload(total) * scratch.rescale[r] + sum);
    }
    multiply<false>(rows, vectors, tile.keys, scratch.s, kKeyRows, head.memory.rows + key * dp, dp,
                    kPanel, scratch.out, dp, key == 0 ? Start::zero : Start::scaled,
                    scratch.rescale);
  }

  float* lse = call.logsumexp + (b * call.heads + h) * call.queries + first;
  for (int r = 0; r < rows; ++r) {
    float* row = scratch.out + r * dp;
    if (scratch.limit[r] == 0) {
      std::memset(row, 0, static_cast<size_t>(dp) * sizeof(float));
      lse[r] = kInfinity;
    } else {
      const float sum = vsum(vload(scratch.weights_sum + r * kWidth));
      const float factor = (call.dropout ? call.keep_scale : 1.0f) / sum;
      for (int64_t c = 0; c < dp; c += kWidth) vstore(row + c, vload(row + c) * factor);
      lse[r] = scratch.highest[r] + std::log(sum);
    }
    store_row(call.out, b, h, first + r, d, row);
  }
}

}  // namespace

void attention_forward(const AttentionCall& call, void* workspace, const Workers& workers) {
  State s = make_state(call, false, workers.count, workspace);
  prepare(s, workers);
  const int64_t total = call.batch * call.kv_heads;
  const int64_t key_blocks = s.padded_keys / kKeyRows;
  const int64_t query_blocks = divide_up(call.queries, kForwardRows);
  for (; s.first < total; s.first += s.wave) {
    const int64_t heads = smaller(s.wave, total - s.first);
    if (s.per_worker) {
      run_tasks(workers, heads, [&](int64_t index, int worker) {
        plan_head(s, index, worker);
        const Head head = head_of(s, index, worker);
        const Scratch& scratch = s.scratch[worker];
        for (int64_t i = 0; i < key_blocks; ++i) pack_keys(s, head, i, scratch.rows);
        for (int64_t g = 0; g < s.group; ++g) {
          for (int64_t i = 0; i < query_blocks; ++i) attend(s, head, g, i, scratch);
        }
      });
      continue;
    }
    if (!s.one_plan) run_tasks(workers, heads, [&](int64_t index, int) { plan_head(s, index, 0); });
    run_tasks(workers, heads * key_blocks, [&](int64_t task, int worker) {
      pack_keys(s, head_of(s, task / key_blocks, 0), task % key_blocks, s.scratch[worker].rows);
    });
    run_tasks(workers, heads * s.group * query_blocks, [&](int64_t task, int worker) {
      const int64_t q_head = task / query_blocks;
      // Causal: the last block of a head is its longest task.
      const int64_t block = query_blocks - 1 - task % query_blocks;
      attend(s, head_of(s, q_head / s.group, 0), q_head % s.group, block, s.scratch[worker]);
    });
  }
}

}  // namespace musiclm_fast::MUSICLM_FAST_SIMD_NS
