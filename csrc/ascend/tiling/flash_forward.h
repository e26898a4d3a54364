// How attention is cut: rows of a tile, keys of a part and of a stack, and what that takes of each memory.
#pragma once

#include "budget.h"

namespace pyalpaca_npu {

constexpr int64_t kL1Memory = 512 * 1024 - 256, kL0Memory = 64 * 1024, kL0CMemory = 128 * 1024;
constexpr int64_t kFlashRows = 128, kFlashPart = 128, kFlashStack = 512, kFlashChunk = 8192;
constexpr int64_t kFlashShare = 2, kFlashGroups = 8;
constexpr int64_t kFlashScoreSlots = 3, kFlashSlots = 3;  // kernels/flash_tasks.h

struct FlashTiling {
  int32_t cores = 0;  // 0: these shapes can't be served
  int32_t q_tile = 0, kv_tile = 0, stack = 0, chunk = 0;
  int32_t share = 1;      // tiles that keys are loaded for
  int64_t workspace = 0;  // bytes, of all cores
};

struct FlashBytes {
  int64_t unified, l1, l0a, l0b, l0c;
  bool fits() const {
    return unified <= kUnifiedMemory && l1 <= kL1Memory && l0a <= kL0Memory && l0b <= kL0Memory && l0c <= kL0CMemory;
  }
};

inline FlashBytes flash_forward_bytes(const FlashTiling& t, int64_t head_dim) {
  const int64_t half = std::min<int64_t>(t.q_tile, round_up_to(divide_up(t.q_tile, 2), 8));
  const int64_t q = t.q_tile * head_dim, kv = t.kv_tile * head_dim, part = int64_t{t.q_tile} * t.kv_tile;
  const int64_t half_stack = t.kv_tile > 0 ? divide_up(divide_up(t.stack, t.kv_tile), 2) * kv : 0;
  return {handed_out({2 * t.chunk * 4, 2 * t.chunk * 2, 2 * 64 * 4, t.share * half * head_dim * 4, t.chunk / 8 * 4,
                      4 * 64 * 8 * 4, 14 * 64 * 4, 64 * 8}),
          handed_out({2 * t.share * q * 2, 2 * half_stack * 2, 2 * part * 2, 2 * half_stack * 2}),
          handed_out({2 * std::max(q, part) * 2}), handed_out({2 * kv * 2}), handed_out({part * 4, q * 4})};
}

// The most rows that all cores have work with; keys by whole parts. Sequences of one length, or packed ones of which
// q_len and kv_len are the longest.
inline FlashTiling flash_forward_tiling(int64_t batch, int64_t q_len, int64_t kv_len, int64_t heads, int64_t kv_heads,
                                        int64_t head_dim, int64_t cores) {
  FlashTiling t;
  const bool served = batch >= 1 && q_len >= 1 && kv_len >= 0 && heads >= 1 && kv_heads >= 1 && heads % kv_heads == 0 &&
                      head_dim >= 16 && head_dim <= 128 && head_dim % 16 == 0 && cores >= 1;
  if (!served) return t;
  int64_t rows = std::min(kFlashRows, round_up_to(q_len, 16));
  while (rows > 32 && batch * heads * divide_up(q_len, rows) < cores) rows = round_up_to(rows / 2, 16);
  t.q_tile = static_cast<int32_t>(rows);
  t.stack = static_cast<int32_t>(std::min(kFlashStack, round_up_to(std::max<int64_t>(kv_len, 1), 64)));
  t.kv_tile = static_cast<int32_t>(std::min<int64_t>(kFlashPart, t.stack));
  t.chunk = kFlashChunk;
  // Groups are dealt whole: with some for each core, what one has more than another is little.
  if (batch * heads * divide_up(q_len, kFlashShare * rows) >= kFlashGroups * cores) t.share = kFlashShare;
  t.cores = static_cast<int32_t>(std::min(cores, batch * heads * divide_up(q_len, t.share * rows)));
  t.workspace = t.cores * (kFlashScoreSlots * rows * t.stack * 4 + kFlashSlots * rows * t.stack * 2 +
                           kFlashSlots * rows * head_dim * 4);
  return t;
}

}  // namespace pyalpaca_npu
