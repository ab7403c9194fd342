// A call's memory. Names of shapes: M queries, N packed keys, D head_dim, W lanes, G query heads of
// one key head. For *.simd.cpp only.
#pragma once

#include <cstdint>

#include "attention/attention.h"
#include "attention/key_plan.h"

namespace musiclm_fast::MUSICLM_FAST_SIMD_NS::attention {

struct Scratch {
  float* rows;         // (2W, dp)
  float* q;            // (kForwardRows, dp)
  float* out;          // (kForwardRows, dp)
  float* s;            // (rows, kKeyRows): similarities, then weights
  float* ds;           // (rows, kKeyRows): gradients of weights, then of similarities
  float* dk;           // (kKeyRows, dp)
  float* dv;           // (kKeyRows, dp)
  float* highest;      // (rows)
  float* higher;       // (rows)
  float* rescale;      // (rows)
  float* weights_sum;  // (rows, W)
  int64_t* limit;      // (rows) visible packed keys
};

// What one key head and its group of query heads are packed into.
struct HeadMemory {
  KeyPlan plan;     // unused if the batch shares one
  float* keys_t;    // (panels, D, kPanel) normalised keys
  float* rows;      // (padded_keys, dp) values; in the backward normalised keys
  float* values_t;  // (panels, D, kPanel)
  float* q;         // (G, M, dp) normalised
  float* grad_out;  // (G, M, dp)
  float* delta;     // (G, M)
  float* dq;        // (G, chunks, M, dp)
};

struct State {
  const AttentionCall* call;
  bool backward;
  int64_t group, dp, padded_keys, query_blocks, table_columns;
  bool one_plan;    // the batch shares keys and codes
  bool per_worker;  // a worker takes a whole key head; else all workers share the wave's heads
  int64_t chunks;   // parts of the keys whose gradients are summed apart
  int64_t wave;     // key heads at a time
  int64_t first;    // first key head of this wave
  int64_t bytes;

  KeyPlan plan;
  float* table;    // (H, table_columns), padded
  float* q_scale;  // (dp)
  float* k_scale;  // (dp)
  HeadMemory* memory;  // per worker, or per head of the wave
  float* dtable;       // (wave, chunks, G, table_columns)
  float* dq_scale;     // (wave, G, query_blocks, dp)
  float* dk_scale;     // (wave, chunks, dp)
  float* dtable_sum;   // (H, table_columns)
  double* dq_scale_sum;  // (dp)
  double* dk_scale_sum;  // (dp)
  Scratch* scratch;
};

// A key head at work.
struct Head {
  int64_t index;  // within the wave
  int64_t b, kv;
  const HeadMemory& memory;
  const KeyPlan& plan;
};

inline Head head_of(const State& s, int64_t index, int worker) {
  const int64_t head = s.first + index;
  const HeadMemory& memory = s.memory[s.per_worker ? worker : index];
  return {index, head / s.call->kv_heads, head % s.call->kv_heads, memory,
          s.one_plan ? s.plan : memory.plan};
}

// Null where there is no l2-norm.
inline const float* scale_or_null(const State& s, const float* scale) {
  return s.call->q_scale == nullptr ? nullptr : scale;
}

// How the heads are laid out depends on the number of workers; what is summed in which order does
// not, so results do not either.
State make_state(const AttentionCall& call, bool backward, int workers, void* workspace);

}  // namespace musiclm_fast::MUSICLM_FAST_SIMD_NS::attention
