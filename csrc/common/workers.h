// How a torch-free kernel runs on torch's threads; common/stable.h makes one. Torch-free.
#pragma once

#include <cstdint>

namespace musiclm_fast {

// Runs tasks 0 .. tasks-1 in any order on `count` workers; `worker` names the scratch to use.
struct Workers {
  int count;
  void* context;
  void (*run)(void* context, int64_t tasks, void (*task)(void* argument, int64_t index, int worker),
              void* argument);
};

}  // namespace musiclm_fast
