// How rope is cut: cores, and tokens by heads of a unit of work.
#pragma once

#include "budget.h"

namespace pyalpaca_npu {

constexpr int64_t kMostUnitHeads = 128, kMostUnitTokens = 64, kUnitBytes = 16 * 1024;

struct RopeTiling {
  int32_t cores = 0;  // 0: these shapes can't be served
  int32_t tile_tokens = 0, tile_heads = 0;
};

inline int64_t rope_bytes(int64_t tokens, int64_t heads, int64_t k_heads, int64_t head_dim, int64_t size, bool cache) {
  return handed_out({2 * tokens * heads * head_dim * size, 4 * tokens * (head_dim / 2) * 4,
                     cache ? 2 * tokens * k_heads * head_dim * size : 0, size < 4 ? heads * head_dim * 4 : 0,
                     heads * head_dim * 4});
}

// Whole tokens if one fits, else some of its heads; then as many tokens as a copy of full bandwidth needs, or a core
// has.
inline RopeTiling rope_tiling(int64_t tokens, int64_t q_heads, int64_t k_heads, int64_t head_dim, int64_t size,
                              bool cache, int64_t cores) {
  RopeTiling tiling;
  const int64_t heads = q_heads + k_heads;
  if (tokens < 1 || heads < 1 || head_dim < 16 || head_dim > 128 || head_dim % 16 != 0) return tiling;
  int64_t unit_heads = std::min(heads, kMostUnitHeads);
  while (unit_heads > 0 && rope_bytes(1, unit_heads, k_heads, head_dim, size, cache) > kUnifiedMemory) --unit_heads;
  if (unit_heads == 0) return tiling;
  const int64_t groups = divide_up(heads, unit_heads);
  unit_heads = divide_up(heads, groups);
  const int64_t enough = std::max<int64_t>(1, kUnitBytes / (unit_heads * head_dim * size));
  int64_t unit_tokens = std::min({divide_up(tokens * groups, cores), enough, kMostUnitTokens, tokens});
  while (unit_tokens > 1 && rope_bytes(unit_tokens, unit_heads, k_heads, head_dim, size, cache) > kUnifiedMemory)
    --unit_tokens;
  tiling.tile_tokens = static_cast<int32_t>(unit_tokens);
  tiling.tile_heads = static_cast<int32_t>(unit_heads);
  tiling.cores = static_cast<int32_t>(std::min(cores, divide_up(tokens, unit_tokens) * groups));
  return tiling;
}

}  // namespace pyalpaca_npu
