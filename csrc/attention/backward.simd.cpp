// Flash attention, backward: a tile of keys meets all queries, and keeps its gradients in cache.
#include <cstring>

#include "attention/bias_table.h"
#include "attention/dropout.h"
#include "attention/packing.h"
#include "attention/products.h"
#include "attention/rows.h"

namespace musiclm_fast::MUSICLM_FAST_SIMD_NS {
using namespace attention;
namespace {

// A row's similarities and gradients of weights become its (dropped) weights and gradients of
// similarities.
template <bool kDropout>
MUSICLM_FAST_INLINE void row_backward(const Tile& tile, const AttentionCall& call, int64_t limit,
                                      uint32_t row_key, float logsumexp, float delta, float* s,
                                      float* ds) {
  const bool all_seen = limit >= tile.key + tile.groups * kWidth;
  for (int g = 0; g < tile.groups; ++g) {
    vfloat p = vexp_weight(vload(s + g * kWidth) - logsumexp);
    if (!all_seen) p = seen_lanes(tile, limit, g) ? p : vzero();
    vfloat dp = vload(ds + g * kWidth);
    vfloat dropped = p;
    if constexpr (kDropout) {
      const vint keep = kept(row_key, tile.columns + g * kWidth, call.drop_below);
      dropped = keep ? p * call.keep_scale : vzero();
      dp = keep ? dp * call.keep_scale : vzero();
    }
    vstore(s + g * kWidth, dropped);
    // The weight of a row's only key is constant; rounding of delta must not say otherwise.
    vstore(ds + g * kWidth, limit == 1 ? vzero() : p * (dp - delta));
  }
}

// Likewise for `rows` queries of a head from `first` on; dtable += its part.
void tile_backward(const State& s, const Tile& tile, const Head& head, int64_t g, int64_t first,
                   int rows, float* dtable, const Scratch& scratch) {
  const AttentionCall& call = *s.call;
  const int64_t b = head.b, h = head.kv * s.group + g;
  const float* lse = call.logsumexp + (b * call.heads + h) * call.queries + first;
  const float* delta = head.memory.delta + g * call.queries + first;
  const int32_t* q_codes =
      call.table == nullptr ? nullptr : call.q_codes + b * call.q_codes_stride + first;
  finish_similarities(call, tile, s.table + h * s.table_columns, q_codes, rows, scratch.s);
  for (int r = 0; r < rows; ++r) {
    float* row_s = scratch.s + r * kKeyRows;
    float* row_ds = scratch.ds + r * kKeyRows;
    if (call.dropout) {
      const uint32_t row_key = row_key_of(call, b, h, first + r);
      row_backward<true>(tile, call, scratch.limit[r], row_key, lse[r], delta[r], row_s, row_ds);
    } else {
      row_backward<false>(tile, call, scratch.limit[r], 0, lse[r], delta[r], row_s, row_ds);
    }
  }
  if (q_codes != nullptr) {
    add_table_gradient(tile.table, dtable, q_codes, rows, tile.groups, scratch.ds);
  }
}

// Gradients of the keys and values of one chunk of a key head, and its parts of dq and dtable.
void chunk_backward(const State& s, const Head& head, int64_t chunk, const Scratch& scratch) {
  const AttentionCall& call = *s.call;
  const HeadMemory& m = head.memory;
  const KeyPlan& plan = head.plan;
  const int64_t d = call.head_dim, dp = s.dp, vectors = dp / kWidth, queries = call.queries;
  const int64_t tiles = divide_up(plan.count, kKeyRows);
  const int64_t begin = chunk * tiles / s.chunks, end = (chunk + 1) * tiles / s.chunks;
  float* dtables = s.dtable + (head.index * s.chunks + chunk) * s.group * s.table_columns;
  float* dk_scale = s.dk_scale + (head.index * s.chunks + chunk) * dp;
  std::memset(dtables, 0, static_cast<size_t>(s.group * s.table_columns) * sizeof(float));
  std::memset(dk_scale, 0, static_cast<size_t>(dp) * sizeof(float));

  for (int64_t t = begin; t < end; ++t) {
    const Tile tile = make_tile(call, plan, t * kKeyRows);
    Start keys_start = Start::zero;
    for (int64_t g = 0; g < s.group; ++g) {
      const float* q = m.q + g * queries * dp;
      const float* grad_out = m.grad_out + g * queries * dp;
      float* dq = m.dq + (g * s.chunks + chunk) * queries * dp;
      for (int64_t first = 0; first < queries; first += kBackwardRows) {
        const int rows = static_cast<int>(smaller<int64_t>(kBackwardRows, queries - first));
        for (int r = 0; r < rows; ++r) scratch.limit[r] = visible(call, plan, first + r);
        if (scratch.limit[rows - 1] <= tile.key) {
          if (t == begin) {
            std::memset(dq + first * dp, 0, static_cast<size_t>(rows * dp) * sizeof(float));
          }
          continue;
        }
        multiply<false>(rows, tile.groups, d, q + first * dp, dp, m.keys_t + tile.key * d,
                        kPanel, kPanel * d, scratch.s, kKeyRows, Start::zero);
        multiply<false>(rows, tile.groups, d, grad_out + first * dp, dp, m.values_t + tile.key * d,
                        kPanel, kPanel * d, scratch.ds, kKeyRows, Start::zero);
        tile_backward(s, tile, head, g, first, rows, dtables + g * s.table_columns, scratch);
        multiply<true>(tile.keys, vectors, rows, scratch.s, kKeyRows, grad_out + first * dp, dp,
                       kPanel, scratch.dv, dp, keys_start);
        multiply<true>(tile.keys, vectors, rows, scratch.ds, kKeyRows, q + first * dp, dp, kPanel,
                       scratch.dk, dp, keys_start);
        multiply<false>(rows, vectors, tile.keys, scratch.ds, kKeyRows, m.rows + tile.key * dp, dp,
                        kPanel, dq + first * dp, dp, t == begin ? Start::zero : Start::add);
        keys_start = Start::add;
      }
    }
    if (keys_start == Start::zero) {  // no query sees a key of this tile
      std::memset(scratch.dk, 0, static_cast<size_t>(tile.keys * dp) * sizeof(float));
      std::memset(scratch.dv, 0, static_cast<size_t>(tile.keys * dp) * sizeof(float));
    }
    for (int64_t j = 0; j < tile.keys; ++j) {
      const int64_t at = plan.index[tile.key + j];
      float* dk = scratch.dk + j * dp;
      for (int64_t c = 0; c < dp; c += kWidth) vstore(dk + c, vload(dk + c) * call.scale);
      if (call.k_scale != nullptr) {
        load_row(call.k, head.b, head.kv, at, d, scratch.rows);
        normalise_backward(scratch.rows, dp, s.k_scale, dk, dk_scale);
      }
      store_row(call.dk, head.b, head.kv, at, d, dk);
      store_row(call.dv, head.b, head.kv, at, d, scratch.dv + j * dp);
    }
  }
}

// dq of a block of queries from the chunks' parts, in order.
void finish_queries(const State& s, const Head& head, int64_t g, int64_t block, float* scratch) {
  const AttentionCall& call = *s.call;
  const int64_t b = head.b, h = head.kv * s.group + g;
  const int64_t tiles = divide_up(head.plan.count, kKeyRows);
  const int64_t dp = s.dp, end = smaller(call.queries, (block + 1) * kBackwardRows);
  const float* parts = head.memory.dq + g * s.chunks * call.queries * dp;
  float* dq_scale = s.dq_scale + ((head.index * s.group + g) * s.query_blocks + block) * dp;
  std::memset(dq_scale, 0, static_cast<size_t>(dp) * sizeof(float));
  float* dq = scratch + dp;
  for (int64_t i = block * kBackwardRows; i < end; ++i) {
    std::memset(dq, 0, static_cast<size_t>(dp) * sizeof(float));
    for (int64_t chunk = 0; chunk < s.chunks; ++chunk) {
      if (chunk * tiles / s.chunks == (chunk + 1) * tiles / s.chunks) continue;
      const float* part = parts + (chunk * call.queries + i) * dp;
      for (int64_t c = 0; c < dp; c += kWidth) vstore(dq + c, vload(dq + c) + vload(part + c));
    }
    for (int64_t c = 0; c < dp; c += kWidth) vstore(dq + c, vload(dq + c) * call.scale);
    if (call.q_scale != nullptr) {
      load_row(call.q, b, h, i, call.head_dim, scratch);
      normalise_backward(scratch, dp, s.q_scale, dq, dq_scale);
    }
    store_row(call.dq, b, h, i, call.head_dim, dq);
  }
}

// dtable_sum of one head += the parts of this wave, in order.
void reduce_table(const State& s, int64_t h, int64_t heads_now) {
  const AttentionCall& call = *s.call;
  float* sum = s.dtable_sum + h * s.table_columns;
  if (s.first == 0) {
    std::memset(sum, 0, static_cast<size_t>(s.table_columns) * sizeof(float));
  }
  for (int64_t head = 0; head < heads_now; ++head) {
    if ((s.first + head) % call.kv_heads != h / s.group) continue;
    for (int64_t chunk = 0; chunk < s.chunks; ++chunk) {
      const float* part =
          s.dtable + ((head * s.chunks + chunk) * s.group + h % s.group) * s.table_columns;
      for (int64_t c = 0; c < s.table_columns; c += kWidth) {
        vstore(sum + c, vload(sum + c) + vload(part + c));
      }
    }
  }
}

void store_table(const State& s, int64_t h) {
  const AttentionCall& call = *s.call;
  const int64_t columns = 2 * call.radius + 1;
  const float* sum = s.dtable_sum + h * s.table_columns;
  float* out = call.dtable + h * columns;
  for (int64_t c = 0; c < columns; ++c) out[c] = sum[kTablePad + c];
  // What the padding received belongs to the edge entries.
  float low = 0.0f, high = 0.0f;
  for (int64_t c = 0; c < kTablePad; ++c) {
    low += sum[c];
    high += sum[kTablePad + columns + c];
  }
  out[0] += low;
  out[columns - 1] += high;
}

void add_rows(const float* parts, int64_t count, int64_t dp, double* sum) {
  for (int64_t p = 0; p < count; ++p) {
    for (int64_t c = 0; c < dp; ++c) sum[c] += parts[p * dp + c];
  }
}

}  // namespace

void attention_backward(const AttentionCall& call, void* workspace, const Workers& workers) {
  State s = make_state(call, true, workers.count, workspace);
  prepare(s, workers);
  const int64_t total = call.batch * call.kv_heads;
  const int64_t key_blocks = s.padded_keys / kKeyRows;
  for (int64_t c = 0; c < s.dp; ++c) s.dq_scale_sum[c] = s.dk_scale_sum[c] = 0.0;
  for (; s.first < total; s.first += s.wave) {
    const int64_t heads = smaller(s.wave, total - s.first);
    const int64_t query_tasks = heads * s.group * s.query_blocks;
    if (s.per_worker) {
      run_tasks(workers, heads, [&](int64_t index, int worker) {
        plan_head(s, index, worker);
        const Head head = head_of(s, index, worker);
        const Scratch& scratch = s.scratch[worker];
        for (int64_t i = 0; i < key_blocks; ++i) pack_keys(s, head, i, scratch.rows);
        for (int64_t i = 0; i < s.group * s.query_blocks; ++i) {
          pack_queries(s, head, i / s.query_blocks, i % s.query_blocks, scratch.rows);
        }
        for (int64_t i = 0; i < s.chunks; ++i) chunk_backward(s, head, i, scratch);
        for (int64_t i = 0; i < s.group * s.query_blocks; ++i) {
          finish_queries(s, head, i / s.query_blocks, i % s.query_blocks, scratch.rows);
        }
      });
    } else {
      if (!s.one_plan) {
        run_tasks(workers, heads, [&](int64_t index, int) { plan_head(s, index, 0); });
      }
      run_tasks(workers, heads * key_blocks, [&](int64_t task, int worker) {
        pack_keys(s, head_of(s, task / key_blocks, 0), task % key_blocks, s.scratch[worker].rows);
      });
      const auto each_query_block = [&](auto f) {
        run_tasks(workers, query_tasks, [&](int64_t task, int worker) {
          const int64_t q_head = task / s.query_blocks;
          f(s, head_of(s, q_head / s.group, 0), q_head % s.group, task % s.query_blocks,
            s.scratch[worker].rows);
        });
      };
      each_query_block(pack_queries);
      run_tasks(workers, heads * s.chunks, [&](int64_t task, int worker) {
        chunk_backward(s, head_of(s, task / s.chunks, 0), task % s.chunks, s.scratch[worker]);
      });
      each_query_block(finish_queries);
    }
    if (call.table != nullptr) {
      run_tasks(workers, call.heads, [&](int64_t h, int) {
        reduce_table(s, h, heads);
        if (s.first + heads == total) store_table(s, h);
      });
    }
    add_rows(s.dq_scale, query_tasks, s.dp, s.dq_scale_sum);
    add_rows(s.dk_scale, heads * s.chunks, s.dp, s.dk_scale_sum);
  }
  if (call.q_scale == nullptr) return;
  for (int64_t c = 0; c < call.head_dim; ++c) {
    call.dq_scale[c] = static_cast<float>(s.dq_scale_sum[c]);
    call.dk_scale[c] = static_cast<float>(s.dk_scale_sum[c]);
  }
}

}  // namespace musiclm_fast::MUSICLM_FAST_SIMD_NS
