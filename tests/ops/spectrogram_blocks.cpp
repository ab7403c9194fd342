// Runs the CUDA blocks of csrc/spectrogram on the CPU, for tests/ops/test_spectrogram.py.
//
// A team of one thread computes what a block computes. A team of 64 threads in two warps, real ones
// with real barriers, must give the same; under the thread sanitizer it shows missing barriers.
#include <algorithm>
#include <barrier>
#include <memory>
#include <thread>
#include <vector>

#include "spectrogram/fft_block.h"
#include "spectrogram/folded_block.h"
#include "spectrogram/plan.h"

using namespace musiclm_fast::spectrogram;

extern "C" struct Case {
  const float *wav, *window, *mel, *grad;
  const int64_t *lengths, *freq_spans, *time_spans;
  const double* rates;
  int64_t clips, samples, n_fft, taps, hop, pad, center, mode, magnitude, bands;
  int64_t rate_step, freq_count, freq_step, time_count, time_step, logarithm;
  int64_t out_bands, out_frames, tile_frames, segment, threads;
  double log_offset, mean, scale, mask_value;
  float* out;
};

namespace {

struct Barriers {
  std::barrier<> block;
  std::vector<std::unique_ptr<std::barrier<>>> warps;
  explicit Barriers(int threads) : block(threads) {
    for (int i = 0; i < threads; i += 32) warps.push_back(std::make_unique<std::barrier<>>(32));
  }
};

// kLanes is 1 for a team of one thread, else 32.
template <int kLanes>
struct HostTeam {
  int thread, threads, lane, warp, warps;
  static constexpr int lanes = kLanes;
  Barriers* barriers;
  HostTeam(int index, int count, Barriers* b)
      : thread(index),
        threads(count),
        lane(index % kLanes),
        warp(index / kLanes),
        warps(count / kLanes),
        barriers(b) {}
  void sync() const {
    if (barriers != nullptr) barriers->block.arrive_and_wait();
  }
  void sync_warp() const {
    if (barriers != nullptr) barriers->warps[warp]->arrive_and_wait();
  }
};

template <class Body>
void run_block(int threads, const Body& body) {
  if (threads == 1) return body(HostTeam<1>(0, 1, nullptr));
  Barriers barriers(threads);
  std::vector<std::thread> team;
  for (int i = 0; i < threads; ++i) {
    team.emplace_back([&, i] { body(HostTeam<32>(i, threads, &barriers)); });
  }
  for (std::thread& member : team) member.join();
}

template <class F>
void with_terms(const Call& c, const F& f) {
  const auto sides = [&](auto terms) {
    if (c.rates == nullptr) {
      f(terms, std::integral_constant<int, 1>{});
    } else {
      f(terms, std::integral_constant<int, 2>{});
    }
  };
  switch (c.transform.terms) {
    case kFoldedTerms[0]: return sides(std::integral_constant<int, kFoldedTerms[0]>{});
    case kFoldedTerms[1]: return sides(std::integral_constant<int, kFoldedTerms[1]>{});
    case kFoldedTerms[2]: return sides(std::integral_constant<int, kFoldedTerms[2]>{});
    case kFoldedTerms[3]: return sides(std::integral_constant<int, kFoldedTerms[3]>{});
    default: return sides(std::integral_constant<int, kFoldedTerms[4]>{});
  }
}

// First and last + 1 with a weight, of the bins of each band or of the bands of each bin.
std::vector<int32_t> weighted(const float* mel, int64_t rows, int64_t row_step, int64_t count,
                              int64_t step) {
  std::vector<int32_t> ranges(2 * rows, 0);
  for (int64_t row = 0; row < rows && mel != nullptr; ++row) {
    for (int64_t i = 0; i < count; ++i) {
      if (mel[row * row_step + i * step] == 0) continue;
      if (ranges[2 * row + 1] == 0) ranges[2 * row] = static_cast<int32_t>(i);
      ranges[2 * row + 1] = static_cast<int32_t>(i + 1);
    }
  }
  return ranges;
}

struct Ranges {
  std::vector<int32_t> of_bands, of_bins;
};

Call make_call(const Case& k, Ranges& ranges) {
  Call c{};
  c.framing = {k.n_fft, k.taps, k.hop, k.pad, k.center ? k.n_fft / 2 : 0, PadMode(k.mode)};
  c.transform = plan_for(k.n_fft, k.taps).transform;
  c.wav = k.wav;
  c.clips = k.clips;
  c.samples = c.clip_stride = k.samples;
  c.sample_stride = 1;
  c.lengths = k.lengths;
  c.window = k.window;
  c.magnitude = k.magnitude;
  c.rates = k.rates;
  c.rate_step = k.rate_step;
  c.mel = k.mel;
  c.mel_bin_stride = k.bands;
  c.mel_band_stride = 1;
  c.bands = static_cast<int>(k.bands);
  const int64_t bins = c.transform.bins;
  ranges.of_bands = weighted(c.mel, k.bands, 1, bins, k.bands);
  ranges.of_bins = weighted(c.mel, bins, k.bands, k.bands, 1);
  c.mel_ranges = ranges.of_bands.data();
  c.mel_bands = ranges.of_bins.data();
  c.logarithm = k.logarithm;
  c.log_offset = static_cast<float>(k.log_offset);
  c.mean = static_cast<float>(k.mean);
  c.scale = static_cast<float>(k.scale);
  c.freq_spans = k.freq_spans;
  c.freq_count = k.freq_count;
  c.freq_step = k.freq_step;
  c.time_spans = k.time_spans;
  c.time_count = k.time_count;
  c.time_step = k.time_step;
  c.mask_value = static_cast<float>(k.mask_value);
  c.out_bands = k.out_bands;
  c.out_frames = k.out_frames;
  return c;
}

// Every block has memory of its own, full of NaN.
std::vector<float> shared_memory(int64_t words) {
  return std::vector<float>(words, __builtin_nanf(""));
}

}  // namespace

extern "C" void forward(const Case* k) {
  Ranges ranges;
  const Call c = make_call(*k, ranges);
  const int threads = static_cast<int>(k->threads), warps = threads == 1 ? 1 : threads / 32;
  const auto each = [&](const auto& layout, int frames, const auto& body) {
    for (int64_t clip = 0; clip < c.clips; ++clip) {
      for (int64_t begin = 0; begin < c.out_frames; begin += frames) {
        auto shared = shared_memory(layout.total);
        run_block(threads, [&](const auto& team) {
          body(team, clip, begin, layout, shared.data(), k->out);
        });
      }
    }
  };
  if (c.transform.folded) {
    const FoldedLayout layout = FoldedLayout::make(c, static_cast<int>(k->tile_frames));
    with_terms(c, [&](auto terms, auto sides) {
      each(layout, layout.tile_frames, [&](auto&&... rest) {
        if constexpr (sides() == 1) {
          if (plain(c)) return forward_folded<terms(), 1, true>(c, rest...);
        }
        forward_folded<terms(), sides(), false>(c, rest...);
      });
    });
    return;
  }
  with_fixed_length(c, [&](auto length, auto sides) {
    if constexpr (length() > 0) {
      each(FixedLayout::make(c, warps, 2), 2 * kFixedFrames, [&](auto&&... rest) {
        forward_fixed<length(), sides()>(c, rest...);
      });
    } else {
      const int tile = static_cast<int>(k->tile_frames);
      each(FftLayout::make(c, tile, warps), tile, [&](auto&&... rest) { forward_fft(c, rest...); });
    }
  });
}

extern "C" void backward(const Case* k) {
  Ranges ranges;
  const Call c = make_call(*k, ranges);
  const int threads = static_cast<int>(k->threads), segment = static_cast<int>(k->segment);
  const int64_t margin = c.framing.margin();
  std::vector<float> margins(c.clips * 2 * margin, 0.0f);
  const auto each = [&](const auto& layout, const auto& body) {
    for (int64_t clip = 0; clip < c.clips; ++clip) {
      for (int64_t begin = -margin; begin < c.samples + margin; begin += segment) {
        auto shared = shared_memory(layout.total);
        run_block(threads, [&](const auto& team) {
          body(team, clip, begin, layout, shared.data(), k->grad, k->out, margins.data());
        });
      }
    }
  };
  if (c.transform.folded) {
    const auto layout = FoldedBackwardLayout::make(c, static_cast<int>(k->tile_frames), segment);
    with_terms(c, [&](auto terms, auto sides) {
      each(layout, [&](auto&&... rest) { backward_folded<terms(), sides()>(c, rest...); });
    });
  } else {
    const auto layout = FftBackwardLayout::make(c, segment, threads == 1 ? 1 : threads / 32);
    with_fixed_length(c, [&](auto length, auto sides) {
      each(layout, [&](auto&&... rest) { backward_fft<length(), sides()>(c, rest...); });
    });
  }
  for (int64_t clip = 0; clip < c.clips; ++clip) {
    run_block(threads, [&](const auto& team) {
      fold_margins(c, team, clip, margins.data(), k->out);
    });
  }
}

#ifdef RACE_CHECK
#include <cmath>
#include <cstdio>

// One thread and 64 threads give the same; to be run under -fsanitize=thread.
int main() {
  constexpr int kClips = 2, kSamples = 700;
  // folded, terms in registers and in memory; a transform of any length; one with odd radices that
  // need a second array; a fixed one
  constexpr int kSizes[][2] = {{128, 24}, {128, 48}, {128, 128}, {154, 100}, {256, 200}};
  std::vector<float> wav(kClips * kSamples), window(200);
  for (size_t i = 0; i < wav.size(); ++i) wav[i] = std::sin(0.37f * i * std::sqrt(1.0f + i));
  for (size_t i = 0; i < window.size(); ++i) window[i] = 0.2f + std::sin(0.02f * i);
  const int64_t lengths[] = {700, 431}, spans[] = {3, 6, 0, 1};
  const double rates[] = {0.8, 1.3};
  int wrong = 0;
  for (const auto& [n_fft, taps] : kSizes) {
    const int bins = n_fft / 2 + 1, bands = bins / 8 + 1;
    std::vector<float> mel(bins * bands, 0.0f);
    for (int bin = 0; bin < bins; ++bin) mel[bin * bands + bin / 8] = 0.5f;
    for (int mode = 0; mode < 4; ++mode) {
      const bool rich = mode % 2 == 0;
      Case k{};
      k.wav = wav.data();
      k.window = window.data();
      k.lengths = lengths;
      k.freq_spans = k.time_spans = spans;
      k.freq_count = k.time_count = 1;
      k.freq_step = k.time_step = 2;
      k.clips = kClips;
      k.samples = kSamples;
      k.n_fft = n_fft;
      k.taps = taps;
      k.hop = 20;
      k.center = 1;
      k.mode = mode;
      k.mel = rich ? mel.data() : nullptr;
      k.bands = k.out_bands = rich ? bands : bins;
      k.rates = rich ? rates : nullptr;
      k.rate_step = 1;
      k.logarithm = rich;
      k.log_offset = 1e-3;
      k.scale = 1.0;
      k.out_frames = kSamples / k.hop + 1;
      k.tile_frames = 32;
      k.segment = 300;
      std::vector<float> result[2], gradient[2];
      for (int many = 0; many < 2; ++many) {
        k.threads = many ? 64 : 1;
        result[many].assign(kClips * k.out_bands * k.out_frames, -1.0f);
        k.out = result[many].data();
        forward(&k);
        gradient[many].assign(wav.size(), -1.0f);
        k.grad = result[0].data();
        k.out = gradient[many].data();
        backward(&k);
      }
      // several warps may add two stretched frames the other way round
      const auto differ = [](const std::vector<float>& a, const std::vector<float>& b) {
        float largest = 0.0f, error = 0.0f;
        for (size_t i = 0; i < a.size(); ++i) {
          if (!(std::abs(a[i] - b[i]) <= 1e30f)) return true;
          largest = std::max(largest, std::abs(a[i]));
          error = std::max(error, std::abs(a[i] - b[i]));
        }
        return largest == 0.0f || error > 1e-6f * largest;
      };
      if (differ(result[0], result[1]) || differ(gradient[0], gradient[1])) {
        std::printf("%d of %d, mode %d: 64 threads differ from one\n", taps, n_fft, mode);
        ++wrong;
      }
    }
  }
  return wrong;
}
#endif
