// Large blocks of memory from the system, kept when they are given back and handed out again.
//
// A fresh page costs a fault and a fill with zeros at its first write, more than most operators here need for their
// work on it, and malloc gives large blocks back to the system each time.
#pragma once

#include <cstddef>
#include <list>
#include <mutex>
#include <unordered_map>

namespace pyalpaca {

class Pool {
 public:
  // At least `size` bytes, not initialised, of pages that may be huge; null where the system has none left.
  void* take(size_t size);

  // Hands back what take() gave; false if that is not so.
  bool give(void* data);

  // Until now idle blocks may have kIdle bytes. If `whole`, they may from here on have what brings all blocks to the
  // most that has ever been in use at once: memory that was needed once is needed again, as in a loop of equal steps.
  void keep(bool whole);

  // Gives all that lies idle back to the system.
  void release();

  size_t idle() const;

  // Held over a fork, so that no other thread's change is half done in the child.
  std::mutex& mutex() { return mutex_; }

 private:
  struct Block {
    void* data;
    size_t size;
  };

  void release_surplus(std::list<Block>& surplus);

  mutable std::mutex mutex_;
  std::list<Block> idle_;  // the one used last in front
  std::unordered_map<void*, size_t> used_;
  size_t idle_bytes_ = 0, used_bytes_ = 0, most_bytes_ = 0;
  bool whole_ = false;
};

// The pool of the process. Never destroyed: tensors may outlive the end of main.
Pool& pool();

}  // namespace pyalpaca
