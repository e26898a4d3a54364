// The gradient of attention cut in pieces: blocks of keys of a head that queries share, and for each the blocks of
// query rows that see it, of all the heads that share it.
//
// A block of keys belongs to one AI core, so what its gradients are sums of comes in one order. Blocks are dealt out
// heaviest first, to and fro: the first keys are seen by the most rows. The steps of all blocks of a core are one
// sequence, which the cube core and its vector cores walk through each at its own pace.
#pragma once

#include "flash_tasks.h"

namespace pyalpaca_npu {

struct FlashGradientShape {
  FlashShape of;  // tensors; q_tile is the side of a product, kv_tile not used, stack a block of keys
  int64_t dout_batch_stride, dout_stride, dout_head_stride;
  int32_t q_block;
};

// A block of keys, and where its tensors lie, in elements.
struct FlashKeys {
  int64_t k, v, dk;
  int64_t key, first_row, q_len;  // its first key; the first row that sees one of them
  int64_t offset;                 // row i sees i + offset + 1 keys, if causal
  int64_t batch, q_start, head;   // the first of the heads that share it
  int32_t keys;
};
// Rows of one head that see a block of keys.
struct FlashRows {
  int64_t q, dout, lse, dq;
  int64_t visible;  // how many keys of the block the first row sees, were there any number of them before and after
  int32_t rows;
};

class FlashGradientWalk {
 public:
  __aicore__ inline FlashGradientWalk(const FlashGradientShape& shape, GM_ADDR q_starts, GM_ADDR kv_starts,
                                      int64_t core, int64_t cores)
      : shape_(shape), core_(core), cores_(cores), packed_(q_starts != nullptr) {
    q_starts_.SetGlobalBuffer(reinterpret_cast<__gm__ int64_t*>(q_starts), shape.of.batch + 1);
    kv_starts_.SetGlobalBuffer(reinterpret_cast<__gm__ int64_t*>(kv_starts), shape.of.batch + 1);
    levels_ = (shape.of.kv_len + shape.of.stack - 1) / shape.of.stack;
    group_ = shape.of.heads / shape.of.kv_heads;
  }

  // To the next block of rows, for the same keys or for the next ones that any row sees.
  __aicore__ inline bool next() {
    if (started_) ++number_;
    first_ = false;
    row_ += shape_.q_block;
    if (started_ && row_ >= keys_.q_len) {
      row_ = keys_.first_row;
      ++head_;
    }
    if (!started_ || head_ == group_) {
      valid_ = next_keys();
      while (valid_ && keys_.first_row >= keys_.q_len) valid_ = next_keys();
      if (started_) ++keys_number_;
      first_ = true;
      head_ = 0;
      row_ = keys_.first_row;
    }
    started_ = true;
    if (valid_) take_rows();
    return valid_;
  }

  // To the next block of keys, whether any row sees it or not.
  __aicore__ inline bool next_keys() {
    const int64_t total = levels_ * shape_.of.batch * shape_.of.kv_heads;
    while (true) {
      const int64_t place = round_ % 2 == 0 ? core_ : cores_ - 1 - core_, at = round_ * cores_ + place;
      if (round_ * cores_ >= total) return false;
      ++round_;
      if (at < total && take_keys(at)) return true;
    }
  }

  __aicore__ inline bool valid() const { return valid_; }
  __aicore__ inline const FlashKeys& keys() const { return keys_; }
  __aicore__ inline const FlashRows& rows() const { return rows_; }
  __aicore__ inline bool first() const { return first_; }  // of the steps of a block of keys
  __aicore__ inline bool last() const { return head_ == group_ - 1 && row_ + shape_.q_block >= keys_.q_len; }
  __aicore__ inline int32_t number() const { return number_; }
  __aicore__ inline int32_t keys_number() const { return keys_number_; }
  __aicore__ inline int32_t q_parts() const { return (rows_.rows + shape_.of.q_tile - 1) / shape_.of.q_tile; }
  __aicore__ inline int32_t kv_parts() const { return (keys_.keys + shape_.of.q_tile - 1) / shape_.of.q_tile; }

 private:
  __aicore__ inline bool take_keys(int64_t at) {
    const FlashShape& of = shape_.of;
    const int64_t level = at / (of.batch * of.kv_heads), rest = at % (of.batch * of.kv_heads);
    const int64_t sequence = rest / of.kv_heads, kv_head = rest % of.kv_heads;
    const int64_t q_start = packed_ ? q_starts_.GetValue(sequence) : 0;
    const int64_t kv_start = packed_ ? kv_starts_.GetValue(sequence) : 0;
    const int64_t q_len = packed_ ? q_starts_.GetValue(sequence + 1) - q_start : of.q_len;
    const int64_t kv_len = packed_ ? kv_starts_.GetValue(sequence + 1) - kv_start : of.kv_len;
    const int64_t key = level * of.stack, batch = packed_ ? 0 : sequence, kv_row = kv_start + key;
    if (key >= kv_len) return false;
    keys_.keys = kv_len - key < of.stack ? static_cast<int32_t>(kv_len - key) : of.stack;
    keys_.key = key;
    keys_.k = batch * of.k_batch_stride + kv_row * of.k_stride + kv_head * of.k_head_stride;
    keys_.v = batch * of.v_batch_stride + kv_row * of.v_stride + kv_head * of.v_head_stride;
    keys_.dk = ((batch * of.kv_len + kv_row) * of.kv_heads + kv_head) * of.head_dim;
    keys_.offset = of.q_offset + (packed_ ? kv_len - q_len : 0);
    keys_.batch = batch;
    keys_.q_start = q_start;
    keys_.q_len = q_len;
    keys_.head = kv_head * group_;
    const int64_t first = key - keys_.offset;
    keys_.first_row = !of.causal || first < 0 ? 0 : first;
    return true;
  }

  __aicore__ inline void take_rows() {
    const FlashShape& of = shape_.of;
    const int64_t head = keys_.head + head_, row = keys_.q_start + row_, batch = keys_.batch;
    rows_.rows = keys_.q_len - row_ < shape_.q_block ? static_cast<int32_t>(keys_.q_len - row_) : shape_.q_block;
    rows_.q = batch * of.q_batch_stride + row * of.q_stride + head * of.q_head_stride;
    rows_.dout = batch * shape_.dout_batch_stride + row * shape_.dout_stride + head * shape_.dout_head_stride;
    rows_.lse = batch * of.lse_batch_stride + head * of.lse_head_stride + row;
    rows_.dq = ((batch * of.q_len + row) * of.heads + head) * of.head_dim;
    rows_.visible = row_ + keys_.offset + 1 - keys_.key;
  }

  const FlashGradientShape& shape_;
  GlobalTensor<int64_t> q_starts_, kv_starts_;
  FlashKeys keys_;
  FlashRows rows_;
  int64_t core_, cores_, levels_, group_, round_ = 0, row_ = 0, head_ = 0;
  int32_t number_ = 0, keys_number_ = 0;
  bool packed_, started_ = false, valid_ = false, first_ = false;
};

// ---- what the cores of a group hand each other through global memory

constexpr int32_t kGradientAhead = 2, kGradientSlots = kGradientAhead + 1, kSumSlots = 2;
constexpr uint16_t kSumsReady = 2;  // beside kScoresReady and kWeightsReady

// One core's part of the workspace, in bytes. A slot of scores has those of dout v^T behind it, a slot of weights their
// gradients, a slot of sums dk and dv.
struct FlashGradientSlots {
  int64_t scores, weights, sums, bytes;
  __aicore__ inline FlashGradientSlots(const FlashGradientShape& shape) {
    scores = int64_t{shape.q_block} * shape.of.stack * 4;
    weights = int64_t{shape.q_block} * shape.of.stack * 2;
    sums = int64_t{shape.of.stack} * shape.of.head_dim * 4;
    bytes = kGradientSlots * 2 * (scores + weights) + kSumSlots * 2 * sums;
  }
  __aicore__ inline int64_t score_slot(int32_t number) const { return number % kGradientSlots * 2 * scores; }
  __aicore__ inline int64_t weight_slot(int32_t number) const {
    return kGradientSlots * 2 * scores + number % kGradientSlots * 2 * weights;
  }
  __aicore__ inline int64_t sum_slot(int32_t keys_number) const {
    return kGradientSlots * 2 * (scores + weights) + keys_number % kSumSlots * 2 * sums;
  }
};

}  // namespace pyalpaca_npu
