// Large blocks of memory from the system, kept when they are given back and handed out again.
//
// A fresh page costs a fault and a fill with zeros at its first write, more than most operators here need for their
// work on it, and malloc gives large blocks back to the system each time. Blocks that lie side by side become one when
// they are idle, and are cut again to what is wanted: in a training step gradients take the place of activations.
#pragma once

#include <cstddef>
#include <map>
#include <mutex>
#include <unordered_map>

namespace pyalpaca {

class Pool {
 public:
  // At least `size` bytes, not initialised, of pages that may be huge; null where the system has none left.
  void* take(size_t size);

  // Hands back what take() gave; false if that is not so.
  bool give(void* data);

  // Until now idle memory may have kIdle bytes. If `whole`, it may from here on have what brings all blocks to the
  // most that has ever been in use at once, and kSlack for blocks that do not fit into the gaps: memory that was needed
  // once is needed again, as in a loop of equal steps.
  void keep(bool whole);

  // Gives all that lies idle back to the system.
  void release();

  size_t idle() const;

  // Held over a fork, so that no other thread's change is half done in the child.
  std::mutex& mutex() { return mutex_; }

 private:
  using Ranges = std::map<char*, size_t>;  // address, size; none touches another

  static void add(Ranges& ranges, char* begin, size_t size);
  static Ranges::iterator best(Ranges& ranges, size_t size);
  char* cut(Ranges& ranges, Ranges::iterator range, size_t size);
  char* find(size_t size);
  bool extend(size_t size);
  void trim(size_t allowed);
  size_t allowed() const;

  mutable std::mutex mutex_;
  Ranges idle_, fresh_;  // with pages, and without any
  std::unordered_map<void*, size_t> used_;
  size_t idle_bytes_ = 0, used_bytes_ = 0, most_bytes_ = 0;
  bool whole_ = false;
};

// The pool of the process. Never destroyed: tensors may outlive the end of main.
Pool& pool();

}  // namespace pyalpaca
