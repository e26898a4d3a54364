#include "cpu/threads.h"

#include <torch/csrc/stable/c/shim.h>
#include <unistd.h>

#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>

namespace pyalpaca::cpu {

int64_t num_threads() {
  uint32_t threads = 1;
  torch_get_num_threads(&threads);
  return threads;
}

int64_t last_level_cache() {
#ifdef _SC_LEVEL3_CACHE_SIZE
  static const int64_t found = sysconf(_SC_LEVEL3_CACHE_SIZE);
#else
  static const int64_t found = 0;
#endif
  return found > 0 ? found : int64_t{1} << 25;
}

// The function behind the stable interface was compiled with torch's own OpenMP: including at::parallel_for here would
// link a second runtime, with threads of its own, wherever the compiler's is not the one that torch ships.
void parallel_for(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  if (count <= 0) return;
  if (count <= grain) return body(0, count, context);
  if (torch_parallel_for(0, count, grain, body, context) != 0) throw std::runtime_error("a kernel ran out of memory");
}

float* scratch(int64_t floats, int slot) {
  struct Memory {
    std::unique_ptr<float, decltype(&std::free)> data{nullptr, &std::free};
    int64_t capacity = 0;
  };
  thread_local Memory slots[2];
  Memory& memory = slots[slot];
  if (floats > memory.capacity) {
    memory.data.reset();
    memory.capacity = 0;
    const size_t bytes = (static_cast<size_t>(floats) * sizeof(float) + 63) / 64 * 64;
    memory.data.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
    if (memory.data == nullptr) throw std::bad_alloc();
    memory.capacity = floats;
  }
  return memory.data.get();
}

}  // namespace pyalpaca::cpu
