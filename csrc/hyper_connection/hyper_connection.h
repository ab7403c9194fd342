// Mixing of residual streams, forward and backward: torch-free interface of the kernels in
// hyper_connection.simd.cpp. musiclm_fast/ops/hyper_connection/README.md has the formulas.
#pragma once

#include <cstdint>

#include "common/cpu.h"

namespace musiclm_fast {

struct HyperCall {
  int64_t tokens, streams, dim;  // N, s, D
  const float* x;        // (N, s, D)
  const float* beta;     // (N, s) or null: nothing is added to x
  const float* branch;   // (N, D) or null
  const float* weights;  // (s + 2, D)
  const float* scales;   // (s + 2)
  const float* offsets;  // (s, s + 2)

  float* input;     // (N, D)
  float* mixed;     // (N, s, D)
  float* beta_out;  // (N, s)
  float* z;         // (N, s, s + 2): <x, W> / |x|
  float* inverse;   // (N, s): 1 / |x|; negative where |x| counts as the smallest norm

  // Backward only.
  const float* grad_input;  // (N, D)
  const float* grad_mixed;  // (N, s, D)
  const float* grad_beta;   // (N, s)
  float* dx;                // (N, s, D)
  float* dbeta;             // (N, s)
  float* dbranch;           // (N, D)
};

// Floats of a worker's scratch.
inline int64_t hyper_scratch(int64_t streams, int64_t dim) {
  return streams * dim + 4 * streams * (streams + 2) + streams + 64;
}

MUSICLM_FAST_DECLARE_SIMD(void hyper_connection_forward(const HyperCall& call, int64_t begin,
                                                        int64_t end, float* scratch))
// dweights (s + 2, D), dscales (s + 2) and doffsets (s, s + 2) receive the tokens' sums.
MUSICLM_FAST_DECLARE_SIMD(void hyper_connection_backward(const HyperCall& call, int64_t begin,
                                                         int64_t end, float* scratch,
                                                         float* dweights, float* dscales,
                                                         float* doffsets))

}  // namespace musiclm_fast
