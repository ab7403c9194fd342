// Checks csrc/spectrogram's CPU kernels against loops in double.
#include "spectrogram/cpu.h"

#include <algorithm>

#include "check.h"
#include "spectrogram/plan.h"

using namespace musiclm_fast;
using namespace musiclm_fast::check;

namespace {

using spectrogram::Call;
using spectrogram::PadMode;

constexpr int64_t kClips = 2;
constexpr double kTwoPi = 6.283185307179586476925286766559;

struct Case {
  std::string name;
  int64_t n_fft, taps, hop, samples;
  bool center = true, magnitude = false;
  int bands = 0;  // of mel filters; 0: none
  bool logarithm = false, stretched = false, shortened = false;
};

// |X| of a frame at every bin; zeros for a frame that the clip does not have.
Doubles magnitudes(const Call& c, const Doubles& wav, int64_t clip, int64_t frame) {
  const int64_t n = c.length(clip), n_fft = c.framing.n_fft;
  Doubles result(n_fft / 2 + 1, 0.0);
  if (frame >= c.framing.frames(n)) return result;
  Doubles cosine, sine;
  for (int64_t i = 0; i < n_fft; ++i) {
    cosine.push_back(std::cos(kTwoPi * static_cast<double>(i) / static_cast<double>(n_fft)));
    sine.push_back(std::sin(kTwoPi * static_cast<double>(i) / static_cast<double>(n_fft)));
  }
  for (int64_t bin = 0; bin <= n_fft / 2; ++bin) {
    double re = 0.0, im = 0.0;
    for (int64_t tap = 0; tap < c.framing.taps; ++tap) {
      int64_t at = frame * c.framing.hop + (n_fft - c.framing.taps) / 2 - c.framing.reach + tap;
      if (at < 0) at = -at;  // reflected
      if (at >= n) at = 2 * (n - 1) - at;
      const double value = wav[clip * c.samples + at] * c.window[tap];
      re += value * cosine[bin * tap % n_fft];
      im += value * sine[bin * tap % n_fft];
    }
    result[bin] = std::sqrt(re * re + im * im);
  }
  return result;
}

// out (clips, bands, frames)
Doubles transform(const Call& c, const Doubles& wav) {
  Doubles out(c.clips * c.out_bands * c.out_frames, 0.0);
  for (int64_t clip = 0; clip < c.clips; ++clip) {
    for (int64_t frame = 0; frame < c.framing.frames(c.length(clip)); ++frame) {
      Doubles x;
      if (c.rates == nullptr) {
        x = magnitudes(c, wav, clip, frame);
      } else {
        const double at = static_cast<double>(frame) * c.rates[clip];
        const int64_t left = static_cast<int64_t>(at);
        x = magnitudes(c, wav, clip, left);
        const Doubles right = magnitudes(c, wav, clip, left + 1);
        for (size_t k = 0; k < x.size(); ++k) {
          x[k] += (right[k] - x[k]) * (at - static_cast<double>(left));
        }
      }
      for (int64_t band = 0; band < c.out_bands; ++band) {
        double value = 0.0;
        for (int64_t bin = 0; bin < static_cast<int64_t>(x.size()); ++bin) {
          const double power = c.magnitude ? x[bin] : x[bin] * x[bin];
          const double weight =
              c.mel == nullptr ? (bin == band ? 1.0 : 0.0) : c.mel[bin * c.bands + band];
          value += power * weight;
        }
        if (c.logarithm) value = std::log(value + c.log_offset);
        out[(clip * c.out_bands + band) * c.out_frames + frame] = (value - c.mean) * c.scale;
      }
    }
  }
  return out;
}

void test(const Case& k) {
  const int64_t bins = k.n_fft / 2 + 1;
  const Floats wav = values(kClips * k.samples, 1), window = values(k.taps, 2);
  const int64_t lengths[] = {k.samples, k.samples - 23};
  const double rates[] = {0.8, 1.3};
  Floats mel(bins * k.bands, 0.0f);
  std::vector<int32_t> ranges;
  for (int band = 0; band < k.bands; ++band) {
    const int64_t first = band * bins / k.bands, last = (band + 1) * bins / k.bands;
    for (int64_t bin = first; bin < last; ++bin) {
      mel[bin * k.bands + band] = 0.3f + 0.1f * static_cast<float>(bin - first);
    }
    ranges.push_back(static_cast<int32_t>(first));
    ranges.push_back(static_cast<int32_t>(last));
  }
  Call c{};
  c.framing = {k.n_fft, k.taps, k.hop, 0, k.center ? k.n_fft / 2 : 0, PadMode::reflect};
  c.transform = spectrogram::plan_for(k.n_fft, k.taps).transform;
  c.wav = wav.data();
  c.clips = kClips;
  c.samples = c.clip_stride = k.samples;
  c.sample_stride = 1;
  if (k.shortened) c.lengths = lengths;
  c.window = window.data();
  c.magnitude = k.magnitude;
  if (k.stretched) c.rates = rates;
  c.rate_step = 1;
  c.bands = static_cast<int>(bins);
  if (k.bands > 0) {
    c.mel = mel.data();
    c.mel_bin_stride = k.bands;
    c.mel_band_stride = 1;
    c.mel_ranges = ranges.data();
    c.bands = k.bands;
  }
  c.logarithm = k.logarithm;
  c.log_offset = 0.5f;
  c.mean = 0.25f;
  c.scale = 0.5f;
  c.out_bands = c.bands;
  c.out_frames = c.framing.frames(k.samples);

  const int64_t size = kClips * c.out_bands * c.out_frames, margin = c.framing.margin();
  const Floats grad = values(size, 3);
  Floats out = poisoned(size), grad_wav(wav.size(), 0.0f);
  Workspace scratch(MUSICLM_FAST_SIMD_CALL(spectrogram_scratch, c, 0));
  constexpr int64_t kSegment = 64;
  Workspace scratch_backward(MUSICLM_FAST_SIMD_CALL(spectrogram_scratch, c, kSegment));
  for (int64_t clip = 0; clip < kClips; ++clip) {
    const int64_t half = c.out_frames / 2, n = c.length(clip);
    MUSICLM_FAST_SIMD_CALL(spectrogram_forward, c, clip, 0, half, scratch, out.data());
    MUSICLM_FAST_SIMD_CALL(spectrogram_forward, c, clip, half, c.out_frames, scratch, out.data());
    float* to = &grad_wav[clip * k.samples];
    Floats margins = poisoned(2 * margin);
    for (int64_t begin = -margin; begin < n + margin; begin += kSegment) {
      MUSICLM_FAST_SIMD_CALL(spectrogram_backward, c, grad.data(), clip, begin,
                             std::min(begin + kSegment, n + margin), scratch_backward, to,
                             margins.data());
    }
    for (int64_t i = 0; i < margin; ++i) {  // reflected
      to[margin - i] += margins[i];
      to[n - 2 - i] += margins[margin + i];
    }
  }
  Doubles in = in_double(wav);
  close(k.name + ": out", out, transform(c, in), 2e-6);
  const auto loss = [&] { return sum_of_products(transform(c, in), grad); };
  close(k.name + ": gradient", grad_wav, gradient(in, loss), 2e-6);
}

}  // namespace

int main() {
  return at_every_level("spectrogram", [] {
    test({.name = "folded", .n_fft = 32, .taps = 24, .hop = 7, .samples = 101});
    test({.name = "folded, stretched", .n_fft = 27, .taps = 13, .hop = 5, .samples = 60,
          .center = false, .stretched = true, .shortened = true});
    test({.name = "packed", .n_fft = 96, .taps = 80, .hop = 17, .samples = 130, .magnitude = true});
    test({.name = "odd length", .n_fft = 75, .taps = 75, .hop = 20, .samples = 110});
    test({.name = "odd radix, log-mel", .n_fft = 98, .taps = 98, .hop = 15, .samples = 140,
          .bands = 7, .logarithm = true, .shortened = true});
    test({.name = "packed, log-mel, stretched", .n_fft = 128, .taps = 65, .hop = 31,
          .samples = 150, .bands = 9, .logarithm = true, .stretched = true});
  });
}
