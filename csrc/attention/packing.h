// What is packed before the tiles. Masked keys are left out, so that the inner loops know nothing
// of masks and lengths. For *.simd.cpp only.
#pragma once

#include "attention/workspace.h"
#include "common/workers.h"

namespace musiclm_fast::MUSICLM_FAST_SIMD_NS::attention {

// The padded table and scales, and the plan if there is one for all.
void prepare(State& s, const Workers& workers);

// The key plan of a head of this wave, unless there is one for all.
void plan_head(const State& s, int64_t index, int worker);

// One block of kKeyRows keys and values.
void pack_keys(const State& s, const Head& head, int64_t block, float* scratch);

// Backward: one block of kBackwardRows queries and their grad_out and delta.
void pack_queries(const State& s, const Head& head, int64_t g, int64_t block, float* scratch);

}  // namespace musiclm_fast::MUSICLM_FAST_SIMD_NS::attention
