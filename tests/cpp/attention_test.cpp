// Checks csrc/attention's kernels against loops in double.
#include "attention/attention.h"

#include <algorithm>
#include <memory>
#include <utility>

#include "check.h"

using namespace musiclm_fast;
using namespace musiclm_fast::check;

namespace {

struct Case {
  std::string name;
  int64_t batch, heads, kv_heads, queries, keys, dim;
  bool causal = false, masked = false, normed = false, half = false;
  int64_t radius = 0;  // of the table of biases; 0: none
  double dropout = 0.0;
};

struct Inputs {
  Doubles q, k, v, table, q_scale, k_scale;
};

// (B, heads, length, D), as float or bf16 in memory
class Heads {
 public:
  Heads(const Case& c, int64_t heads, int64_t length, const Floats& x)
      : half_(c.half), heads_(heads), length_(length), dim_(c.dim), floats_(x) {
    for (float& value : floats_) {
      halves_.push_back(to_bf16(value));
      if (half_) value = to_float(halves_.back());
    }
  }
  HeadRows rows() {
    void* data = half_ ? static_cast<void*>(halves_.data()) : floats_.data();
    return {data, half_, heads_ * length_ * dim_, length_ * dim_, dim_};
  }
  Floats values() const {
    Floats x = floats_;
    for (size_t i = 0; half_ && i < x.size(); ++i) x[i] = to_float(halves_[i]);
    return x;
  }

 private:
  bool half_;
  int64_t heads_, length_, dim_;
  Floats floats_;
  std::vector<bf16> halves_;
};

uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x85EBCA6Bu;
  x = (x ^ (x >> 13)) * 0xC2B2AE35u;
  return x ^ (x >> 16);
}

// A row as it takes part: l2-normalised and scaled, where there are scales.
Doubles row_of(const Doubles& x, int64_t at, int64_t dim, const Doubles& scale) {
  Doubles row(x.begin() + at * dim, x.begin() + (at + 1) * dim);
  if (scale.empty()) return row;
  double square = 0.0;
  for (const double value : row) square += value * value;
  for (int64_t c = 0; c < dim; ++c) row[c] *= scale[c] / std::sqrt(square);
  return row;
}

// out (B, H, M, D) and logsumexp (B, H, M)
std::pair<Doubles, Doubles> attention(const Case& c, const AttentionCall& call, const Inputs& in) {
  Doubles out(c.batch * c.heads * c.queries * c.dim, 0.0);
  Doubles logsumexp(c.batch * c.heads * c.queries);
  for (int64_t row = 0; row < c.batch * c.heads * c.queries; ++row) {
    const int64_t i = row % c.queries, h = row / c.queries % c.heads;
    const int64_t b = row / c.queries / c.heads;
    const Doubles q = row_of(in.q, row, c.dim, in.q_scale);
    const uint32_t row_key =
        mix(mix(static_cast<uint32_t>(row) ^ call.seed_low) ^ call.seed_high);
    double sum = 0.0;
    for (int64_t j = 0; j < c.keys; ++j) {
      if (c.causal && j > i + c.keys - c.queries) continue;
      if (c.masked && (!call.key_mask[b * c.keys + j] || j >= call.key_lengths[b])) continue;
      const int64_t key = (b * c.kv_heads + h / (c.heads / c.kv_heads)) * c.keys + j;
      const Doubles k = row_of(in.k, key, c.dim, in.k_scale);
      double s = 0.0;
      for (int64_t e = 0; e < c.dim; ++e) s += q[e] * k[e];
      s *= call.scale;
      if (c.radius > 0) {
        const int64_t offset = call.q_codes[i] - call.k_codes[j];
        s += in.table[h * (2 * c.radius + 1) + c.radius + std::clamp(offset, -c.radius, c.radius)];
      }
      const double weight = std::exp(s);
      sum += weight;
      if (c.dropout > 0.0 &&
          mix(static_cast<uint32_t>(j) * 0x9E3779B9u + row_key) < call.drop_below) {
        continue;
      }
      for (int64_t e = 0; e < c.dim; ++e) out[row * c.dim + e] += weight * in.v[key * c.dim + e];
    }
    logsumexp[row] = std::log(sum);
    for (int64_t e = 0; e < c.dim; ++e) out[row * c.dim + e] /= sum * (1.0 - c.dropout);
  }
  return {out, logsumexp};
}

void test(const Case& c, int workers) {
  const std::string name = c.name + ", " + std::to_string(workers) + " workers: ";
  const int64_t q_size = c.batch * c.heads * c.queries * c.dim;
  const int64_t k_size = c.batch * c.kv_heads * c.keys * c.dim;
  const int64_t table_size = c.radius > 0 ? c.heads * (2 * c.radius + 1) : 0;
  Heads q(c, c.heads, c.queries, values(q_size, 1)), k(c, c.kv_heads, c.keys, values(k_size, 2));
  Heads v(c, c.kv_heads, c.keys, values(k_size, 3));
  Heads grad(c, c.heads, c.queries, values(q_size, 4));
  Heads out(c, c.heads, c.queries, poisoned(q_size)), dq = out;
  // Rows of keys that are masked are not written.
  Heads dk(c, c.kv_heads, c.keys, c.masked ? Floats(k_size, 0.0f) : poisoned(k_size)), dv = dk;
  const Floats table = values(table_size, 5), q_scale = values(c.normed ? c.dim : 0, 6);
  const Floats k_scale = values(c.normed ? c.dim : 0, 7);
  Floats logsumexp = poisoned(c.batch * c.heads * c.queries), dtable = poisoned(table_size);
  Floats dq_scale = poisoned(q_scale.size()), dk_scale = poisoned(k_scale.size());
  // Positions of a grid of width 5, as one number that offsets can be read from.
  std::vector<int32_t> q_codes, k_codes;
  for (int32_t i = 0; i < c.queries; ++i) q_codes.push_back(i / 5 * 9 + i % 5);
  for (int32_t j = 0; j < c.keys; ++j) k_codes.push_back(j / 5 * 9 + j % 5);
  const auto mask = std::make_unique<bool[]>(static_cast<size_t>(c.batch * c.keys));
  for (int64_t j = 0; j < c.batch * c.keys; ++j) mask[j] = j % 3 != 1;
  std::vector<int64_t> lengths;
  for (int64_t b = 0; b < c.batch; ++b) lengths.push_back(c.keys - 2 * b);

  AttentionCall call{};
  call.batch = c.batch;
  call.heads = c.heads;
  call.kv_heads = c.kv_heads;
  call.queries = c.queries;
  call.keys = c.keys;
  call.head_dim = c.dim;
  call.scale = 1.0f / std::sqrt(static_cast<float>(c.dim));
  call.causal = c.causal;
  call.q = q.rows();
  call.k = k.rows();
  call.v = v.rows();
  call.out = out.rows();
  call.logsumexp = logsumexp.data();
  if (c.radius > 0) {
    call.table = table.data();
    call.radius = c.radius;
    call.q_codes = q_codes.data();
    call.k_codes = k_codes.data();
    call.dtable = dtable.data();
  }
  if (c.masked) {
    call.key_mask = mask.get();
    call.key_lengths = lengths.data();
  }
  if (c.normed) {
    call.q_scale = q_scale.data();
    call.k_scale = k_scale.data();
    call.dq_scale = dq_scale.data();
    call.dk_scale = dk_scale.data();
  }
  if (c.dropout > 0.0) {
    call.dropout = true;
    call.seed_low = 123;
    call.seed_high = 456;
    call.drop_below = static_cast<uint32_t>(std::ldexp(c.dropout, 32));
    call.keep_scale = static_cast<float>(1.0 / (1.0 - c.dropout));
  }
  call.grad_out = grad.rows();
  call.dq = dq.rows();
  call.dk = dk.rows();
  call.dv = dv.rows();
  Workspace forward(MUSICLM_FAST_SIMD_CALL(attention_workspace, call, false, workers));
  MUSICLM_FAST_SIMD_CALL(attention_forward, call, forward, in_turn(workers));
  Workspace backward(MUSICLM_FAST_SIMD_CALL(attention_workspace, call, true, workers));
  MUSICLM_FAST_SIMD_CALL(attention_backward, call, backward, in_turn(workers));

  Inputs in{in_double(q.values()), in_double(k.values()), in_double(v.values()),
            in_double(table),      in_double(q_scale),    in_double(k_scale)};
  const auto [expected, expected_logsumexp] = attention(c, call, in);
  // bf16 keeps 8 bits: half a unit in the last place is 2^-9 of a number, and delta in the backward
  // comes from the rounded output.
  const double tolerance = c.half ? 0x1p-8 : 2e-6;
  close(name + "out", out.values(), expected, tolerance);
  close(name + "logsumexp", logsumexp, expected_logsumexp, 2e-6);
  const Floats weights = grad.values();
  const auto loss = [&] { return sum_of_products(attention(c, call, in).first, weights); };
  close(name + "dq", dq.values(), gradient(in.q, loss), 2 * tolerance);
  close(name + "dk", dk.values(), gradient(in.k, loss), 2 * tolerance);
  close(name + "dv", dv.values(), gradient(in.v, loss), 2 * tolerance);
  if (c.radius > 0) close(name + "dtable", dtable, gradient(in.table, loss), 2 * tolerance);
  if (c.normed) {
    close(name + "dq_scale", dq_scale, gradient(in.q_scale, loss), 2 * tolerance);
    close(name + "dk_scale", dk_scale, gradient(in.k_scale, loss), 2 * tolerance);
  }
}

}  // namespace

int main() {
  const Case grouped{.name = "grouped, causal, biased", .batch = 1, .heads = 2, .kv_heads = 1,
                     .queries = 9, .keys = 21, .dim = 8, .causal = true, .radius = 4};
  const Case masked{.name = "masked, normed, dropped", .batch = 2, .heads = 2, .kv_heads = 2,
                    .queries = 3, .keys = 19, .dim = 5, .masked = true, .normed = true,
                    .radius = 6, .dropout = 0.25};
  const Case tiles{.name = "two tiles of keys", .batch = 1, .heads = 1, .kv_heads = 1,
                   .queries = 2, .keys = 131, .dim = 6, .radius = 300};
  const Case blocks{.name = "blocks of queries", .batch = 1, .heads = 1, .kv_heads = 1,
                    .queries = 99, .keys = 7, .dim = 3};
  const Case half{.name = "bf16", .batch = 1, .heads = 2, .kv_heads = 1, .queries = 5, .keys = 33,
                  .dim = 17, .half = true};
  return at_every_level("attention", [&] {
    for (const Case& c : {grouped, masked, tiles, blocks, half}) {
      for (const int workers : {1, 3}) test(c, workers);
    }
  });
}
