// Checks csrc/decode's step against loops in double.
#include "decode/decode.h"

#include <algorithm>
#include <memory>

#include "check.h"

using namespace musiclm_fast;
using namespace musiclm_fast::check;

namespace {

struct Norm {
  Floats gamma, beta;
};

struct Mix {
  Floats weights, scales, offsets;  // (streams + 2, dim), (streams + 2), (streams, streams + 2)
};

struct Attention {
  Norm norm;
  Floats to_q, to_out;  // (outputs, inputs), as all matrices
};

struct Layer {
  Mix own_mix, cross_mix, ff_mix;
  Norm context_norm;
  Floats to_kv, null_kv;  // null_kv (2, nulls, D)
  Attention own, cross;
  Norm ff_norm, inner_norm;
  Floats widen, narrow;
};

// Makes parameters and puts each where the layout says.
class Maker {
 public:
  Maker(const DecodeSizes& z, const DecodeLayout& layout) : packed(layout.total, 0.0f), z_(z) {}

  Layer layer(const DecodeLayout& at, int64_t index) {
    base_ = index * at.layer;
    const int64_t inner = z_.heads * z_.dim_head;
    Layer layer;
    layer.own_mix = mix(at.own_mix);
    if (z_.norm_context) layer.context_norm = norm(at.context_norm, z_.dim);
    layer.to_kv = matrix(at.to_kv, 2 * z_.dim_head, z_.dim);
    layer.null_kv = copy(at.null_kv, 2 * z_.nulls * z_.dim_head);
    layer.own = {norm(at.own_norm, z_.dim), matrix(at.own_to_q, inner, z_.dim),
                 matrix(at.own_to_out, z_.dim, inner)};
    if (z_.cross) {
      layer.cross_mix = mix(at.cross_mix);
      layer.cross = {norm(at.cross_norm, z_.dim), matrix(at.cross_to_q, inner, z_.dim),
                     matrix(at.cross_to_out, z_.dim, inner)};
    }
    layer.ff_mix = mix(at.ff_mix);
    layer.ff_norm = norm(at.ff_norm, z_.dim);
    layer.widen = matrix(at.widen, 2 * z_.hidden, z_.dim);
    layer.inner_norm = norm(at.inner_norm, z_.hidden);
    layer.narrow = matrix(at.narrow, z_.dim, z_.hidden);
    return layer;
  }

  Norm last_norm(const DecodeLayout& at) {
    base_ = 0;
    return norm(at.norm, z_.dim);
  }

  Floats packed;

 private:
  static int64_t padded(int64_t n) {
    return (n + kDecodePanel - 1) / kDecodePanel * kDecodePanel;
  }

  Floats copy(int64_t at, int64_t n) {
    const Floats x = values(n, ++seed_);
    std::copy(x.begin(), x.end(), packed.begin() + base_ + at);
    return x;
  }

  Norm norm(int64_t at, int64_t n) { return {copy(at, n), copy(at + padded(n), n)}; }

  Floats matrix(int64_t at, int64_t outputs, int64_t inputs) {
    const Floats x = values(outputs * inputs, ++seed_, 2.0f / std::sqrt(static_cast<float>(inputs)));
    MUSICLM_FAST_SIMD_CALL(decode_pack_matrix, x.data(), outputs, inputs, &packed[base_ + at]);
    return x;
  }

  Mix mix(const DecodeMix& at) {
    if (z_.streams == 1) return {};
    const int64_t columns = z_.streams + 2;
    Mix made;
    for (int64_t j = 0; j < columns; ++j) {
      const Floats row = copy(at.weights + j * padded(z_.dim), z_.dim);
      made.weights.insert(made.weights.end(), row.begin(), row.end());
    }
    made.scales = copy(at.scales, columns);
    made.offsets = copy(at.offsets, z_.streams * columns);
    return made;
  }

  const DecodeSizes& z_;
  uint32_t seed_ = 100;
  int64_t base_ = 0;
};

// ---- one row, in double -------------------------------------------------------------------------

Doubles product(const Floats& matrix, const Doubles& x) {
  Doubles out(matrix.size() / x.size(), 0.0);
  for (size_t i = 0; i < matrix.size(); ++i) out[i / x.size()] += matrix[i] * x[i % x.size()];
  return out;
}

Doubles layer_norm(const Norm& norm, Doubles x) {
  const double n = static_cast<double>(x.size());
  double mean = 0.0, variance = 0.0;
  for (const double value : x) mean += value / n;
  for (const double value : x) variance += (value - mean) * (value - mean) / n;
  for (size_t c = 0; c < x.size(); ++c) {
    x[c] = (x[c] - mean) / std::sqrt(variance + 1e-5) * norm.gamma[c] + norm.beta[c];
  }
  return x;
}

// streams (s, dim) -> with the branch's output added; branch maps (dim) to (dim).
template <typename Branch>
void connect(const Mix& mix, std::vector<Doubles>& streams, const Branch& branch) {
  const size_t s = streams.size(), columns = s + 2, dim = streams[0].size();
  if (s == 1) {
    const Doubles out = branch(streams[0]);
    for (size_t c = 0; c < dim; ++c) streams[0][c] += out[c];
    return;
  }
  std::vector<Doubles> mixed(s + 1, Doubles(dim, 0.0));  // the branch's input, then the streams
  Doubles beta(s);
  for (size_t t = 0; t < s; ++t) {
    double square = 0.0;
    for (const double value : streams[t]) square += value * value;
    const Doubles along = product(mix.weights, streams[t]);
    for (size_t j = 0; j < columns; ++j) {
      const double weight =
          std::tanh(along[j] / std::sqrt(square)) * mix.scales[j] + mix.offsets[t * columns + j];
      for (size_t c = 0; c < dim && j <= s; ++c) mixed[j][c] += weight * streams[t][c];
      if (j == s + 1) beta[t] = weight;
    }
  }
  const Doubles out = branch(mixed[0]);
  for (size_t t = 0; t < s; ++t) {
    for (size_t c = 0; c < dim; ++c) streams[t][c] = mixed[t + 1][c] + beta[t] * out[c];
  }
}

struct Key {
  Doubles key, value;  // (D)
  bool seen;
};

// bias(head, index of key)
template <typename Bias>
Doubles attend(const DecodeSizes& z, const Attention& weights, const Doubles& x,
               const std::vector<Key>& keys, const Bias& bias) {
  const Doubles q = product(weights.to_q, layer_norm(weights.norm, x));
  Doubles out(z.heads * z.dim_head, 0.0);
  for (int64_t h = 0; h < z.heads; ++h) {
    double sum = 0.0;
    for (size_t j = 0; j < keys.size(); ++j) {
      if (!keys[j].seen) continue;
      double s = 0.0;
      for (int64_t c = 0; c < z.dim_head; ++c) s += q[h * z.dim_head + c] * keys[j].key[c];
      const double weight = std::exp(s / std::sqrt(static_cast<double>(z.dim_head)) + bias(h, j));
      sum += weight;
      for (int64_t c = 0; c < z.dim_head; ++c) {
        out[h * z.dim_head + c] += weight * keys[j].value[c];
      }
    }
    for (int64_t c = 0; c < z.dim_head && sum > 0.0; ++c) out[h * z.dim_head + c] /= sum;
  }
  return product(weights.to_out, out);
}

Doubles feed_forward(const Layer& layer, const Doubles& x) {
  const Doubles wide = product(layer.widen, layer_norm(layer.ff_norm, x));
  Doubles hidden(wide.begin(), wide.begin() + static_cast<int64_t>(wide.size() / 2));
  for (size_t c = 0; c < hidden.size(); ++c) {
    const double gate = wide[hidden.size() + c];
    hidden[c] *= gate * 0.5 * (1.0 + std::erf(gate / std::sqrt(2.0)));
  }
  return product(layer.narrow, layer_norm(layer.inner_norm, hidden));
}

// Row `row` of a call; its keys and values are written as the kernel writes them.
Doubles decode(const DecodeCall& call, const std::vector<Layer>& layers, const Norm& last,
               int64_t row, Doubles& keys_values) {
  const DecodeSizes& z = call.sizes;
  const int64_t d = z.dim_head;
  std::vector<Doubles> streams(z.streams, Doubles(call.x + row * z.dim, call.x + (row + 1) * z.dim));
  Doubles first;
  for (int64_t index = 0; index < z.depth; ++index) {
    const Layer& layer = layers[index];
    const auto slice = [&](int64_t side, int64_t position) {
      return (((index * 2 + side) * call.rows + row) * call.capacity + position) * d;
    };
    connect(layer.own_mix, streams, [&](const Doubles& x) {
      const Doubles kv = product(layer.to_kv, z.norm_context ? layer_norm(layer.context_norm, x) : x);
      for (int64_t c = 0; c < d; ++c) {
        keys_values[slice(0, call.length) + c] = kv[c];
        keys_values[slice(1, call.length) + c] =
            z.value_residual && index > 0 ? 0.5 * (kv[d + c] + first[c]) : kv[d + c];
      }
      if (index == 0) first.assign(kv.begin() + d, kv.end());
      std::vector<Key> keys;
      const int64_t n = z.nulls + call.length + 1;
      for (int64_t j = 0; j < n; ++j) {
        const bool null = j < z.nulls;
        Doubles parts[2];
        for (int64_t side = 0; side < 2; ++side) {
          for (int64_t c = 0; c < d; ++c) {
            parts[side].push_back(null ? layer.null_kv[(side * z.nulls + j) * d + c]
                                       : keys_values[slice(side, j - z.nulls) + c]);
          }
        }
        keys.push_back({parts[0], parts[1],
                        call.key_mask == nullptr || call.key_mask[row * n + j]});
      }
      return attend(z, layer.own, x, keys, [&](int64_t h, int64_t j) -> double {
        if (call.table == nullptr) return 0.0;
        const int64_t offset = int64_t{call.q_code} - call.k_codes[j];
        return call.table[h * (2 * call.radius + 1) + call.radius +
                          std::clamp(offset, -call.radius, call.radius)];
      });
    });
    if (z.cross) {
      connect(layer.cross_mix, streams, [&](const Doubles& x) {
        std::vector<Key> keys;
        for (int64_t j = 0; j < call.contexts; ++j) {
          const float* key = call.context + ((index * 2 * call.rows + row) * call.contexts + j) * d;
          const float* value = key + call.rows * call.contexts * d;
          keys.push_back({Doubles(key, key + d), Doubles(value, value + d),
                          call.context_mask[row * call.contexts + j]});
        }
        return attend(z, layer.cross, x, keys, [](int64_t, int64_t) { return 0.0; });
      });
    }
    connect(layer.ff_mix, streams, [&](const Doubles& x) { return feed_forward(layer, x); });
  }
  Doubles sum(z.dim, 0.0);
  for (const Doubles& stream : streams) {
    for (int64_t c = 0; c < z.dim; ++c) sum[c] += stream[c];
  }
  return layer_norm(last, sum);
}

void test(const DecodeSizes& z, int64_t rows, int64_t length, bool masked, int workers) {
  const std::string name = "width " + std::to_string(z.dim) + ", " + std::to_string(rows) +
                           " rows, length " + std::to_string(length) + ": ";
  DecodeCall call{};
  call.sizes = z;
  call.layout = decode_layout(z);
  Maker maker(z, call.layout);
  std::vector<Layer> layers;
  for (int64_t index = 0; index < z.depth; ++index) {
    layers.push_back(maker.layer(call.layout, index));
  }
  const Norm last = maker.last_norm(call.layout);
  const Floats x = values(rows * z.dim, 1), table = values(z.heads * 13, 2);
  const int64_t capacity = length + 3, contexts = 5, keys = z.nulls + length + 1;
  Floats keys_values = values(z.depth * 2 * rows * capacity * z.dim_head, 3);
  const Floats context = values(z.depth * 2 * rows * contexts * z.dim_head, 4);
  const auto mask = std::make_unique<bool[]>(static_cast<size_t>(rows * keys));
  for (int64_t j = 0; j < rows * keys; ++j) mask[j] = j % 4 != 1;
  const auto context_mask = std::make_unique<bool[]>(static_cast<size_t>(rows * contexts));
  // The last row sees no context.
  for (int64_t j = 0; j < (rows - 1) * contexts; ++j) context_mask[j] = j % 3 != 2;
  std::vector<int32_t> codes;
  for (int32_t j = 0; j < keys; ++j) codes.push_back(2 * j);
  Floats out = poisoned(rows * z.dim);
  call.packed = maker.packed.data();
  call.rows = rows;
  call.x = x.data();
  call.out = out.data();
  call.keys_values = keys_values.data();
  call.capacity = capacity;
  call.length = length;
  if (z.cross) {
    call.context = context.data();
    call.context_mask = context_mask.get();
    call.contexts = contexts;
  }
  if (masked) {
    call.key_mask = mask.get();
  } else {
    call.table = table.data();
    call.radius = 6;
    call.q_code = 2 * static_cast<int32_t>(keys) - 2;
    call.k_codes = codes.data();
  }
  Doubles expected_keys_values = in_double(keys_values), expected;
  Workspace workspace(MUSICLM_FAST_SIMD_CALL(decode_workspace, call, workers));
  MUSICLM_FAST_SIMD_CALL(decode_step, call, workspace, in_turn(workers));
  for (int64_t row = 0; row < rows; ++row) {
    const Doubles result = decode(call, layers, last, row, expected_keys_values);
    expected.insert(expected.end(), result.begin(), result.end());
  }
  close(name + "out", out, expected, 1e-6);
  close(name + "keys and values", keys_values, expected_keys_values, 1e-6);
}

}  // namespace

int main() {
  return at_every_level("decode", [] {
    test({.depth = 2, .dim = 20, .heads = 3, .dim_head = 6, .hidden = 27, .streams = 1, .nulls = 1,
          .cross = false, .norm_context = false, .value_residual = false}, 1, 0, false, 1);
    test({.depth = 3, .dim = 33, .heads = 4, .dim_head = 17, .hidden = 50, .streams = 4,
          .nulls = 2, .cross = true, .norm_context = true, .value_residual = true}, 3, 18, true, 2);
    // Wide enough for several workers and for more rows than a tile.
    test({.depth = 1, .dim = 96, .heads = 9, .dim_head = 64, .hidden = 256, .streams = 2,
          .nulls = 0, .cross = true, .norm_context = false, .value_residual = false}, 18, 40, false,
         3);
  });
}
