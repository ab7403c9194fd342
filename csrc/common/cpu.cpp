#include "common/cpu.h"

#include <cstdlib>
#include <cstring>

namespace musiclm_fast {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};

SimdLevel best_level() {
#ifdef MUSICLM_FAST_HAVE_AVX512
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    return avx512 ? SimdLevel::avx512 : SimdLevel::avx2;
  }
#endif
  return SimdLevel::baseline;
}

// The environment can lower the level, never raise it above what the processor has; the Python
// loader refuses a value that is not the level in use.
SimdLevel first_level() {
  const SimdLevel best = best_level();
  const char* wanted = std::getenv("MUSICLM_FAST_SIMD");
  for (int level = 0; wanted != nullptr && level < static_cast<int>(best); ++level) {
    if (std::strcmp(wanted, kNames[level]) == 0) return static_cast<SimdLevel>(level);
  }
  return best;
}

SimdLevel current = first_level();

}  // namespace

SimdLevel simd_level() { return current; }

bool has_avx512_bf16() {
#ifdef MUSICLM_FAST_HAVE_AVX512
  static const bool supported = __builtin_cpu_supports("avx512bf16");
  return supported && current == SimdLevel::avx512;
#else
  return false;
#endif
}

}  // namespace musiclm_fast

// Read and set by musiclm_fast/_extension.py, which finds them by name.
extern "C" {

__attribute__((visibility("default"))) const char* musiclm_fast_simd_level() {
  return musiclm_fast::kNames[static_cast<int>(musiclm_fast::current)];
}

// 0, or 1 if `name` is no level that this processor and this build have. For tests: not thread-safe.
__attribute__((visibility("default"))) int musiclm_fast_set_simd_level(const char* name) {
  for (int level = 0; level <= static_cast<int>(musiclm_fast::best_level()); ++level) {
    if (std::strcmp(name, musiclm_fast::kNames[level]) == 0) {
      musiclm_fast::current = static_cast<musiclm_fast::SimdLevel>(level);
      return 0;
    }
  }
  return 1;
}

__attribute__((visibility("default"))) int musiclm_fast_has_avx512_bf16() {
  return musiclm_fast::has_avx512_bf16();
}
}
