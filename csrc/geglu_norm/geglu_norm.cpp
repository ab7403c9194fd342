// Registers the CPU kernels of geglu_norm.simd.cpp: checks, new tensors, threads, sums.
#include "geglu_norm/geglu_norm.h"

#include "common/stable.h"

namespace musiclm_fast {
namespace {

// Rows of a task. The norm's gradients are sums of tasks' sums, in order, whatever the threads.
constexpr int64_t kTaskRows = 64;

GegluCall make_call(const Tensor& x, const Tensor& gamma, const Tensor& beta, int64_t rows) {
  check_dim(gamma, "gamma", 1);
  GegluCall call{};
  call.hidden = gamma.size(0);
  call.padded = x.size(1) / 2;
  STD_TORCH_CHECK(x.size(1) % 2 == 0 && call.padded >= call.hidden && call.hidden > 0,
                  "x: got width ", x.size(1), ", expected at least twice ", call.hidden);
  call.x = cpu_data<float>(x, "x", {rows, 2 * call.padded});
  call.gamma = cpu_data<float>(gamma, "gamma", {call.hidden});
  call.beta = cpu_data<float>(beta, "beta", {call.hidden});
  return call;
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& gamma,
                                           const Tensor& beta) {
  check_dim(x, "x", 2);
  const int64_t rows = x.size(0);
  GegluCall call = make_call(x, gamma, beta, rows);
  Tensor out = empty_as(x, {rows, call.padded});
  Tensor mean = empty_as(x, {rows}), rstd = empty_as(x, {rows});
  call.out = out.mutable_data_ptr<float>();
  call.mean = mean.mutable_data_ptr<float>();
  call.rstd = rstd.mutable_data_ptr<float>();
  const int64_t size = call.hidden + 16;
  Tensor scratch = empty_as(x, {divide_up(rows, kTaskRows) * size});
  float* memory = scratch.mutable_data_ptr<float>();
  each_task(rows, kTaskRows, [&](int64_t task, int64_t begin, int64_t end) {
    MUSICLM_FAST_SIMD_CALL(geglu_norm_forward, call, begin, end, memory + task * size);
  });
  return {out, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& x,
                                            const Tensor& gamma, const Tensor& beta,
                                            const Tensor& mean, const Tensor& rstd) {
  check_dim(x, "x", 2);
  const int64_t rows = x.size(0);
  GegluCall call = make_call(x, gamma, beta, rows);
  const int64_t h = call.hidden;
  call.grad = cpu_data<float>(grad, "grad", {rows, call.padded});
  call.mean = const_cast<float*>(cpu_data<float>(mean, "mean", {rows}));
  call.rstd = const_cast<float*>(cpu_data<float>(rstd, "rstd", {rows}));
  Tensor dx = empty_as(x, {rows, 2 * call.padded});
  call.dx = dx.mutable_data_ptr<float>();
  const int64_t tasks = divide_up(rows, kTaskRows), size = 2 * (h + 16);
  Tensor scratch = empty_as(x, {tasks * size}), parts = zeros_as(x, {tasks, 2, h});
  float* memory = scratch.mutable_data_ptr<float>();
  float* part = parts.mutable_data_ptr<float>();
  each_task(rows, kTaskRows, [&](int64_t task, int64_t begin, int64_t end) {
    float* dgamma = part + task * 2 * h;
    MUSICLM_FAST_SIMD_CALL(geglu_norm_backward, call, begin, end, memory + task * size, dgamma,
                           dgamma + h);
  });
  Tensor dgamma = zeros_as(x, {h}), dbeta = zeros_as(x, {h});
  float* sums[] = {dgamma.mutable_data_ptr<float>(), dbeta.mutable_data_ptr<float>()};
  for (int64_t task = 0; task < tasks; ++task) {
    for (int64_t i = 0; i < 2; ++i) {
      for (int64_t c = 0; c < h; ++c) sums[i][c] += part[(task * 2 + i) * h + c];
    }
  }
  return {dx, dgamma, dbeta};
}

STABLE_TORCH_LIBRARY_IMPL(musiclm_fast, CPU, m) {
  m.impl("geglu_norm_forward", TORCH_BOX(&forward));
  m.impl("geglu_norm_backward", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace musiclm_fast
