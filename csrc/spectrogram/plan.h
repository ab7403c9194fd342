// Tables of a transform, made once per (n_fft, win_length) and kept. Torch-free.
#pragma once

#include <cstdint>
#include <vector>

#include "spectrogram/spectrogram.h"

namespace musiclm_fast::spectrogram {

struct Plan {
  Transform transform;
  std::vector<float> numbers;
  std::vector<int32_t> order;
};

// Whether there is a transform for these sizes: few taps, or n_fft with small prime factors.
bool plannable(int64_t n_fft, int64_t taps);

// The plan for these sizes, which must be plannable; it lives as long as the process.
const Plan& plan_for(int64_t n_fft, int64_t taps);

}  // namespace musiclm_fast::spectrogram
