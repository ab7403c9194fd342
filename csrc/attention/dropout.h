// Which weights dropout keeps: a hash of the seed, the row and the key's position. For *.simd.cpp
// only.
#pragma once

#include <cstdint>
#include <cstring>

#include "attention/attention.h"
#include "common/simd.h"

namespace musiclm_fast::MUSICLM_FAST_SIMD_NS::attention {

template <typename T>  // uint32_t or vuint
MUSICLM_FAST_INLINE T mix(T x) {
  x ^= x >> 16;
  x *= 0x85EBCA6Bu;
  x ^= x >> 13;
  x *= 0xC2B2AE35u;
  return x ^ (x >> 16);
}

MUSICLM_FAST_INLINE uint32_t row_key_of(const AttentionCall& call, int64_t b, int64_t h,
                                        int64_t i) {
  const uint32_t row = static_cast<uint32_t>((b * call.heads + h) * call.queries + i);
  return mix(mix(row ^ call.seed_low) ^ call.seed_high);
}

// -1 in lanes whose weight stays
MUSICLM_FAST_INLINE vint kept(uint32_t row_key, const uint32_t* columns, uint32_t drop_below) {
  vuint column;
  std::memcpy(&column, columns, sizeof column);
  return mix(column + row_key) >= (vuint{} + drop_below);
}

}  // namespace musiclm_fast::MUSICLM_FAST_SIMD_NS::attention
