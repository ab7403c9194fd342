#include "attention/key_plan.h"

#include "common/integers.h"

namespace musiclm_fast::MUSICLM_FAST_SIMD_NS::attention {
namespace {

// The greedy cover of a group by windows; 0 if more than kMaxWindows are needed.
int cover(const int32_t* code, int lanes, Window* windows) {
  bool done[kWidth] = {};
  int left = lanes;
  for (int w = 0; w < kMaxWindows; ++w) {
    Window& window = windows[w];
    window.base = INT64_MIN;
    for (int i = 0; i < lanes; ++i) {
      if (!done[i]) window.base = larger<int64_t>(window.base, code[i]);
    }
    window.source = window.lanes = vint{};
    for (int32_t& reader : window.readers) reader = kWidth;
    for (int i = 0; i < lanes; ++i) {
      const int64_t entry = window.base - code[i];
      // A repeated code goes to the next window.
      if (done[i] || entry >= kSpan || window.readers[kReach + entry] != kWidth) continue;
      window.readers[kReach + entry] = i;
      window.source[i] = static_cast<int32_t>(entry);
      window.lanes[i] = -1;
      done[i] = true;
      if (--left == 0) return w + 1;
    }
  }
  return 0;
}

}  // namespace

void make_plan(const AttentionCall& call, int64_t b, KeyPlan& plan) {
  int64_t end = call.keys;
  if (call.key_lengths != nullptr) end = larger<int64_t>(0, smaller(end, call.key_lengths[b]));
  const bool* mask = call.key_mask == nullptr ? nullptr : call.key_mask + b * call.keys;
  const int32_t* codes = call.table == nullptr ? nullptr : call.k_codes + b * call.k_codes_stride;
  int64_t n = 0;
  for (int64_t j = 0; j < end; ++j) {
    if (mask != nullptr && !mask[j]) continue;
    plan.index[n] = static_cast<int32_t>(j);
    plan.column[n] = static_cast<uint32_t>(j) * 0x9E3779B9u;
    plan.code[n] = codes == nullptr ? 0 : codes[j];
    ++n;
  }
  plan.count = n;
  for (int64_t j = n; j < round_up(n, kWidth); ++j) {
    plan.index[j] = 0;
    plan.column[j] = 0;
    plan.code[j] = 0;
  }
  if (codes == nullptr) return;
  int32_t used = 0;
  for (int64_t j = 0; j < n; j += kWidth) {
    plan.first_window[j / kWidth] = used;
    used += cover(plan.code + j, static_cast<int>(smaller<int64_t>(kWidth, n - j)),
                  plan.windows + used);
  }
  plan.first_window[divide_up(n, kWidth)] = used;
}

int64_t visible(const AttentionCall& call, const KeyPlan& plan, int64_t i) {
  if (!call.causal) return plan.count;
  const int64_t last = i + call.keys - call.queries;
  int64_t low = 0, high = plan.count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (plan.index[middle] <= last) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

}  // namespace musiclm_fast::MUSICLM_FAST_SIMD_NS::attention
