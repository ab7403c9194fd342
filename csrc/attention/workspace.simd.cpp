#include "attention/workspace.h"

#include "attention/tile.h"
#include "common/arena.h"
#include "common/integers.h"

namespace musiclm_fast::MUSICLM_FAST_SIMD_NS {
namespace attention {
namespace {

constexpr int64_t kUnits = 16;  // wanted backward tasks, whatever the threads
constexpr int64_t kBudget = int64_t{24} << 20;  // bytes of packed heads; as much for parts of sums

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

}  // namespace

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

}  // namespace attention

int64_t attention_workspace(const AttentionCall& call, bool backward, int workers) {
  return attention::make_state(call, backward, workers, nullptr).bytes;
}

}  // namespace musiclm_fast::MUSICLM_FAST_SIMD_NS
