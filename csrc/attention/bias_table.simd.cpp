#include "attention/bias_table.h"

#include <cstring>

namespace musiclm_fast::MUSICLM_FAST_SIMD_NS::attention {
namespace {

MUSICLM_FAST_INLINE vint vload_int(const int32_t* p) {
  vint v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// How many of `rows` queries make a run.
MUSICLM_FAST_INLINE int run_length(const int32_t* q_codes, int rows) {
  int n = 1;
  while (n < rows) {
    const int64_t shift = int64_t{q_codes[n]} - q_codes[0];
    if (shift < 0 || shift > kReach) break;
    ++n;
  }
  return n;
}

MUSICLM_FAST_INLINE int64_t window_start(const TableTile& t, int64_t q_code, const Window& window) {
  const int64_t start = q_code - window.base + t.radius + kTablePad;
  return smaller(larger<int64_t>(start, 0), t.last);
}

MUSICLM_FAST_INLINE int64_t entry_of(const TableTile& t, int64_t q_code, int64_t k_code) {
  const int64_t offset = smaller(larger(q_code - k_code, -t.radius), t.radius);
  return offset + t.radius + kTablePad;
}

void scale_tile(int rows, int groups, float scale, float* s) {
  for (int r = 0; r < rows; ++r) {
    float* row = s + r * kKeyRows;
    for (int g = 0; g < groups; ++g) vstore(row + g * kWidth, vload(row + g * kWidth) * scale);
  }
}

// s = scale * s + bias for a tile of `rows` x `groups` * W similarities.
void add_bias(const TableTile& t, const float* table, const int32_t* q_codes, int rows, int groups,
              float scale, float* s) {
  for (int length; rows > 0; rows -= length, q_codes += length, s += length * kKeyRows) {
    length = run_length(q_codes, rows);
    for (int g = 0; g < groups; ++g) {
      const int32_t first = t.first_window[g], end = t.first_window[g + 1];
      float* column = s + g * kWidth;
      if (first == end) {
        for (int r = 0; r < length; ++r) {
          float bias[kWidth];
          for (int i = 0; i < kWidth; ++i) {
            bias[i] = table[entry_of(t, q_codes[r], t.code[g * kWidth + i])];
          }
          float* x = column + r * kKeyRows;
          vstore(x, vload(x) * scale + vload(bias));
        }
        continue;
      }
      const Window* window = t.windows + first;
      const float* start = table + window_start(t, q_codes[0], *window);
      vfloat low = vload(start), high = vload(start + kWidth);
      vint source = window->source;
      if (first + 1 == end) {
        for (int r = 0; r < length; ++r) {
          float* x = column + r * kKeyRows;
          const vfloat bias = vpermute2(low, high, source + (q_codes[r] - q_codes[0]));
          vstore(x, vload(x) * scale + bias);
        }
        continue;
      }
      for (int r = 0; r < length; ++r) {
        float* x = column + r * kKeyRows;
        const vfloat bias = vpermute2(low, high, source + (q_codes[r] - q_codes[0]));
        vstore(x, vload(x) * scale + (vfloat)((vint)bias & window->lanes));
      }
      for (int32_t w = first + 1; w < end; ++w) {
        ++window;
        start = table + window_start(t, q_codes[0], *window);
        low = vload(start);
        high = vload(start + kWidth);
        source = window->source;
        for (int r = 0; r < length; ++r) {
          float* x = column + r * kKeyRows;
          const vfloat bias = vpermute2(low, high, source + (q_codes[r] - q_codes[0]));
          vstore(x, vload(x) + (vfloat)((vint)bias & window->lanes));
        }
      }
    }
  }
}

}  // namespace

void finish_similarities(const AttentionCall& call, const Tile& tile, const float* table,
                         const int32_t* q_codes, int rows, float* s) {
  if (q_codes == nullptr) {
    scale_tile(rows, tile.groups, call.scale, s);
  } else {
    add_bias(tile.table, table, q_codes, rows, tile.groups, call.scale, s);
  }
}

void add_table_gradient(const TableTile& t, float* dtable, const int32_t* q_codes, int rows,
                        int groups, const float* ds) {
  for (int length; rows > 0; rows -= length, q_codes += length, ds += length * kKeyRows) {
    length = run_length(q_codes, rows);
    for (int g = 0; g < groups; ++g) {
      const int32_t first = t.first_window[g], end = t.first_window[g + 1];
      const float* column = ds + g * kWidth;
      if (first == end) {
        for (int r = 0; r < length; ++r) {
          for (int i = 0; i < kWidth; ++i) {
            dtable[entry_of(t, q_codes[r], t.code[g * kWidth + i])] += column[r * kKeyRows + i];
          }
        }
        continue;
      }
      for (int32_t w = first; w < end; ++w) {
        const Window& window = t.windows[w];
        float* start = dtable + window_start(t, q_codes[0], window);
        vfloat low = vload(start), high = vload(start + kWidth);
        for (int r = 0; r < length; ++r) {
          const vfloat x = vload(column + r * kKeyRows);
          const int32_t* readers = window.readers + kReach - (q_codes[r] - q_codes[0]);
          low += vpermute2(x, vzero(), vload_int(readers));
          high += vpermute2(x, vzero(), vload_int(readers + kWidth));
        }
        vstore(start, low);
        vstore(start + kWidth, high);
      }
    }
  }
}

}  // namespace musiclm_fast::MUSICLM_FAST_SIMD_NS::attention
