// Which SIMD level the kernels run at: chosen once when the library is loaded, from what was
// compiled and what the processor has; MUSICLM_FAST_SIMD=baseline|avx2|avx512 lowers it. Torch-free.
#pragma once

namespace musiclm_fast {

enum class SimdLevel : int { baseline = 0, avx2 = 1, avx512 = 2 };

// The level in use.
SimdLevel simd_level();

// Whether the processor has AVX512-BF16 (dpbf16ps, cvtneps2bf16) and the level in use is avx512:
// then a function marked __attribute__((target("avx512bf16"))) may be called.
bool has_avx512_bf16();

}  // namespace musiclm_fast

// A kernel in <op>.simd.cpp is declared once, for all levels, in <op>.h:
//   MUSICLM_FAST_DECLARE_SIMD(void row_sums(const float* x, int64_t rows, float* out))
// defined once, inside `namespace musiclm_fast::MUSICLM_FAST_SIMD_NS`, and called through
//   MUSICLM_FAST_SIMD_CALL(row_sums, x, rows, out);
#ifdef MUSICLM_FAST_HAVE_AVX512
#define MUSICLM_FAST_DECLARE_SIMD(...)     \
  namespace simd_baseline { __VA_ARGS__; } \
  namespace simd_avx2 { __VA_ARGS__; }     \
  namespace simd_avx512 { __VA_ARGS__; }
#define MUSICLM_FAST_SIMD_CALL(name, ...)                                \
  (::musiclm_fast::simd_level() == ::musiclm_fast::SimdLevel::avx512     \
       ? ::musiclm_fast::simd_avx512::name(__VA_ARGS__)                  \
   : ::musiclm_fast::simd_level() == ::musiclm_fast::SimdLevel::avx2     \
       ? ::musiclm_fast::simd_avx2::name(__VA_ARGS__)                    \
       : ::musiclm_fast::simd_baseline::name(__VA_ARGS__))
#else
#define MUSICLM_FAST_DECLARE_SIMD(...) \
  namespace simd_baseline { __VA_ARGS__; }
#define MUSICLM_FAST_SIMD_CALL(name, ...) (::musiclm_fast::simd_baseline::name(__VA_ARGS__))
#endif
