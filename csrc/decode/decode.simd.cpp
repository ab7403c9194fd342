// One token per row through all layers, at one SIMD level. Every weight is read once, in the order
// in which it lies in memory, for all rows. Names of shapes: B rows, H heads, D dim_head, n keys,
// s streams, W lanes; a row's vectors are padded with zeros to a multiple of 16.
#include <cmath>
#include <cstring>
#include <type_traits>

#include "common/arena.h"
#include "common/simd.h"
#include "decode/decode.h"

namespace musiclm_fast::MUSICLM_FAST_SIMD_NS {
namespace {

constexpr int64_t kPanel = kDecodePanel;
constexpr int kVectors = kPanel / kWidth;
// Rows whose sums over a panel fit into the registers.
#if defined(__AVX512F__)
constexpr int kTileRows = 16;
#elif defined(__AVX2__)
constexpr int kTileRows = 6;
#else
constexpr int kTileRows = 3;
#endif
// A sum over more inputs than this is made of partial sums: its rounding error stays small.
constexpr int64_t kDepth = 64;
// A step reads weights as fast as memory gives them; this far ahead they are asked for, in floats.
constexpr int64_t kAhead = 1024;
constexpr float kNormEps = 1e-5f;  // torch.nn.functional.layer_norm's
// Fewer multiply-adds than this take less time than waking another thread.
constexpr int64_t kWorthThreads = 1 << 16;

MUSICLM_FAST_INLINE int64_t padded(int64_t n) { return round_up(n, kPanel); }

template <typename F>
void run(const Workers& workers, int64_t tasks, int64_t work, const F& f) {
  if (workers.count == 1 || tasks == 1 || work < kWorthThreads) {
    for (int64_t i = 0; i < tasks; ++i) f(i, 0);
    return;
  }
  run_tasks(workers, tasks, f);
}

struct Scratch {
  float* sim;     // (H, n)
  float* hidden;  // (n): -inf where a key is hidden
  float* keys;    // (D padded, W): W keys, transposed
};

// The parts of the workspace.
struct State {
  const DecodeCall* call;
  int64_t dim, q_dim, kv_dim, wide, hidden, keys;  // padded widths
  float* streams;  // (B, s, dim)
  float* mixed;    // (B, s, dim)
  float* weight;   // (B, s, s + 2)
  float* beta;     // (B, s)
  float* input;    // (B, dim): a branch's
  float* normed;   // (B, dim or hidden)
  float* turned;   // rows of a product's input, transposed in tiles
  float* kv;       // (B, 2D)
  float* first;    // (B, D): values of the first layer
  float* q;        // (B, H D)
  float* attended;  // (B, H D)
  float* gated;    // (B, 2 hidden)
  float* branch;   // (B, dim): a branch's output
  float* bias;     // (H, n): shared by layers and rows
  Scratch* scratch;
  int64_t bytes;
};

State make_state(const DecodeCall& call, int workers, void* workspace) {
  const DecodeSizes& z = call.sizes;
  State s{};
  s.call = &call;
  s.dim = padded(z.dim);
  s.q_dim = padded(z.heads * z.dim_head);
  s.kv_dim = padded(2 * z.dim_head);
  s.hidden = padded(z.hidden);
  s.wide = padded(2 * z.hidden);
  const int64_t own = z.nulls + call.length + 1;
  // A segment that begins anywhere is written in whole vectors.
  s.keys = padded(own > call.contexts ? own : call.contexts) + kPanel;
  const int64_t widest = s.hidden > s.dim ? s.hidden : s.dim;
  const int64_t deepest = widest > s.q_dim ? widest : s.q_dim;
  Arena arena{static_cast<char*>(workspace)};
  const int64_t rows = call.rows;
  s.streams = arena.take<float>(rows * z.streams * s.dim);
  s.mixed = arena.take<float>(rows * z.streams * s.dim);
  s.weight = arena.take<float>(rows * padded(z.streams * (z.streams + 2)));
  s.beta = arena.take<float>(rows * z.streams);
  s.input = arena.take<float>(rows * s.dim);
  s.normed = arena.take<float>(rows * widest);
  s.turned = arena.take<float>(rows * deepest);
  s.kv = arena.take<float>(rows * s.kv_dim);
  s.first = arena.take<float>(rows * z.dim_head);
  s.q = arena.take<float>(rows * s.q_dim);
  s.attended = arena.take<float>(rows * s.q_dim);
  s.gated = arena.take<float>(rows * s.wide);
  s.branch = arena.take<float>(rows * s.dim);
  s.bias = arena.take<float>(z.heads * s.keys);
  s.scratch = arena.take<Scratch>(workers);
  for (int i = 0; i < workers; ++i) {
    const Scratch scratch{arena.take<float>(z.heads * s.keys), arena.take<float>(s.keys),
                          arena.take<float>(padded(z.dim_head) * kWidth)};
    if (workspace != nullptr) s.scratch[i] = scratch;
  }
  s.bytes = arena.used;
  return s;
}

// ---- products of few rows -----------------------------------------------------------------------

// out (kRows, 16) = x (kRows, inputs) times a panel; x comes as (inputs, kRows). Each output sums in
// one order, whatever the number of rows: a row's result does not depend on its company.
template <int kRows>
void panel_rows(const float* panel, int64_t inputs, const float* x, float* out, int64_t stride) {
  for (int64_t begin = 0; begin < inputs; begin += kDepth) {
    const int64_t end = smaller(inputs, begin + kDepth);
    vfloat sum[kRows][kVectors] = {};
    for (int64_t k = begin; k < end; ++k) {
      const float* weights = panel + k * kPanel;
      __builtin_prefetch(weights + kAhead);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const vfloat left = vset(x[k * kRows + r]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sum[r][v] += left * vload(weights + v * kWidth);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        float* to = out + r * stride + v * kWidth;
        vstore(to, begin == 0 ? sum[r][v] : vload(to) + sum[r][v]);
      }
    }
  }
}

using PanelRows = void (*)(const float*, int64_t, const float*, float*, int64_t);
constexpr PanelRows kPanelRows[] = {
    nullptr,        panel_rows<1>,  panel_rows<2>,  panel_rows<3>,
#if defined(__AVX2__)
    panel_rows<4>,  panel_rows<5>,  panel_rows<6>,
#endif
#if defined(__AVX512F__)
    panel_rows<7>,  panel_rows<8>,  panel_rows<9>,  panel_rows<10>, panel_rows<11>,
    panel_rows<12>, panel_rows<13>, panel_rows<14>, panel_rows<15>, panel_rows<16>,
#endif
};

// out (B, outputs) = x (B, inputs) times the packed matrix.
void multiply(const State& s, const Workers& workers, const float* packed, int64_t inputs,
              int64_t outputs, const float* x, int64_t x_stride, float* out, int64_t stride) {
  const int64_t rows = s.call->rows;
  for (int64_t first = 0; first < rows; first += kTileRows) {
    const int64_t count = smaller<int64_t>(kTileRows, rows - first);
    float* turned = s.turned + first * inputs;
    for (int64_t r = 0; r < count; ++r) {
      const float* row = x + (first + r) * x_stride;
      for (int64_t k = 0; k < inputs; ++k) turned[k * count + r] = row[k];
    }
  }
  // Neighbouring panels for each worker: it reads one stretch of memory.
  const int64_t panels = padded(outputs) / kPanel;
  const int64_t parts = smaller<int64_t>(workers.count, panels);
  run(workers, parts, outputs * inputs, [&](int64_t part, int) {
    for (int64_t p = part * panels / parts; p < (part + 1) * panels / parts; ++p) {
      for (int64_t first = 0; first < rows; first += kTileRows) {
        kPanelRows[smaller<int64_t>(kTileRows, rows - first)](packed + p * kPanel * inputs, inputs,
                                                     s.turned + first * inputs,
                                                     out + first * stride + p * kPanel, stride);
      }
    }
  });
}

// ---- vectors of a row ---------------------------------------------------------------------------

float dot(const float* a, const float* b, int64_t n) {  // n padded
  vfloat sum[2] = {};
  int64_t c = 0;
  for (; c + 2 * kWidth <= n; c += 2 * kWidth) {
    sum[0] += vload(a + c) * vload(b + c);
    sum[1] += vload(a + c + kWidth) * vload(b + c + kWidth);
  }
  for (; c < n; c += kWidth) sum[0] += vload(a + c) * vload(b + c);
  return vsum(sum[0] + sum[1]);
}

// The layer norm of n values; `norm` is gamma and beta, padded.
void layer_norm(const float* x, int64_t n, const float* norm, float* out) {
  const int64_t width = padded(n);
  vfloat sum = vzero();
  for (int64_t c = 0; c < n; c += kWidth) sum += vload_up_to(x + c, n - c);
  const float mean = vsum(sum) / static_cast<float>(n);
  vfloat squares = vzero();
  for (int64_t c = 0; c < n; c += kWidth) {
    vfloat d = vload_up_to(x + c, n - c) - mean;
    if (n - c < kWidth) d = vfirst(static_cast<int32_t>(n - c)) ? d : vzero();
    squares += d * d;
  }
  const float rstd = 1.0f / std::sqrt(vsum(squares) / static_cast<float>(n) + kNormEps);
  for (int64_t c = 0; c < width; c += kWidth) {
    const vfloat y = c < n ? (vload_up_to(x + c, n - c) - mean) * rstd : vzero();
    vstore(out + c, y * vload(norm + c) + vload(norm + width + c));
  }
}

// out = value * gelu(gate), the two halves of x; padded with zeros.
void gate(const float* x, int64_t hidden, float* out) {
  for (int64_t c = 0; c < padded(hidden); c += kWidth) {
    if (c >= hidden) {
      vstore(out + c, vzero());
      continue;
    }
    const vfloat value = vload_up_to(x + c, hidden - c);
    const vfloat g = vload_up_to(x + hidden + c, hidden - c);
    vstore(out + c, value * (g * vnormal(g)));
  }
}

// ---- residual streams ---------------------------------------------------------------------------

// input = the branch's input, mixed and beta = what its output is added to, and how.
void mix_row(const State& s, const float* layer, const DecodeMix& mix, int64_t row) {
  const int64_t count = s.call->sizes.streams, dim = s.dim, columns = count + 2;
  const float* x = s.streams + row * count * dim;
  float* mixed = s.mixed + row * count * dim;
  float* input = s.input + row * dim;
  if (count == 1) {
    std::memcpy(input, x, static_cast<size_t>(dim) * sizeof(float));
    std::memcpy(mixed, x, static_cast<size_t>(dim) * sizeof(float));
    s.beta[row] = 1.0f;
    return;
  }
  // weight[t, j] = tanh(<x_t, w_j> / |x_t|) scale_j + offset[t, j]
  float* weight = s.weight + row * padded(count * columns);
  for (int64_t t = 0; t < count; ++t) {
    const float norm = std::sqrt(dot(x + t * dim, x + t * dim, dim));
    const float inverse = 1.0f / (norm > 1e-12f ? norm : 1e-12f);
    for (int64_t j = 0; j < columns; ++j) {
      weight[t * columns + j] = dot(x + t * dim, layer + mix.weights + j * dim, dim) * inverse;
    }
  }
  for (int64_t i = 0; i < count * columns; i += kWidth) {
    vstore(weight + i, vtanh(vload_up_to(weight + i, count * columns - i)));
  }
  for (int64_t t = 0; t < count; ++t) {
    for (int64_t j = 0; j < columns; ++j) {
      float& w = weight[t * columns + j];
      w = w * layer[mix.scales + j] + layer[mix.offsets + t * columns + j];
    }
    s.beta[row * count + t] = weight[t * columns + columns - 1];
  }
  for (int64_t c = 0; c < dim; c += kWidth) {
    for (int64_t j = 0; j <= count; ++j) {
      vfloat sum = vzero();
      for (int64_t t = 0; t < count; ++t) sum += weight[t * columns + j] * vload(x + t * dim + c);
      vstore((j == 0 ? input : mixed + (j - 1) * dim) + c, sum);
    }
  }
}

// streams = mixed + beta * the branch's output
void add_branch(const State& s, int64_t row) {
  const int64_t count = s.call->sizes.streams, dim = s.dim;
  const float* branch = s.branch + row * dim;
  for (int64_t t = 0; t < count; ++t) {
    const float beta = s.beta[row * count + t];
    const float* mixed = s.mixed + (row * count + t) * dim;
    float* out = s.streams + (row * count + t) * dim;
    for (int64_t c = 0; c < dim; c += kWidth) {
      vstore(out + c, vload(mixed + c) + beta * vload(branch + c));
    }
  }
}

// ---- attention ----------------------------------------------------------------------------------

// Keys and values of a row that lie together, (count, D) each.
struct Segment {
  const float* keys;
  const float* values;
  int64_t count;
};

template <int kCount>
using Count = std::integral_constant<int, kCount>;

// f(first, count) for groups of heads that read a key, or a value, together.
template <typename F>
MUSICLM_FAST_INLINE void head_groups(int64_t heads, const F& f) {
  int64_t h = 0;
#if defined(__AVX512F__)
  for (; h + 8 <= heads; h += 8) f(h, Count<8>{});
#endif
  for (; h + 4 <= heads; h += 4) f(h, Count<4>{});
  for (; h < heads; ++h) f(h, Count<1>{});
}

// sim[h, j] = <q_h, k_j> for W keys
template <int kCount>
MUSICLM_FAST_INLINE void similarities(const float* q, int64_t d, const float* keys, float* sim,
                                      int64_t stride) {
  vfloat even[kCount] = {}, odd[kCount] = {};  // shorter sums round less
  int64_t c = 0;
  for (; c + 2 <= d; c += 2) {
    const vfloat first = vload(keys + c * kWidth), second = vload(keys + (c + 1) * kWidth);
#pragma GCC unroll 8
    for (int h = 0; h < kCount; ++h) {
      even[h] += vset(q[h * d + c]) * first;
      odd[h] += vset(q[h * d + c + 1]) * second;
    }
  }
  if (c < d) {
    const vfloat last = vload(keys + c * kWidth);
#pragma GCC unroll 8
    for (int h = 0; h < kCount; ++h) even[h] += vset(q[h * d + c]) * last;
  }
#pragma GCC unroll 8
  for (int h = 0; h < kCount; ++h) vstore(sim + h * stride, even[h] + odd[h]);
}

// sim (H, stride) of a segment's keys; written in whole vectors.
void segment_similarities(const State& s, const Segment& segment, const float* q, float* sim,
                          float* turned) {
  const int64_t d = s.call->sizes.dim_head, heads = s.call->sizes.heads;
  for (int64_t j = 0; j < segment.count; j += kWidth) {
    const int64_t lanes = smaller<int64_t>(kWidth, segment.count - j);
    const float* keys = segment.keys + j * d;
    // A page holds one such block at D = 64: nobody else asks for the next one.
    for (int64_t c = 0; c < kWidth * d; c += kPanel) __builtin_prefetch(keys + kWidth * d + c);
    for (int64_t c = 0; c < d; c += kWidth) {
      vfloat x[kWidth];
      for (int i = 0; i < kWidth; ++i) {
        x[i] = i < lanes ? vload_up_to(keys + i * d + c, d - c) : vzero();
      }
      transpose(x);
      for (int i = 0; i < kWidth; ++i) vstore(turned + (c + i) * kWidth, x[i]);
    }
    head_groups(heads, [&](int64_t h, auto count) {
      similarities<count>(q + h * d, d, turned, sim + h * s.keys + j, s.keys);
    });
  }
}

// out (kCount, D) += p (kCount, count) times a segment's values
template <int kCount>
MUSICLM_FAST_INLINE void add_values(const Segment& segment, int64_t d, const float* p,
                                    int64_t stride, float* out) {
  int64_t c = 0;
  for (; c + 2 * kWidth <= d; c += 2 * kWidth) {
    vfloat sum[kCount][2];
#pragma GCC unroll 8
    for (int h = 0; h < kCount; ++h) {
      sum[h][0] = vload(out + h * d + c);
      sum[h][1] = vload(out + h * d + c + kWidth);
    }
    for (int64_t j = 0; j < segment.count; ++j) {
      __builtin_prefetch(segment.values + j * d + c + kAhead);
      __builtin_prefetch(segment.values + j * d + c + kAhead + kPanel);
      const vfloat low = vload(segment.values + j * d + c);
      const vfloat high = vload(segment.values + j * d + c + kWidth);
#pragma GCC unroll 8
      for (int h = 0; h < kCount; ++h) {
        const vfloat weight = vset(p[h * stride + j]);
        sum[h][0] += weight * low;
        sum[h][1] += weight * high;
      }
    }
#pragma GCC unroll 8
    for (int h = 0; h < kCount; ++h) {
      vstore(out + h * d + c, sum[h][0]);
      vstore(out + h * d + c + kWidth, sum[h][1]);
    }
  }
  for (; c < d; c += kWidth) {
    const int lanes = static_cast<int>(smaller<int64_t>(kWidth, d - c));
    for (int h = 0; h < kCount; ++h) {
      vfloat sum = vload_partial(out + h * d + c, lanes);
      for (int64_t j = 0; j < segment.count; ++j) {
        sum += p[h * stride + j] * vload_partial(segment.values + j * d + c, lanes);
      }
      vstore_partial(out + h * d + c, sum, lanes);
    }
  }
}

// The softmax of n similarities, in place; zeros where no key is seen. Lanes beyond n become 0.
void softmax(float* sim, int64_t n, float scale, const float* bias, const float* hidden) {
  vfloat highest = vset(-kInfinity);
  for (int64_t j = 0; j < n; j += kWidth) {
    vfloat x = vload(sim + j) * scale;
    if (bias != nullptr) x += vload(bias + j);
    if (hidden != nullptr) x += vload(hidden + j);
    if (n - j < kWidth) x = vfirst(static_cast<int32_t>(n - j)) ? x : vset(-kInfinity);
    vstore(sim + j, x);
    highest = vmax(highest, x);
  }
  const float top = vmaximum(highest);
  if (top == -kInfinity) {
    std::memset(sim, 0, static_cast<size_t>(n) * sizeof(float));
    return;
  }
  vfloat sum = vzero();
  for (int64_t j = 0; j < n; j += kWidth) {
    const vfloat p = vexp(vload(sim + j) - top);
    vstore(sim + j, p);
    sum += p;
  }
  const float inverse = 1.0f / vsum(sum);
  for (int64_t j = 0; j < n; j += kWidth) vstore(sim + j, vload(sim + j) * inverse);
}

// attended (B, H D) of a row.
void attend_row(const State& s, int64_t row, const Segment* segments, int count, const float* bias,
                const bool* seen, const Scratch& scratch) {
  const int64_t d = s.call->sizes.dim_head, heads = s.call->sizes.heads;
  const float* q = s.q + row * s.q_dim;
  float* out = s.attended + row * s.q_dim;
  int64_t n = 0;
  for (int i = 0; i < count; ++i) {  // a segment's last vector may run over the next one's begin
    segment_similarities(s, segments[i], q, scratch.sim + n, scratch.keys);
    n += segments[i].count;
  }
  if (seen != nullptr) {
    for (int64_t j = 0; j < padded(n); ++j) scratch.hidden[j] = j >= n || seen[j] ? 0.0f : -kInfinity;
  }
  const float scale = 1.0f / std::sqrt(static_cast<float>(d));
  for (int64_t h = 0; h < heads; ++h) {
    softmax(scratch.sim + h * s.keys, n, scale, bias == nullptr ? nullptr : bias + h * s.keys,
            seen == nullptr ? nullptr : scratch.hidden);
  }
  std::memset(out, 0, static_cast<size_t>(heads * d) * sizeof(float));
  int64_t begin = 0;
  for (int i = 0; i < count; ++i) {
    head_groups(heads, [&](int64_t h, auto count) {
      add_values<count>(segments[i], d, scratch.sim + h * s.keys + begin, s.keys, out + h * d);
    });
    begin += segments[i].count;
  }
}

// bias[h, j] = table[h, R + clamp(q_code - k_code[j])]
void fill_bias(const State& s) {
  const DecodeCall& call = *s.call;
  const int64_t n = call.sizes.nulls + call.length + 1, columns = 2 * call.radius + 1;
  for (int64_t j = 0; j < n; ++j) {
    int64_t offset = int64_t{call.q_code} - call.k_codes[j];
    offset = offset < -call.radius ? -call.radius : smaller(offset, call.radius);
    const float* entry = call.table + offset + call.radius;
    for (int64_t h = 0; h < call.sizes.heads; ++h) s.bias[h * s.keys + j] = entry[h * columns];
  }
  for (int64_t h = 0; h < call.sizes.heads; ++h) {
    for (int64_t j = n; j < s.keys; ++j) s.bias[h * s.keys + j] = 0.0f;
  }
}

// ---- branches -----------------------------------------------------------------------------------

template <typename F>
void each_row(const State& s, const Workers& workers, const F& f) {
  run(workers, s.call->rows, s.call->rows * s.dim * s.call->sizes.streams,
      [&](int64_t row, int) { f(row); });
}

void own_attention(const State& s, const Workers& workers, int64_t index, const float* layer) {
  const DecodeCall& call = *s.call;
  const DecodeSizes& z = call.sizes;
  const DecodeLayout& at = call.layout;
  const int64_t rows = call.rows, d = z.dim_head;
  const float* source = s.input;
  if (z.norm_context) {
    each_row(s, workers, [&](int64_t row) {
      layer_norm(s.input + row * s.dim, z.dim, layer + at.context_norm, s.normed + row * s.dim);
    });
    source = s.normed;
  }
  multiply(s, workers, layer + at.to_kv, z.dim, 2 * d, source, s.dim, s.kv, s.kv_dim);
  float* keys = call.keys_values + index * 2 * rows * call.capacity * d;
  float* values = keys + rows * call.capacity * d;
  for (int64_t row = 0; row < rows; ++row) {
    const float* kv = s.kv + row * s.kv_dim;
    float* k = keys + (row * call.capacity + call.length) * d;
    float* v = values + (row * call.capacity + call.length) * d;
    float* first = s.first + row * d;
    for (int64_t c = 0; c < d; ++c) {
      k[c] = kv[c];
      v[c] = z.value_residual && index > 0 ? 0.5f * (kv[d + c] + first[c]) : kv[d + c];
      if (index == 0) first[c] = kv[d + c];
    }
  }
  each_row(s, workers, [&](int64_t row) {
    layer_norm(s.input + row * s.dim, z.dim, layer + at.own_norm, s.normed + row * s.dim);
  });
  multiply(s, workers, layer + at.own_to_q, z.dim, z.heads * d, s.normed, s.dim, s.q, s.q_dim);
  const int64_t n = z.nulls + call.length + 1;
  run(workers, rows, rows * n * d * z.heads, [&](int64_t row, int worker) {
    const Segment segments[] = {
        {layer + at.null_kv, layer + at.null_kv + z.nulls * d, z.nulls},
        {keys + row * call.capacity * d, values + row * call.capacity * d, call.length + 1},
    };
    attend_row(s, row, segments, 2, call.table == nullptr ? nullptr : s.bias,
               call.key_mask == nullptr ? nullptr : call.key_mask + row * n, s.scratch[worker]);
  });
  multiply(s, workers, layer + at.own_to_out, z.heads * d, z.dim, s.attended, s.q_dim, s.branch,
           s.dim);
}

void cross_attention(const State& s, const Workers& workers, int64_t index, const float* layer) {
  const DecodeCall& call = *s.call;
  const DecodeSizes& z = call.sizes;
  const DecodeLayout& at = call.layout;
  const int64_t rows = call.rows, d = z.dim_head, n = call.contexts;
  each_row(s, workers, [&](int64_t row) {
    layer_norm(s.input + row * s.dim, z.dim, layer + at.cross_norm, s.normed + row * s.dim);
  });
  multiply(s, workers, layer + at.cross_to_q, z.dim, z.heads * d, s.normed, s.dim, s.q, s.q_dim);
  const float* keys = call.context + index * 2 * rows * n * d;
  const float* values = keys + rows * n * d;
  run(workers, rows, rows * n * d * z.heads, [&](int64_t row, int worker) {
    const Segment segment{keys + row * n * d, values + row * n * d, n};
    attend_row(s, row, &segment, 1, nullptr,
               call.context_mask == nullptr ? nullptr : call.context_mask + row * n,
               s.scratch[worker]);
  });
  multiply(s, workers, layer + at.cross_to_out, z.heads * d, z.dim, s.attended, s.q_dim, s.branch,
           s.dim);
}

void feed_forward(const State& s, const Workers& workers, const float* layer) {
  const DecodeSizes& z = s.call->sizes;
  const DecodeLayout& at = s.call->layout;
  each_row(s, workers, [&](int64_t row) {
    layer_norm(s.input + row * s.dim, z.dim, layer + at.ff_norm, s.normed + row * s.dim);
  });
  multiply(s, workers, layer + at.widen, z.dim, 2 * z.hidden, s.normed, s.dim, s.gated, s.wide);
  each_row(s, workers, [&](int64_t row) {
    float* hidden = s.normed + row * s.hidden;
    gate(s.gated + row * s.wide, z.hidden, hidden);
    layer_norm(hidden, z.hidden, layer + at.inner_norm, hidden);
  });
  multiply(s, workers, layer + at.narrow, z.hidden, z.dim, s.normed, s.hidden, s.branch, s.dim);
}

}  // namespace

void decode_pack_matrix(const float* weight, int64_t outputs, int64_t inputs, float* packed) {
  for (int64_t n = 0; n < outputs; n += kWidth) {
    float* panel = packed + n / kPanel * kPanel * inputs + n % kPanel;
    const int64_t rows = smaller<int64_t>(kWidth, outputs - n);
    for (int64_t k = 0; k < inputs; k += kWidth) {
      vfloat x[kWidth];
      for (int i = 0; i < kWidth; ++i) {
        x[i] = i < rows ? vload_up_to(weight + (n + i) * inputs + k, inputs - k) : vzero();
      }
      transpose(x);
      const int64_t columns = smaller<int64_t>(kWidth, inputs - k);
      for (int64_t i = 0; i < columns; ++i) vstore(panel + (k + i) * kPanel, x[i]);
    }
  }
}

int64_t decode_workspace(const DecodeCall& call, int workers) {
  return make_state(call, workers, nullptr).bytes;
}

void decode_step(const DecodeCall& call, void* workspace, const Workers& workers) {
  const State s = make_state(call, workers.count, workspace);
  const DecodeSizes& z = call.sizes;
  for (int64_t row = 0; row < call.rows * z.streams; ++row) {
    float* stream = s.streams + row * s.dim;
    std::memset(stream, 0, static_cast<size_t>(s.dim) * sizeof(float));
    std::memcpy(stream, call.x + row / z.streams * z.dim, static_cast<size_t>(z.dim) * sizeof(float));
  }
  if (call.table != nullptr) fill_bias(s);
  for (int64_t index = 0; index < z.depth; ++index) {
    const float* layer = call.packed + index * call.layout.layer;
    const auto connect = [&](const DecodeMix& mix, auto branch) {
      each_row(s, workers, [&](int64_t row) { mix_row(s, layer, mix, row); });
      branch();
      each_row(s, workers, [&](int64_t row) { add_branch(s, row); });
    };
    connect(call.layout.own_mix, [&] { own_attention(s, workers, index, layer); });
    if (z.cross) {
      connect(call.layout.cross_mix, [&] { cross_attention(s, workers, index, layer); });
    }
    connect(call.layout.ff_mix, [&] { feed_forward(s, workers, layer); });
  }
  for (int64_t row = 0; row < call.rows; ++row) {
    float* sum = s.streams + row * z.streams * s.dim;
    for (int64_t t = 1; t < z.streams; ++t) {
      for (int64_t c = 0; c < s.dim; c += kWidth) {
        vstore(sum + c, vload(sum + c) + vload(sum + t * s.dim + c));
      }
    }
    layer_norm(sum, z.dim, call.packed + call.layout.norm, s.input + row * s.dim);
    std::memcpy(call.out + row * z.dim, s.input + row * s.dim,
                static_cast<size_t>(z.dim) * sizeof(float));
  }
}

}  // namespace musiclm_fast::MUSICLM_FAST_SIMD_NS
