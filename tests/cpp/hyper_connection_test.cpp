// Checks csrc/hyper_connection's kernels against loops in double.
#include "hyper_connection/hyper_connection.h"

#include "check.h"

using namespace musiclm_fast;
using namespace musiclm_fast::check;

namespace {

constexpr int64_t kTokens = 3;

struct Inputs {
  Doubles x, beta, branch, weights, scales, offsets;  // as in HyperCall
};

struct Outputs {
  Doubles input, mixed, beta;
};

Outputs hyper_connection(const Inputs& in, int64_t s, int64_t dim) {
  const int64_t columns = s + 2;
  Outputs out{Doubles(kTokens * dim, 0.0), Doubles(kTokens * s * dim, 0.0), Doubles(kTokens * s)};
  for (int64_t token = 0; token < kTokens; ++token) {
    for (int64_t t = 0; t < s; ++t) {
      Doubles stream(dim);
      double square = 0.0;
      for (int64_t c = 0; c < dim; ++c) {
        stream[c] = in.x[(token * s + t) * dim + c];
        if (!in.branch.empty()) stream[c] += in.beta[token * s + t] * in.branch[token * dim + c];
        square += stream[c] * stream[c];
      }
      for (int64_t j = 0; j < columns; ++j) {
        double product = 0.0;
        for (int64_t c = 0; c < dim; ++c) product += stream[c] * in.weights[j * dim + c];
        const double weight =
            std::tanh(product / std::sqrt(square)) * in.scales[j] + in.offsets[t * columns + j];
        if (j == s + 1) {
          out.beta[token * s + t] = weight;
          continue;
        }
        double* to = j == 0 ? &out.input[token * dim] : &out.mixed[(token * s + j - 1) * dim];
        for (int64_t c = 0; c < dim; ++c) to[c] += weight * stream[c];
      }
    }
  }
  return out;
}

void test(int64_t s, int64_t dim, bool adds) {
  const std::string name = std::to_string(s) + " streams of " + std::to_string(dim) +
                           (adds ? " and a branch: " : ": ");
  const int64_t columns = s + 2, wide = kTokens * s * dim;
  const Floats x = values(wide, 1), beta = values(kTokens * s, 2), branch = values(kTokens * dim, 3);
  const Floats weights = values(columns * dim, 4), scales = values(columns, 5);
  const Floats offsets = values(s * columns, 6);
  const Floats grad_input = values(kTokens * dim, 7), grad_mixed = values(wide, 8);
  const Floats grad_beta = values(kTokens * s, 9);
  Floats input = poisoned(kTokens * dim), mixed = poisoned(wide), beta_out = poisoned(kTokens * s);
  Floats z = poisoned(kTokens * s * columns), inverse = poisoned(kTokens * s);
  Floats dx = poisoned(wide), dbeta = poisoned(kTokens * s), dbranch = poisoned(kTokens * dim);
  Floats dweights(columns * dim, 0.0f), dscales(columns, 0.0f), doffsets(s * columns, 0.0f);
  const HyperCall call{kTokens,
                       s,
                       dim,
                       x.data(),
                       adds ? beta.data() : nullptr,
                       adds ? branch.data() : nullptr,
                       weights.data(),
                       scales.data(),
                       offsets.data(),
                       input.data(),
                       mixed.data(),
                       beta_out.data(),
                       z.data(),
                       inverse.data(),
                       grad_input.data(),
                       grad_mixed.data(),
                       grad_beta.data(),
                       dx.data(),
                       dbeta.data(),
                       dbranch.data()};
  Workspace scratch(hyper_scratch(s, dim) * 4);
  MUSICLM_FAST_SIMD_CALL(hyper_connection_forward, call, 0, kTokens, scratch);
  MUSICLM_FAST_SIMD_CALL(hyper_connection_backward, call, 0, kTokens, scratch, dweights.data(),
                         dscales.data(), doffsets.data());

  Inputs in{in_double(x),       in_double(beta),   adds ? in_double(branch) : Doubles(),
            in_double(weights), in_double(scales), in_double(offsets)};
  const Outputs out = hyper_connection(in, s, dim);
  close(name + "input", input, out.input, 1e-6);
  close(name + "mixed", mixed, out.mixed, 1e-6);
  close(name + "beta", beta_out, out.beta, 1e-6);
  const auto loss = [&] {
    const Outputs at = hyper_connection(in, s, dim);
    return sum_of_products(at.input, grad_input) + sum_of_products(at.mixed, grad_mixed) +
           sum_of_products(at.beta, grad_beta);
  };
  close(name + "dx", dx, gradient(in.x, loss), 1e-6);
  close(name + "dweights", dweights, gradient(in.weights, loss), 1e-6);
  close(name + "dscales", dscales, gradient(in.scales, loss), 1e-6);
  close(name + "doffsets", doffsets, gradient(in.offsets, loss), 1e-6);
  if (!adds) return;
  close(name + "dbeta", dbeta, gradient(in.beta, loss), 1e-6);
  close(name + "dbranch", dbranch, gradient(in.branch, loss), 1e-6);
}

}  // namespace

int main() {
  return at_every_level("hyper_connection", [] {
    test(2, 5, true);
    test(4, 16, false);
    test(4, 37, true);
    test(5, 64, true);
  });
}
