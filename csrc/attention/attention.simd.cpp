// Flash attention with an offset-table bias, forward and backward, at one SIMD level.
//
// Visible keys are packed first: masked ones are left out, so that the inner loops know nothing of
// masks and lengths. Names of shapes: M queries, N packed keys, D head_dim, W lanes, G query heads
// of one key head. A tile is kForwardRows (or kBackwardRows) x kKeyRows similarities in cache.
#include <cmath>
#include <cstring>

#include "attention/attention.h"
#include "common/arena.h"
#include "common/simd.h"

namespace musiclm_fast::MUSICLM_FAST_SIMD_NS {
namespace {

// A register block of C += A B is kBlockRows x (kBlockVectors * W): 24 accumulators in 32
// registers, 12 in 16, or 8 in 16 where multiply-add needs a temporary.
#if defined(__AVX512F__)
constexpr int kBlockRows = 6, kBlockVectors = 4;
#elif defined(__AVX2__)
constexpr int kBlockRows = 6, kBlockVectors = 2;
#else
constexpr int kBlockRows = 4, kBlockVectors = 2;
#endif
constexpr int kPanel = kBlockVectors * kWidth;  // keys in a panel of transposed keys
constexpr int kKeyRows = 128;                   // keys of a tile; a multiple of kPanel and of W
constexpr int kForwardRows = 48;                // queries of a tile
constexpr int kBackwardRows = 96;
constexpr int kMaxWindows = 4;
constexpr int64_t kUnits = 16;                  // wanted backward tasks, whatever the threads
constexpr int64_t kBudget = int64_t{24} << 20;  // bytes of packed heads; as much for parts of sums
constexpr float kSmallestNorm = 1e-12f;  // torch.nn.functional.normalize's eps

MUSICLM_FAST_INLINE vint vload_int(const int32_t* p) {
  vint v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// ---- the table of biases ------------------------------------------------------------------------

// The W keys of a group read table entries R + q - k. Their codes lie close together, so the
// entries lie in one window of 2W consecutive ones (rarely in a few), and which lane reads which
// entry is the same for every query but for a shift by the query's code: a window is two registers,
// loaded once for a run of queries, and a permutation; its gradient is the inverse permutation.
//
// The padded table has 2W copies of its edge entries on either side. A window that lies beyond the
// table by any amount is then read right from the nearest place in the padded table: that is the
// clamp, for all codes.
constexpr int kReach = kWidth / 2;          // codes of a run of queries differ by at most this
constexpr int kSpan = 2 * kWidth - kReach;  // entries that a group reads from one window
constexpr int kTablePad = 2 * kWidth;

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

// A tile's part of the key plan.
struct TableTile {
  const int32_t* first_window;
  const Window* windows;
  const int32_t* code;
  int64_t radius;
  int64_t last;  // last place where a window can start in the padded table
};

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

// dtable[entry of each pair] += ds for a tile.
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

// ---- small matrix products ----------------------------------------------------------------------

enum class Start { zero, add, scaled };  // C = A B, C += A B, C = alpha[row] * C + A B

// One register block; A is (rows, depth), or stored as (depth, rows) if kTransposed.
template <int kRows, int kVectors, bool kTransposed>
void block(int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
           int64_t ldc, Start start, const float* alpha) {
  vfloat sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      sum[r][v] = start == Start::zero ? vzero() : vload(c + r * ldc + v * kWidth);
    }
  }
  if (start == Start::scaled) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] *= alpha[r];
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    vfloat right[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) right[v] = vload(b + v * kWidth);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const vfloat left = vset(kTransposed ? a[r] : a[r * lda]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] += left * right[v];
    }
    a += kTransposed ? lda : 1;
    b += ldb;
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) vstore(c + r * ldc + v * kWidth, sum[r][v]);
  }
}

using Block = void (*)(int64_t, const float*, int64_t, const float*, int64_t, float*, int64_t,
                       Start, const float*);

template <int kVectors, bool kTransposed>
MUSICLM_FAST_INLINE void rows_of_blocks(int64_t rows, int64_t depth, const float* a, int64_t lda,
                                        const float* b, int64_t ldb, float* c, int64_t ldc,
                                        Start start, const float* alpha) {
  static constexpr Block rest[] = {
      nullptr,
      block<1, kVectors, kTransposed>,
      block<2, kVectors, kTransposed>,
      block<3, kVectors, kTransposed>,
#if defined(__AVX2__)
      block<4, kVectors, kTransposed>,
      block<5, kVectors, kTransposed>,
#endif
  };
  int64_t r = 0;
  for (; r + kBlockRows <= rows; r += kBlockRows) {
    block<kBlockRows, kVectors, kTransposed>(depth, a + (kTransposed ? r : r * lda), lda, b, ldb,
                                             c + r * ldc, ldc, start,
                                             start == Start::scaled ? alpha + r : nullptr);
  }
  if (r < rows) {
    rest[rows - r](depth, a + (kTransposed ? r : r * lda), lda, b, ldb, c + r * ldc, ldc, start,
                   start == Start::scaled ? alpha + r : nullptr);
  }
}

// C (rows, vectors * W) from A (rows, depth) and B, which comes in panels of (depth, kPanel):
// consecutive columns of a row-major matrix (panel = kPanel) or panels of transposed keys.
template <bool kTransposed>
void multiply(int64_t rows, int64_t vectors, int64_t depth, const float* a, int64_t lda,
              const float* b, int64_t ldb, int64_t panel, float* c, int64_t ldc, Start start,
              const float* alpha = nullptr) {
  for (; vectors >= kBlockVectors; vectors -= kBlockVectors) {
    rows_of_blocks<kBlockVectors, kTransposed>(rows, depth, a, lda, b, ldb, c, ldc, start, alpha);
    b += panel;
    c += kPanel;
  }
  switch (vectors) {
#if defined(__AVX512F__)
    case 3:
      rows_of_blocks<3, kTransposed>(rows, depth, a, lda, b, ldb, c, ldc, start, alpha);
      break;
    case 2:
      rows_of_blocks<2, kTransposed>(rows, depth, a, lda, b, ldb, c, ldc, start, alpha);
      break;
#endif
    case 1:
      rows_of_blocks<1, kTransposed>(rows, depth, a, lda, b, ldb, c, ldc, start, alpha);
      break;
    default:
      break;
  }
}

// ---- rows of heads ------------------------------------------------------------------------------

template <typename T>
MUSICLM_FAST_INLINE void load_values(const T* x, int64_t d, float* out) {
  int64_t c = 0;
  for (; c + kWidth <= d; c += kWidth) vstore(out + c, vload(x + c));
  if (c < d) vstore(out + c, vload_partial(x + c, static_cast<int>(d - c)));
}

template <typename T>
MUSICLM_FAST_INLINE void store_values(T* x, int64_t d, const float* row) {
  int64_t c = 0;
  for (; c + kWidth <= d; c += kWidth) vstore(x + c, vload(row + c));
  if (c < d) vstore_partial(x + c, vload(row + c), static_cast<int>(d - c));
}

// Row i of a head; `out` is padded to dp (D rounded up to W) with zeros.
void load_row(const HeadRows& x, int64_t b, int64_t h, int64_t i, int64_t d, float* out) {
  const int64_t at = b * x.batch_stride + h * x.head_stride + i * x.row_stride;
  if (x.half) {
    load_values(static_cast<const bf16*>(x.data) + at, d, out);
  } else {
    load_values(static_cast<const float*>(x.data) + at, d, out);
  }
}

// Rows of one head lie far apart, so the processor does not see the next one coming.
constexpr int64_t kAhead = 8;

MUSICLM_FAST_INLINE void prefetch_row(const HeadRows& x, int64_t b, int64_t h, int64_t i,
                                      int64_t d) {
  const int64_t size = x.half ? sizeof(bf16) : sizeof(float);
  const char* row = static_cast<const char*>(x.data) +
                    (b * x.batch_stride + h * x.head_stride + i * x.row_stride) * size;
  for (int64_t c = 0; c < d * size; c += 64) __builtin_prefetch(row + c);
}

void store_row(const HeadRows& x, int64_t b, int64_t h, int64_t i, int64_t d, const float* row) {
  const int64_t at = b * x.batch_stride + h * x.head_stride + i * x.row_stride;
  if (x.half) {
    store_values(static_cast<bf16*>(x.data) + at, d, row);
  } else {
    store_values(static_cast<float*>(x.data) + at, d, row);
  }
}

float norm_of(const float* row, int64_t dp) {
  vfloat squares = vzero();
  for (int64_t c = 0; c < dp; c += kWidth) squares += vload(row + c) * vload(row + c);
  return std::sqrt(vsum(squares));
}

// row = l2norm(row) * scale; nothing without a scale
void normalise(float* row, int64_t dp, const float* scale) {
  if (scale == nullptr) return;
  const float norm = larger(norm_of(row, dp), kSmallestNorm);
  for (int64_t c = 0; c < dp; c += kWidth) {
    vstore(row + c, vload(row + c) / norm * vload(scale + c));
  }
}

// grad of l2norm(row) * scale  ->  grad of row, in place; dscale += its part
void normalise_backward(const float* row, int64_t dp, const float* scale, float* grad,
                        float* dscale) {
  const float norm = norm_of(row, dp);
  const float inverse = 1.0f / larger(norm, kSmallestNorm);
  vfloat along = vzero();  // <unit, grad of unit>
  for (int64_t c = 0; c < dp; c += kWidth) {
    const vfloat unit = vload(row + c) * inverse, g = vload(grad + c);
    vstore(dscale + c, vload(dscale + c) + g * unit);
    along += g * vload(scale + c) * unit;
  }
  // Below the smallest norm the division is by a constant.
  const float projection = norm < kSmallestNorm ? 0.0f : vsum(along);
  for (int64_t c = 0; c < dp; c += kWidth) {
    const vfloat unit = vload(row + c) * inverse;
    vstore(grad + c, (vload(grad + c) * vload(scale + c) - unit * projection) * inverse);
  }
}

// W rows of length dp (stride dp) -> columns: out[d * kPanel + i] = rows[i][d] for d < D.
void transpose_rows(const float* rows, int64_t d, int64_t dp, float* out) {
  for (int64_t c = 0; c < dp; c += kWidth) {
    vfloat x[kWidth];
    for (int i = 0; i < kWidth; ++i) x[i] = vload(rows + i * dp + c);
    transpose(x);
    const int64_t end = smaller<int64_t>(kWidth, d - c);
    for (int64_t i = 0; i < end; ++i) vstore(out + (c + i) * kPanel, x[i]);
  }
}

// <a, b> for each of W rows of length dp, summed in the order in which block() sums: where a row's
// output is one value exactly, delta then equals that value's gradient exactly.
vfloat row_products(const float* a, const float* b, int64_t dp) {
  vfloat sum = vzero();
  for (int64_t c = 0; c < dp; c += kWidth) {
    vfloat x[kWidth], y[kWidth];
    for (int i = 0; i < kWidth; ++i) {
      x[i] = vload(a + i * dp + c);
      y[i] = vload(b + i * dp + c);
    }
    transpose(x);
    transpose(y);
    for (int i = 0; i < kWidth; ++i) sum += x[i] * y[i];
  }
  return sum;
}

// ---- dropout ------------------------------------------------------------------------------------

template <typename T>  // uint32_t or vuint
MUSICLM_FAST_INLINE T mix(T x) {
  x ^= x >> 16;
  x *= 0x85EBCA6Bu;
  x ^= x >> 13;
  x *= 0xC2B2AE35u;
  return x ^ (x >> 16);
}

// -1 in lanes whose weight stays
MUSICLM_FAST_INLINE vint kept(uint32_t row_key, const uint32_t* columns, uint32_t drop_below) {
  vuint column;
  std::memcpy(&column, columns, sizeof column);
  return mix(column + row_key) >= (vuint{} + drop_below);
}

// ---- workspace ----------------------------------------------------------------------------------

struct Scratch {
  float* rows;         // (2W, dp)
  float* q;            // (kForwardRows, dp)
  float* out;          // (kForwardRows, dp)
  float* s;            // (rows, kKeyRows): similarities, then weights
  float* ds;           // (rows, kKeyRows): gradients of weights, then of similarities
  float* dk;           // (kKeyRows, dp)
  float* dv;           // (kKeyRows, dp)
  float* highest;      // (rows)
  float* higher;       // (rows)
  float* rescale;      // (rows)
  float* weights_sum;  // (rows, W)
  int64_t* limit;      // (rows) visible packed keys
};

// What one key head and its group of query heads are packed into.
struct HeadMemory {
  KeyPlan plan;     // unused if the batch shares one
  float* keys_t;    // (panels, D, kPanel) normalised keys
  float* rows;      // (padded_keys, dp) values; in the backward normalised keys
  float* values_t;  // (panels, D, kPanel)
  float* q;         // (G, M, dp) normalised
  float* grad_out;  // (G, M, dp)
  float* delta;     // (G, M)
  float* dq;        // (G, chunks, M, dp)
};

struct State {
  const AttentionCall* call;
  bool backward;
  int64_t group, dp, padded_keys, query_blocks, table_columns;
  bool one_plan;    // the batch shares keys and codes
  bool per_worker;  // a worker takes a whole key head; else all workers share the wave's heads
  int64_t chunks;   // parts of the keys whose gradients are summed apart
  int64_t wave;     // key heads at a time
  int64_t first;    // first key head of this wave
  int64_t bytes;

  KeyPlan plan;
  float* table;    // (H, table_columns), padded
  float* q_scale;  // (dp)
  float* k_scale;  // (dp)
  HeadMemory* memory;  // per worker, or per head of the wave
  float* dtable;       // (wave, chunks, G, table_columns)
  float* dq_scale;     // (wave, G, query_blocks, dp)
  float* dk_scale;     // (wave, chunks, dp)
  float* dtable_sum;   // (H, table_columns)
  double* dq_scale_sum;  // (dp)
  double* dk_scale_sum;  // (dp)
  Scratch* scratch;
};

// A key head at work.
struct Head {
  int64_t index;  // within the wave
  int64_t b, kv;
  const HeadMemory& memory;
  const KeyPlan& plan;
};

Head head_of(const State& s, int64_t index, int worker) {
  const int64_t head = s.first + index;
  const HeadMemory& memory = s.memory[s.per_worker ? worker : index];
  return {index, head / s.call->kv_heads, head % s.call->kv_heads, memory,
          s.one_plan ? s.plan : memory.plan};
}

KeyPlan take_plan(Arena& arena, const State& s) {
  KeyPlan plan{};
  plan.index = arena.take<int32_t>(s.padded_keys);
  plan.code = arena.take<int32_t>(s.padded_keys);
  plan.column = arena.take<uint32_t>(s.padded_keys);
  if (s.call->table != nullptr) {
    const int64_t groups = s.padded_keys / kWidth;
    plan.first_window = arena.take<int32_t>(groups + 1);
    plan.windows = arena.take<Window>(groups * kMaxWindows);
  }
  return plan;
}

HeadMemory take_head(Arena& arena, const State& s) {
  const int64_t panels = s.padded_keys * s.call->head_dim;
  const int64_t queries = s.group * s.call->queries;
  HeadMemory memory{};
  if (!s.one_plan) memory.plan = take_plan(arena, s);
  memory.keys_t = arena.take<float>(panels);
  memory.rows = arena.take<float>(s.padded_keys * s.dp);
  if (s.backward) {
    memory.values_t = arena.take<float>(panels);
    memory.q = arena.take<float>(queries * s.dp);
    memory.grad_out = arena.take<float>(queries * s.dp);
    memory.delta = arena.take<float>(queries);
    memory.dq = arena.take<float>(queries * s.chunks * s.dp);
  }
  return memory;
}

void take_parts(Arena& arena, State& s) {
  if (!s.backward) return;
  s.dtable = arena.take<float>(s.wave * s.chunks * s.group * s.table_columns);
  s.dq_scale = arena.take<float>(s.wave * s.group * s.query_blocks * s.dp);
  s.dk_scale = arena.take<float>(s.wave * s.chunks * s.dp);
}

Scratch take_scratch(Arena& arena, const State& s) {
  const int64_t rows = s.backward ? kBackwardRows : kForwardRows;
  Scratch scratch{};
  scratch.rows = arena.take<float>(2 * kWidth * s.dp);
  scratch.s = arena.take<float>(rows * kKeyRows);
  scratch.limit = arena.take<int64_t>(rows);
  if (s.backward) {
    scratch.ds = arena.take<float>(rows * kKeyRows);
    scratch.dk = arena.take<float>(kKeyRows * s.dp);
    scratch.dv = arena.take<float>(kKeyRows * s.dp);
  } else {
    scratch.q = arena.take<float>(rows * s.dp);
    scratch.out = arena.take<float>(rows * s.dp);
    scratch.highest = arena.take<float>(rows);
    scratch.higher = arena.take<float>(rows);
    scratch.rescale = arena.take<float>(rows);
    scratch.weights_sum = arena.take<float>(rows * kWidth);
  }
  return scratch;
}

// How the heads are laid out depends on the number of workers; what is summed in which order does
// not, so results do not either.
State make_state(const AttentionCall& call, bool backward, int workers, void* workspace) {
  State s{};
  s.call = &call;
  s.backward = backward;
  s.group = call.heads / call.kv_heads;
  s.dp = round_up(call.head_dim, kWidth);
  s.padded_keys = round_up(call.keys, kKeyRows);
  s.query_blocks = divide_up(call.queries, kBackwardRows);
  s.table_columns = call.table == nullptr ? 0 : round_up(2 * call.radius + 1 + 2 * kTablePad, 16);
  s.one_plan = call.key_mask == nullptr && call.key_lengths == nullptr && call.k_codes_stride == 0;
  const int64_t total = call.batch * call.kv_heads;
  // Each chunk has its own dq: few heads are split into more of them, long ones into fewer.
  const int64_t dq_bytes = s.group * call.queries * s.dp * static_cast<int64_t>(sizeof(float));
  const int64_t chunks = smaller(kUnits / total, s.padded_keys / kKeyRows);
  s.chunks = larger<int64_t>(1, smaller(chunks, kBudget / 2 / dq_bytes));

  Arena head{nullptr}, parts{nullptr};
  s.wave = 1;
  take_head(head, s);
  take_parts(parts, s);
  const bool even = total % workers == 0 || total >= 4 * workers;
  s.per_worker = workers == 1 || (even && workers * head.used <= kBudget);
  const int64_t each = parts.used + (s.per_worker ? 0 : head.used);
  const int64_t waves = divide_up(total, larger<int64_t>(1, kBudget / larger<int64_t>(each, 1)));
  s.wave = divide_up(total, waves);

  Arena arena{static_cast<char*>(workspace)};
  if (s.one_plan) s.plan = take_plan(arena, s);
  s.table = arena.take<float>(call.heads * s.table_columns);
  s.q_scale = arena.take<float>(s.dp);
  s.k_scale = arena.take<float>(s.dp);
  if (backward) {
    s.dtable_sum = arena.take<float>(call.heads * s.table_columns);
    s.dq_scale_sum = arena.take<double>(s.dp);
    s.dk_scale_sum = arena.take<double>(s.dp);
  }
  take_parts(arena, s);
  const int64_t heads = s.per_worker ? workers : s.wave;
  s.memory = arena.take<HeadMemory>(heads);
  for (int64_t i = 0; i < heads; ++i) {
    const HeadMemory memory = take_head(arena, s);
    if (workspace != nullptr) s.memory[i] = memory;
  }
  s.scratch = arena.take<Scratch>(workers);
  for (int64_t i = 0; i < workers; ++i) {
    const Scratch scratch = take_scratch(arena, s);
    if (workspace != nullptr) s.scratch[i] = scratch;
  }
  s.bytes = arena.used;
  return s;
}

// ---- preparation --------------------------------------------------------------------------------

void pad_table(const State& s, int64_t h) {
  const AttentionCall& call = *s.call;
  const int64_t columns = 2 * call.radius + 1;
  const float* from = call.table + h * columns;
  float* to = s.table + h * s.table_columns;
  for (int64_t c = 0; c < s.table_columns; ++c) {
    to[c] = from[smaller(larger<int64_t>(c - kTablePad, 0), columns - 1)];
  }
}

void pad_scales(const State& s) {
  const AttentionCall& call = *s.call;
  if (call.q_scale == nullptr) return;
  for (int64_t c = 0; c < s.dp; ++c) {
    s.q_scale[c] = c < call.head_dim ? call.q_scale[c] : 0.0f;
    s.k_scale[c] = c < call.head_dim ? call.k_scale[c] : 0.0f;
  }
}

const float* scale_or_null(const State& s, const float* scale) {
  return s.call->q_scale == nullptr ? nullptr : scale;
}

// The padded table and scales, and the plan if there is one for all.
void prepare(State& s, const Workers& workers) {
  const AttentionCall& call = *s.call;
  pad_scales(s);
  if (s.one_plan) make_plan(call, 0, s.plan);
  if (call.table == nullptr) return;
  run_tasks(workers, call.heads, [&](int64_t h, int) { pad_table(s, h); });
}

void plan_head(const State& s, int64_t index, int worker) {
  if (s.one_plan) return;
  make_plan(*s.call, (s.first + index) / s.call->kv_heads,
            s.memory[s.per_worker ? worker : index].plan);
}

// Packs rows [begin, end) of a key head, a multiple of W except at the last: transposed into panels
// and, if `rows` is given, as they are.
void pack_rows(const State& s, const Head& head, const HeadRows& x, const float* scale,
               int64_t begin, int64_t end, float* panels, float* rows, float* scratch) {
  const int64_t d = s.call->head_dim;
  const KeyPlan& plan = head.plan;
  for (int64_t j = begin; j < end; j += kWidth) {
    float* block = rows == nullptr ? scratch : rows + j * s.dp;
    for (int64_t i = 0; i < kWidth; ++i) {
      float* row = block + i * s.dp;
      if (j + i + kAhead < plan.count) {
        prefetch_row(x, head.b, head.kv, plan.index[j + i + kAhead], d);
      }
      if (j + i < plan.count) {
        load_row(x, head.b, head.kv, plan.index[j + i], d, row);
        normalise(row, s.dp, scale);
      } else {
        std::memset(row, 0, static_cast<size_t>(s.dp) * sizeof(float));
      }
    }
    if (panels != nullptr) {
      transpose_rows(block, d, s.dp, panels + j / kPanel * kPanel * d + j % kPanel);
    }
  }
}

void pack_keys(const State& s, const Head& head, int64_t block, float* scratch) {
  const AttentionCall& call = *s.call;
  const HeadMemory& m = head.memory;
  const int64_t begin = block * kKeyRows;
  const int64_t end = smaller(begin + kKeyRows, round_up(head.plan.count, kWidth));
  const float* scale = scale_or_null(s, s.k_scale);
  pack_rows(s, head, call.k, scale, begin, end, m.keys_t, s.backward ? m.rows : nullptr, scratch);
  pack_rows(s, head, call.v, nullptr, begin, end, m.values_t, s.backward ? nullptr : m.rows,
            scratch);
}

// How many packed keys query i sees: a prefix, because they are in order.
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

// The tile's keys, and what its rows need besides.
struct Tile {
  int64_t key;     // first packed key
  int64_t keys;    // at most kKeyRows
  int groups;      // of W keys, the last one perhaps not full
  TableTile table;
  const uint32_t* columns;
};

Tile make_tile(const State& s, const KeyPlan& plan, int64_t key) {
  const AttentionCall& call = *s.call;
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

uint32_t row_key_of(const AttentionCall& call, int64_t b, int64_t h, int64_t i) {
  const uint32_t row = static_cast<uint32_t>((b * call.heads + h) * call.queries + i);
  return mix(mix(row ^ call.seed_low) ^ call.seed_high);
}

// ---- forward ------------------------------------------------------------------------------------

// Largest similarity of a row. Lanes beyond its limit become -inf.
MUSICLM_FAST_INLINE float find_highest(const Tile& tile, int64_t limit, float* s) {
  vfloat highest = vset(-kInfinity);
  if (limit >= tile.key + tile.groups * kWidth) {
    for (int g = 0; g < tile.groups; ++g) highest = vmax(highest, vload(s + g * kWidth));
  } else {
    for (int g = 0; g < tile.groups; ++g) {
      const vfloat x = seen_lanes(tile, limit, g) ? vload(s + g * kWidth) : vset(-kInfinity);
      vstore(s + g * kWidth, x);
      highest = vmax(highest, x);
    }
  }
  return vmaximum(highest);
}

// s = exp(s - highest), dropped; returns the sum before dropout, per lane.
template <bool kDropout>
MUSICLM_FAST_INLINE vfloat exponentiate(const Tile& tile, const AttentionCall& call,
                                        uint32_t row_key, float highest, float* s) {
  vfloat sum = vzero();
  for (int g = 0; g < tile.groups; ++g) {
    vfloat p = vexp_weight(vload(s + g * kWidth) - highest);
    sum += p;
    if constexpr (kDropout) {
      p = kept(row_key, tile.columns + g * kWidth, call.drop_below) ? p : vzero();
    }
    vstore(s + g * kWidth, p);
  }
  return sum;
}

void scale_tile(int rows, int groups, float scale, float* s) {
  for (int r = 0; r < rows; ++r) {
    float* row = s + r * kKeyRows;
    for (int g = 0; g < groups; ++g) vstore(row + g * kWidth, vload(row + g * kWidth) * scale);
  }
}

// s = scale * s + bias
void finish_similarities(const AttentionCall& call, const Tile& tile, const float* table,
                         const int32_t* q_codes, int rows, float* s) {
  if (q_codes == nullptr) {
    scale_tile(rows, tile.groups, call.scale, s);
  } else {
    add_bias(tile.table, table, q_codes, rows, tile.groups, call.scale, s);
  }
}

void attend(const State& s, const Head& head, int64_t g, int64_t block, const Scratch& scratch) {
  const AttentionCall& call = *s.call;
  const KeyPlan& plan = head.plan;
  const int64_t b = head.b, h = head.kv * s.group + g;
  const int64_t d = call.head_dim, dp = s.dp, vectors = dp / kWidth;
  const int64_t first = block * kForwardRows;
  const int rows = static_cast<int>(smaller<int64_t>(kForwardRows, call.queries - first));
  const float* table = s.table + h * s.table_columns;
  const int32_t* q_codes =
      call.table == nullptr ? nullptr : call.q_codes + b * call.q_codes_stride + first;

  for (int r = 0; r < rows; ++r) {
    if (r + kAhead < rows) prefetch_row(call.q, b, h, first + r + kAhead, d);
    load_row(call.q, b, h, first + r, d, scratch.q + r * dp);
    normalise(scratch.q + r * dp, dp, scale_or_null(s, s.q_scale));
    scratch.limit[r] = visible(call, plan, first + r);
    scratch.highest[r] = -kInfinity;
    vstore(scratch.weights_sum + r * kWidth, vzero());
  }
  const int64_t end = scratch.limit[rows - 1];  // limits do not fall from row to row
  for (int64_t key = 0; key < end; key += kKeyRows) {
    const Tile tile = make_tile(s, plan, key);
    multiply<false>(rows, tile.groups, d, scratch.q, dp, head.memory.keys_t + key * d, kPanel,
                    kPanel * d, scratch.s, kKeyRows, Start::zero);
    finish_similarities(call, tile, table, q_codes, rows, scratch.s);
    for (int r = 0; r < rows; ++r) {
      const float highest = find_highest(tile, scratch.limit[r], scratch.s + r * kKeyRows);
      scratch.higher[r] = larger(scratch.highest[r], highest);
      // A row that has seen no key yet subtracts 0, so that its weights are 0 rather than NaN.
      const float shift = scratch.higher[r] == -kInfinity ? 0.0f : scratch.higher[r];
      scratch.rescale[r] = scratch.highest[r] - shift;
      scratch.highest[r] = scratch.higher[r];
      scratch.higher[r] = shift;
    }
    for (int r = 0; r < kForwardRows; r += kWidth) {
      vstore(scratch.rescale + r, vexp_weight(vload(scratch.rescale + r)));
    }
    for (int r = 0; r < rows; ++r) {
      float* row = scratch.s + r * kKeyRows;
      const vfloat sum =
          call.dropout
              ? exponentiate<true>(tile, call, row_key_of(call, b, h, first + r),
                                   scratch.higher[r], row)
              : exponentiate<false>(tile, call, 0, scratch.higher[r], row);
      float* total = scratch.weights_sum + r * kWidth;
      vstore(total, vload(total) * scratch.rescale[r] + sum);
    }
    multiply<false>(rows, vectors, tile.keys, scratch.s, kKeyRows, head.memory.rows + key * dp, dp,
                    kPanel, scratch.out, dp, key == 0 ? Start::zero : Start::scaled,
                    scratch.rescale);
  }

  float* lse = call.logsumexp + (b * call.heads + h) * call.queries + first;
  for (int r = 0; r < rows; ++r) {
    float* row = scratch.out + r * dp;
    if (scratch.limit[r] == 0) {
      std::memset(row, 0, static_cast<size_t>(dp) * sizeof(float));
      lse[r] = kInfinity;
    } else {
      const float sum = vsum(vload(scratch.weights_sum + r * kWidth));
      const float factor = (call.dropout ? call.keep_scale : 1.0f) / sum;
      for (int64_t c = 0; c < dp; c += kWidth) vstore(row + c, vload(row + c) * factor);
      lse[r] = scratch.highest[r] + std::log(sum);
    }
    store_row(call.out, b, h, first + r, d, row);
  }
}

// ---- backward -----------------------------------------------------------------------------------

void pack_queries(const State& s, const Head& head, int64_t g, int64_t block, float* scratch) {
  const AttentionCall& call = *s.call;
  const HeadMemory& m = head.memory;
  const int64_t b = head.b, h = head.kv * s.group + g, d = call.head_dim;
  const int64_t end = smaller(call.queries, (block + 1) * kBackwardRows);
  for (int64_t first = block * kBackwardRows; first < end; first += kWidth) {
    const int rows = static_cast<int>(smaller<int64_t>(kWidth, end - first));
    float* grads = m.grad_out + (g * call.queries + first) * s.dp;
    for (int r = 0; r < rows; ++r) {
      const int64_t i = first + r;
      if (i + kAhead < end) {
        prefetch_row(call.q, b, h, i + kAhead, d);
        prefetch_row(call.grad_out, b, h, i + kAhead, d);
        prefetch_row(call.out, b, h, i + kAhead, d);
      }
      float* q = m.q + (g * call.queries + i) * s.dp;
      load_row(call.q, b, h, i, d, q);
      normalise(q, s.dp, scale_or_null(s, s.q_scale));
      load_row(call.grad_out, b, h, i, d, grads + r * s.dp);
      load_row(call.out, b, h, i, d, scratch + r * s.dp);
    }
    if (rows < kWidth) {  // what follows is not ours to read
      float* copy = scratch + kWidth * s.dp;
      std::memcpy(copy, grads, static_cast<size_t>(rows * s.dp) * sizeof(float));
      grads = copy;
    }
    vstore_partial(m.delta + g * call.queries + first, row_products(grads, scratch, s.dp), rows);
  }
}

// A row's similarities and gradients of weights become its (dropped) weights and gradients of
// similarities.
template <bool kDropout>
MUSICLM_FAST_INLINE void row_backward(const Tile& tile, const AttentionCall& call, int64_t limit,
                                      uint32_t row_key, float logsumexp, float delta, float* s,
                                      float* ds) {
  const bool all_seen = limit >= tile.key + tile.groups * kWidth;
  for (int g = 0; g < tile.groups; ++g) {
    vfloat p = vexp_weight(vload(s + g * kWidth) - logsumexp);
    if (!all_seen) p = seen_lanes(tile, limit, g) ? p : vzero();
    vfloat dp = vload(ds + g * kWidth);
    vfloat dropped = p;
    if constexpr (kDropout) {
      const vint keep = kept(row_key, tile.columns + g * kWidth, call.drop_below);
      dropped = keep ? p * call.keep_scale : vzero();
      dp = keep ? dp * call.keep_scale : vzero();
    }
    vstore(s + g * kWidth, dropped);
    // The weight of a row's only key is constant; rounding of delta must not say otherwise.
    vstore(ds + g * kWidth, limit == 1 ? vzero() : p * (dp - delta));
  }
}

// Likewise for `rows` queries of a head from `first` on; dtable += its part.
void tile_backward(const State& s, const Tile& tile, const Head& head, int64_t g, int64_t first,
                   int rows, float* dtable, const Scratch& scratch) {
  const AttentionCall& call = *s.call;
  const int64_t b = head.b, h = head.kv * s.group + g;
  const float* lse = call.logsumexp + (b * call.heads + h) * call.queries + first;
  const float* delta = head.memory.delta + g * call.queries + first;
  const int32_t* q_codes =
      call.table == nullptr ? nullptr : call.q_codes + b * call.q_codes_stride + first;
  finish_similarities(call, tile, s.table + h * s.table_columns, q_codes, rows, scratch.s);
  for (int r = 0; r < rows; ++r) {
    float* row_s = scratch.s + r * kKeyRows;
    float* row_ds = scratch.ds + r * kKeyRows;
    if (call.dropout) {
      const uint32_t row_key = row_key_of(call, b, h, first + r);
      row_backward<true>(tile, call, scratch.limit[r], row_key, lse[r], delta[r], row_s, row_ds);
    } else {
      row_backward<false>(tile, call, scratch.limit[r], 0, lse[r], delta[r], row_s, row_ds);
    }
  }
  if (q_codes != nullptr) {
    add_table_gradient(tile.table, dtable, q_codes, rows, tile.groups, scratch.ds);
  }
}

// Gradients of the keys and values of one chunk of a key head, and its parts of dq and dtable.
void chunk_backward(const State& s, const Head& head, int64_t chunk, const Scratch& scratch) {
  const AttentionCall& call = *s.call;
  const HeadMemory& m = head.memory;
  const KeyPlan& plan = head.plan;
  const int64_t d = call.head_dim, dp = s.dp, vectors = dp / kWidth, queries = call.queries;
  const int64_t tiles = divide_up(plan.count, kKeyRows);
  const int64_t begin = chunk * tiles / s.chunks, end = (chunk + 1) * tiles / s.chunks;
  float* dtables = s.dtable + (head.index * s.chunks + chunk) * s.group * s.table_columns;
  float* dk_scale = s.dk_scale + (head.index * s.chunks + chunk) * dp;
  std::memset(dtables, 0, static_cast<size_t>(s.group * s.table_columns) * sizeof(float));
  std::memset(dk_scale, 0, static_cast<size_t>(dp) * sizeof(float));

  for (int64_t t = begin; t < end; ++t) {
    const Tile tile = make_tile(s, plan, t * kKeyRows);
    Start keys_start = Start::zero;
    for (int64_t g = 0; g < s.group; ++g) {
      const float* q = m.q + g * queries * dp;
      const float* grad_out = m.grad_out + g * queries * dp;
      float* dq = m.dq + (g * s.chunks + chunk) * queries * dp;
      for (int64_t first = 0; first < queries; first += kBackwardRows) {
        const int rows = static_cast<int>(smaller<int64_t>(kBackwardRows, queries - first));
        for (int r = 0; r < rows; ++r) scratch.limit[r] = visible(call, plan, first + r);
        if (scratch.limit[rows - 1] <= tile.key) {
          if (t == begin) {
            std::memset(dq + first * dp, 0, static_cast<size_t>(rows * dp) * sizeof(float));
          }
          continue;
        }
        multiply<false>(rows, tile.groups, d, q + first * dp, dp, m.keys_t + tile.key * d,
                        kPanel, kPanel * d, scratch.s, kKeyRows, Start::zero);
        multiply<false>(rows, tile.groups, d, grad_out + first * dp, dp, m.values_t + tile.key * d,
                        kPanel, kPanel * d, scratch.ds, kKeyRows, Start::zero);
        tile_backward(s, tile, head, g, first, rows, dtables + g * s.table_columns, scratch);
        multiply<true>(tile.keys, vectors, rows, scratch.s, kKeyRows, grad_out + first * dp, dp,
                       kPanel, scratch.dv, dp, keys_start);
        multiply<true>(tile.keys, vectors, rows, scratch.ds, kKeyRows, q + first * dp, dp, kPanel,
                       scratch.dk, dp, keys_start);
        multiply<false>(rows, vectors, tile.keys, scratch.ds, kKeyRows, m.rows + tile.key * dp, dp,
                        kPanel, dq + first * dp, dp, t == begin ? Start::zero : Start::add);
        keys_start = Start::add;
      }
    }
    if (keys_start == Start::zero) {  // no query sees a key of this tile
      std::memset(scratch.dk, 0, static_cast<size_t>(tile.keys * dp) * sizeof(float));
      std::memset(scratch.dv, 0, static_cast<size_t>(tile.keys * dp) * sizeof(float));
    }
    for (int64_t j = 0; j < tile.keys; ++j) {
      const int64_t at = plan.index[tile.key + j];
      float* dk = scratch.dk + j * dp;
      for (int64_t c = 0; c < dp; c += kWidth) vstore(dk + c, vload(dk + c) * call.scale);
      if (call.k_scale != nullptr) {
        load_row(call.k, head.b, head.kv, at, d, scratch.rows);
        normalise_backward(scratch.rows, dp, s.k_scale, dk, dk_scale);
      }
      store_row(call.dk, head.b, head.kv, at, d, dk);
      store_row(call.dv, head.b, head.kv, at, d, scratch.dv + j * dp);
    }
  }
}

// dq of a block of queries from the chunks' parts, in order.
void finish_queries(const State& s, const Head& head, int64_t g, int64_t block, float* scratch) {
  const AttentionCall& call = *s.call;
  const int64_t b = head.b, h = head.kv * s.group + g;
  const int64_t tiles = divide_up(head.plan.count, kKeyRows);
  const int64_t dp = s.dp, end = smaller(call.queries, (block + 1) * kBackwardRows);
  const float* parts = head.memory.dq + g * s.chunks * call.queries * dp;
  float* dq_scale = s.dq_scale + ((head.index * s.group + g) * s.query_blocks + block) * dp;
  std::memset(dq_scale, 0, static_cast<size_t>(dp) * sizeof(float));
  float* dq = scratch + dp;
  for (int64_t i = block * kBackwardRows; i < end; ++i) {
    std::memset(dq, 0, static_cast<size_t>(dp) * sizeof(float));
    for (int64_t chunk = 0; chunk < s.chunks; ++chunk) {
      if (chunk * tiles / s.chunks == (chunk + 1) * tiles / s.chunks) continue;
      const float* part = parts + (chunk * call.queries + i) * dp;
      for (int64_t c = 0; c < dp; c += kWidth) vstore(dq + c, vload(dq + c) + vload(part + c));
    }
    for (int64_t c = 0; c < dp; c += kWidth) vstore(dq + c, vload(dq + c) * call.scale);
    if (call.q_scale != nullptr) {
      load_row(call.q, b, h, i, call.head_dim, scratch);
      normalise_backward(scratch, dp, s.q_scale, dq, dq_scale);
    }
    store_row(call.dq, b, h, i, call.head_dim, dq);
  }
}

// dtable_sum of one head += the parts of this wave, in order.
void reduce_table(const State& s, int64_t h, int64_t heads_now) {
  const AttentionCall& call = *s.call;
  float* sum = s.dtable_sum + h * s.table_columns;
  if (s.first == 0) {
    std::memset(sum, 0, static_cast<size_t>(s.table_columns) * sizeof(float));
  }
  for (int64_t head = 0; head < heads_now; ++head) {
    if ((s.first + head) % call.kv_heads != h / s.group) continue;
    for (int64_t chunk = 0; chunk < s.chunks; ++chunk) {
      const float* part =
          s.dtable + ((head * s.chunks + chunk) * s.group + h % s.group) * s.table_columns;
      for (int64_t c = 0; c < s.table_columns; c += kWidth) {
        vstore(sum + c, vload(sum + c) + vload(part + c));
      }
    }
  }
}

void store_table(const State& s, int64_t h) {
  const AttentionCall& call = *s.call;
  const int64_t columns = 2 * call.radius + 1;
  const float* sum = s.dtable_sum + h * s.table_columns;
  float* out = call.dtable + h * columns;
  for (int64_t c = 0; c < columns; ++c) out[c] = sum[kTablePad + c];
  // What the padding received belongs to the edge entries.
  float low = 0.0f, high = 0.0f;
  for (int64_t c = 0; c < kTablePad; ++c) {
    low += sum[c];
    high += sum[kTablePad + columns + c];
  }
  out[0] += low;
  out[columns - 1] += high;
}

void add_rows(const float* parts, int64_t count, int64_t dp, double* sum) {
  for (int64_t p = 0; p < count; ++p) {
    for (int64_t c = 0; c < dp; ++c) sum[c] += parts[p * dp + c];
  }
}

}  // namespace

int64_t attention_workspace(const AttentionCall& call, bool backward, int workers) {
  return make_state(call, backward, workers, nullptr).bytes;
}

void attention_forward(const AttentionCall& call, void* workspace, const Workers& workers) {
  State s = make_state(call, false, workers.count, workspace);
  prepare(s, workers);
  const int64_t total = call.batch * call.kv_heads;
  const int64_t key_blocks = s.padded_keys / kKeyRows;
  const int64_t query_blocks = divide_up(call.queries, kForwardRows);
  for (; s.first < total; s.first += s.wave) {
    const int64_t heads = smaller(s.wave, total - s.first);
    if (s.per_worker) {
      run_tasks(workers, heads, [&](int64_t index, int worker) {
        plan_head(s, index, worker);
        const Head head = head_of(s, index, worker);
        const Scratch& scratch = s.scratch[worker];
        for (int64_t i = 0; i < key_blocks; ++i) pack_keys(s, head, i, scratch.rows);
        for (int64_t g = 0; g < s.group; ++g) {
          for (int64_t i = 0; i < query_blocks; ++i) attend(s, head, g, i, scratch);
        }
      });
      continue;
    }
    if (!s.one_plan) run_tasks(workers, heads, [&](int64_t index, int) { plan_head(s, index, 0); });
    run_tasks(workers, heads * key_blocks, [&](int64_t task, int worker) {
      pack_keys(s, head_of(s, task / key_blocks, 0), task % key_blocks, s.scratch[worker].rows);
    });
    run_tasks(workers, heads * s.group * query_blocks, [&](int64_t task, int worker) {
      const int64_t q_head = task / query_blocks;
      // Causal: the last block of a head is its longest task.
      const int64_t block = query_blocks - 1 - task % query_blocks;
      attend(s, head_of(s, q_head / s.group, 0), q_head % s.group, block, s.scratch[worker]);
    });
  }
}

void attention_backward(const AttentionCall& call, void* workspace, const Workers& workers) {
  State s = make_state(call, true, workers.count, workspace);
  prepare(s, workers);
  const int64_t total = call.batch * call.kv_heads;
  const int64_t key_blocks = s.padded_keys / kKeyRows;
  for (int64_t c = 0; c < s.dp; ++c) s.dq_scale_sum[c] = s.dk_scale_sum[c] = 0.0;
  for (; s.first < total; s.first += s.wave) {
    const int64_t heads = smaller(s.wave, total - s.first);
    const int64_t query_tasks = heads * s.group * s.query_blocks;
    if (s.per_worker) {
      run_tasks(workers, heads, [&](int64_t index, int worker) {
        plan_head(s, index, worker);
        const Head head = head_of(s, index, worker);
        const Scratch& scratch = s.scratch[worker];
        for (int64_t i = 0; i < key_blocks; ++i) pack_keys(s, head, i, scratch.rows);
        for (int64_t i = 0; i < s.group * s.query_blocks; ++i) {
          pack_queries(s, head, i / s.query_blocks, i % s.query_blocks, scratch.rows);
        }
        for (int64_t i = 0; i < s.chunks; ++i) chunk_backward(s, head, i, scratch);
        for (int64_t i = 0; i < s.group * s.query_blocks; ++i) {
          finish_queries(s, head, i / s.query_blocks, i % s.query_blocks, scratch.rows);
        }
      });
    } else {
      if (!s.one_plan) run_tasks(workers, heads, [&](int64_t index, int) { plan_head(s, index, 0); });
      run_tasks(workers, heads * key_blocks, [&](int64_t task, int worker) {
        pack_keys(s, head_of(s, task / key_blocks, 0), task % key_blocks, s.scratch[worker].rows);
      });
      const auto each_query_block = [&](auto f) {
        run_tasks(workers, query_tasks, [&](int64_t task, int worker) {
          const int64_t q_head = task / s.query_blocks;
          f(s, head_of(s, q_head / s.group, 0), q_head % s.group, task % s.query_blocks,
            s.scratch[worker].rows);
        });
      };
      each_query_block(pack_queries);
      run_tasks(workers, heads * s.chunks, [&](int64_t task, int worker) {
        chunk_backward(s, head_of(s, task / s.chunks, 0), task % s.chunks, s.scratch[worker]);
      });
      each_query_block(finish_queries);
    }
    if (call.table != nullptr) {
      run_tasks(workers, call.heads, [&](int64_t h, int) {
        reduce_table(s, h, heads);
        if (s.first + heads == total) store_table(s, h);
      });
    }
    add_rows(s.dq_scale, query_tasks, s.dp, s.dq_scale_sum);
    add_rows(s.dk_scale, heads * s.chunks, s.dp, s.dk_scale_sum);
  }
  if (call.q_scale == nullptr) return;
  for (int64_t c = 0; c < call.head_dim; ++c) {
    call.dq_scale[c] = static_cast<float>(s.dq_scale_sum[c]);
    call.dk_scale[c] = static_cast<float>(s.dk_scale_sum[c]);
  }
}

}  // namespace musiclm_fast::MUSICLM_FAST_SIMD_NS
