// One pass over the streams for each direction, token by token: a token's streams stay in the cache
// while they are added to, weighed and mixed. Names of shapes: N tokens, s streams, D width.
#include <cmath>
#include <cstring>

#include "common/simd.h"
#include "hyper_connection/hyper_connection.h"

namespace musiclm_fast::MUSICLM_FAST_SIMD_NS {
namespace {

constexpr float kSmallestNorm = 1e-12f;
constexpr int kBlock = 4;  // products that share the reading of one vector

// out[i] = <x, y_i>, y_i at y + i * stride
template <int kCount>
MUSICLM_FAST_INLINE void products(const float* x, const float* y, int64_t stride, int64_t n,
                                  float* out) {
  vfloat sum[kCount] = {};
  int64_t c = 0;
  for (; c + kWidth <= n; c += kWidth) {
    const vfloat left = vload(x + c);
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) sum[i] += left * vload(y + i * stride + c);
  }
  if (c < n) {
    const int lanes = static_cast<int>(n - c);
    const vfloat left = vload_partial(x + c, lanes);
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) sum[i] += left * vload_partial(y + i * stride + c, lanes);
  }
  for (int i = 0; i < kCount; ++i) out[i] = vsum(sum[i]);
}

void all_products(const float* x, const float* y, int64_t stride, int64_t count, int64_t n,
                  float* out) {
  for (; count >= kBlock; count -= kBlock, y += kBlock * stride, out += kBlock) {
    products<kBlock>(x, y, stride, n, out);
  }
  for (; count > 0; --count, y += stride, ++out) products<1>(x, y, stride, n, out);
}

// tanh of n values
void all_tanh(const float* z, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += kWidth) {
    vstore_up_to(out + i, vtanh(vload_up_to(z + i, n - i)), n - i);
  }
}

// The token's streams, with the branch's output added: in scratch, or where they are.
const float* streams_of(const HyperCall& call, int64_t token, float* scratch) {
  const int64_t s = call.streams, dim = call.dim;
  const float* x = call.x + token * s * dim;
  if (call.branch == nullptr) return x;
  const float* branch = call.branch + token * dim;
  for (int64_t t = 0; t < s; ++t) {
    const float beta = call.beta[token * s + t];
    for (int64_t c = 0; c < dim; c += kWidth) {
      const int64_t left = dim - c;
      const vfloat sum =
          vload_up_to(x + t * dim + c, left) + beta * vload_up_to(branch + c, left);
      vstore_up_to(scratch + t * dim + c, sum, left);
    }
  }
  return scratch;
}

}  // namespace

void hyper_connection_forward(const HyperCall& call, int64_t begin, int64_t end, float* scratch) {
  const int64_t s = call.streams, dim = call.dim, columns = s + 2;
  float* weight = scratch + s * dim;  // (s, s + 2)
  for (int64_t token = begin; token < end; ++token) {
    const float* x = streams_of(call, token, scratch);
    float* z = call.z + token * s * columns;
    for (int64_t t = 0; t < s; ++t) {
      const float* stream = x + t * dim;
      float square;
      products<1>(stream, stream, 0, dim, &square);
      const float norm = std::sqrt(square);
      const float inverse = 1.0f / (norm > kSmallestNorm ? norm : kSmallestNorm);
      // below the smallest norm the division is by a constant: a sign for the backward
      call.inverse[token * s + t] = norm > kSmallestNorm ? inverse : -inverse;
      all_products(stream, call.weights, dim, columns, dim, z + t * columns);
      for (int64_t j = 0; j < columns; ++j) z[t * columns + j] *= inverse;
    }
    all_tanh(z, s * columns, weight);
    for (int64_t t = 0; t < s; ++t) {
      for (int64_t j = 0; j < columns; ++j) {
        const int64_t i = t * columns + j;
        weight[i] = weight[i] * call.scales[j] + call.offsets[i];
      }
      call.beta_out[token * s + t] = weight[t * columns + columns - 1];
    }
    float* input = call.input + token * dim;
    float* mixed = call.mixed + token * s * dim;
    for (int64_t c = 0; c < dim; c += kWidth) {
      const int64_t left = dim - c;
      for (int64_t j = 0; j <= s; ++j) {
        vfloat sum = vzero();
        for (int64_t t = 0; t < s; ++t) {
          sum += weight[t * columns + j] * vload_up_to(x + t * dim + c, left);
        }
        vstore_up_to((j == 0 ? input : mixed + (j - 1) * dim) + c, sum, left);
      }
    }
  }
}

void hyper_connection_backward(const HyperCall& call, int64_t begin, int64_t end, float* scratch,
                               float* dweights, float* dscales, float* doffsets) {
  const int64_t s = call.streams, dim = call.dim, columns = s + 2;
  float* weight = scratch + s * dim;      // (s, s + 2)
  float* along = weight + s * columns;    // (s, s + 2): gradient of <x, W_j>
  float* dw = along + s * columns;        // (s, s + 2)
  float* tanhs = dw + s * columns;        // (s, s + 2)
  float* back = tanhs + s * columns;      // (s): what comes back along x through the norm
  for (int64_t token = begin; token < end; ++token) {
    const float* x = streams_of(call, token, scratch);
    const float* z = call.z + token * s * columns;
    all_tanh(z, s * columns, tanhs);
    const float* grad_input = call.grad_input + token * dim;
    const float* grad_mixed = call.grad_mixed + token * s * dim;
    for (int64_t t = 0; t < s; ++t) {
      float* row = dw + t * columns;
      products<1>(x + t * dim, grad_input, 0, dim, row);
      all_products(x + t * dim, grad_mixed, dim, s, dim, row + 1);
      row[columns - 1] = call.grad_beta[token * s + t];
      const float signed_inverse = call.inverse[token * s + t];
      const float inverse = signed_inverse < 0.0f ? -signed_inverse : signed_inverse;
      float radial = 0.0f;  // sum_j dz_j z_j
      for (int64_t j = 0; j < columns; ++j) {
        const int64_t i = t * columns + j;
        weight[i] = tanhs[i] * call.scales[j] + call.offsets[i];
        doffsets[i] += row[j];
        dscales[j] += row[j] * tanhs[i];
        const float dz = row[j] * call.scales[j] * (1.0f - tanhs[i] * tanhs[i]);
        along[i] = dz * inverse;
        radial += dz * z[i];
      }
      back[t] = signed_inverse < 0.0f ? 0.0f : radial * inverse * inverse;
    }
    float* dx = call.dx + token * s * dim;
    for (int64_t c = 0; c < dim; c += kWidth) {
      const int64_t left = dim - c;
      const vfloat from_input = vload_up_to(grad_input + c, left);
      for (int64_t t = 0; t < s; ++t) {
        vfloat sum = weight[t * columns] * from_input - back[t] * vload_up_to(x + t * dim + c, left);
        for (int64_t u = 0; u < s; ++u) {
          sum += weight[t * columns + 1 + u] * vload_up_to(grad_mixed + u * dim + c, left);
        }
        for (int64_t j = 0; j < columns; ++j) {
          sum += along[t * columns + j] * vload_up_to(call.weights + j * dim + c, left);
        }
        vstore_up_to(dx + t * dim + c, sum, left);
      }
      for (int64_t j = 0; j < columns; ++j) {
        vfloat sum = vload_up_to(dweights + j * dim + c, left);
        for (int64_t t = 0; t < s; ++t) {
          sum += along[t * columns + j] * vload_up_to(x + t * dim + c, left);
        }
        vstore_up_to(dweights + j * dim + c, sum, left);
      }
    }
    if (call.branch == nullptr) continue;
    all_products(call.branch + token * dim, dx, dim, s, dim, call.dbeta + token * s);
    float* dbranch = call.dbranch + token * dim;
    for (int64_t c = 0; c < dim; c += kWidth) {
      const int64_t left = dim - c;
      vfloat sum = vzero();
      for (int64_t t = 0; t < s; ++t) {
        sum += call.beta[token * s + t] * vload_up_to(dx + t * dim + c, left);
      }
      vstore_up_to(dbranch + c, sum, left);
    }
  }
}

}  // namespace musiclm_fast::MUSICLM_FAST_SIMD_NS
