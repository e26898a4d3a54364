// Attention cut in pieces: tiles of query rows, and for each the keys it sees, a stack at a time.
//
// Tiles that follow each other make a group: it takes each stack once for all its tiles, so that the keys and values
// which one has loaded serve the others. Groups are dealt to the AI cores heaviest first, to and fro, so that all have
// the same to do though a causal tile sees the more keys the later it is; each core begins with another round of the
// deal, so that they do not all read keys for the first time at once, nor all have short tiles at once. The stacks of
// all tiles of a core are one sequence: the cube core and its two vector cores walk through it, each at its own pace,
// and nothing stands still between two groups.
#pragma once

#include "flash_cube.h"

namespace pyalpaca_npu {

struct FlashShape {
  int64_t batch, q_len, kv_len;  // of packed sequences: how many, and the longest
  int64_t q_batch_stride, q_stride, q_head_stride;
  int64_t k_batch_stride, k_stride, k_head_stride;
  int64_t v_batch_stride, v_stride, v_head_stride;
  int64_t lse_batch_stride, lse_head_stride, q_offset;
  int32_t heads, kv_heads, head_dim, causal, q_tile, kv_tile, stack, chunk, share;
  float scale;
  int64_t out_batch_stride, out_stride, out_head_stride;
  int64_t split, out_split_stride, lse_split_stride;  // keys of a split, 0: a tile sees all its keys at once
};

constexpr int32_t kMostShare = 2;  // tiles of a group

// Rows of one head of one sequence, and where their tensors lie, in elements.
struct FlashTile {
  int64_t q, k, v, out, lse;
  int64_t visible;  // how many keys the first row sees, were there any number of them before and after
  int64_t keys;     // how many keys any row sees
  int32_t rows;
  int32_t number;  // of this core's tiles that see any keys
};

// Parts of half a stack, or of one more than the rest.
__aicore__ inline int32_t half_stack_parts(const FlashShape& shape) {
  return ((shape.stack + shape.kv_tile - 1) / shape.kv_tile + 1) / 2;
}

class FlashWalk {
 public:
  __aicore__ inline FlashWalk(const FlashShape& shape, GM_ADDR q_starts, GM_ADDR kv_starts, int64_t core, int64_t cores)
      : shape_(shape), core_(core), cores_(cores), packed_(q_starts != nullptr) {
    q_starts_.SetGlobalBuffer(reinterpret_cast<__gm__ int64_t*>(q_starts), shape.batch + 1);
    kv_starts_.SetGlobalBuffer(reinterpret_cast<__gm__ int64_t*>(kv_starts), shape.batch + 1);
    const int64_t group = int64_t{shape.q_tile} * shape.share;
    half_ = half_stack_parts(shape) * shape.kv_tile;
    levels_ = (shape.q_len + group - 1) / group;
    splits_ = shape.split > 0 && shape.kv_len > 0 ? (shape.kv_len + shape.split - 1) / shape.split : 1;
    lengths_ = !packed_ && kv_starts != nullptr;  // how many keys each sequence has, in the place of their starts
  }

  // To the next tile's turn with this stack of keys, else the next stack, else the next group that sees any.
  __aicore__ inline bool next() {
    valid_ = false;
    if (started_) {
      ++number_;
      while (!valid_ && key_ < keys_) {
        if (++member_ == shape_.share) {
          const int64_t stack = keys_ - key_ < shape_.stack ? keys_ - key_ : shape_.stack;
          halves_ += static_cast<int32_t>((stack + half_ - 1) / half_);
          member_ = 0;
          key_ += shape_.stack;
        }
        valid_ = key_ < tiles_[member_].keys;
      }
    }
    if (!valid_) {
      if (started_) ++group_number_;
      do {
        valid_ = next_group();
      } while (valid_ && keys_ == 0);
      key_ = 0;
      member_ = first_that_sees(0);
    }
    started_ = true;
    const int64_t rest = tile().keys - key_;
    if (valid_) columns_ = rest < shape_.stack ? static_cast<int32_t>(rest) : shape_.stack;
    return valid_;
  }

  // To the next group, whether it sees keys or not.
  __aicore__ inline bool next_group() {
    const int64_t total = levels_ * splits_ * shape_.batch * shape_.heads, rounds = (total + cores_ - 1) / cores_;
    while (round_ < rounds) {
      const int64_t round = (round_ + core_ * rounds / cores_) % rounds;
      const int64_t place = round % 2 == 0 ? core_ : cores_ - 1 - core_, at = round * cores_ + place;
      ++round_;
      if (at < total && take(at)) return true;
    }
    return false;
  }

  __aicore__ inline bool valid() const { return valid_; }
  __aicore__ inline const FlashTile& tile() const { return tiles_[member_]; }
  __aicore__ inline const FlashTile& tile(int32_t member) const {
    return tiles_[member];
  }  // without rows: there is none
  __aicore__ inline int32_t member() const { return member_; }
  __aicore__ inline int64_t key() const { return key_; }          // of the tile's keys, the first of the stack
  __aicore__ inline int64_t group_keys() const { return keys_; }  // as many as any tile of the group sees
  __aicore__ inline int32_t columns() const { return columns_; }  // keys of the stack
  __aicore__ inline bool first() const { return key_ == 0; }
  __aicore__ inline bool last() const { return key_ + columns_ == tile().keys; }
  __aicore__ inline int32_t number() const { return number_; }  // of the turn
  __aicore__ inline int32_t halves() const { return halves_; }  // half stacks before this one
  __aicore__ inline int32_t group_number() const { return group_number_; }
  __aicore__ inline int32_t parts() const { return (columns_ + shape_.kv_tile - 1) / shape_.kv_tile; }
  // Of the group's tiles, the first and the last that see a key.
  __aicore__ inline int32_t first_that_sees(int64_t key) const {
    int32_t member = 0;
    while (member + 1 < shape_.share && tiles_[member].keys <= key) ++member;
    return member;
  }
  __aicore__ inline int32_t last_that_sees(int64_t key) const {
    int32_t member = shape_.share - 1;
    while (member > 0 && tiles_[member].keys <= key) --member;
    return member;
  }

 private:
  __aicore__ inline bool take(int64_t at) {
    const int64_t head = at % shape_.heads, sequence = at / shape_.heads % shape_.batch;
    const int64_t split = at / shape_.heads / shape_.batch % splits_;
    const int64_t level = at / shape_.heads / shape_.batch / splits_;
    const int64_t q_start = packed_ ? q_starts_.GetValue(sequence) : 0;
    const int64_t kv_start = packed_ ? kv_starts_.GetValue(sequence) : split * shape_.split;
    const int64_t q_len = packed_ ? q_starts_.GetValue(sequence + 1) - q_start : shape_.q_len;
    int64_t kv_len = packed_    ? kv_starts_.GetValue(sequence + 1) - kv_start
                     : lengths_ ? kv_starts_.GetValue(sequence)
                                : shape_.kv_len;
    if (shape_.split > 0) {
      kv_len = kv_len < kv_start ? 0 : kv_len - kv_start;
      if (kv_len > shape_.split) kv_len = shape_.split;
    }
    keys_ = 0;
    bool any = false;
    for (int32_t member = 0; member < shape_.share; ++member) {
      FlashTile& tile = tiles_[member];
      const int64_t row = ((levels_ - 1 - level) * shape_.share + member) * shape_.q_tile, left = q_len - row;
      tile.rows = left < shape_.q_tile ? (left < 0 ? 0 : static_cast<int32_t>(left)) : shape_.q_tile;
      tile.keys = 0;
      if (tile.rows == 0) continue;
      any = true;
      const int64_t kv_head = head / (shape_.heads / shape_.kv_heads);
      const int64_t batch = packed_ ? 0 : sequence, q_row = q_start + row;
      tile.q = batch * shape_.q_batch_stride + q_row * shape_.q_stride + head * shape_.q_head_stride;
      tile.k = batch * shape_.k_batch_stride + kv_start * shape_.k_stride + kv_head * shape_.k_head_stride;
      tile.v = batch * shape_.v_batch_stride + kv_start * shape_.v_stride + kv_head * shape_.v_head_stride;
      tile.out = split * shape_.out_split_stride + batch * shape_.out_batch_stride + q_row * shape_.out_stride +
                 head * shape_.out_head_stride;
      tile.lse =
          split * shape_.lse_split_stride + batch * shape_.lse_batch_stride + head * shape_.lse_head_stride + q_row;
      // The last query of a packed sequence sees its last key.
      tile.visible = row + 1 + shape_.q_offset + (packed_ ? kv_len - q_len : 0);
      const int64_t end = tile.visible + tile.rows - 1;
      tile.keys = !shape_.causal || end > kv_len ? kv_len : (end < 0 ? 0 : end);
      if (tile.keys > 0) tile.number = tiles_taken_++;
      if (tile.keys > keys_) keys_ = tile.keys;
    }
    return any;
  }

  const FlashShape& shape_;
  GlobalTensor<int64_t> q_starts_, kv_starts_;
  FlashTile tiles_[kMostShare] = {};
  int64_t core_, cores_, levels_, splits_, round_ = 0, key_ = 0, keys_ = 0;
  int32_t member_ = 0, columns_ = 0, number_ = 0, group_number_ = 0, tiles_taken_ = 0, halves_ = 0, half_;
  bool packed_, lengths_, started_ = false, valid_ = false;
};

// ---- what the cores of a group hand each other through global memory: slots, and flags that say they are full

constexpr int32_t kAhead = 2;                // stacks whose scores are computed before their turn
constexpr int32_t kScoreSlots = kAhead + 1;  // one is read while two are filled
constexpr int32_t kLag = 2;                  // stacks whose weights are computed before the values of one are added
constexpr int32_t kLate = kLag + 1;          // what is kept of as many stacks, or of as many tiles
constexpr int32_t kWeightSlots = kLate, kValueSlots = kLate;
constexpr uint16_t kScoresReady = 0, kWeightsReady = 1, kValuesReady = 2;

// Rows of the first of the two vector cores; the second has the rest.
__aicore__ inline int32_t first_rows(int32_t rows) {
  const int32_t first = round_up((rows + 1) / 2, kBlock);
  return first < rows ? first : rows;
}

// One core's part of the workspace, in bytes.
struct FlashSlots {
  int64_t scores, weights, values, bytes;
  __aicore__ inline FlashSlots(const FlashShape& shape) {
    scores = int64_t{shape.q_tile} * shape.stack * 4;
    weights = int64_t{shape.q_tile} * shape.stack * 2;
    values = int64_t{shape.q_tile} * shape.head_dim * 4;
    bytes = kScoreSlots * scores + kWeightSlots * weights + kValueSlots * values;
  }
  __aicore__ inline int64_t score_slot(int32_t number) const { return number % kScoreSlots * scores; }
  __aicore__ inline int64_t weight_slot(int32_t number) const {
    return kScoreSlots * scores + number % kWeightSlots * weights;
  }
  __aicore__ inline int64_t value_slot(int32_t number) const {
    return kScoreSlots * scores + kWeightSlots * weights + number % kValueSlots * values;
  }
};

}  // namespace pyalpaca_npu
