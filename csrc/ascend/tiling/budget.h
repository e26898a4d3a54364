// Unified memory as TPipe hands it out: 184 KB, in pieces rounded up to 32 bytes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>

namespace pyalpaca_npu {

constexpr int64_t kUnifiedMemory = 184 * 1024;

constexpr int64_t round_up_to(int64_t value, int64_t step) { return (value + step - 1) / step * step; }
constexpr int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

inline int64_t handed_out(std::initializer_list<int64_t> pieces) {
  int64_t total = 0;
  for (const int64_t piece : pieces) total += round_up_to(piece, 32);
  return total;
}

}  // namespace pyalpaca_npu
