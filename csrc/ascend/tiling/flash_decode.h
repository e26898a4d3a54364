// How attention of one token over a cache is cut: keys of a split so that all cores have as much to read.
#pragma once

#include "flash_forward.h"

namespace pyalpaca_npu {

constexpr int64_t kShortestSplit = 256, kMostSplits = 64;  // so many lse of a row are merged at once
constexpr int64_t kSplitCost = 256;                        // what a split costs beside its keys, in keys
constexpr int64_t kDecodeChunk = 4096;

struct FlashDecodeTiling {
  FlashTiling of;     // as of attention; of.cores = 0: these shapes can't be served
  int64_t split = 0;  // keys
  int32_t splits = 0;
};

inline FlashBytes flash_decode_bytes(const FlashDecodeTiling& t, int64_t head_dim) {
  FlashBytes bytes = flash_forward_bytes(t.of, head_dim);
  bytes.unified += 2 * t.of.chunk * 2;  // results leave in fp32
  return bytes;
}
// Of the launch that merges the splits.
inline int64_t flash_merge_bytes(int64_t splits, int64_t head_dim) {
  return handed_out({2 * 64 * head_dim * 4, splits * 64 * 4, 64 * head_dim * 4, 64 * head_dim * 2, 5 * 64 * 4, 64 * 4,
                     64 * 8 * 4, 32});
}

inline FlashDecodeTiling flash_decode_tiling(int64_t batch, int64_t kv_len, int64_t heads, int64_t kv_heads,
                                             int64_t head_dim, int64_t cores) {
  FlashDecodeTiling t;
  const int64_t group = kv_heads >= 1 ? heads / kv_heads : 0;
  if (group < 1 || group > kFlashRows) return t;
  t.of = flash_forward_tiling(batch, group, kv_len, kv_heads, kv_heads, head_dim, 1);  // one tile for a group
  if (t.of.cores == 0 || heads % kv_heads != 0) {
    t.of.cores = 0;
    return t;
  }
  const int64_t tiles = batch * kv_heads;
  int64_t best = 0;
  for (int64_t splits = 1; splits <= kMostSplits; ++splits) {
    const int64_t keys = round_up_to(divide_up(std::max<int64_t>(kv_len, 1), splits), kFlashPart);
    if (splits > 1 && (keys < kShortestSplit || divide_up(kv_len, keys) < splits)) continue;
    const int64_t cost = divide_up(tiles * splits, cores) * (keys + kSplitCost);  // of the core with the most
    if (best != 0 && cost >= best) continue;
    best = cost;
    t.split = keys;
    t.splits = static_cast<int32_t>(splits);
  }
  t.of.chunk = kDecodeChunk;
  t.of.cores = static_cast<int32_t>(std::min(cores, tiles * t.splits));
  t.of.workspace = t.of.cores * (kFlashScoreSlots * t.of.q_tile * t.of.stack * 4 +
                                 kFlashSlots * t.of.q_tile * t.of.stack * 2 + kFlashSlots * t.of.q_tile * head_dim * 4);
  return t;
}

}  // namespace pyalpaca_npu
