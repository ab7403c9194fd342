// One more token through a transformer's layers: torch-free interface of decode.simd.cpp.
// musiclm_fast/ops/decode/README.md describes what is packed how, and why.
#pragma once

#include <cstdint>

#include "common/cpu.h"
#include "common/workers.h"

namespace musiclm_fast {

// Outputs of a packed matrix that lie side by side: panel p holds outputs 16p .. 16p+15 as
// (inputs, 16), the missing ones zero.
inline constexpr int64_t kDecodePanel = 16;

struct DecodeSizes {
  int64_t depth, dim, heads, dim_head, hidden, streams, nulls;
  bool cross, norm_context, value_residual;
};

// Where a connection's constants lie, in floats from the layer's begin.
struct DecodeMix {
  int64_t weights;  // (streams + 2, dim padded)
  int64_t scales;   // (streams + 2)
  int64_t offsets;  // (streams, streams + 2)
};

// Where everything lies: layer after layer in the order in which a step reads it. Vectors are padded
// with zeros to a multiple of 16, norms are gamma and then beta, matrices are panels.
struct DecodeLayout {
  DecodeMix own_mix, cross_mix, ff_mix;
  int64_t context_norm, to_kv, null_kv, own_norm, own_to_q, own_to_out;
  int64_t cross_norm, cross_to_q, cross_to_out;
  int64_t ff_norm, widen, inner_norm, narrow;
  int64_t layer;  // floats of a layer
  int64_t norm;   // the last norm, from the begin of all
  int64_t total;
};

DecodeLayout decode_layout(const DecodeSizes& sizes);

struct DecodeCall {
  DecodeSizes sizes;
  DecodeLayout layout;
  const float* packed;
  int64_t rows;
  const float* x;      // (B, dim)
  float* out;          // (B, dim)
  float* keys_values;  // (depth, 2, B, capacity, D); the token's go to `length`
  int64_t capacity, length;
  const float* context;     // (depth, 2, B, contexts, D) or null
  const bool* context_mask;  // (B, contexts) or null
  int64_t contexts;
  const float* table;  // (H, 2 * radius + 1) or null
  int64_t radius;
  int32_t q_code;
  const int32_t* k_codes;  // (nulls + length + 1)
  const bool* key_mask;    // (B, nulls + length + 1) or null
};

MUSICLM_FAST_DECLARE_SIMD(void decode_pack_matrix(const float* weight, int64_t outputs,
                                                  int64_t inputs, float* packed))
// Bytes of workspace, aligned to 64, that a call needs.
MUSICLM_FAST_DECLARE_SIMD(int64_t decode_workspace(const DecodeCall& call, int workers))
MUSICLM_FAST_DECLARE_SIMD(void decode_step(const DecodeCall& call, void* workspace,
                                           const Workers& workers))

}  // namespace musiclm_fast
