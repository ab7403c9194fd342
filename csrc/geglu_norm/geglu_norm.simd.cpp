// Row by row: the hidden values of a row stay in the cache between the unit and the norm, and are
// made anew in the backward.
#include <cmath>
#include <cstring>

#include "common/integers.h"
#include "common/simd.h"
#include "geglu_norm/geglu_norm.h"

namespace musiclm_fast::MUSICLM_FAST_SIMD_NS {
namespace {

constexpr float kNormEps = 1e-5f;  // torch.nn.functional.layer_norm's

// v where the lane is below n, else 0
MUSICLM_FAST_INLINE vfloat first_lanes(vfloat v, int64_t n) {
  if (n >= kWidth) return v;
  return vfirst(static_cast<int32_t>(n)) ? v : vzero();
}

}  // namespace

void geglu_norm_forward(const GegluCall& call, int64_t begin, int64_t end, float* scratch) {
  const int64_t h = call.hidden, p = call.padded;
  const float count = static_cast<float>(h);
  for (int64_t row = begin; row < end; ++row) {
    const float* values = call.x + row * 2 * p;
    const float* gates = values + p;
    vfloat sum = vzero();
    for (int64_t c = 0; c < h; c += kWidth) {
      const vfloat g = vload_up_to(gates + c, h - c);
      const vfloat u = vload_up_to(values + c, h - c) * (g * vnormal(g));
      vstore_up_to(scratch + c, u, h - c);
      sum += u;
    }
    const float mean = vsum(sum) / count;
    vfloat squares = vzero();
    for (int64_t c = 0; c < h; c += kWidth) {
      const vfloat d = first_lanes(vload_up_to(scratch + c, h - c) - mean, h - c);
      squares += d * d;
    }
    const float rstd = 1.0f / std::sqrt(vsum(squares) / count + kNormEps);
    float* out = call.out + row * p;
    for (int64_t c = 0; c < h; c += kWidth) {
      const vfloat y = (vload_up_to(scratch + c, h - c) - mean) * rstd;
      const vfloat z = y * vload_up_to(call.gamma + c, h - c) + vload_up_to(call.beta + c, h - c);
      vstore_up_to(out + c, z, h - c);
    }
    std::memset(out + h, 0, static_cast<size_t>(p - h) * sizeof(float));
    call.mean[row] = mean;
    call.rstd[row] = rstd;
  }
}

void geglu_norm_backward(const GegluCall& call, int64_t begin, int64_t end, float* scratch,
                         float* dgamma, float* dbeta) {
  const int64_t h = call.hidden, p = call.padded;
  const float count = static_cast<float>(h);
  float* normed = scratch;
  float* lower = scratch + round_up(h, kWidth);
  for (int64_t row = begin; row < end; ++row) {
    const float* values = call.x + row * 2 * p;
    const float* gates = values + p;
    const float* grad = call.grad + row * p;
    const float mean = call.mean[row], rstd = call.rstd[row];
    vfloat sum = vzero(), along = vzero();  // of the normed values' gradient
    for (int64_t c = 0; c < h; c += kWidth) {
      const int64_t left = h - c;
      const vfloat g = vload_up_to(gates + c, left);
      const vfloat phi = vnormal(g);
      const vfloat u = vload_up_to(values + c, left) * (g * phi);
      const vfloat y = first_lanes((u - mean) * rstd, left);
      const vfloat dz = vload_up_to(grad + c, left);
      const vfloat dy = dz * vload_up_to(call.gamma + c, left);
      vstore_up_to(dgamma + c, vload_up_to(dgamma + c, left) + dz * y, left);
      vstore_up_to(dbeta + c, vload_up_to(dbeta + c, left) + dz, left);
      vstore(normed + c, y);
      vstore(lower + c, phi);
      sum += dy;
      along += dy * y;
    }
    const float mean_dy = vsum(sum) / count, mean_along = vsum(along) / count;
    float* dvalues = call.dx + row * 2 * p;
    float* dgates = dvalues + p;
    for (int64_t c = 0; c < h; c += kWidth) {
      const int64_t left = h - c;
      const vfloat g = vload_up_to(gates + c, left), phi = vload(lower + c);
      const vfloat dy = vload_up_to(grad + c, left) * vload_up_to(call.gamma + c, left);
      const vfloat du = (dy - mean_dy - vload(normed + c) * mean_along) * rstd;
      // gelu'(g) = P(g) + g e^(-g^2/2) / sqrt(2 pi)
      const vfloat slope = phi + g * vexp(g * g * -0.5f) * 0.39894228f;
      vstore_up_to(dvalues + c, du * (g * phi), left);
      vstore_up_to(dgates + c, du * vload_up_to(values + c, left) * slope, left);
    }
    std::memset(dvalues + h, 0, static_cast<size_t>(p - h) * sizeof(float));
    std::memset(dgates + h, 0, static_cast<size_t>(p - h) * sizeof(float));
  }
}

}  // namespace musiclm_fast::MUSICLM_FAST_SIMD_NS
