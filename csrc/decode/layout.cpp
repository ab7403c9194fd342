// Where a layer's packed weights lie. Torch-free.
#include "common/integers.h"
#include "decode/decode.h"

namespace musiclm_fast {

DecodeLayout decode_layout(const DecodeSizes& z) {
  const auto padded = [](int64_t n) { return round_up(n, kDecodePanel); };
  int64_t used = 0;
  const auto take = [&](int64_t count) {
    const int64_t at = used;
    used += padded(count);
    return at;
  };
  const auto mix = [&]() -> DecodeMix {
    if (z.streams == 1) return {};
    const int64_t columns = z.streams + 2;
    return {take(columns * padded(z.dim)), take(columns), take(z.streams * columns)};
  };
  const auto norm = [&](int64_t n) { return take(2 * padded(n)); };
  const auto matrix = [&](int64_t outputs, int64_t inputs) {
    return take(padded(outputs) * inputs);
  };
  const int64_t inner = z.heads * z.dim_head;
  DecodeLayout at{};
  at.own_mix = mix();
  at.context_norm = norm(z.norm_context ? z.dim : 0);
  at.to_kv = matrix(2 * z.dim_head, z.dim);
  at.null_kv = take(2 * z.nulls * z.dim_head);
  at.own_norm = norm(z.dim);
  at.own_to_q = matrix(inner, z.dim);
  at.own_to_out = matrix(z.dim, inner);
  if (z.cross) {
    at.cross_mix = mix();
    at.cross_norm = norm(z.dim);
    at.cross_to_q = matrix(inner, z.dim);
    at.cross_to_out = matrix(z.dim, inner);
  }
  at.ff_mix = mix();
  at.ff_norm = norm(z.dim);
  at.widen = matrix(2 * z.hidden, z.dim);
  at.inner_norm = norm(z.hidden);
  at.narrow = matrix(z.dim, z.hidden);
  at.layer = used;
  at.norm = z.depth * at.layer;
  at.total = at.norm + 2 * padded(z.dim);
  return at;
}

}  // namespace musiclm_fast
