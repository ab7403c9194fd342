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

// Calls f(task, worker) for every task.
template <typename F>
void run_tasks(const Workers& workers, int64_t tasks, const F& f) {
  workers.run(
      workers.context, tasks,
      [](void* argument, int64_t index, int worker) {
        (*static_cast<const F*>(argument))(index, worker);
      },
      const_cast<void*>(static_cast<const void*>(&f)));
}

}  // namespace musiclm_fast
