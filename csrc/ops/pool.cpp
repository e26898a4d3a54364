#include "ops/pool.h"

#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <iterator>

namespace pyalpaca {
namespace {

constexpr size_t kHuge = size_t{1} << 21;     // a huge page
constexpr size_t kGrain = size_t{1} << 16;    // blocks are multiples of it
constexpr size_t kSegment = size_t{1} << 30;  // addresses asked for at once; memory comes with the first write
constexpr size_t kIdle = size_t{1} << 29;
constexpr size_t kSlack = size_t{1} << 25;
// Large blocks are no multiples of it, by a grain: a weight, its gradient and its moments, walked through together,
// would lie a large power of two apart and take turns at the same bank of the memory, at 0.6 of its rate.
constexpr size_t kApart = size_t{1} << 24;

size_t rounded(size_t size, size_t unit) { return (size + unit - 1) / unit * unit; }

// From the system, not from malloc: what is freed there may stay with the process.
char* map(size_t size) {
  const size_t wide = size + kHuge;  // so that a huge page can begin at its beginning
  void* const mapped = mmap(nullptr, wide, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  char* const begin = static_cast<char*>(mapped);
  char* const data = begin + (kHuge - reinterpret_cast<uintptr_t>(begin) % kHuge) % kHuge;
  if (data > begin) munmap(begin, static_cast<size_t>(data - begin));
  if (data + size < begin + wide) munmap(data + size, static_cast<size_t>(begin + wide - data - size));
#ifdef MADV_HUGEPAGE
  madvise(data, size, MADV_HUGEPAGE);  // a wish: where it is not granted, pages are small
#endif
  return data;
}

}  // namespace

void* Pool::take(size_t size) {
  size = rounded(std::max<size_t>(size, 1), kGrain);
  if (size % kApart == 0) size += kGrain;
  const std::lock_guard<std::mutex> lock(mutex_);
  char* data = find(size);
  if (data == nullptr && extend(size)) data = find(size);
  if (data == nullptr) return nullptr;
  used_.emplace(data, size);
  used_bytes_ += size;
  most_bytes_ = std::max(most_bytes_, used_bytes_);
  trim(allowed());
  return data;
}

bool Pool::give(void* data) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = used_.find(data);
  if (found == used_.end()) return false;
  add(idle_, static_cast<char*>(data), found->second);
  used_bytes_ -= found->second;
  idle_bytes_ += found->second;
  used_.erase(found);
  trim(allowed());
  return true;
}

void Pool::keep(bool whole) {
  const std::lock_guard<std::mutex> lock(mutex_);
  whole_ = whole;
  trim(allowed());
}

void Pool::release() {
  const std::lock_guard<std::mutex> lock(mutex_);
  trim(0);
}

size_t Pool::idle() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return idle_bytes_;
}

size_t Pool::allowed() const { return whole_ ? most_bytes_ - used_bytes_ + kSlack : kIdle; }

// Puts a range among others, as one with those beside it.
void Pool::add(Ranges& ranges, char* begin, size_t size) {
  auto after = ranges.lower_bound(begin);
  if (after != ranges.end() && begin + size == after->first) {
    size += after->second;
    after = ranges.erase(after);
  }
  if (after != ranges.begin()) {
    const auto before = std::prev(after);
    if (before->first + before->second == begin) {
      before->second += size;
      return;
    }
  }
  ranges.emplace_hint(after, begin, size);
}

// The smallest range that has `size`, of equals the first.
Pool::Ranges::iterator Pool::best(Ranges& ranges, size_t size) {
  auto found = ranges.end();
  for (auto range = ranges.begin(); range != ranges.end(); ++range) {
    if (range->second >= size && (found == ranges.end() || range->second < found->second)) found = range;
  }
  return found;
}

// Takes the beginning of a range.
char* Pool::cut(Ranges& ranges, Ranges::iterator range, size_t size) {
  char* const begin = range->first;
  const size_t rest = range->second - size;
  const auto next = ranges.erase(range);
  if (rest != 0) ranges.emplace_hint(next, begin + size, rest);
  if (&ranges == &idle_) idle_bytes_ -= size;
  return begin;
}

// A block out of what is idle; or idle memory and what is fresh behind it; or out of what is fresh.
char* Pool::find(size_t size) {
  if (const auto range = best(idle_, size); range != idle_.end()) return cut(idle_, range, size);
  for (auto range = fresh_.begin(); range != fresh_.end(); ++range) {
    auto before = idle_.lower_bound(range->first);
    if (before == idle_.begin()) continue;
    --before;
    const size_t held = before->second;
    if (before->first + held != range->first || held + range->second < size) continue;
    cut(fresh_, range, size - held);
    return cut(idle_, before, held);
  }
  if (const auto range = best(fresh_, size); range != fresh_.end()) return cut(fresh_, range, size);
  return nullptr;
}

// More addresses; where the system gives none for so many, what lies idle may be what it lacks.
bool Pool::extend(size_t size) {
  for (const size_t wanted : {rounded(std::max(size, kSegment), kHuge), rounded(size, kHuge)}) {
    char* data = map(wanted);
    if (data == nullptr) {
      trim(0);
      data = map(wanted);
    }
    if (data == nullptr) continue;
    add(fresh_, data, wanted);
    return true;
  }
  return false;
}

// Gives the pages of idle memory back to the system, from its end on, until no more than `allowed` bytes are left.
void Pool::trim(size_t allowed) {
  while (idle_bytes_ > allowed) {
    const auto last = std::prev(idle_.end());
    const size_t surplus = std::min(rounded(idle_bytes_ - allowed, kHuge), last->second);
    char* const begin = last->first + last->second - surplus;
    madvise(begin, surplus, MADV_DONTNEED);
    add(fresh_, begin, surplus);
    last->second -= surplus;
    if (last->second == 0) idle_.erase(last);
    idle_bytes_ -= surplus;
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
