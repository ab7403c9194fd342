// The LibTorch stable ABI (torch 2.11 and newer), and the few helpers that every op's registration
// wants. No other file of torch's C++ is included anywhere: ATen and c10 are not stable.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <vector>

#include "common/bf16.h"
#include "common/integers.h"
#include "common/workers.h"

namespace musiclm_fast {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Checks of what the Python layer guarantees: they guard a kernel against being called by hand as
// torch.ops.musiclm_fast.<op>. The user's errors are raised in Python, with the user's names.
inline void check_cpu(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, ": expected a CPU tensor");
}

inline void check_dim(const Tensor& tensor, const char* name, int64_t dim) {
  STD_TORCH_CHECK(tensor.dim() == dim, name, ": got ", tensor.dim(), " dimensions, expected ", dim);
}

inline void check_size(const Tensor& tensor, const char* name, int64_t dim, int64_t size) {
  STD_TORCH_CHECK(tensor.size(dim) == size, name, ": got size ", tensor.size(dim), " at dimension ",
                  dim, ", expected ", size);
}

inline void check_dtype(const Tensor& tensor, const char* name, ScalarType dtype) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, ": got dtype ",
                  torch::headeronly::toString(tensor.scalar_type()), ", expected ",
                  torch::headeronly::toString(dtype));
}

inline void check_contiguous(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_contiguous(), name, ": expected a contiguous tensor");
}

inline void check_inner_contiguous(const Tensor& tensor, const char* name) {
  const int64_t last = tensor.dim() - 1;
  STD_TORCH_CHECK(tensor.size(last) <= 1 || tensor.stride(last) == 1, name,
                  ": expected stride 1 in the last dimension, got ", tensor.stride(last));
}

// The data of a contiguous tensor of T and of `shape`, on whichever device it is.
template <typename T>
const T* contiguous_data(const Tensor& tensor, const char* name,
                         const std::vector<int64_t>& shape) {
  check_dtype(tensor, name, torch::headeronly::CppTypeToScalarType<T>::value);
  check_contiguous(tensor, name);
  check_dim(tensor, name, static_cast<int64_t>(shape.size()));
  for (size_t i = 0; i < shape.size(); ++i) {
    check_size(tensor, name, static_cast<int64_t>(i), shape[i]);
  }
  return tensor.const_data_ptr<T>();
}

// Likewise, on the CPU.
template <typename T>
const T* cpu_data(const Tensor& tensor, const char* name, const std::vector<int64_t>& shape) {
  check_cpu(tensor, name);
  return contiguous_data<T>(tensor, name, shape);
}

// An uninitialised tensor of `sizes`; dtype and device are `like`'s unless given.
inline Tensor empty_as(const Tensor& like, std::vector<int64_t> sizes,
                       std::optional<ScalarType> dtype = std::nullopt) {
  return torch::stable::new_empty(like, sizes, dtype);
}

inline Tensor zeros_as(const Tensor& like, std::vector<int64_t> sizes,
                       std::optional<ScalarType> dtype = std::nullopt) {
  return torch::stable::new_zeros(like, sizes, dtype);
}

// A bfloat16 tensor's data as the kernels' own type.
inline const bf16* kernel_type(const BFloat16* data) { return reinterpret_cast<const bf16*>(data); }
inline bf16* kernel_type(BFloat16* data) { return reinterpret_cast<bf16*>(data); }
inline const float* kernel_type(const float* data) { return data; }
inline float* kernel_type(float* data) { return data; }

// Calls f with a value of the C++ type of `dtype`, one of Types:
//   dispatch<float, BFloat16>(q.scalar_type(), "q", [&](auto zero) {
//     using scalar_t = decltype(zero);
//     ...
//   });
template <typename... Types, typename F>
void dispatch(ScalarType dtype, const char* name, const F& f) {
  const bool found =
      ((dtype == torch::headeronly::CppTypeToScalarType<Types>::value && (f(Types{}), true)) ||
       ...);
  STD_TORCH_CHECK(found, name, ": dtype ", torch::headeronly::toString(dtype),
                  " is not supported by this kernel");
}

// `count` uninitialised T on a cache line, for the length of a scope.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count) {
    const int64_t bytes = round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    data_.reset(static_cast<T*>(std::aligned_alloc(64, larger<int64_t>(bytes, 64))));
    STD_TORCH_CHECK(data_ != nullptr, "no memory for ", bytes, " bytes");
  }
  T* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(T* data) const { std::free(data); }
  };
  std::unique_ptr<T, Free> data_;
};

// Calls f(task, begin, end) for each `size` of `count` items, on torch's threads.
template <typename F>
void each_task(int64_t count, int64_t size, const F& f) {
  torch::stable::parallel_for(0, divide_up(count, size), 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      f(task, task * size, smaller(count, (task + 1) * size));
    }
  });
}

// `count` of torch's threads; each takes the next task until none is left.
inline Workers torch_workers(int count) {
  const auto run = [](void* context, int64_t tasks, void (*task)(void*, int64_t, int),
                      void* argument) {
    const auto workers = static_cast<int64_t>(reinterpret_cast<intptr_t>(context));
    if (workers == 1 || tasks == 1) {
      for (int64_t i = 0; i < tasks; ++i) task(argument, i, 0);
      return;
    }
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, workers, 1, [&](int64_t worker, int64_t) {
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
        task(argument, i, static_cast<int>(worker));
      }
    });
  };
  return {count, reinterpret_cast<void*>(static_cast<intptr_t>(count)), run};
}

}  // namespace musiclm_fast
