// Registers the CPU kernels of hyper_connection.simd.cpp: checks, new tensors, threads, sums.
#include "hyper_connection/hyper_connection.h"

#include "common/stable.h"

namespace musiclm_fast {
namespace {

using OptionalTensor = std::optional<Tensor>;

// Tokens of a task. Sums over tokens are made of tasks' sums, in order, whatever the threads.
constexpr int64_t kTaskTokens = 128;

HyperCall make_call(const Tensor& streams, const OptionalTensor& beta, const OptionalTensor& branch,
                    const Tensor& weights, const Tensor& scales, const Tensor& offsets) {
  HyperCall call{};
  check_dim(streams, "streams", 3);
  call.tokens = streams.size(0);
  call.streams = streams.size(1);
  call.dim = streams.size(2);
  const int64_t columns = call.streams + 2;
  call.x = cpu_data<float>(streams, "streams", {call.tokens, call.streams, call.dim});
  STD_TORCH_CHECK(beta.has_value() == branch.has_value(), "beta, branch: both or none");
  if (beta.has_value()) {
    call.beta = cpu_data<float>(*beta, "beta", {call.tokens, call.streams});
    call.branch = cpu_data<float>(*branch, "branch", {call.tokens, call.dim});
  }
  call.weights = cpu_data<float>(weights, "weights", {columns, call.dim});
  call.scales = cpu_data<float>(scales, "scales", {columns});
  call.offsets = cpu_data<float>(offsets, "offsets", {call.streams, columns});
  return call;
}

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
  const int64_t size = hyper_scratch(s, dim);
  Tensor scratch = empty_as(streams, {divide_up(n, kTaskTokens) * size});
  float* memory = scratch.mutable_data_ptr<float>();
  each_task(n, kTaskTokens, [&](int64_t task, int64_t begin, int64_t end) {
    MUSICLM_FAST_SIMD_CALL(hyper_connection_forward, call, begin, end, memory + task * size);
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
  call.grad_input = cpu_data<float>(grad_input, "grad_input", {n, dim});
  call.grad_mixed = cpu_data<float>(grad_mixed, "grad_mixed", {n, s, dim});
  call.grad_beta = cpu_data<float>(grad_beta, "grad_beta", {n, s});
  call.z = const_cast<float*>(cpu_data<float>(z, "z", {n, s, columns}));
  call.inverse = const_cast<float*>(cpu_data<float>(inverse, "inverse_norm", {n, s}));
  const bool adds = branch.has_value();
  Tensor dx = empty_as(streams, {n, s, dim});
  Tensor dbeta = empty_as(streams, adds ? std::vector<int64_t>{n, s} : std::vector<int64_t>{0});
  Tensor dbranch = empty_as(streams, adds ? std::vector<int64_t>{n, dim} : std::vector<int64_t>{0});
  call.dx = dx.mutable_data_ptr<float>();
  call.dbeta = dbeta.mutable_data_ptr<float>();
  call.dbranch = dbranch.mutable_data_ptr<float>();
  const int64_t tasks = divide_up(n, kTaskTokens), size = hyper_scratch(s, dim);
  const int64_t sums = columns * (dim + 1 + s);
  Tensor parts = zeros_as(streams, {tasks, sums});
  Tensor scratch = empty_as(streams, {tasks * size});
  float* memory = scratch.mutable_data_ptr<float>();
  float* part = parts.mutable_data_ptr<float>();
  each_task(n, kTaskTokens, [&](int64_t task, int64_t begin, int64_t end) {
    float* dweights = part + task * sums;
    float* dscales = dweights + columns * dim;
    MUSICLM_FAST_SIMD_CALL(hyper_connection_backward, call, begin, end, memory + task * size,
                           dweights, dscales, dscales + columns);
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
