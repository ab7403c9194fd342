#include "contrastive/contrastive.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>

#include "common/stable.h"

#if defined(__GLIBC__) && defined(__x86_64__)
// The same functions as before glibc 2.29, which a library with the newer ones would need.
__asm__(".symver exp, exp@GLIBC_2.2.5");
__asm__(".symver log, log@GLIBC_2.2.5");
#endif

namespace musiclm_fast {
namespace {

// Tiles of 256 x 256 at depth 128 fill three quarters of a megabyte of cache: the similarities, two
// operands and two gradients. Fewer pairs want smaller tiles, so that all threads have one; the
// choice follows from the shape alone, so that results do not depend on the number of threads.
int64_t tile_size(int64_t count, int64_t depth) {
  const int64_t by_count = count >= 2048 ? 256 : count >= 512 ? 128 : 64;
  const int64_t by_depth = depth <= 160 ? 256 : depth <= 640 ? 128 : 64;
  return std::min(by_count, by_depth);
}

// Both sides of a block of similarities, packed, for all layers; labels of both sides, or null.
class Packed {
 public:
  Packed(const Tensor& audio, const Tensor& text, const Tensor& temperature, int64_t offset,
         const std::optional<Tensor>& audio_labels, const std::optional<Tensor>& text_labels,
         bool inclusive)
      : layers(audio.size(0)),
        m(audio.size(1)),
        n(text.size(1)),
        depth(audio.size(2)),
        ld(round_up(std::max<int64_t>(depth, 1), kAlign)),
        offset(offset),
        row_tile(tile_size(m, depth)),
        column_tile(tile_size(n, depth)),
        row_tiles(divide_up(m, row_tile)),
        column_tiles(divide_up(n, column_tile)),
        inclusive_(inclusive),
        temperature_(temperature.const_data_ptr<float>()),
        row_labels_(audio_labels.has_value()
                        ? cpu_data<int32_t>(*audio_labels, "audio_labels", {m})
                        : nullptr),
        column_labels_(text_labels.has_value() ? round_up(n, kPanel) : 0),
        rows_(layers * m * ld),
        columns_(layers * n * ld),
        panels_(layers * divide_up(n, kPanel) * kPanel * depth),
        bounded_(std::make_unique<bool[]>(layers)) {
    STD_TORCH_CHECK(audio_labels.has_value() == text_labels.has_value(),
                    "text_labels: expected labels of both sides, or of none");
    STD_TORCH_CHECK(audio_labels.has_value() || !inclusive, "inclusive: expected labels");
    if (text_labels.has_value()) {
      const int32_t* from = cpu_data<int32_t>(*text_labels, "text_labels", {n});
      std::fill(std::copy_n(from, n, column_labels_.get()),
                column_labels_.get() + round_up(n, kPanel), -1);
    }
    const int64_t row_parts = divide_up(m, kPanel), column_parts = divide_up(n, kPanel);
    Buffer<float> row_norm(layers * row_parts), column_norm(layers * column_parts);
    dispatch<float, BFloat16>(audio.scalar_type(), "audio", [&](auto zero) {
      using scalar_t = decltype(zero);
      const auto* from_audio = kernel_type(audio.const_data_ptr<scalar_t>());
      const auto* from_text = kernel_type(text.const_data_ptr<scalar_t>());
      const int64_t audio_stride[2] = {audio.stride(0), audio.stride(1)};
      const int64_t text_stride[2] = {text.stride(0), text.stride(1)};
      const auto pack_audio = [&](int64_t part) {
        const int64_t layer = part / row_parts, begin = part % row_parts * kPanel;
        row_norm.get()[part] = MUSICLM_FAST_SIMD_CALL(
            contrastive_pack, from_audio + layer * audio_stride[0] + begin * audio_stride[1],
            std::min(kPanel, m - begin), depth, audio_stride[1], ld,
            rows(layer) + begin * ld);
      };
      const auto pack_text = [&](int64_t part) {
        const int64_t layer = part / column_parts, begin = part % column_parts * kPanel;
        const int64_t count = std::min(kPanel, n - begin);
        column_norm.get()[part] = MUSICLM_FAST_SIMD_CALL(
            contrastive_pack, from_text + layer * text_stride[0] + begin * text_stride[1], count,
            depth, text_stride[1], ld, columns(layer) + begin * ld);
        MUSICLM_FAST_SIMD_CALL(contrastive_panel, columns(layer) + begin * ld, count, depth, ld,
                               panels(layer) + begin * depth);
      };
      torch::stable::parallel_for(0, layers * row_parts, 4, [&](int64_t begin, int64_t end) {
        for (int64_t part = begin; part < end; ++part) pack_audio(part);
      });
      torch::stable::parallel_for(0, layers * column_parts, 4, [&](int64_t begin, int64_t end) {
        for (int64_t part = begin; part < end; ++part) pack_text(part);
      });
    });
    for (int64_t layer = 0; layer < layers; ++layer) {
      const float bound = temperature_[layer] *
                          std::sqrt(largest(row_norm.get() + layer * row_parts, row_parts)) *
                          std::sqrt(largest(column_norm.get() + layer * column_parts, column_parts));
      bounded_[layer] = bound <= kBounded;  // not where a norm is NaN
    }
  }

  float* rows(int64_t layer) const { return rows_.get() + layer * m * ld; }
  float* columns(int64_t layer) const { return columns_.get() + layer * n * ld; }
  float* panels(int64_t layer) const {
    return panels_.get() + layer * divide_up(n, kPanel) * kPanel * depth;
  }
  // Whether all of a layer's similarities lie within +-kBounded, by the product of norms.
  bool bounded(int64_t layer) const { return bounded_[layer]; }

  // Calls f(layer, first row, first column, tile) for every tile. Tiles that run at the same time
  // share no row and no column, and each row and column meets its tiles in the same order whatever
  // the number of threads: f may add to per-row and per-column results, deterministically.
  template <typename F>
  void for_each_tile(const F& f) const {
    const int64_t steps = std::max(row_tiles, column_tiles);
    const int64_t width = std::min(row_tiles, column_tiles);
    const int64_t stride = round_up(column_tile, kPanel);
    for (int64_t step = 0; step < steps; ++step) {
      torch::stable::parallel_for(0, layers * width, 1, [&](int64_t begin, int64_t end) {
        Buffer<float> similarities(row_tile * stride), scratch(4 * (row_tile + stride));
        for (int64_t task = begin; task < end; ++task) {
          const int64_t layer = task / width, place = task % width;
          const int64_t shifted = (place + step) % steps;
          const int64_t row = (row_tiles <= column_tiles ? place : shifted) * row_tile;
          const int64_t column = (row_tiles <= column_tiles ? shifted : place) * column_tile;
          ContrastiveTile tile;
          tile.rows = rows(layer) + row * ld;
          tile.columns = columns(layer) + column * ld;
          tile.panels = panels(layer) + column * depth;
          tile.m = std::min(row_tile, m - row);
          tile.n = std::min(column_tile, n - column);
          tile.depth = depth;
          tile.ld = ld;
          tile.positive = row + offset - column;
          tile.row_labels = row_labels_ == nullptr ? nullptr : row_labels_ + row;
          tile.column_labels = column_labels_.get() + column;
          tile.inclusive = inclusive_;
          tile.temperature = temperature_[layer];
          tile.similarities = similarities.get();
          tile.scratch = scratch.get();
          f(layer, row, column, tile);
        }
      });
    }
  }

  const int64_t layers, m, n, depth, ld, offset, row_tile, column_tile, row_tiles, column_tiles;
  const float* temperature() const { return temperature_; }

 private:
  static float largest(const float* values, int64_t count) {
    float result = 0.0f;
    for (int64_t i = 0; i < count; ++i) {
      if (!(values[i] <= result)) result = values[i];
      if (result != result) break;
    }
    return result;
  }

  const bool inclusive_;
  const float* const temperature_;
  const int32_t* const row_labels_;
  const Buffer<int32_t> column_labels_;  // -1 after the last
  const Buffer<float> rows_, columns_, panels_;
  const std::unique_ptr<bool[]> bounded_;
};

// Sums of gradients in rows of ld floats: the result itself where it has no padding.
class Gradient {
 public:
  Gradient(const Tensor& like, int64_t layers, int64_t count, int64_t depth, int64_t ld)
      : layers_(layers), count_(count), depth_(depth), ld_(ld),
        result(zeros_as(like, {layers, count, depth}, ScalarType::Float)),
        out_(result.mutable_data_ptr<float>()),
        padded_(depth == ld ? 0 : layers * count * ld) {
    sums = depth == ld ? out_ : padded_.get();
    if (depth != ld) std::fill(sums, sums + layers * count * ld, 0.0f);
  }

  float* at(int64_t layer, int64_t row) const { return sums + (layer * count_ + row) * ld_; }

  // Multiplies layer l by factor[l]; the result is then complete.
  void finish(const float* factor) const {
    for (int64_t layer = 0; layer < layers_; ++layer) {
      const float by = factor[layer];
      torch::stable::parallel_for(0, count_, 1024, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          const float* from = at(layer, row);
          float* to = out_ + (layer * count_ + row) * depth_;
          for (int64_t k = 0; k < depth_; ++k) to[k] = by * from[k];
        }
      });
    }
  }

 private:
  const int64_t layers_, count_, depth_, ld_;

 public:
  const Tensor result;

 private:
  float* const out_;
  const Buffer<float> padded_;
  float* sums;
};

// d temperature[l] = sum_ij ds_ij <audio_i, text_j> = sum_i <audio_i, (ds @ text)_i>, before the
// gradient of audio is multiplied by the temperature.
Tensor temperature_gradient(const Packed& packed, const Gradient& d_audio, const Tensor& like) {
  Tensor result = empty_as(like, {packed.layers}, ScalarType::Float);
  float* out = result.mutable_data_ptr<float>();
  for (int64_t layer = 0; layer < packed.layers; ++layer) {
    double total = 0.0;
    for (int64_t i = 0; i < packed.m; ++i) {
      const float* row = packed.rows(layer) + i * packed.ld;
      const float* grad = d_audio.at(layer, i);
      float dot = 0.0f;
      for (int64_t k = 0; k < packed.ld; ++k) dot += row[k] * grad[k];
      total += dot;
    }
    out[layer] = static_cast<float>(total);
  }
  return result;
}

void check_block(const Tensor& audio, const Tensor& text, const Tensor& temperature) {
  check_cpu(audio, "audio");
  check_cpu(text, "text");
  check_dim(audio, "audio", 3);
  check_dim(text, "text", 3);
  check_size(text, "text", 0, audio.size(0));
  check_size(text, "text", 2, audio.size(2));
  check_dtype(text, "text", audio.scalar_type());
  check_inner_contiguous(audio, "audio");
  check_inner_contiguous(text, "text");
  cpu_data<float>(temperature, "temperature", {audio.size(0)});
}

// Log-sum-exp of the similarities of every row and column, with the positives if `inclusive`, and
// the sum of each row's positives (0 for a row that has none in this block).
std::tuple<Tensor, Tensor, Tensor> contrastive_logsumexp(
    const Tensor& audio, const Tensor& text, const Tensor& temperature, int64_t offset,
    const std::optional<Tensor>& audio_labels, const std::optional<Tensor>& text_labels,
    bool inclusive) {
  check_block(audio, text, temperature);
  const Packed packed(audio, text, temperature, offset, audio_labels, text_labels, inclusive);
  const int64_t layers = packed.layers, m = packed.m, n = packed.n;
  Tensor row_result = empty_as(audio, {layers, m}, ScalarType::Float);
  Tensor column_result = empty_as(audio, {layers, n}, ScalarType::Float);
  Tensor positive_result = zeros_as(audio, {layers, m}, ScalarType::Float);
  float* row_out = row_result.mutable_data_ptr<float>();
  float* column_out = column_result.mutable_data_ptr<float>();
  float* positive = positive_result.mutable_data_ptr<float>();

  const Buffer<float> shift(layers * (m + n)), sum(layers * (m + n));
  for (int64_t layer = 0; layer < layers; ++layer) {
    std::fill_n(shift.get() + layer * (m + n), m + n,
                packed.bounded(layer) ? 0.0f : std::numeric_limits<float>::lowest());
  }
  std::fill_n(sum.get(), layers * (m + n), 0.0f);
  packed.for_each_tile([&](int64_t layer, int64_t row, int64_t column,
                           const ContrastiveTile& tile) {
    const int64_t i = layer * (m + n) + row, j = layer * (m + n) + m + column;
    MUSICLM_FAST_SIMD_CALL(contrastive_stats, tile, packed.bounded(layer),
                           ContrastiveSums{shift.get() + i, sum.get() + i},
                           ContrastiveSums{shift.get() + j, sum.get() + j},
                           positive + layer * m + row);
  });
  for (int64_t layer = 0; layer < layers; ++layer) {
    const float* shifts = shift.get() + layer * (m + n);
    const float* sums = sum.get() + layer * (m + n);
    for (int64_t k = 0; k < m + n; ++k) {
      float& out = k < m ? row_out[layer * m + k] : column_out[layer * n + k - m];
      out = static_cast<float>(shifts[k] + std::log(static_cast<double>(sums[k])));
    }
  }
  return {row_result, column_result, positive_result};
}

// Gradients of audio, text and temperature, in float32, from those of contrastive_logsumexp's
// results.
std::tuple<Tensor, Tensor, Tensor> contrastive_logsumexp_backward(
    const Tensor& grad_row, const Tensor& grad_column, const Tensor& grad_positive,
    const Tensor& audio, const Tensor& text, const Tensor& temperature, const Tensor& row_lse,
    const Tensor& column_lse, int64_t offset, const std::optional<Tensor>& audio_labels,
    const std::optional<Tensor>& text_labels, bool inclusive) {
  check_block(audio, text, temperature);
  const Packed packed(audio, text, temperature, offset, audio_labels, text_labels, inclusive);
  const int64_t layers = packed.layers, m = packed.m, n = packed.n;
  const float* row_grad = cpu_data<float>(grad_row, "grad_row", {layers, m});
  const float* column_grad = cpu_data<float>(grad_column, "grad_column", {layers, n});
  const float* positive_grad = cpu_data<float>(grad_positive, "grad_positive", {layers, m});
  const float* row = cpu_data<float>(row_lse, "row_lse", {layers, m});
  const float* column = cpu_data<float>(column_lse, "column_lse", {layers, n});

  // Weights g e^-lse where similarities are bounded, else g beside the shift lse. A row without
  // negatives has lse = -inf: its weight is never used, and its shift must not make a NaN.
  const Buffer<float> weight(layers * (m + n)), shift(layers * (m + n));
  for (int64_t layer = 0; layer < layers; ++layer) {
    float* weights = weight.get() + layer * (m + n);
    float* shifts = shift.get() + layer * (m + n);
    for (int64_t k = 0; k < m + n; ++k) {
      const float lse = k < m ? row[layer * m + k] : column[layer * n + k - m];
      const float grad = k < m ? row_grad[layer * m + k] : column_grad[layer * n + k - m];
      const bool empty = lse == -std::numeric_limits<float>::infinity();
      shifts[k] = empty ? 0.0f : lse;
      weights[k] = empty ? 0.0f
                   : packed.bounded(layer)
                       ? static_cast<float>(grad * std::exp(-static_cast<double>(lse)))
                       : grad;
    }
  }
  const Gradient d_audio(audio, layers, m, packed.depth, packed.ld);
  const Gradient d_text(audio, layers, n, packed.depth, packed.ld);
  packed.for_each_tile([&](int64_t layer, int64_t i, int64_t j, const ContrastiveTile& tile) {
    const int64_t at_row = layer * (m + n) + i, at_column = layer * (m + n) + m + j;
    MUSICLM_FAST_SIMD_CALL(contrastive_grad, tile, packed.bounded(layer), weight.get() + at_row,
                           shift.get() + at_row, weight.get() + at_column, shift.get() + at_column,
                           positive_grad + layer * m + i, d_audio.at(layer, i),
                           d_text.at(layer, j));
  });
  Tensor d_temperature = temperature_gradient(packed, d_audio, audio);
  d_audio.finish(packed.temperature());
  d_text.finish(packed.temperature());
  return {d_audio.result, d_text.result, d_temperature};
}

// Sum of softplus(-y s) over all pairs; with `gradients` also its gradients for audio, text,
// temperature and bias, in float32, from the same pass (else of shape (0,)).
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> contrastive_sigmoid(
    const Tensor& audio, const Tensor& text, const Tensor& temperature,
    const std::optional<Tensor>& bias, int64_t offset, bool gradients,
    const std::optional<Tensor>& audio_labels, const std::optional<Tensor>& text_labels) {
  check_block(audio, text, temperature);
  const float* biases =
      bias.has_value() ? cpu_data<float>(*bias, "bias", {audio.size(0)}) : nullptr;
  const Packed packed(audio, text, temperature, offset, audio_labels, text_labels, false);
  const int64_t layers = packed.layers, m = packed.m, n = packed.n;
  const Buffer<float> row_loss(layers * m);
  std::fill_n(row_loss.get(), layers * m, 0.0f);
  const int64_t kept = gradients ? layers : 0;
  const Gradient d_audio(audio, kept, m, packed.depth, packed.ld);
  const Gradient d_text(audio, kept, n, packed.depth, packed.ld);
  const Buffer<float> row_grad(kept * m);
  std::fill_n(row_grad.get(), kept * m, 0.0f);
  packed.for_each_tile([&](int64_t layer, int64_t i, int64_t j, const ContrastiveTile& tile) {
    MUSICLM_FAST_SIMD_CALL(contrastive_sigmoid, tile, biases == nullptr ? 0.0f : biases[layer],
                           row_loss.get() + layer * m + i,
                           gradients ? row_grad.get() + layer * m + i : nullptr,
                           gradients ? d_audio.at(layer, i) : nullptr,
                           gradients ? d_text.at(layer, j) : nullptr);
  });
  double total_loss = 0.0;
  for (int64_t k = 0; k < layers * m; ++k) total_loss += row_loss.get()[k];
  Tensor loss = empty_as(audio, {}, ScalarType::Float);
  *loss.mutable_data_ptr<float>() = static_cast<float>(total_loss);
  if (!gradients) {
    const auto none = [&] { return empty_as(audio, {0}, ScalarType::Float); };
    return {loss, none(), none(), none(), none()};
  }
  Tensor d_bias = empty_as(audio, {layers}, ScalarType::Float);
  for (int64_t layer = 0; layer < layers; ++layer) {
    double total = 0.0;
    for (int64_t i = 0; i < m; ++i) total += row_grad.get()[layer * m + i];
    d_bias.mutable_data_ptr<float>()[layer] = static_cast<float>(total);
  }
  Tensor d_temperature = temperature_gradient(packed, d_audio, audio);
  d_audio.finish(packed.temperature());
  d_text.finish(packed.temperature());
  return {loss, d_audio.result, d_text.result, d_temperature, d_bias};
}

STABLE_TORCH_LIBRARY_IMPL(musiclm_fast, CPU, m) {
  m.impl("contrastive_logsumexp", TORCH_BOX(&contrastive_logsumexp));
  m.impl("contrastive_logsumexp_backward", TORCH_BOX(&contrastive_logsumexp_backward));
  m.impl("contrastive_sigmoid", TORCH_BOX(&contrastive_sigmoid));
}

}  // namespace
}  // namespace musiclm_fast
