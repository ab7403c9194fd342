// A tile of similarities in cache: its sizes, its keys and who sees them. For *.simd.cpp only.
#pragma once

#include <cstdint>

#include "attention/key_plan.h"
#include "common/integers.h"
#include "common/simd.h"

namespace musiclm_fast::MUSICLM_FAST_SIMD_NS::attention {

inline constexpr int kKeyRows = 128;     // keys of a tile; a multiple of kPanel and of W
inline constexpr int kForwardRows = 48;  // queries of a tile
inline constexpr int kBackwardRows = 96;

// A tile's part of the key plan.
struct TableTile {
  const int32_t* first_window;
  const Window* windows;
  const int32_t* code;
  int64_t radius;
  int64_t last;  // last place where a window can start in the padded table
};

// The tile's keys, and what its rows need besides.
struct Tile {
  int64_t key;     // first packed key
  int64_t keys;    // at most kKeyRows
  int groups;      // of W keys, the last one perhaps not full
  TableTile table;
  const uint32_t* columns;
};

inline Tile make_tile(const AttentionCall& call, const KeyPlan& plan, int64_t key) {
  Tile tile{};
  tile.key = key;
  tile.keys = smaller<int64_t>(kKeyRows, plan.count - key);
  tile.groups = static_cast<int>(divide_up(tile.keys, kWidth));
  tile.columns = plan.column + key;
  if (call.table != nullptr) {
    tile.table = {plan.first_window + key / kWidth, plan.windows, plan.code + key, call.radius,
                  2 * call.radius + 1 + 2 * kTablePad - 2 * kWidth};
  }
  return tile;
}

// Lanes of group g that a row with `limit` visible keys sees.
MUSICLM_FAST_INLINE vint seen_lanes(const Tile& tile, int64_t limit, int g) {
  const int64_t left = smaller<int64_t>(limit - tile.key - g * kWidth, kWidth);
  return vfirst(static_cast<int32_t>(larger<int64_t>(left, 0)));
}

}  // namespace musiclm_fast::MUSICLM_FAST_SIMD_NS::attention
