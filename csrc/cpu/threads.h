// torch's thread pool and per-thread scratch memory, without torch's headers.
#pragma once

#include <cstdint>

namespace pyalpaca::cpu {

int64_t num_threads();

// Bytes of this processor's last cache, asked once.
int64_t last_level_cache();

// Calls body(begin, end, context) for parts of [0, count) of at least `grain`, on torch's threads.
void parallel_for(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context);

// This thread's scratch memory, 64-byte aligned, at least that large, not initialised. It is kept and handed out again
// at the next call: fresh memory would cost a page fault every 4 KB, more than the arithmetic on it.
// What a call needs while its parts use theirs lies in another slot.
float* scratch(int64_t floats, int slot = 0);

// A shared counter from which threads take tasks, so that uneven ones (causal attention) spread evenly.
class Queue {
 public:
  int64_t take() { return __atomic_fetch_add(&next_, 1, __ATOMIC_RELAXED); }

 private:
  int64_t next_ = 0;
};

// parallel_for with a lambda; one call per thread suits a body that takes from a Queue.
template <class Body>
void parallel(int64_t count, int64_t grain, const Body& body) {
  parallel_for(
      count, grain, [](int64_t begin, int64_t end, void* context) { (*static_cast<const Body*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace pyalpaca::cpu
