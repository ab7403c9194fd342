// The CPU kernels. A frame is a lane, so the transform's arithmetic needs no shuffles; frames,
// spectra and power live in a scratch of a few hundred kilobytes at most, per thread.
#pragma once

#include <cstdint>

#include "common/cpu.h"
#include "spectrogram/spectrogram.h"

namespace musiclm_fast {

// Bytes of scratch, aligned to 64, that one thread needs; a backward call also holds a segment.
MUSICLM_FAST_DECLARE_SIMD(int64_t spectrogram_scratch(const spectrogram::Call& call,
                                                      int64_t segment))

// Frames [begin, end) of a clip into out (clips, out_bands, out_frames).
MUSICLM_FAST_DECLARE_SIMD(void spectrogram_forward(const spectrogram::Call& call, int64_t clip,
                                                   int64_t begin, int64_t end, void* scratch,
                                                   float* out))

// Gradient of positions [begin, end) of a clip (relative to its first sample): those inside the
// clip into grad_wav (samples), the others into margins (2 * framing.margin()), from
// grad (clips, out_bands, out_frames).
MUSICLM_FAST_DECLARE_SIMD(void spectrogram_backward(const spectrogram::Call& call,
                                                    const float* grad, int64_t clip,
                                                    int64_t begin, int64_t end, void* scratch,
                                                    float* grad_wav, float* margins))

}  // namespace musiclm_fast
