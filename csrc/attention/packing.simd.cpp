#include "attention/packing.h"

#include <cstring>

#include "attention/products.h"
#include "attention/rows.h"
#include "attention/tile.h"
#include "common/integers.h"
#include "common/simd.h"

namespace musiclm_fast::MUSICLM_FAST_SIMD_NS::attention {
namespace {

void pad_table(const State& s, int64_t h) {
  const AttentionCall& call = *s.call;
  const int64_t columns = 2 * call.radius + 1;
  const float* from = call.table + h * columns;
  float* to = s.table + h * s.table_columns;
  for (int64_t c = 0; c < s.table_columns; ++c) {
    to[c] = from[smaller(larger<int64_t>(c - kTablePad, 0), columns - 1)];
  }
}

void pad_scales(const State& s) {
  const AttentionCall& call = *s.call;
  if (call.q_scale == nullptr) return;
  for (int64_t c = 0; c < s.dp; ++c) {
    s.q_scale[c] = c < call.head_dim ? call.q_scale[c] : 0.0f;
    s.k_scale[c] = c < call.head_dim ? call.k_scale[c] : 0.0f;
  }
}

// Packs rows [begin, end) of a key head, a multiple of W except at the last: transposed into panels
// and, if `rows` is given, as they are.
void pack_rows(const State& s, const Head& head, const HeadRows& x, const float* scale,
               int64_t begin, int64_t end, float* panels, float* rows, float* scratch) {
  const int64_t d = s.call->head_dim;
  const KeyPlan& plan = head.plan;
  for (int64_t j = begin; j < end; j += kWidth) {
    float* block = rows == nullptr ? scratch : rows + j * s.dp;
    for (int64_t i = 0; i < kWidth; ++i) {
      float* row = block + i * s.dp;
      if (j + i + kAhead < plan.count) {
        prefetch_row(x, head.b, head.kv, plan.index[j + i + kAhead], d);
      }
      if (j + i < plan.count) {
        load_row(x, head.b, head.kv, plan.index[j + i], d, row);
        normalise(row, s.dp, scale);
      } else {
        std::memset(row, 0, static_cast<size_t>(s.dp) * sizeof(float));
      }
    }
    if (panels != nullptr) {
      transpose_rows(block, d, s.dp, panels + j / kPanel * kPanel * d + j % kPanel);
    }
  }
}

}  // namespace

void prepare(State& s, const Workers& workers) {
  const AttentionCall& call = *s.call;
  pad_scales(s);
  if (s.one_plan) make_plan(call, 0, s.plan);
  if (call.table == nullptr) return;
  run_tasks(workers, call.heads, [&](int64_t h, int) { pad_table(s, h); });
}

void plan_head(const State& s, int64_t index, int worker) {
  if (s.one_plan) return;
  make_plan(*s.call, (s.first + index) / s.call->kv_heads,
            s.memory[s.per_worker ? worker : index].plan);
}

void pack_keys(const State& s, const Head& head, int64_t block, float* scratch) {
  const AttentionCall& call = *s.call;
  const HeadMemory& m = head.memory;
  const int64_t begin = block * kKeyRows;
  const int64_t end = smaller(begin + kKeyRows, round_up(head.plan.count, kWidth));
  const float* scale = scale_or_null(s, s.k_scale);
  pack_rows(s, head, call.k, scale, begin, end, m.keys_t, s.backward ? m.rows : nullptr, scratch);
  pack_rows(s, head, call.v, nullptr, begin, end, m.values_t, s.backward ? nullptr : m.rows,
            scratch);
}

void pack_queries(const State& s, const Head& head, int64_t g, int64_t block, float* scratch) {
  const AttentionCall& call = *s.call;
  const HeadMemory& m = head.memory;
  const int64_t b = head.b, h = head.kv * s.group + g, d = call.head_dim;
  const int64_t end = smaller(call.queries, (block + 1) * kBackwardRows);
  for (int64_t first = block * kBackwardRows; first < end; first += kWidth) {
    const int rows = static_cast<int>(smaller<int64_t>(kWidth, end - first));
    float* grads = m.grad_out + (g * call.queries + first) * s.dp;
    for (int r = 0; r < rows; ++r) {
      const int64_t i = first + r;
      if (i + kAhead < end) {
        prefetch_row(call.q, b, h, i + kAhead, d);
        prefetch_row(call.grad_out, b, h, i + kAhead, d);
        prefetch_row(call.out, b, h, i + kAhead, d);
      }
      float* q = m.q + (g * call.queries + i) * s.dp;
      load_row(call.q, b, h, i, d, q);
      normalise(q, s.dp, scale_or_null(s, s.q_scale));
      load_row(call.grad_out, b, h, i, d, grads + r * s.dp);
      load_row(call.out, b, h, i, d, scratch + r * s.dp);
    }
    if (rows < kWidth) {  // what follows is not ours to read
      float* copy = scratch + kWidth * s.dp;
      std::memcpy(copy, grads, static_cast<size_t>(rows * s.dp) * sizeof(float));
      grads = copy;
    }
    vstore_partial(m.delta + g * call.queries + first, row_products(grads, scratch, s.dp), rows);
  }
}

}  // namespace musiclm_fast::MUSICLM_FAST_SIMD_NS::attention
