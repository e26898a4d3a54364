// How attention's gradient is cut: the side of a product, rows and keys of a block, and what that takes of each memory.
#pragma once

#include "flash_forward.h"

namespace pyalpaca_npu {

constexpr int64_t kGradientBlock = 256, kGradientChunk = 4096;
constexpr int64_t kGradientStepSlots = 3, kGradientSumSlots = 2;  // kernels/flash_backward_tasks.h

struct FlashGradientTiling {
  int32_t cores = 0;  // 0: these shapes can't be served
  int32_t side = 0, q_block = 0, kv_block = 0, chunk = 0;
  int64_t workspace = 0;  // bytes, of all cores
};

inline FlashBytes flash_backward_bytes(const FlashGradientTiling& t, int64_t head_dim) {
  const int64_t width = t.side * head_dim, square = int64_t{t.side} * t.side, factor = std::max(width, square);
  const int64_t block = t.kv_block * head_dim;
  return {handed_out({2 * (2 * t.chunk + 2 * 64) * 4, 4 * t.chunk * 2, 3 * 64 * 8 * 4, 2 * 64 * 4, 64 * 8}),
          handed_out({2 * block * 2, 2 * block * 2, 2 * width * 2, 2 * (square + width) * 2}),
          handed_out({2 * factor * 2}), handed_out({2 * width * 2}), handed_out({2 * factor * 4})};
}

// The largest blocks that all cores have work with. Sequences of one length, or packed ones of which q_len and kv_len
// are the longest.
inline FlashGradientTiling flash_backward_tiling(int64_t batch, int64_t q_len, int64_t kv_len, int64_t heads,
                                                 int64_t kv_heads, int64_t head_dim, int64_t cores) {
  FlashGradientTiling t;
  const bool served = batch >= 1 && q_len >= 1 && kv_len >= 1 && heads >= 1 && kv_heads >= 1 && heads % kv_heads == 0 &&
                      head_dim >= 16 && head_dim <= 128 && head_dim % 16 == 0 && cores >= 1;
  if (!served) return t;
  int64_t keys = std::min(kGradientBlock, round_up_to(kv_len, 64));
  while (keys > 64 && batch * kv_heads * divide_up(kv_len, keys) < cores) keys = round_up_to(keys / 2, 64);
  t.kv_block = static_cast<int32_t>(keys);
  t.q_block = static_cast<int32_t>(std::min(kGradientBlock, round_up_to(q_len, 16)));
  t.side = static_cast<int32_t>(std::min<int64_t>(kFlashPart, std::max(t.kv_block, t.q_block)));
  t.chunk = kGradientChunk;
  t.cores = static_cast<int32_t>(std::min(cores, batch * kv_heads * divide_up(kv_len, keys)));
  t.workspace =
      t.cores * (kGradientStepSlots * 2 * t.q_block * keys * (4 + 2) + kGradientSumSlots * 2 * keys * head_dim * 4);
  return t;
}

}  // namespace pyalpaca_npu
