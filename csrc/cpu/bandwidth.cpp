#include "cpu/bandwidth.h"

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include <cstring>

#include "cpu/threads.h"

namespace pyalpaca::cpu {
namespace {

constexpr int64_t kLine = 64, kWord = 8, kWords = kLine / kWord;
constexpr int64_t kGrain = 1 << 14;  // lines a thread takes at least

#ifdef __SSE2__
void copy_lines(const char* from, char* to, int64_t lines) {
  if (reinterpret_cast<uintptr_t>(to) % sizeof(__m128i) != 0) {
    std::memcpy(to, from, static_cast<size_t>(lines * kLine));
    return;
  }
  // A line that is written whole with such stores is neither read first nor kept in the caches.
  for (int64_t i = 0; i < lines; ++i, from += kLine, to += kLine) {
    __m128i part[4];
    std::memcpy(part, from, kLine);
    for (int k = 0; k < 4; ++k) _mm_stream_si128(reinterpret_cast<__m128i*>(to) + k, part[k]);
  }
  _mm_sfence();
}
#else
void copy_lines(const char* from, char* to, int64_t lines) {
  std::memcpy(to, from, static_cast<size_t>(lines * kLine));
}
#endif

uint64_t read_lines(const char* from, int64_t lines) {
  uint64_t found[kWords] = {};
  for (int64_t i = 0; i < lines; ++i, from += kLine) {
    uint64_t words[kWords];
    std::memcpy(words, from, kLine);
    for (int k = 0; k < kWords; ++k) found[k] ^= words[k];
  }
  uint64_t all = 0;
  for (const uint64_t word : found) all ^= word;
  return all;
}

}  // namespace

void copy_memory(const void* from, void* to, int64_t bytes) {
  const char* source = static_cast<const char*>(from);
  char* target = static_cast<char*>(to);
  const int64_t whole = bytes / kLine * kLine;
  parallel(whole / kLine, kGrain, [&](int64_t begin, int64_t end) {
    copy_lines(source + begin * kLine, target + begin * kLine, end - begin);
  });
  std::memcpy(target + whole, source + whole, static_cast<size_t>(bytes - whole));
}

uint64_t read_memory(const void* from, int64_t bytes) {
  const char* source = static_cast<const char*>(from);
  const int64_t whole = bytes / kLine * kLine;
  uint64_t found = 0;
  parallel(whole / kLine, kGrain, [&](int64_t begin, int64_t end) {
    __atomic_fetch_xor(&found, read_lines(source + begin * kLine, end - begin), __ATOMIC_RELAXED);
  });
  for (int64_t i = whole; i < bytes; i += kWord) {
    uint64_t word = 0;
    std::memcpy(&word, source + i, static_cast<size_t>(bytes - i < kWord ? bytes - i : kWord));
    found ^= word;
  }
  return found;
}

}  // namespace pyalpaca::cpu
