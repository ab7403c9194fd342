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

struct BlockTeam {
  int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  int lane = thread % 32, warp = thread / 32, warps = threads / 32;
  static constexpr int lanes = 32;
  __device__ void sync() const { __syncthreads(); }
  __device__ void sync_warp() const { __syncwarp(); }
};

extern __shared__ __align__(16) float shared_memory[];

__global__ void forward_fft_kernel(Call c, int64_t tiles, FftLayout layout, float* out) {
  const int64_t clip = blockIdx.x / tiles, begin = blockIdx.x % tiles * layout.tile_frames;
  forward_fft(c, BlockTeam(), clip, begin, layout, shared_memory, out);
}

// Two blocks a multiprocessor, where that many registers hold the two spectra of a stretch.
template <int kLength, int kSides>
__global__ void __launch_bounds__(256, kLength == 512 && kSides == 2 ? 1 : 2)
    forward_fixed_kernel(Call c, int64_t tiles, FixedLayout layout, float* out) {
  const int64_t clip = blockIdx.x / tiles, begin = blockIdx.x % tiles * kFixedFrames;
  forward_fixed<kLength, kSides>(c, BlockTeam(), clip, begin, layout, shared_memory, out);
}

template <int kTerms, int kSides>
__global__ void forward_folded_kernel(Call c, int64_t tiles, FoldedLayout layout, float* out) {
  const int64_t clip = blockIdx.x / tiles, begin = blockIdx.x % tiles * layout.tile_frames;
  forward_folded<kTerms, kSides>(c, BlockTeam(), clip, begin, layout, shared_memory, out);
}

template <int kSides>
__global__ void backward_fft_kernel(Call c, int64_t segments, FftBackwardLayout layout,
                                    const float* grad, float* grad_wav, float* margins) {
  const int64_t clip = blockIdx.x / segments;
  const int64_t begin = blockIdx.x % segments * layout.segment - c.framing.margin();
  backward_fft<kSides>(c, BlockTeam(), clip, begin, layout, shared_memory, grad, grad_wav, margins);
}

template <int kTerms, int kSides>
__global__ void backward_folded_kernel(Call c, int64_t segments, FoldedBackwardLayout layout,
                                       const float* grad, float* grad_wav, float* margins) {
  const int64_t clip = blockIdx.x / segments;
  const int64_t begin = blockIdx.x % segments * layout.segment - c.framing.margin();
  backward_folded<kTerms, kSides>(c, BlockTeam(), clip, begin, layout, shared_memory, grad,
                                  grad_wav, margins);
}

__global__ void fold_margins_kernel(Call c, const float* margins, float* grad_wav) {
  fold_margins(c, BlockTeam(), blockIdx.x, margins, grad_wav);
}

// First bin and last + 1 with a weight, for every band: mel filters are mostly zero.
__global__ void mel_ranges_kernel(Call c, int32_t* ranges) {
  const int band = static_cast<int>(blockIdx.x);
  __shared__ int first, last;
  if (threadIdx.x == 0) {
    first = c.transform.bins;
    last = 0;
  }
  __syncthreads();
  for (int bin = static_cast<int>(threadIdx.x); bin < c.transform.bins; bin += 32) {
    if (c.mel[bin * c.mel_bin_stride + band * c.mel_band_stride] == 0.0f) continue;
    atomicMin(&first, bin);
    atomicMax(&last, bin + 1);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    ranges[2 * band] = first < last ? first : 0;
    ranges[2 * band + 1] = last;
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
    ranges = empty_as(a.wav, {c.bands, 2}, ScalarType::Int);
    int32_t* to = ranges->mutable_data_ptr<int32_t>();
    launch("mel_ranges", mel_ranges_kernel, c.bands, 32, 0, stream, c, to);
    c.mel_ranges = to;
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
  if (c.transform.folded) {
    const FoldedLayout layout = fitting(128, 32, limit, [&](int tile_frames) {
      return FoldedLayout::make(c, tile_frames);
    });
    const int64_t tiles = (c.out_frames + layout.tile_frames - 1) / layout.tile_frames;
    with_terms(c, [&](auto terms, auto sides) {
      launch("spectrogram_forward", forward_folded_kernel<terms(), sides()>, c.clips * tiles,
             layout.tile_frames, layout.total, scope.stream, c, tiles, layout, to);
    });
    return out;
  }
  if (has_fixed_fft(c.transform)) {
    int warps = 8;
    while (warps > 1 && FixedLayout::make(c, warps).total * 4 > limit) warps /= 2;
    const FixedLayout layout = FixedLayout::make(c, warps);
    if (layout.total * 4 <= limit) {
      const int64_t tiles = (c.out_frames + kFixedFrames - 1) / kFixedFrames;
      with_fixed_length(c, [&](auto length, auto sides) {
        launch("spectrogram_forward", forward_fixed_kernel<length(), sides()>, c.clips * tiles,
               32 * warps, layout.total, scope.stream, c, tiles, layout, to);
      });
      return out;
    }
  }
  // 32 frames make whole cache lines of output; fewer where a long transform leaves no room
  int warps = 8;
  while (warps > 1 && FftLayout::make(c, 8, warps).total * 4 > limit) warps /= 2;
  const FftLayout layout = fitting(32, 8, limit, [&](int tile_frames) {
    return FftLayout::make(c, tile_frames, warps);
  });
  const int64_t tiles = (c.out_frames + layout.tile_frames - 1) / layout.tile_frames;
  launch("spectrogram_forward", forward_fft_kernel, c.clips * tiles, 32 * warps, layout.total,
         scope.stream, c, tiles, layout, to);
  return out;
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
  const auto segments = [&](int length) { return (c.samples + 2 * margin + length - 1) / length; };
  // Frames that reach over a segment's end are computed twice: a segment is many windows long.
  if (c.transform.folded) {
    const int64_t wanted = std::max<int64_t>(16 * c.transform.taps, 128 * c.framing.hop);
    const int segment = static_cast<int>(std::min<int64_t>(wanted, 4096));
    const FoldedBackwardLayout layout = fitting(128, 32, limit, [&](int tile_frames) {
      return FoldedBackwardLayout::make(c, tile_frames, segment);
    });
    with_terms(c, [&](auto terms, auto sides) {
      launch("spectrogram_backward", backward_folded_kernel<terms(), sides()>,
             c.clips * segments(segment), layout.tile_frames, layout.total, scope.stream, c,
             segments(segment), layout, from, to, edges);
    });
  } else {
    const int64_t wanted = std::max<int64_t>(6 * c.transform.taps, 16 * c.framing.hop);
    const int segment = static_cast<int>(std::min<int64_t>(wanted, 8192));
    const FftBackwardLayout layout = fitting(8, 1, limit, [&](int warps) {
      return FftBackwardLayout::make(c, segment, warps);
    });
    const auto run = [&](auto* kernel) {
      launch("spectrogram_backward", kernel, c.clips * segments(segment), 32 * layout.warps,
             layout.total, scope.stream, c, segments(segment), layout, from, to, edges);
    };
    if (c.rates == nullptr) {
      run(backward_fft_kernel<1>);
    } else {
      run(backward_fft_kernel<2>);
    }
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
