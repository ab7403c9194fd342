#include "spectrogram/plan.h"

#include <cmath>
#include <map>
#include <memory>
#include <mutex>
#include <utility>

namespace musiclm_fast::spectrogram {
namespace {

constexpr double kTwoPi = 6.283185307179586476925286766559;

// cos and sin of 2 pi i / n, exact at multiples of a quarter turn.
std::pair<double, double> unit(int64_t i, int64_t n) {
  i %= n;
  if ((4 * i) % n == 0) {
    constexpr double kCos[] = {1, 0, -1, 0}, kSin[] = {0, 1, 0, -1};
    return {kCos[4 * i / n], kSin[4 * i / n]};
  }
  const double angle = kTwoPi * static_cast<double>(i) / static_cast<double>(n);
  return {std::cos(angle), std::sin(angle)};
}

// Radices of n, or none if a prime factor is too large. Fours and eights first: fewest passes.
std::vector<int> factors(int64_t n) {
  std::vector<int> found;
  int twos = 0;
  while (n % 2 == 0) {
    n /= 2;
    ++twos;
  }
  // 2^twos as eights and fours, a two only where it is all there is
  while (twos >= 3 && twos != 4) {
    found.push_back(8);
    twos -= 3;
  }
  for (; twos >= 2; twos -= 2) found.push_back(4);
  if (twos == 1) found.push_back(2);
  for (int radix = 3; radix <= kMaxRadix; radix += 2) {
    while (n % radix == 0) {
      found.push_back(radix);
      n /= radix;
    }
  }
  if (n != 1) found.clear();
  return found;
}

// The table of a folded transform has about n_fft * taps / 4 entries.
bool folds(int64_t n_fft, int64_t taps) { return taps <= kMaxFoldedTaps && n_fft <= kMaxFoldedFft; }

void add_folded(Plan& plan) {
  Transform& t = plan.transform;
  for (const int terms : kFoldedTerms) {
    if (t.terms == 0 && terms > t.taps / 2) t.terms = terms;
  }
  t.rows = t.n_fft % 2 == 0 ? t.n_fft / 4 + 1 : t.bins;
  t.table = static_cast<int>(plan.numbers.size());
  for (int row = 0; row < t.rows; ++row) {
    for (int m = 0; m < t.terms; ++m) {
      plan.numbers.push_back(unit(int64_t{row} * m, t.n_fft).first);
    }
    for (int m = 0; m < t.terms; ++m) {
      plan.numbers.push_back(unit(int64_t{row} * m, t.n_fft).second);
    }
  }
}

void add_fft(Plan& plan) {
  Transform& t = plan.transform;
  t.packed = t.n_fft % 2 == 0;
  t.length = t.packed ? t.n_fft / 2 : t.n_fft;
  std::vector<int> frequency(t.length, 0);  // by position
  int done = 1;                             // product of the radices so far
  for (const int radix : factors(t.length)) {
    Stage& stage = t.stage[t.stages++];
    stage.radix = radix;
    stage.span = t.length / done / radix;
    stage.shift = -1;
    for (int shift = 0; shift < 31; ++shift) {
      if (stage.span == 1 << shift) stage.shift = shift;
    }
    stage.twiddles = static_cast<int>(plan.numbers.size());
    for (int q = 1; q < radix; ++q) {
      for (int j = 0; j < stage.span; ++j) {
        const auto [c, s] = unit(int64_t{q} * j, int64_t{radix} * stage.span);
        plan.numbers.push_back(c);
        plan.numbers.push_back(-s);
      }
    }
    stage.roots = static_cast<int>(plan.numbers.size());
    for (int k = 0; radix > 5 && radix != 8 && k < radix; ++k) {
      const auto [c, s] = unit(k, radix);
      plan.numbers.push_back(c);
      plan.numbers.push_back(-s);
    }
    // output q of a butterfly holds the frequencies q (mod radix) of its block
    for (int i = 0; i < t.length; ++i) frequency[i] += done * (i / stage.span % radix);
    done *= radix;
  }
  plan.order.resize(t.length);
  for (int i = 0; i < t.length; ++i) plan.order[frequency[i]] = i;
  if (t.packed) {
    t.split = static_cast<int>(plan.numbers.size());
    for (int k = 0; k <= t.length / 2; ++k) {
      const auto [c, s] = unit(k, t.n_fft);
      plan.numbers.push_back(c);
      plan.numbers.push_back(s);
    }
  }
}

std::unique_ptr<Plan> make(int64_t n_fft, int64_t taps) {
  auto plan = std::make_unique<Plan>();
  Transform& t = plan->transform = Transform{};
  t.n_fft = static_cast<int>(n_fft);
  t.taps = static_cast<int>(taps);
  t.bins = t.n_fft / 2 + 1;
  t.folded = folds(n_fft, taps);
  if (t.folded) {
    add_folded(*plan);
  } else {
    add_fft(*plan);
  }
  t.numbers = plan->numbers.data();
  t.order = plan->order.data();
  return plan;
}

}  // namespace

bool plannable(int64_t n_fft, int64_t taps) {
  if (folds(n_fft, taps)) return true;
  return n_fft <= kMaxFft && !factors(n_fft % 2 == 0 ? n_fft / 2 : n_fft).empty();
}

const Plan& plan_for(int64_t n_fft, int64_t taps) {
  static std::mutex mutex;
  static std::map<std::pair<int64_t, int64_t>, std::unique_ptr<Plan>> plans;
  const std::lock_guard lock(mutex);
  auto& plan = plans[{n_fft, taps}];
  if (!plan) plan = make(n_fft, taps);
  return *plan;
}

}  // namespace musiclm_fast::spectrogram
