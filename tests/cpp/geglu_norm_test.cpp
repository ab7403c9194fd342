// Checks csrc/geglu_norm's kernels against loops in double.
#include "geglu_norm/geglu_norm.h"

#include "check.h"

using namespace musiclm_fast;
using namespace musiclm_fast::check;

namespace {

constexpr int64_t kRows = 3;

// out (N, p) from x (N, 2p), gamma and beta (h)
Doubles geglu_norm(const Doubles& x, const Doubles& gamma, const Doubles& beta, int64_t h,
                   int64_t p) {
  Doubles out(kRows * p, 0.0);
  for (int64_t row = 0; row < kRows; ++row) {
    Doubles u(h);
    double mean = 0.0, variance = 0.0;
    for (int64_t c = 0; c < h; ++c) {
      const double gate = x[row * 2 * p + p + c];
      u[c] = x[row * 2 * p + c] * gate * 0.5 * (1.0 + std::erf(gate / std::sqrt(2.0)));
      mean += u[c] / static_cast<double>(h);
    }
    for (const double value : u) variance += (value - mean) * (value - mean) / static_cast<double>(h);
    for (int64_t c = 0; c < h; ++c) {
      out[row * p + c] = (u[c] - mean) / std::sqrt(variance + 1e-5) * gamma[c] + beta[c];
    }
  }
  return out;
}

void test(int64_t h, int64_t p) {
  const std::string name = "hidden " + std::to_string(h) + " of " + std::to_string(p) + ": ";
  Floats x = values(kRows * 2 * p, 1, 2.0f), gamma = values(h, 2), beta = values(h, 3);
  for (int64_t i = 0; i < kRows * 2 * p; ++i) {
    if (i % p >= h) x[i] = std::nanf("");  // not to be read
  }
  const Floats grad = values(kRows * p, 4);
  Floats out = poisoned(kRows * p), mean = poisoned(kRows), rstd = poisoned(kRows);
  Floats dx = poisoned(kRows * 2 * p), dgamma(h, 0.0f), dbeta(h, 0.0f);
  const GegluCall call{h,          p,           x.data(),    gamma.data(), beta.data(), out.data(),
                       mean.data(), rstd.data(), grad.data(), dx.data()};
  Workspace scratch((h + 16) * 4), scratch_backward(2 * (h + 16) * 4);
  MUSICLM_FAST_SIMD_CALL(geglu_norm_forward, call, 0, kRows, scratch);
  MUSICLM_FAST_SIMD_CALL(geglu_norm_backward, call, 0, kRows, scratch_backward, dgamma.data(),
                         dbeta.data());

  Doubles in = in_double(x), scale = in_double(gamma), shift = in_double(beta);
  close(name + "out", out, geglu_norm(in, scale, shift, h, p), 1e-6);
  const auto loss = [&] { return sum_of_products(geglu_norm(in, scale, shift, h, p), grad); };
  for (double& value : in) value = std::isnan(value) ? 0.0 : value;
  close(name + "dx", dx, gradient(in, loss), 1e-6);
  close(name + "dgamma", dgamma, gradient(scale, loss), 1e-6);
  close(name + "dbeta", dbeta, gradient(shift, loss), 1e-6);
}

}  // namespace

int main() {
  return at_every_level("geglu_norm", [] {
    test(5, 8);
    test(16, 16);
    test(75, 80);
  });
}
