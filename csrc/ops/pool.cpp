#include "ops/pool.h"

#include <pthread.h>
#include <sys/mman.h>

#include <cstdint>
#include <iterator>

namespace pyalpaca {
namespace {

constexpr size_t kHuge = size_t{1} << 21;  // a huge page
constexpr size_t kIdle = size_t{1} << 29;

// To an eighth of its power of two: blocks of about one size can take each other's place, and little is wasted.
size_t rounded(size_t size) {
  size_t step = size_t{1} << 17;
  while (step * 16 < size) step *= 2;
  return (size + step - 1) / step * step;
}

// From the system, not from malloc: what is freed there may stay with the process.
void* map(size_t size) {
  const size_t wide = size + (size >= kHuge ? kHuge : 0);  // so that a huge page can begin at its beginning
  void* const mapped = mmap(nullptr, wide, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  char* const begin = static_cast<char*>(mapped);
  char* data = begin;
  if (wide > size) {
    data += (kHuge - reinterpret_cast<uintptr_t>(begin) % kHuge) % kHuge;
    if (data > begin) munmap(begin, static_cast<size_t>(data - begin));
    if (data + size < begin + wide) munmap(data + size, static_cast<size_t>(begin + wide - data - size));
#ifdef MADV_HUGEPAGE
    madvise(data, size, MADV_HUGEPAGE);  // a wish: where it is not granted, pages are small
#endif
  }
  return data;
}

}  // namespace

void* Pool::take(size_t size) {
  size = rounded(size);
  std::list<Block> surplus;
  void* data = nullptr;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto block = idle_.begin(); block != idle_.end(); ++block) {
      if (block->size != size) continue;
      data = block->data;
      idle_.erase(block);
      idle_bytes_ -= size;
      break;
    }
    used_bytes_ += size;
    if (used_bytes_ > most_bytes_) most_bytes_ = used_bytes_;
    release_surplus(surplus);
    if (data != nullptr) used_.emplace(data, size);
  }
  for (const Block& old : surplus) munmap(old.data, old.size);
  if (data != nullptr) return data;
  data = map(size);
  if (data == nullptr) {  // the system has none: what lies idle may be enough
    release();
    data = map(size);
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  if (data == nullptr) {
    used_bytes_ -= size;
  } else {
    used_.emplace(data, size);
  }
  return data;
}

bool Pool::give(void* data) {
  std::list<Block> surplus;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = used_.find(data);
    if (found == used_.end()) return false;
    used_bytes_ -= found->second;
    idle_bytes_ += found->second;
    idle_.push_front({data, found->second});
    used_.erase(found);
    release_surplus(surplus);
  }
  for (const Block& old : surplus) munmap(old.data, old.size);
  return true;
}

void Pool::keep(bool whole) {
  std::list<Block> surplus;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    whole_ = whole;
    release_surplus(surplus);
  }
  for (const Block& old : surplus) munmap(old.data, old.size);
}

void Pool::release() {
  std::list<Block> all;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    all.swap(idle_);
    idle_bytes_ = 0;
  }
  for (const Block& old : all) munmap(old.data, old.size);
}

size_t Pool::idle() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return idle_bytes_;
}

// Takes the blocks that have lain idle longest from the list, until no more than allowed are left.
void Pool::release_surplus(std::list<Block>& surplus) {
  const auto allowed = [&] { return whole_ && most_bytes_ - used_bytes_ > kIdle ? most_bytes_ - used_bytes_ : kIdle; };
  while (idle_bytes_ > allowed()) {
    idle_bytes_ -= idle_.back().size;
    surplus.splice(surplus.end(), idle_, std::prev(idle_.end()));
  }
}

Pool& pool() {
  static Pool* const kept = [] {
    Pool* const made = new Pool;
    pthread_atfork([] { pool().mutex().lock(); }, [] { pool().mutex().unlock(); }, [] { pool().mutex().unlock(); });
    return made;
  }();
  return *kept;
}

}  // namespace pyalpaca
