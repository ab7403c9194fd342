// Hands out the parts of a workspace. For *.simd.cpp only. Torch-free.
#pragma once

#include "common/integers.h"
#include "common/simd.h"

namespace musiclm_fast::MUSICLM_FAST_SIMD_NS {

// Pieces of one allocation, each on a cache line; with a null base it only counts.
struct Arena {
  char* base;
  int64_t used = 0;

  template <typename T>
  T* take(int64_t count) {
    T* piece = base == nullptr ? nullptr : reinterpret_cast<T*>(base + used);
    used += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return piece;
  }
};

}  // namespace musiclm_fast::MUSICLM_FAST_SIMD_NS
