// Flash attention with an offset-table bias on the CPU: torch-free interface of the kernels in
// forward.simd.cpp and backward.simd.cpp.
// musiclm_fast/ops/attention/README.md describes the algorithm.
#pragma once

#include <cstdint>

#include "common/cpu.h"
#include "common/workers.h"

namespace musiclm_fast {

// A (B, heads, length, D) tensor of float or bf16; strides in elements, 1 in the last dimension.
struct HeadRows {
  void* data;
  bool half;  // bf16
  int64_t batch_stride, head_stride, row_stride;
};

struct AttentionCall {
  int64_t batch, heads, kv_heads, queries, keys, head_dim;
  float scale;
  bool causal;

  HeadRows q, k, v, out;
  float* logsumexp;  // (B, H, M); +inf where a query sees no key

  const float* table;  // (H, 2 * radius + 1) or null
  int64_t radius;
  const int32_t* q_codes;  // (B or 1, M): batch stride 0 where the batch shares them
  const int32_t* k_codes;  // (B or 1, N)
  int64_t q_codes_stride, k_codes_stride;

  const bool* key_mask;       // (B, N) or null
  const int64_t* key_lengths;  // (B,) or null
  const float* q_scale;        // (D,) or null: no l2-norm
  const float* k_scale;

  bool dropout;
  uint32_t seed_low, seed_high;
  uint32_t drop_below;  // a weight whose hash is below is dropped
  float keep_scale;     // 1 / (1 - p)

  // Backward only. Rows of dk and dv that no query can see are not written.
  HeadRows grad_out, dq, dk, dv;
  float* dtable;   // (H, 2 * radius + 1)
  float* dq_scale;  // (D,)
  float* dk_scale;
};

// Bytes of workspace, aligned to 64, that a call needs.
MUSICLM_FAST_DECLARE_SIMD(int64_t attention_workspace(const AttentionCall& call, bool backward,
                                                      int workers))
MUSICLM_FAST_DECLARE_SIMD(void attention_forward(const AttentionCall& call, void* workspace,
                                                 const Workers& workers))
MUSICLM_FAST_DECLARE_SIMD(void attention_backward(const AttentionCall& call, void* workspace,
                                                  const Workers& workers))

}  // namespace musiclm_fast
