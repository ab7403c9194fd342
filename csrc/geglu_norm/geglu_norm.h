// The gated unit of a feed-forward and the norm after it: torch-free interface of
// geglu_norm.simd.cpp.
#pragma once

#include <cstdint>

#include "common/cpu.h"

namespace musiclm_fast {

struct GegluCall {
  int64_t hidden, padded;  // h <= p
  const float* x;          // (N, 2p): values, then gates; what lies beyond h is not read
  const float* gamma;      // (h)
  const float* beta;       // (h)
  float* out;              // (N, p): zeros beyond h
  float* mean;             // (N)
  float* rstd;             // (N)
  const float* grad;       // (N, p); backward only, as the next
  float* dx;               // (N, 2p): zeros beyond h
};

// `scratch` has hidden + 16 floats (twice as many backward).
MUSICLM_FAST_DECLARE_SIMD(void geglu_norm_forward(const GegluCall& call, int64_t begin, int64_t end,
                                                  float* scratch))
// dgamma and dbeta (h) receive the rows' sums.
MUSICLM_FAST_DECLARE_SIMD(void geglu_norm_backward(const GegluCall& call, int64_t begin,
                                                   int64_t end, float* scratch, float* dgamma,
                                                   float* dbeta))

}  // namespace musiclm_fast
