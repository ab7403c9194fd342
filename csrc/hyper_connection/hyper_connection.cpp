// Registers the CPU kernels of hyper_connection.simd.cpp: checks, new tensors, threads, sums.
#include "hyper_connection/hyper_connection.h"

#include "common/stable.h"

namespace musiclm_fast {
namespace {

using OptionalTensor = std::optional<Tensor>;

// Tokens of a task. Sums over tokens are made of tasks' sums, in order, whatever the threads.
constexpr int64_t kTaskTokens = 128;

const float* float_data(const Tensor& x, const char* name, std::vector<int64_t> shape) {
  check_cpu(x, name);
  check_dtype(x, name, ScalarType::Float);
  check_contiguous(x, name);
  check_dim(x, name, static_cast<int64_t>(shape.size()));
  for (size_t i = 0; i < shape.size(); ++i) check_size(x, name, static_cast<int64_t>(i), shape[i]);
  return x.const_data_ptr<float>();
}

HyperCall make_call(const Tensor& streams, const OptionalTensor& beta, const OptionalTensor& branch,
                    const Tensor& weights, const Tensor& scales, const Tensor& offsets) {
  HyperCall call{};
  check_dim(streams, "streams", 3);
  call.tokens = streams.size(0);
  call.streams = streams.size(1);
  call.dim = streams.size(2);
  const int64_t columns = call.streams + 2;
  call.x = float_data(streams, "streams", {call.tokens, call.streams, call.dim});
  STD_TORCH_CHECK(beta.has_value() == branch.has_value(), "beta, branch: both or none");
  if (beta.has_value()) {
    call.beta = float_data(*beta, "beta", {call.tokens, call.streams});
    call.branch = float_data(*branch, "branch", {call.tokens, call.dim});
  }
  call.weights = float_data(weights, "weights", {columns, call.dim});
  call.scales = float_data(scales, "scales", {columns});
  call.offsets = float_data(offsets, "offsets", {call.streams, columns});
  return call;
}

template <typename F>
void each_task(const HyperCall& call, float* scratch, const F& f) {
  const int64_t tasks = (call.tokens + kTaskTokens - 1) / kTaskTokens;
  const int64_t size = hyper_scratch(call.streams, call.dim);
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      const int64_t begin = task * kTaskTokens, end = begin + kTaskTokens;
      f(task, begin, end < call.tokens ? end : call.tokens, scratch + task * size);
    }
  });
}

int64_t task_count(const HyperCall& call) { return (call.tokens + kTaskTokens - 1) / kTaskTokens; }

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& streams, const OptionalTensor& beta, const OptionalTensor& branch,
    const Tensor& weights, const Tensor& scales, const Tensor& offsets) {
  HyperCall call = make_call(streams, beta, branch, weights, scales, offsets);
  const int64_t n = call.tokens, s = call.streams, dim = call.dim;
  Tensor input = empty_as(streams, {n, dim}), mixed = empty_as(streams, {n, s, dim});
  Tensor beta_out = empty_as(streams, {n, s}), z = empty_as(streams, {n, s, s + 2});
  Tensor inverse = empty_as(streams, {n, s});
  call.input = input.mutable_data_ptr<float>();
  call.mixed = mixed.mutable_data_ptr<float>();
  call.beta_out = beta_out.mutable_data_ptr<float>();
  call.z = z.mutable_data_ptr<float>();
  call.inverse = inverse.mutable_data_ptr<float>();
  Tensor scratch = empty_as(streams, {task_count(call) * hyper_scratch(s, dim)});
  each_task(call, scratch.mutable_data_ptr<float>(),
            [&](int64_t, int64_t begin, int64_t end, float* memory) {
              MUSICLM_FAST_SIMD_CALL(hyper_connection_forward, call, begin, end, memory);
            });
  return {input, mixed, beta_out, z, inverse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_input, const Tensor& grad_mixed, const Tensor& grad_beta,
    const Tensor& streams, const OptionalTensor& beta, const OptionalTensor& branch,
    const Tensor& weights, const Tensor& scales, const Tensor& offsets, const Tensor& z,
    const Tensor& inverse) {
  HyperCall call = make_call(streams, beta, branch, weights, scales, offsets);
  const int64_t n = call.tokens, s = call.streams, dim = call.dim, columns = s + 2;
  call.grad_input = float_data(grad_input, "grad_input", {n, dim});
  call.grad_mixed = float_data(grad_mixed, "grad_mixed", {n, s, dim});
  call.grad_beta = float_data(grad_beta, "grad_beta", {n, s});
  call.z = const_cast<float*>(float_data(z, "z", {n, s, columns}));
  call.inverse = const_cast<float*>(float_data(inverse, "inverse_norm", {n, s}));
  const bool adds = branch.has_value();
  Tensor dx = empty_as(streams, {n, s, dim});
  Tensor dbeta = empty_as(streams, adds ? std::vector<int64_t>{n, s} : std::vector<int64_t>{0});
  Tensor dbranch = empty_as(streams, adds ? std::vector<int64_t>{n, dim} : std::vector<int64_t>{0});
  call.dx = dx.mutable_data_ptr<float>();
  call.dbeta = dbeta.mutable_data_ptr<float>();
  call.dbranch = dbranch.mutable_data_ptr<float>();
  const int64_t tasks = task_count(call), sums = columns * (dim + 1 + s);
  Tensor parts = zeros_as(streams, {tasks, sums});
  Tensor scratch = empty_as(streams, {tasks * hyper_scratch(s, dim)});
  float* part = parts.mutable_data_ptr<float>();
  each_task(call, scratch.mutable_data_ptr<float>(),
            [&](int64_t task, int64_t begin, int64_t end, float* memory) {
              float* dweights = part + task * sums;
              float* dscales = dweights + columns * dim;
              MUSICLM_FAST_SIMD_CALL(hyper_connection_backward, call, begin, end, memory, dweights,
                                     dscales, dscales + columns);
            });
  Tensor dweights = zeros_as(streams, {columns, dim}), dscales = zeros_as(streams, {columns});
  Tensor doffsets = zeros_as(streams, {s, columns});
  for (int64_t task = 0; task < tasks; ++task) {
    const float* from = part + task * sums;
    for (auto [sum, count] : {std::pair{&dweights, columns * dim}, std::pair{&dscales, columns},
                              std::pair{&doffsets, s * columns}}) {
      float* to = sum->mutable_data_ptr<float>();
      for (int64_t i = 0; i < count; ++i) to[i] += from[i];
      from += count;
    }
  }
  return {dx, dbeta, dbranch, dweights, dscales, doffsets};
}

STABLE_TORCH_LIBRARY_IMPL(musiclm_fast, CPU, m) {
  m.impl("hyper_connection_forward", TORCH_BOX(&forward));
  m.impl("hyper_connection_backward", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace musiclm_fast
