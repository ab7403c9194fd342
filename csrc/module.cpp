// musiclm_fast._C: what was built, and loading the op library that lies beside it. Nothing of torch
// is linked here, so the facts can be read with any torch or none.

#include "build_facts.h"

#include <dlfcn.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

namespace py = pybind11;

namespace {

void* library = nullptr;

// Loads the op library at `path`, which registers its ops with the torch in this process.
void load_ops(const std::string& path) {
  if (library != nullptr) return;
  library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) throw std::runtime_error(dlerror());
}

template <typename Function>
Function* symbol(const char* name) {
  if (library == nullptr) throw std::runtime_error("the op library is not loaded");
  void* address = dlsym(library, name);
  if (address == nullptr) throw std::runtime_error(dlerror());
  return reinterpret_cast<Function*>(address);
}

py::dict build_facts() {
  py::dict facts;
  facts["version"] = BUILD_VERSION;
  facts["compiler"] = BUILD_COMPILER;
  facts["flags"] = BUILD_FLAGS;
  facts["simd_levels"] = py::str(BUILD_SIMD_LEVELS).attr("split")();
  facts["cuda_compiler"] = BUILD_CUDA_COMPILER;
  facts["cuda_archs"] = py::str(BUILD_CUDA_ARCHS).attr("split")();
  facts["sanitize"] = BUILD_SANITIZE;
  facts["torch_built_against"] = BUILD_TORCH;
  return facts;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build facts of musiclm_fast's compiled library, and its loader.";
  m.def("build_facts", &build_facts, "What was built: versions, flags, SIMD levels, CUDA archs.");
  m.def("load_ops", &load_ops, py::arg("path"), "Load the op library; RuntimeError says why not.");
  m.def(
      "simd_level", [] { return std::string(symbol<const char*()>("musiclm_fast_simd_level")()); },
      "The SIMD level that the kernels run at: baseline, avx2 or avx512.");
  m.def(
      "set_simd_level",
      [](const std::string& name) {
        if (symbol<int(const char*)>("musiclm_fast_set_simd_level")(name.c_str()) != 0) {
          throw std::invalid_argument("name: got '" + name +
                                      "', expected a SIMD level that this processor has");
        }
      },
      py::arg("name"), "Run the kernels at another SIMD level (for tests).");
  m.def(
      "has_avx512_bf16",
      [] { return symbol<int()>("musiclm_fast_has_avx512_bf16")() != 0; },
      "Whether kernels may use AVX512-BF16 instructions.");
}
