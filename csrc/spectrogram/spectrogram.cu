#include <algorithm>
#include <map>
#include <mutex>
#include <utility>

#include "common/cuda.h"
#include "spectrogram/arguments.h"
#include "spectrogram/fft_block.h"
#include "spectrogram/fixed_fft.h"
#include "spectrogram/folded_block.h"

namespace musiclm_fast {
namespace {

using namespace spectrogram;

// kWarps: known when it is compiled, or 0.
template <int kWarps = 0>
struct BlockTeam {
  static constexpr int lanes = 32;
  int thread = static_cast<int>(threadIdx.x);
  int warps = kWarps > 0 ? kWarps : static_cast<int>(blockDim.x) / lanes, threads = lanes * warps;
  int lane = thread % lanes, warp = thread / lanes;
  __device__ void sync() const { __syncthreads(); }
  __device__ void sync_warp() const { __syncwarp(); }
};

extern __shared__ __align__(16) float shared_memory[];

// What a block works on: a tile of one clip.
struct Job {
  int64_t clip, tile;
  __device__ explicit Job(unsigned tiles) : clip(blockIdx.x / tiles), tile(blockIdx.x % tiles) {}
};

__global__ void forward_fft_kernel(Call c, unsigned tiles, FftLayout layout, float* out) {
  const Job job(tiles);
  forward_fft(c, BlockTeam<>(), job.clip, job.tile * layout.tile_frames, layout, shared_memory,
              out);
}

// Blocks a multiprocessor: with 1,024 points shared memory holds two.
template <int kLength, int kSides>
__global__ void __launch_bounds__(32 * kFixedWarps, kLength == 512 ? 2 : kSides == 2 ? 3 : 4)
    forward_fixed_kernel(Call c, unsigned tiles, FixedLayout layout, float* out) {
  const Job job(tiles);
  const int64_t begin = job.tile * kFixedFrames * layout.tiles;
  forward_fixed<kLength, kSides>(c, BlockTeam<kFixedWarps>(), job.clip, begin, layout,
                                 shared_memory, out);
}

template <int kTerms, int kSides, bool kPlain>
__global__ void __launch_bounds__(128, 1)
    forward_folded_kernel(Call c, unsigned tiles, FoldedLayout layout, float* out) {
  const Job job(tiles);
  forward_folded<kTerms, kSides, kPlain>(c, BlockTeam<>(), job.clip,
                                         job.tile * layout.tile_frames, layout, shared_memory,
                                         out);
}

template <int kLength, int kSides>
__global__ void __launch_bounds__(kLength > 0 ? 32 * kFixedWarps : 256,
                                  kLength == 0 || kLength == 512 ? 2 : 3)
    backward_fft_kernel(Call c, unsigned segments, FftBackwardLayout layout, const float* grad,
                        float* grad_wav, float* margins) {
  const Job job(segments);
  backward_fft<kLength, kSides>(c, BlockTeam<>(), job.clip,
                                job.tile * layout.segment - c.framing.margin(), layout,
                                shared_memory, grad, grad_wav, margins);
}

template <int kTerms, int kSides>
__global__ void __launch_bounds__(128, kTerms <= 14 && kSides == 1 ? 4 : 1)
    backward_folded_kernel(Call c, unsigned segments, FoldedBackwardLayout layout,
                           const float* grad, float* grad_wav, float* margins) {
  const Job job(segments);
  backward_folded<kTerms, kSides>(c, BlockTeam<>(), job.clip,
                                  job.tile * layout.segment - c.framing.margin(), layout,
                                  shared_memory, grad, grad_wav, margins);
}

__global__ void fold_margins_kernel(Call c, const float* margins, float* grad_wav) {
  fold_margins(c, BlockTeam<>(), blockIdx.x, margins, grad_wav);
}

// First and last + 1 with a weight: of the bins of each band, then of the bands of each bin. Mel
// filters are mostly zero.
__global__ void mel_ranges_kernel(Call c, int32_t* ranges) {
  const int block = static_cast<int>(blockIdx.x), bins = c.transform.bins;
  const bool band = block < c.bands;  // else a bin
  const int count = band ? bins : c.bands;
  const float* weights =
      c.mel + (band ? block * c.mel_band_stride : (block - c.bands) * c.mel_bin_stride);
  const int64_t step = band ? c.mel_bin_stride : c.mel_band_stride;
  int first = count, last = 0;
  for (int i = static_cast<int>(threadIdx.x); i < count; i += 32) {
    if (weights[i * step] == 0.0f) continue;
    first = min(first, i);
    last = i + 1;
  }
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    first = min(first, __shfl_xor_sync(~0u, first, lanes));
    last = max(last, __shfl_xor_sync(~0u, last, lanes));
  }
  if (threadIdx.x == 0) {
    ranges[2 * block] = first < last ? first : 0;
    ranges[2 * block + 1] = last;
  }
}

// A plan's transform with its tables on a device. They are copied once per device, on the first
// call with these sizes (which a CUDA graph cannot capture), and stay.
Transform device_transform(int64_t n_fft, int64_t taps, int device) {
  static std::mutex mutex;
  static std::map<std::pair<int, const Plan*>, Transform> copies;
  const Plan& plan = plan_for(n_fft, taps);
  const std::lock_guard lock(mutex);
  const auto found = copies.find({device, &plan});
  if (found != copies.end()) return found->second;
  Transform t = plan.transform;
  const size_t numbers = plan.numbers.size() * sizeof(float);
  const size_t order = plan.order.size() * sizeof(int32_t);
  char* memory = nullptr;
  check_cuda(cudaMalloc(&memory, numbers + order), "spectrogram tables");
  check_cuda(cudaMemcpy(memory, plan.numbers.data(), numbers, cudaMemcpyHostToDevice),
             "spectrogram tables");
  check_cuda(cudaMemcpy(memory + numbers, plan.order.data(), order, cudaMemcpyHostToDevice),
             "spectrogram tables");
  check_cuda(cudaStreamSynchronize(nullptr), "spectrogram tables");  // seen by every stream now
  t.numbers = reinterpret_cast<const float*>(memory);
  t.order = reinterpret_cast<const int32_t*>(memory + numbers);
  copies[{device, &plan}] = t;
  return t;
}

int64_t shared_limit(int device) {
  int bytes = 0;
  check_cuda(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
             "shared memory");
  return bytes;
}

// Largest of some sizes, each half of the one before, whose layout fits.
template <class Make>
auto fitting(int size, int smallest, int64_t limit, const Make& make) {
  auto layout = make(size);
  while (layout.total * 4 > limit && size > smallest) {
    size /= 2;
    layout = make(size);
  }
  STD_TORCH_CHECK(layout.total * 4 <= limit, "spectrogram: a frame's spectra need ",
                  layout.total * 4, " bytes of shared memory, the device has ", limit);
  return layout;
}

template <class Kernel, class... Args>
void launch(const char* name, Kernel* kernel, int64_t blocks, int threads, int64_t shared_words,
            cudaStream_t stream, const Args&... args) {
  if (blocks == 0) return;
  const int bytes = static_cast<int>(shared_words * 4);
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
             name);
  kernel<<<static_cast<unsigned>(blocks), threads, bytes, stream>>>(args...);
  check_launch(name);
}

// Calls f with the number of a folded transform's terms and of a place's frames as constants.
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

// A call whose pointers are all on the device; `ranges` keeps mel's alive until the launch.
Call device_call(const Arguments& a, cudaStream_t stream, std::optional<Tensor>& ranges) {
  Call c = make_call(a);
  c.transform = device_transform(a.n_fft, a.window.size(0), a.wav.get_device_index());
  if (c.mel != nullptr) {
    const int count = c.bands + c.transform.bins;
    ranges = empty_as(a.wav, {count, 2}, ScalarType::Int);
    int32_t* to = ranges->mutable_data_ptr<int32_t>();
    launch("mel_ranges", mel_ranges_kernel, count, 32, 0, stream, c, to);
    c.mel_ranges = to;
    c.mel_bands = to + 2 * c.bands;
  }
  return c;
}

Tensor spectrogram_forward_cuda(MUSICLM_FAST_SPECTROGRAM_PARAMETERS) {
  CudaScope scope(wav);
  std::optional<Tensor> ranges;
  const Call c = device_call(Arguments MUSICLM_FAST_SPECTROGRAM_ARGUMENTS, scope.stream, ranges);
  const int64_t limit = shared_limit(wav.get_device_index());
  Tensor out = empty_as(wav, {c.clips, c.out_bands, c.out_frames});
  float* to = out.mutable_data_ptr<float>();
  const auto tiles = [&](int frames) {
    return static_cast<unsigned>((c.out_frames + frames - 1) / frames);
  };
  if (c.transform.folded) {
    const FoldedLayout layout =
        fitting(128, 16, limit, [&](int threads) { return FoldedLayout::make(c, threads); });
    const unsigned count = tiles(layout.tile_frames);
    const auto run = [&](auto* kernel) {
      launch("spectrogram_forward", kernel, c.clips * count, std::max(layout.threads, 32),
             layout.total, scope.stream, c, count, layout, to);
    };
    with_terms(c, [&](auto terms, auto sides) {
      if constexpr (sides() == 1) {
        if (plain(c)) return run(forward_folded_kernel<terms(), 1, true>);
      }
      run(forward_folded_kernel<terms(), sides(), false>);
    });
    return out;
  }
  with_fixed_length(c, [&](auto length, auto sides) {
    if constexpr (length() > 0) {
      const bool many = c.clips * tiles(kFixedFrames) >= 2048;  // enough for every device
      const FixedLayout layout = FixedLayout::make(c, kFixedWarps, many ? 2 : 1);
      const unsigned count = tiles(kFixedFrames * layout.tiles);
      launch("spectrogram_forward", forward_fixed_kernel<length(), sides()>, c.clips * count,
             32 * kFixedWarps, layout.total, scope.stream, c, count, layout, to);
    } else {
      // 32 frames make whole cache lines of output; fewer where a long transform leaves no room
      int warps = 8;
      while (warps > 1 && FftLayout::make(c, 4, warps).total * 4 > limit) warps /= 2;
      const FftLayout layout = fitting(32, 4, limit, [&](int tile_frames) {
        return FftLayout::make(c, tile_frames, warps);
      });
      const unsigned count = tiles(layout.tile_frames);
      launch("spectrogram_forward", forward_fft_kernel, c.clips * count, 32 * warps, layout.total,
             scope.stream, c, count, layout, to);
    }
  });
  return out;
}

// Positions of a block of the gradient: at least `windows` of them long, and so that the frames
// that touch it are whole rounds of `frames`, if they do not exceed `most`.
int segment_for(const Call& c, int frames, int windows, int most) {
  const int64_t taps = c.framing.taps, hop = c.framing.hop, wanted = windows * taps;
  const int64_t rounds = (wanted + taps + 2 * hop - 1) / (frames * hop) + 1;
  const int64_t whole = rounds * frames * hop - taps - hop;
  return static_cast<int>(whole <= most ? whole : std::min<int64_t>(wanted, most));
}

Tensor spectrogram_backward_cuda(const Tensor& grad, MUSICLM_FAST_SPECTROGRAM_PARAMETERS) {
  CudaScope scope(wav);
  std::optional<Tensor> ranges;
  const Call c = device_call(Arguments MUSICLM_FAST_SPECTROGRAM_ARGUMENTS, scope.stream, ranges);
  check_grad(grad, c);
  const int64_t limit = shared_limit(wav.get_device_index()), margin = c.framing.margin();
  Tensor grad_wav = empty_as(wav, {c.clips, c.samples});
  Tensor margins = zeros_as(wav, {c.clips, 2 * margin});
  const float* from = grad.const_data_ptr<float>();
  float* to = grad_wav.mutable_data_ptr<float>();
  float* edges = margins.mutable_data_ptr<float>();
  // Frames that reach over a segment's end are computed twice: a segment is many windows long.
  const auto run = [&](auto* kernel, const auto& layout, int threads) {
    const auto count = static_cast<unsigned>((c.samples + 2 * margin + layout.segment - 1) /
                                             layout.segment);
    launch("spectrogram_backward", kernel, c.clips * count, threads, layout.total, scope.stream, c,
           count, layout, from, to, edges);
  };
  if (c.transform.folded) {
    const FoldedBackwardLayout layout = fitting(128, 32, limit, [&](int threads) {
      return FoldedBackwardLayout::make(c, threads, segment_for(c, threads, 16, 4096));
    });
    with_terms(c, [&](auto terms, auto sides) {
      run(backward_folded_kernel<terms(), sides()>, layout, layout.threads);
    });
  } else {
    const int most = has_fixed_fft(c.transform) ? kFixedWarps : 8;
    const FftBackwardLayout layout = fitting(most, 1, limit, [&](int warps) {
      return FftBackwardLayout::make(c, segment_for(c, warps, 10, 8192), warps);
    });
    with_fixed_length(c, [&](auto length, auto sides) {
      run(backward_fft_kernel<length(), sides()>, layout, 32 * layout.warps);
    });
  }
  launch("spectrogram_margins", fold_margins_kernel, c.clips, 256, 0, scope.stream, c,
         static_cast<const float*>(edges), to);
  return grad_wav;
}

STABLE_TORCH_LIBRARY_IMPL(musiclm_fast, CUDA, m) {
  m.impl("spectrogram_forward", TORCH_BOX(&spectrogram_forward_cuda));
  m.impl("spectrogram_backward", TORCH_BOX(&spectrogram_backward_cuda));
}

}  // namespace
}  // namespace musiclm_fast
