// What a CUDA kernel's launch needs from torch, without linking a CUDA library of torch's: this file
// compiles against a CPU build of torch, and the library loads with one. For *.cu only.
#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>

#include "common/stable.h"

namespace musiclm_fast {

inline void check_cuda(cudaError_t status, const char* what) {
  STD_TORCH_CHECK(status == cudaSuccess, what, ": ", cudaGetErrorString(status));
}

// After a launch: reports a launch that was refused. It does not wait for the kernel.
inline void check_launch(const char* kernel) { check_cuda(cudaGetLastError(), kernel); }

// torch's current CUDA stream on a device. The function lies in libtorch_cuda, which is in the
// process wherever a CUDA tensor is; it is looked up there rather than linked.
inline cudaStream_t current_stream(int32_t device_index) {
  using Function = AOTITorchError (*)(int32_t, void**);
  static const Function get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library == nullptr ? nullptr
                              : reinterpret_cast<Function>(
                                    dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  STD_TORCH_CHECK(get != nullptr, "this torch has no CUDA");
  void* stream = nullptr;
  STD_TORCH_CHECK(get(device_index, &stream) == AOTI_TORCH_SUCCESS,
                  "no current CUDA stream on device ", device_index);
  return static_cast<cudaStream_t>(stream);
}

// For the length of a scope `tensor`'s device is the current one, for torch and for the statically
// linked CUDA runtime, and `stream` is torch's current stream on it.
struct CudaScope {
  explicit CudaScope(const Tensor& tensor)
      : guard(tensor.get_device_index()), stream(current_stream(tensor.get_device_index())) {
    check_cuda(cudaSetDevice(tensor.get_device_index()), "cudaSetDevice");
  }
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;
};

}  // namespace musiclm_fast
