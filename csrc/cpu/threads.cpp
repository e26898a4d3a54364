#include "cpu/threads.h"

#include <torch/csrc/stable/c/shim.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

namespace pyalpaca::cpu {

int64_t num_threads() {
  uint32_t threads = 1;
  torch_get_num_threads(&threads);
  return threads;
}

namespace {

// Linux's own word, of the largest cache that the first processor reaches: where a socket has several last caches, as
// AMD's have, and in virtual machines above all, the C library may speak of all of them together.
int64_t cache_of_first_processor() {
  int64_t largest = 0;
  for (int index = 0;; ++index) {
    std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index) + "/size");
    int64_t size = 0;
    char unit = 0;
    if (!(file >> size >> unit)) return largest;
    largest = std::max(largest, size << (unit == 'M' ? 20 : 10));
  }
}

int64_t find_last_level_cache() {
  int64_t found = cache_of_first_processor();
#ifdef _SC_LEVEL3_CACHE_SIZE
  if (found == 0) found = sysconf(_SC_LEVEL3_CACHE_SIZE);
#endif
  return found > 0 ? found : int64_t{1} << 25;
}

}  // namespace

int64_t last_level_cache() {
  static const int64_t found = find_last_level_cache();
  return found;
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
