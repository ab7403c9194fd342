// What the programs share that check an op's torch-free kernels against loops in double. A gradient
// is compared with central differences of the forward loop, so that nobody derives it twice.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "common/bf16.h"
#include "common/workers.h"

extern "C" int musiclm_fast_set_simd_level(const char* name);  // csrc/common/cpu.cpp

namespace musiclm_fast::check {

using Floats = std::vector<float>;
using Doubles = std::vector<double>;

inline int cases = 0, failures = 0;
inline double worst = 0.0;  // error of a case that is nearest to its tolerance, relative to that

// n numbers in [-scale, scale), the same in every run.
inline Floats values(int64_t n, uint32_t seed, float scale = 1.0f) {
  Floats x(n);
  uint32_t state = seed * 2654435761u + 1u;
  for (float& value : x) {
    state ^= state << 13;
    state ^= state >> 17;
    state ^= state << 5;
    value = (static_cast<float>(state >> 8) * 0x1p-23f - 1.0f) * scale;
  }
  return x;
}

inline Doubles in_double(const Floats& x) { return Doubles(x.begin(), x.end()); }

// Memory that a kernel has to write: a number that it leaves is seen.
inline Floats poisoned(int64_t n) { return Floats(n, std::nanf("")); }

// One case: errors of at most `tolerance` times the largest number that is expected.
inline void close(const std::string& what, const Floats& ours, const Doubles& expected,
                  double tolerance) {
  ++cases;
  double largest = 0.0, error = 0.0;
  for (size_t i = 0; i < expected.size(); ++i) {
    largest = std::fmax(largest, std::fabs(expected[i]));
    const double difference = std::fabs(ours[i] - expected[i]);
    error = difference <= error ? error : difference;  // takes a NaN, and keeps it
  }
  const double allowed = largest * tolerance;
  worst = error / allowed <= worst ? worst : error / allowed;
  if (ours.size() == expected.size() && error <= allowed) return;
  ++failures;
  std::printf("FAILED: %s: error %.3g, allowed %.3g\n", what.c_str(), error, allowed);
}

inline double sum_of_products(const Doubles& a, const Floats& b) {
  double sum = 0.0;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

// df / dx, where f() reads x.
template <typename F>
Doubles gradient(Doubles& x, const F& f) {
  constexpr double kStep = 1e-5;
  Doubles result(x.size());
  for (size_t i = 0; i < x.size(); ++i) {
    const double at = x[i];
    x[i] = at + kStep;
    const double above = f();
    x[i] = at - kStep;
    const double below = f();
    x[i] = at;
    result[i] = (above - below) / (2 * kStep);
  }
  return result;
}

// `count` workers, in one thread: tasks go to them in turn.
inline Workers in_turn(int count) {
  const auto run = [](void* context, int64_t tasks, void (*task)(void*, int64_t, int),
                      void* argument) {
    const auto workers = reinterpret_cast<intptr_t>(context);
    for (int64_t i = tasks; i-- > 0;) task(argument, i, static_cast<int>(i % workers));
  };
  return {count, reinterpret_cast<void*>(static_cast<intptr_t>(count)), run};
}

// At least `bytes` of memory, aligned to 64, full of NaN.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) : lines_(static_cast<size_t>(bytes + 63) / 64) {
    for (Line& line : lines_) {
      for (float& value : line.floats) value = std::nanf("");
    }
  }
  operator void*() { return lines_.data(); }
  operator float*() { return lines_.data()->floats; }

 private:
  struct alignas(64) Line {
    float floats[16];
  };
  std::vector<Line> lines_;
};

// Runs f at every level that was compiled and that this processor has; the program's exit status.
template <typename F>
int at_every_level(const char* op, const F& f) {
  for (const char* level : {"baseline", "avx2", "avx512"}) {
    if (musiclm_fast_set_simd_level(level) != 0) continue;
    cases = failures = 0;
    worst = 0.0;
    f();
    std::printf("%s %s %d cases, %d failures, %.2f of the tolerance\n", level, op, cases, failures,
                worst);
    if (failures != 0) return 1;
  }
  return 0;
}

}  // namespace musiclm_fast::check
