// Which keys of a sample take part, and how groups of them read the table of biases. For *.simd.cpp
// only.
#pragma once

#include <cstdint>

#include "attention/attention.h"
#include "common/simd.h"

namespace musiclm_fast::MUSICLM_FAST_SIMD_NS::attention {

// The W keys of a group read table entries R + q - k. Their codes lie close together, so the
// entries lie in one window of 2W consecutive ones (rarely in a few), and which lane reads which
// entry is the same for every query but for a shift by the query's code: a window is two registers,
// loaded once for a run of queries, and a permutation; its gradient is the inverse permutation.
//
// The padded table has 2W copies of its edge entries on either side. A window that lies beyond the
// table by any amount is then read right from the nearest place in the padded table: that is the
// clamp, for all codes.
inline constexpr int kReach = kWidth / 2;  // codes of a run of queries differ by at most this
inline constexpr int kSpan = 2 * kWidth - kReach;  // entries that a group reads from one window
inline constexpr int kTablePad = 2 * kWidth;
inline constexpr int kMaxWindows = 4;  // of a group

struct alignas(64) Window {
  int64_t base;  // largest key code of the window; its entry is the window's first
  vint source;   // for each lane its entry in the window, 0 .. kSpan-1
  vint lanes;    // -1 for lanes of this window, 0 for others
  int32_t readers[kReach + 2 * kWidth];  // for entries from -kReach on the lane that reads it, or W
};

// Keys of one sample that take part, in order, and how groups of W of them read the table.
struct KeyPlan {
  int64_t count;          // N
  int32_t* index;         // original position
  int32_t* code;
  uint32_t* column;       // position's part of the dropout hash
  int32_t* first_window;  // per group, and one more; equal to the next: read lane by lane
  Window* windows;
};

// The plan of sample b, in the memory that `plan` points to.
void make_plan(const AttentionCall& call, int64_t b, KeyPlan& plan);

// How many packed keys query i sees: a prefix, because they are in order.
int64_t visible(const AttentionCall& call, const KeyPlan& plan, int64_t i);

}  // namespace musiclm_fast::MUSICLM_FAST_SIMD_NS::attention
