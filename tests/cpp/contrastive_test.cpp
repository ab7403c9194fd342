// Checks csrc/contrastive's kernels, tile by tile, against loops in double.
#include "contrastive/contrastive.h"

#include <algorithm>
#include <limits>

#include "check.h"

using namespace musiclm_fast;
using namespace musiclm_fast::check;

namespace {

int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

struct Sizes {
  int64_t m, n, depth;
  int64_t first_tile;  // columns of the first of two tiles
  int64_t offset;      // column of row 0's positive
};

// Both sides, packed, and every similarity.
struct Problem {
  Sizes z;
  float temperature;
  int64_t ld;
  Floats rows, columns;  // (m or n, ld)
  Doubles s;             // (m, n)
  bool labelled, inclusive;

  static int32_t row_label(int64_t i) { return static_cast<int32_t>(i * i % 5); }
  static int32_t column_label(int64_t j) { return static_cast<int32_t>(j % 7); }
  bool positive(int64_t i, int64_t j) const {
    return labelled ? row_label(i) == column_label(j) : j == z.offset + i;
  }

  // f(tile, its first column) for both tiles
  template <typename F>
  void each_tile(const F& f) const {
    for (int64_t begin = 0; begin < z.n; begin = begin == 0 ? z.first_tile : z.n) {
      const int64_t n = begin == 0 ? z.first_tile : z.n - begin;
      const int64_t wide = round_up(n, kPanel);
      Floats panels = poisoned(wide * z.depth);
      for (int64_t j = 0; j < n; j += kPanel) {
        MUSICLM_FAST_SIMD_CALL(contrastive_panel, &columns[(begin + j) * ld],
                               std::min(kPanel, n - j), z.depth, ld, &panels[j * z.depth]);
      }
      Floats similarities = poisoned(z.m * wide), scratch = poisoned(4 * (z.m + wide));
      std::vector<int32_t> row_labels(z.m), column_labels(wide, -1);
      for (int64_t i = 0; i < z.m; ++i) row_labels[i] = row_label(i);
      for (int64_t j = 0; j < n; ++j) column_labels[j] = column_label(begin + j);
      const ContrastiveTile tile{rows.data(), &columns[begin * ld], panels.data(), z.m, n, z.depth,
                                 ld, z.offset - begin, labelled ? row_labels.data() : nullptr,
                                 labelled ? column_labels.data() : nullptr, inclusive,
                                 temperature, similarities.data(), scratch.data()};
      f(tile, begin);
    }
  }

  // ds (m, n) @ columns, or ds^T @ rows
  Doubles pushed(const Doubles& ds, bool to_rows) const {
    Doubles out((to_rows ? z.m : z.n) * ld, 0.0);
    for (int64_t i = 0; i < z.m; ++i) {
      for (int64_t j = 0; j < z.n; ++j) {
        for (int64_t k = 0; k < ld; ++k) {
          if (to_rows) out[i * ld + k] += ds[i * z.n + j] * columns[j * ld + k];
          if (!to_rows) out[j * ld + k] += ds[i * z.n + j] * rows[i * ld + k];
        }
      }
    }
    return out;
  }
};

template <typename T>
Floats packed(const Problem& p, int64_t count, const std::vector<T>& x) {
  Floats out = poisoned(count * p.ld);
  const float largest =
      MUSICLM_FAST_SIMD_CALL(contrastive_pack, x.data(), count, p.z.depth, p.z.depth, p.ld,
                             out.data());
  Doubles expected(count * p.ld, 0.0);
  double square = 0.0;
  for (int64_t i = 0; i < count; ++i) {
    double sum = 0.0;
    for (int64_t k = 0; k < p.z.depth; ++k) {
      const double value = to_float(x[i * p.z.depth + k]);
      expected[i * p.ld + k] = value;
      sum += value * value;
    }
    square = std::max(square, sum);
  }
  close("packed", out, expected, 1e-9);
  close("largest square", {largest}, {square}, 1e-6);
  return out;
}

Problem make_problem(const Sizes& z, float temperature, bool labelled = false,
                     bool inclusive = false) {
  Problem p{z,  temperature, round_up(z.depth, kAlign), {}, {}, Doubles(z.m * z.n, 0.0),
            labelled, inclusive};
  const float scale = std::sqrt(3.0f / static_cast<float>(z.depth));  // norms of about 1
  p.rows = packed(p, z.m, values(z.m * z.depth, 1, scale));
  std::vector<bf16> half;
  for (const float x : values(z.n * z.depth, 2, scale)) half.push_back(to_bf16(x));
  p.columns = packed(p, z.n, half);
  for (int64_t i = 0; i < z.m * z.n; ++i) {
    for (int64_t k = 0; k < z.depth; ++k) {
      p.s[i] += static_cast<double>(p.rows[i / z.n * p.ld + k]) * p.columns[i % z.n * p.ld + k];
    }
    p.s[i] *= temperature;
  }
  return p;
}

void test_softmax(const std::string& name, const Problem& p, bool bounded) {
  const int64_t m = p.z.m, n = p.z.n;
  const float shift = bounded ? 0.0f : std::numeric_limits<float>::lowest();
  Floats row_shift(m, shift), row_sum(m, 0.0f), column_shift(n, shift), column_sum(n, 0.0f);
  Floats positive(m, 0.0f);
  p.each_tile([&](const ContrastiveTile& tile, int64_t begin) {
    MUSICLM_FAST_SIMD_CALL(contrastive_stats, tile, bounded, {row_shift.data(), row_sum.data()},
                           {&column_shift[begin], &column_sum[begin]}, positive.data());
  });
  Floats lse(m + n);
  for (int64_t i = 0; i < m; ++i) lse[i] = row_shift[i] + std::log(row_sum[i]);
  for (int64_t j = 0; j < n; ++j) lse[m + j] = column_shift[j] + std::log(column_sum[j]);
  Doubles sums(m + n, 0.0), positives(m, 0.0);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      const double s = p.s[i * n + j];
      if (p.positive(i, j)) positives[i] += s;
      if (!p.positive(i, j) || p.inclusive) {
        sums[i] += std::exp(s);
        sums[m + j] += std::exp(s);
      }
    }
  }
  for (double& sum : sums) sum = std::log(sum);
  close(name + "log-sum-exp", lse, sums, 1e-6);
  close(name + "positives", positive, positives, 1e-6);

  // weight_i e^(s - shift_i); where bounded, the weights hold e^-shift
  Floats weight = values(m + n, 3);
  Doubles factor(m + n);
  for (int64_t i = 0; i < m + n; ++i) {
    factor[i] = weight[i] * std::exp(-static_cast<double>(lse[i]));
    if (bounded) weight[i] = static_cast<float>(factor[i]);
  }
  const Floats positive_grad = values(m, 4);
  Floats d_rows(m * p.ld, 0.0f), d_columns(n * p.ld, 0.0f);
  p.each_tile([&](const ContrastiveTile& tile, int64_t begin) {
    MUSICLM_FAST_SIMD_CALL(contrastive_grad, tile, bounded, weight.data(), lse.data(),
                           &weight[m + begin], &lse[m + begin], positive_grad.data(),
                           d_rows.data(), &d_columns[begin * p.ld]);
  });
  Doubles ds(m * n, 0.0);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      if (!p.positive(i, j) || p.inclusive) {
        ds[i * n + j] = std::exp(p.s[i * n + j]) * (factor[i] + factor[m + j]);
      }
      if (p.positive(i, j)) ds[i * n + j] += positive_grad[i];
    }
  }
  close(name + "gradient of rows", d_rows, p.pushed(ds, true), 1e-5);
  close(name + "gradient of columns", d_columns, p.pushed(ds, false), 1e-5);
}

void test_sigmoid(const std::string& name, const Problem& p) {
  const int64_t m = p.z.m, n = p.z.n;
  constexpr float kBias = -0.5f;
  Floats loss(m, 0.0f), row_grad(m, 0.0f), d_rows(m * p.ld, 0.0f), d_columns(n * p.ld, 0.0f);
  p.each_tile([&](const ContrastiveTile& tile, int64_t begin) {
    MUSICLM_FAST_SIMD_CALL(contrastive_sigmoid, tile, kBias, loss.data(), row_grad.data(),
                           d_rows.data(), &d_columns[begin * p.ld]);
  });
  Doubles losses(m, 0.0), sums(m, 0.0), ds(m * n);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      const double sign = p.positive(i, j) ? -1.0 : 1.0, s = sign * (p.s[i * n + j] + kBias);
      ds[i * n + j] = sign / (1.0 + std::exp(-s));
      losses[i] += std::log1p(std::exp(s));
      sums[i] += ds[i * n + j];
    }
  }
  close(name + "sigmoid loss", loss, losses, 1e-6);
  close(name + "gradient of its bias", row_grad, sums, 1e-6);
  close(name + "its gradient of rows", d_rows, p.pushed(ds, true), 2e-6);
  close(name + "its gradient of columns", d_columns, p.pushed(ds, false), 2e-6);
}

}  // namespace

int main() {
  return at_every_level("contrastive", [] {
    for (const Sizes& z : {Sizes{3, 5, 7, 2, 0}, Sizes{7, 130, 130, 65, -2},
                           Sizes{13, 75, 16, 70, 66}}) {
      const std::string name = std::to_string(z.m) + " x " + std::to_string(z.n) + ": ";
      test_softmax(name + "bounded, ", make_problem(z, 5.0f), true);
      test_softmax(name + "shifted, ", make_problem(z, 60.0f), false);
      test_sigmoid(name, make_problem(z, 2.0f));
      for (const bool inclusive : {false, true}) {
        const std::string labels = name + (inclusive ? "labels, inclusive, " : "labels, ");
        test_softmax(labels + "bounded, ", make_problem(z, 5.0f, true, inclusive), true);
        test_softmax(labels + "shifted, ", make_problem(z, 60.0f, true, inclusive), false);
      }
      test_sigmoid(name + "labels, ", make_problem(z, 2.0f, true));
    }
  });
}
