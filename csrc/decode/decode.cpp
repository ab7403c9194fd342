// Registers decode for CPU tensors: checks, packing, workspace, threads.
#include "decode/decode.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "common/stable.h"

namespace musiclm_fast {
namespace {

using OptionalTensor = std::optional<Tensor>;

DecodeSizes make_sizes(const std::vector<int64_t>& given) {
  STD_TORCH_CHECK(given.size() == 10, "sizes: got ", given.size(), " numbers, expected 10");
  const DecodeSizes z{given[0], given[1], given[2], given[3],      given[4],
                      given[5], given[6], given[7] != 0, given[8] != 0, given[9] != 0};
  STD_TORCH_CHECK(z.depth > 0 && z.dim > 0 && z.heads > 0 && z.dim_head > 0 && z.hidden > 0 &&
                      z.streams > 0 && z.nulls >= 0,
                  "sizes: expected positive numbers");
  return z;
}

const bool* mask_data(const OptionalTensor& x, const char* name, int64_t rows, int64_t keys) {
  return x.has_value() ? cpu_data<bool>(*x, name, {rows, keys}) : nullptr;
}

// Memory of huge pages where the system has them: a step reads all of it once, and with small pages
// that takes a fifth longer.
Tensor huge_pages(const Tensor& like, int64_t count) {
  constexpr int64_t kPage = int64_t{2} << 20;
  constexpr auto kSize = static_cast<int64_t>(sizeof(float));
  const Tensor memory = empty_as(like, {count + kPage / kSize}, ScalarType::Float);
  const auto address = reinterpret_cast<uintptr_t>(memory.mutable_data_ptr());
  const uintptr_t aligned = (address + kPage - 1) / kPage * kPage;
#ifdef __linux__
  madvise(reinterpret_cast<void*>(aligned), static_cast<size_t>(count * kSize), MADV_HUGEPAGE);
#endif
  Tensor view = memory;
  return torch::stable::narrow(view, 0, static_cast<int64_t>(aligned - address) / kSize, count);
}

// Takes the parameters in turn and puts each where the layout says.
class Packer {
 public:
  Packer(const std::vector<Tensor>& parameters, float* packed)
      : parameters_(parameters), packed_(packed) {}

  void layer(const DecodeSizes& z, const DecodeLayout& at, int64_t index) {
    base_ = index * at.layer;
    const int64_t inner = z.heads * z.dim_head;
    mix(at.own_mix, z);
    if (z.norm_context) norm(at.context_norm, z.dim);
    matrix(at.to_kv, 2 * z.dim_head, z.dim);
    if (z.nulls > 0) copy(at.null_kv, {2, z.nulls, z.dim_head});
    norm(at.own_norm, z.dim);
    matrix(at.own_to_q, inner, z.dim);
    matrix(at.own_to_out, z.dim, inner);
    if (z.cross) {
      mix(at.cross_mix, z);
      norm(at.cross_norm, z.dim);
      matrix(at.cross_to_q, inner, z.dim);
      matrix(at.cross_to_out, z.dim, inner);
    }
    mix(at.ff_mix, z);
    norm(at.ff_norm, z.dim);
    matrix(at.widen, 2 * z.hidden, z.dim);
    norm(at.inner_norm, z.hidden);
    matrix(at.narrow, z.dim, z.hidden);
  }

  void last_norm(const DecodeSizes& z, const DecodeLayout& at) {
    base_ = 0;
    norm(at.norm, z.dim);
    STD_TORCH_CHECK(next_ == parameters_.size(), "parameters: got ", parameters_.size(),
                    " tensors, expected ", next_);
  }

 private:
  const float* take(const std::vector<int64_t>& shape) {
    STD_TORCH_CHECK(next_ < parameters_.size(), "parameters: too few tensors");
    return cpu_data<float>(parameters_[next_++], "parameters", shape);
  }

  void copy(int64_t at, const std::vector<int64_t>& shape) {
    int64_t count = 1;
    for (const int64_t size : shape) count *= size;
    const float* from = take(shape);
    for (int64_t i = 0; i < count; ++i) packed_[base_ + at + i] = from[i];
  }

  void norm(int64_t at, int64_t n) {
    copy(at, {n});
    copy(at + round_up(n, kDecodePanel), {n});
  }

  void matrix(int64_t at, int64_t outputs, int64_t inputs) {
    const float* weight = take({outputs, inputs});
    const int64_t panels = divide_up(outputs, kDecodePanel);
    float* to = packed_ + base_ + at;
    torch::stable::parallel_for(0, panels, 8, [&](int64_t begin, int64_t end) {
      const int64_t first = begin * kDecodePanel;
      const int64_t count = (end == panels ? outputs : end * kDecodePanel) - first;
      MUSICLM_FAST_SIMD_CALL(decode_pack_matrix, weight + first * inputs, count, inputs,
                             to + first * inputs);
    });
  }

  void mix(const DecodeMix& at, const DecodeSizes& z) {
    if (z.streams == 1) return;
    const int64_t columns = z.streams + 2;
    const int64_t width = round_up(z.dim, kDecodePanel);
    const float* weights = take({z.dim, columns});
    for (int64_t c = 0; c < z.dim; ++c) {
      for (int64_t j = 0; j < columns; ++j) {
        packed_[base_ + at.weights + j * width + c] = weights[c * columns + j];
      }
    }
    copy(at.scales, {columns});
    copy(at.offsets, {z.streams, columns});
  }

  const std::vector<Tensor>& parameters_;
  float* packed_;
  size_t next_ = 0;
  int64_t base_ = 0;
};

Tensor pack(const std::vector<Tensor>& parameters, const std::vector<int64_t>& sizes) {
  const DecodeSizes z = make_sizes(sizes);
  const DecodeLayout at = decode_layout(z);
  STD_TORCH_CHECK(!parameters.empty(), "parameters: too few tensors");
  Tensor packed = huge_pages(parameters.front(), at.total);
  torch::stable::zero_(packed);
  Packer packer(parameters, packed.mutable_data_ptr<float>());
  for (int64_t index = 0; index < z.depth; ++index) packer.layer(z, at, index);
  packer.last_norm(z, at);
  return packed;
}

Tensor step(const Tensor& x, const Tensor& packed, const Tensor& keys_values, int64_t length,
            const OptionalTensor& context, const OptionalTensor& context_mask,
            const OptionalTensor& bias_table, const OptionalTensor& q_code,
            const OptionalTensor& k_codes, const OptionalTensor& key_padding_mask,
            const std::vector<int64_t>& sizes) {
  DecodeCall call{};
  call.sizes = make_sizes(sizes);
  call.layout = decode_layout(call.sizes);
  const DecodeSizes& z = call.sizes;
  call.packed = cpu_data<float>(packed, "packed", {call.layout.total});
  check_dim(x, "x", 2);
  call.rows = x.size(0);
  call.x = cpu_data<float>(x, "x", {call.rows, z.dim});
  check_dim(keys_values, "keys_values", 5);
  call.capacity = keys_values.size(3);
  cpu_data<float>(keys_values, "keys_values", {z.depth, 2, call.rows, call.capacity, z.dim_head});
  call.keys_values = const_cast<Tensor&>(keys_values).mutable_data_ptr<float>();
  STD_TORCH_CHECK(0 <= length && length < call.capacity, "length: got ", length,
                  ", expected less than the capacity ", call.capacity);
  call.length = length;
  const int64_t keys = z.nulls + length + 1;
  STD_TORCH_CHECK(context.has_value() == z.cross, "context: needed where there is cross attention");
  if (context.has_value()) {
    check_dim(*context, "context", 5);
    call.contexts = context->size(3);
    call.context =
        cpu_data<float>(*context, "context", {z.depth, 2, call.rows, call.contexts, z.dim_head});
    call.context_mask = mask_data(context_mask, "context_mask", call.rows, call.contexts);
  }
  if (bias_table.has_value()) {
    STD_TORCH_CHECK(q_code.has_value() && k_codes.has_value(), "bias_table needs codes");
    check_dim(*bias_table, "bias_table", 2);
    const int64_t columns = bias_table->size(1);
    STD_TORCH_CHECK(columns % 2 == 1, "bias_table: expected 2R + 1 columns");
    call.table = cpu_data<float>(*bias_table, "bias_table", {z.heads, columns});
    call.radius = columns / 2;
    call.q_code = *cpu_data<int32_t>(*q_code, "q_code", {1});
    call.k_codes = cpu_data<int32_t>(*k_codes, "k_codes", {keys});
  }
  call.key_mask = mask_data(key_padding_mask, "key_padding_mask", call.rows, keys);

  Tensor out = empty_as(x, {call.rows, z.dim});
  if (call.rows == 0) return out;
  call.out = out.mutable_data_ptr<float>();
  const Workers workers = torch_workers(static_cast<int>(torch::stable::get_num_threads()));
  const int64_t bytes = MUSICLM_FAST_SIMD_CALL(decode_workspace, call, workers.count);
  const Buffer<char> workspace(bytes);
  MUSICLM_FAST_SIMD_CALL(decode_step, call, workspace.get(), workers);
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(musiclm_fast, CPU, m) {
  m.impl("decode_pack", TORCH_BOX(&pack));
  m.impl("decode_step", TORCH_BOX(&step));
}

}  // namespace
}  // namespace musiclm_fast
