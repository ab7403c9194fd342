// Registers the CPU kernels: checks, new tensors, workspace, threads.
#include "attention/attention.h"

#include <cmath>
#include <limits>

#include "common/stable.h"

namespace musiclm_fast {
namespace {

using OptionalTensor = std::optional<Tensor>;
using torch::stable::contiguous;

// Fewer multiply-adds than this take less time than waking another thread.
constexpr double kWorthThreads = 1 << 20;

HeadRows head_rows(const Tensor& x) {
  return {const_cast<void*>(x.const_data_ptr()), x.scalar_type() == ScalarType::BFloat16,
          x.stride(0), x.stride(1), x.stride(2)};
}

// Unit stride in the last dimension.
Tensor unit_rows(const Tensor& x) {
  return x.size(3) == 1 || x.stride(3) == 1 ? x : contiguous(x);
}

// (B, heads, length, D) stored as (B, length, heads, D).
Tensor new_heads(const Tensor& like, int64_t heads, int64_t length, bool zeros) {
  const std::vector<int64_t> sizes{like.size(0), length, heads, like.size(3)};
  const Tensor stored = zeros ? zeros_as(like, sizes) : empty_as(like, sizes);
  return torch::stable::transpose(stored, 1, 2);
}

struct Options {
  OptionalTensor table, q_codes, k_codes, key_mask, q_scale, k_scale;
  std::vector<int64_t> key_lengths;
};

Tensor float_vector(const Tensor& x, const char* name, int64_t dim) {
  check_cpu(x, name);
  check_dim(x, name, dim);
  check_dtype(x, name, ScalarType::Float);
  return contiguous(x);
}

Tensor checked_codes(const Tensor& codes, const char* name, int64_t batch, int64_t length) {
  check_cpu(codes, name);
  check_dtype(codes, name, ScalarType::Int);
  if (codes.dim() == 2) check_size(codes, name, 0, batch);
  check_size(codes, name, codes.dim() - 1, length);
  return contiguous(codes);
}

void check_heads(const Tensor& x, const char* name, ScalarType dtype) {
  check_cpu(x, name);
  check_dim(x, name, 4);
  check_dtype(x, name, dtype);
}

// The call without its outputs; `options` keeps the tensors that it points into.
AttentionCall make_call(const Tensor& q, const Tensor& k, const Tensor& v,
                        const OptionalTensor& bias_table, const OptionalTensor& q_codes,
                        const OptionalTensor& k_codes, const OptionalTensor& key_padding_mask,
                        const OptionalTensor& key_lengths, const OptionalTensor& q_scale,
                        const OptionalTensor& k_scale, const OptionalTensor& dropout_seed,
                        double scale, bool causal, double dropout_p, Options& options) {
  STD_TORCH_CHECK(q.scalar_type() == ScalarType::Float || q.scalar_type() == ScalarType::BFloat16,
                  "q: expected float32 or bfloat16");
  check_heads(q, "q", q.scalar_type());
  check_heads(k, "k", q.scalar_type());
  check_heads(v, "v", q.scalar_type());
  AttentionCall call{};
  call.batch = q.size(0);
  call.heads = q.size(1);
  call.queries = q.size(2);
  call.head_dim = q.size(3);
  call.kv_heads = k.size(1);
  call.keys = k.size(2);
  STD_TORCH_CHECK(call.head_dim > 0 && call.kv_heads > 0 && call.heads % call.kv_heads == 0,
                  "k: ", call.kv_heads, " heads do not divide q's ", call.heads);
  for (const auto& [x, name] : {std::pair{&k, "k"}, std::pair{&v, "v"}}) {
    check_size(*x, name, 0, call.batch);
    check_size(*x, name, 1, call.kv_heads);
    check_size(*x, name, 2, call.keys);
    check_size(*x, name, 3, call.head_dim);
  }
  call.scale = static_cast<float>(scale);
  call.causal = causal;
  call.q = head_rows(q);
  call.k = head_rows(k);
  call.v = head_rows(v);

  if (bias_table.has_value()) {
    STD_TORCH_CHECK(q_codes.has_value() && k_codes.has_value(), "bias_table needs codes");
    options.table = float_vector(*bias_table, "bias_table", 2);
    check_size(*bias_table, "bias_table", 0, call.heads);
    STD_TORCH_CHECK(bias_table->size(1) % 2 == 1, "bias_table: expected 2R + 1 columns");
    options.q_codes = checked_codes(*q_codes, "q_codes", call.batch, call.queries);
    options.k_codes = checked_codes(*k_codes, "k_codes", call.batch, call.keys);
    call.table = options.table->const_data_ptr<float>();
    call.radius = bias_table->size(1) / 2;
    call.q_codes = options.q_codes->const_data_ptr<int32_t>();
    call.k_codes = options.k_codes->const_data_ptr<int32_t>();
    call.q_codes_stride = q_codes->dim() == 2 ? call.queries : 0;
    call.k_codes_stride = k_codes->dim() == 2 ? call.keys : 0;
  }
  if (key_padding_mask.has_value()) {
    check_cpu(*key_padding_mask, "key_padding_mask");
    check_dtype(*key_padding_mask, "key_padding_mask", ScalarType::Bool);
    check_dim(*key_padding_mask, "key_padding_mask", 2);
    check_size(*key_padding_mask, "key_padding_mask", 0, call.batch);
    check_size(*key_padding_mask, "key_padding_mask", 1, call.keys);
    options.key_mask = contiguous(*key_padding_mask);
    call.key_mask = options.key_mask->const_data_ptr<bool>();
  }
  if (key_lengths.has_value()) {
    check_cpu(*key_lengths, "key_lengths");
    check_dim(*key_lengths, "key_lengths", 1);
    check_size(*key_lengths, "key_lengths", 0, call.batch);
    const Tensor lengths = contiguous(*key_lengths);
    dispatch<int32_t, int64_t>(lengths.scalar_type(), "key_lengths", [&](auto zero) {
      const auto* data = lengths.const_data_ptr<decltype(zero)>();
      options.key_lengths.assign(data, data + call.batch);
    });
    call.key_lengths = options.key_lengths.data();
  }
  STD_TORCH_CHECK(q_scale.has_value() == k_scale.has_value(), "q_scale, k_scale: both or none");
  if (q_scale.has_value()) {
    options.q_scale = float_vector(*q_scale, "q_scale", 1);
    options.k_scale = float_vector(*k_scale, "k_scale", 1);
    check_size(*q_scale, "q_scale", 0, call.head_dim);
    check_size(*k_scale, "k_scale", 0, call.head_dim);
    call.q_scale = options.q_scale->const_data_ptr<float>();
    call.k_scale = options.k_scale->const_data_ptr<float>();
  }
  if (dropout_p > 0.0) {
    STD_TORCH_CHECK(dropout_p < 1.0, "dropout_p: expected less than 1");
    STD_TORCH_CHECK(dropout_seed.has_value() && dropout_seed->numel() == 1,
                    "dropout_seed: expected one int64");
    check_cpu(*dropout_seed, "dropout_seed");
    check_dtype(*dropout_seed, "dropout_seed", ScalarType::Long);
    const auto seed = static_cast<uint64_t>(*dropout_seed->const_data_ptr<int64_t>());
    call.dropout = true;
    call.seed_low = static_cast<uint32_t>(seed);
    call.seed_high = static_cast<uint32_t>(seed >> 32);
    call.drop_below = static_cast<uint32_t>(std::ldexp(dropout_p, 32));
    call.keep_scale = static_cast<float>(1.0 / (1.0 - dropout_p));
  }
  return call;
}

bool nothing_to_do(const AttentionCall& call) {
  return call.batch == 0 || call.heads == 0 || call.queries == 0 || call.keys == 0;
}

template <typename Size, typename Kernel>
void launch(const AttentionCall& call, const Size& size, const Kernel& kernel) {
  const double work = static_cast<double>(call.batch * call.heads * call.head_dim) *
                      static_cast<double>(call.queries) * static_cast<double>(call.keys);
  const int count = work < kWorthThreads ? 1 : static_cast<int>(torch::stable::get_num_threads());
  const Workers workers = torch_workers(count);
  const Buffer<char> workspace(size(workers));
  kernel(workspace.get(), workers);
}

std::tuple<Tensor, Tensor> forward(
    const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& bias_table,
    const OptionalTensor& q_codes, const OptionalTensor& k_codes,
    const OptionalTensor& key_padding_mask, const OptionalTensor& key_lengths,
    const OptionalTensor& q_scale, const OptionalTensor& k_scale,
    const OptionalTensor& dropout_seed, double scale, bool causal, double dropout_p) {
  const Tensor q_rows = unit_rows(q), k_rows = unit_rows(k), v_rows = unit_rows(v);
  Options options;
  AttentionCall call =
      make_call(q_rows, k_rows, v_rows, bias_table, q_codes, k_codes, key_padding_mask, key_lengths,
                q_scale, k_scale, dropout_seed, scale, causal, dropout_p, options);
  const bool nothing = nothing_to_do(call);
  Tensor out = new_heads(q, call.heads, call.queries, nothing);
  Tensor logsumexp = empty_as(q, {call.batch, call.heads, call.queries}, ScalarType::Float);
  if (nothing) {
    torch::stable::fill_(logsumexp, std::numeric_limits<double>::infinity());
    return {out, logsumexp};
  }
  call.out = head_rows(out);
  call.logsumexp = logsumexp.mutable_data_ptr<float>();
  launch(
      call,
      [&](const Workers& workers) {
        return MUSICLM_FAST_SIMD_CALL(attention_workspace, call, false, workers.count);
      },
      [&](void* workspace, const Workers& workers) {
        MUSICLM_FAST_SIMD_CALL(attention_forward, call, workspace, workers);
      });
  return {out, logsumexp};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
    const Tensor& logsumexp, const OptionalTensor& bias_table, const OptionalTensor& q_codes,
    const OptionalTensor& k_codes, const OptionalTensor& key_padding_mask,
    const OptionalTensor& key_lengths, const OptionalTensor& q_scale,
    const OptionalTensor& k_scale, const OptionalTensor& dropout_seed, double scale, bool causal,
    double dropout_p) {
  const Tensor q_rows = unit_rows(q), k_rows = unit_rows(k), v_rows = unit_rows(v);
  const Tensor out_rows = unit_rows(out), grad_rows = unit_rows(grad_out);
  const Tensor lse = contiguous(logsumexp);
  Options options;
  AttentionCall call =
      make_call(q_rows, k_rows, v_rows, bias_table, q_codes, k_codes, key_padding_mask, key_lengths,
                q_scale, k_scale, dropout_seed, scale, causal, dropout_p, options);
  check_heads(grad_rows, "grad_out", q.scalar_type());
  check_heads(out_rows, "out", q.scalar_type());
  check_dtype(lse, "logsumexp", ScalarType::Float);
  for (int64_t dim = 0; dim < 4; ++dim) {
    check_size(grad_rows, "grad_out", dim, q.size(dim));
    check_size(out_rows, "out", dim, q.size(dim));
    if (dim < 3) check_size(lse, "logsumexp", dim, q.size(dim));
  }
  const bool nothing = nothing_to_do(call);
  // The kernels write no row of a key that is masked for every query.
  const bool unseen = nothing || call.key_mask != nullptr || call.key_lengths != nullptr;
  Tensor dq = new_heads(q, call.heads, call.queries, nothing);
  Tensor dk = new_heads(k, call.kv_heads, call.keys, unseen);
  Tensor dv = new_heads(v, call.kv_heads, call.keys, unseen);
  const auto like = [&](const OptionalTensor& x) {
    if (!x.has_value()) return empty_as(q, {0});
    std::vector<int64_t> sizes;
    for (int64_t dim = 0; dim < x->dim(); ++dim) sizes.push_back(x->size(dim));
    return nothing ? zeros_as(*x, sizes) : empty_as(*x, sizes);
  };
  Tensor dtable = like(bias_table), dq_scale = like(q_scale), dk_scale = like(k_scale);
  if (!nothing) {
    call.logsumexp = const_cast<float*>(lse.const_data_ptr<float>());
    call.out = head_rows(out_rows);
    call.grad_out = head_rows(grad_rows);
    call.dq = head_rows(dq);
    call.dk = head_rows(dk);
    call.dv = head_rows(dv);
    if (bias_table.has_value()) call.dtable = dtable.mutable_data_ptr<float>();
    if (q_scale.has_value()) {
      call.dq_scale = dq_scale.mutable_data_ptr<float>();
      call.dk_scale = dk_scale.mutable_data_ptr<float>();
    }
    launch(
        call,
        [&](const Workers& workers) {
          return MUSICLM_FAST_SIMD_CALL(attention_workspace, call, true, workers.count);
        },
        [&](void* workspace, const Workers& workers) {
          MUSICLM_FAST_SIMD_CALL(attention_backward, call, workspace, workers);
        });
  }
  return {dq, dk, dv, dtable, dq_scale, dk_scale};
}

STABLE_TORCH_LIBRARY_IMPL(musiclm_fast, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&forward));
  m.impl("attention_backward", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace musiclm_fast
