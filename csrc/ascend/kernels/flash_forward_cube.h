// The cube core's part of attention: scores = q k^T of the stack after next, and values = weights v of this one, by
// turns.
//
// A part of a stack is `kv_tile` keys: its scores fill one half of L0C while the weights of another part are multiplied
// into the other half, so that the scores leave L0C under cover of that product. Each factor has two places in L0.
// Keys and values stay in L1, half a stack in each of two places, until the last tile of the group has used them.
#pragma once

#include "flash_tasks.h"

namespace pyalpaca_npu {

template <typename T>
class FlashForwardCube {
 public:
  __aicore__ inline FlashForwardCube(TPipe& pipe, const FlashShape& shape)
      : pipe_(pipe), shape_(shape), slots_(shape) {}

  __aicore__ inline void init(GM_ADDR q, GM_ADDR k, GM_ADDR v, GM_ADDR workspace, GM_ADDR q_starts, GM_ADDR kv_starts) {
    q_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(q));
    k_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(k));
    v_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(v));
    workspace_ = workspace + GetBlockIdx() * slots_.bytes;
    q_starts_ = q_starts;
    kv_starts_ = kv_starts;
    q_size_ = shape_.q_tile * shape_.head_dim;
    kv_size_ = shape_.kv_tile * shape_.head_dim;
    weight_size_ = shape_.q_tile * shape_.kv_tile;
    half_parts_ = half_stack_parts(shape_);
    left_size_ = q_size_ > weight_size_ ? q_size_ : weight_size_;
    pipe_.InitBuffer(q_buffer_, 2 * shape_.share * q_size_ * sizeof(T));
    pipe_.InitBuffer(k_buffer_, 2 * half_parts_ * kv_size_ * sizeof(T));
    pipe_.InitBuffer(weight_buffer_, 2 * weight_size_ * sizeof(T));
    pipe_.InitBuffer(v_buffer_, 2 * half_parts_ * kv_size_ * sizeof(T));
    pipe_.InitBuffer(left_buffer_, 2 * left_size_ * sizeof(T));
    pipe_.InitBuffer(right_buffer_, 2 * kv_size_ * sizeof(T));
    pipe_.InitBuffer(score_buffer_, weight_size_ * sizeof(float));
    pipe_.InitBuffer(value_buffer_, q_size_ * sizeof(float));
  }

  __aicore__ inline void run() {
    open();
    const int64_t core = GetBlockIdx(), cores = GetBlockNum();
    FlashWalk ahead(shape_, q_starts_, kv_starts_, core, cores), now(shape_, q_starts_, kv_starts_, core, cores);
    ahead.next();
    for (int32_t i = 0; i < kAhead && ahead.valid(); ++i, ahead.next()) {
      for (int32_t part = 0; part < ahead.parts(); ++part) scores(ahead, part);
    }
    for (now.next(); now.valid(); now.next()) {
      const int32_t score_parts = ahead.valid() ? ahead.parts() : 0;
      load_values(now, 0);
      for (int32_t part = 0; part < score_parts || part < now.parts(); ++part) {
        if (part < score_parts) scores(ahead, part);
        if (part == 0) CrossCoreWaitFlag(kWeightsReady);
        if (part < now.parts()) values(now, part);
        load_values(now, part + 1);
      }
      if (ahead.valid()) ahead.next();
    }
    close();
  }

 private:
  __aicore__ inline void open() {
    k_places_.open(pipe_);
    v_places_.open(pipe_);
    weight_places_.open(pipe_);
    factor_places_.open(pipe_);
    product_places_.open(pipe_);
  }
  __aicore__ inline void close() {
    k_places_.close(pipe_);
    v_places_.close(pipe_);
    weight_places_.close(pipe_);
    factor_places_.close(pipe_);
    product_places_.close(pipe_);
  }

  // Of a part, the keys this tile sees, or those in L1, which the group's tiles see.
  __aicore__ inline int32_t part_of(const FlashWalk& walk, int64_t keys, int32_t part) const {
    const int64_t rest = keys - walk.key() - part * shape_.kv_tile;
    return rest < shape_.kv_tile ? static_cast<int32_t>(rest) : shape_.kv_tile;
  }
  __aicore__ inline bool begins_half(int32_t part) const { return part % half_parts_ == 0; }

  // Rows of q of all tiles of a group.
  __aicore__ inline void load_group(const LocalTensor<T>& to, const FlashWalk& walk) {
    for (int32_t member = 0; member < shape_.share; ++member) {
      const FlashTile& tile = walk.tile(member);
      if (tile.keys > 0) load_left_rows(to[member * q_size_], q_[tile.q], tile.rows, shape_.head_dim, shape_.q_stride);
    }
  }

  // Half a stack of the group's keys or values into L1, a part after the other, from that of number `part` on.
  __aicore__ inline void load_half(const LocalTensor<T>& to, const GlobalTensor<T>& from, int64_t stride,
                                   const FlashWalk& walk, int32_t part) {
    for (int32_t i = 0; i < half_parts_ && (part + i) * shape_.kv_tile < shape_.stack; ++i) {
      const int32_t keys = part_of(walk, walk.group_keys(), part + i);
      if (keys <= 0) return;
      load_fractals(to[i * kv_size_], from[(walk.key() + (part + i) * shape_.kv_tile) * stride], keys, shape_.head_dim,
                    stride, fractals(keys) * kSide);
    }
  }

  // Whether the half stack that begins with this part is not in L1 yet.
  __aicore__ inline bool to_load(const FlashWalk& walk, int32_t part) const {
    return part < walk.parts() && begins_half(part) &&
           walk.member() == walk.first_that_sees(walk.key() + part * shape_.kv_tile);
  }
  // Whether this part is the last use of its half stack.
  __aicore__ inline bool used_up(const FlashWalk& walk, int32_t part) const {
    return (begins_half(part + 1) || part == walk.parts() - 1) &&
           walk.member() == walk.last_that_sees(walk.key() + part / half_parts_ * half_parts_ * shape_.kv_tile);
  }
  __aicore__ inline int32_t half_place(const FlashWalk& walk, int32_t part) const {
    return (walk.halves() + part / half_parts_) % 2;
  }
  // Of keys or values in L1, a part.
  __aicore__ inline LocalTensor<T> part_in(TBuf<TPosition::B1>& buffer, const FlashWalk& walk, int32_t part) {
    return buffer.Get<T>()[(half_place(walk, part) * half_parts_ + part % half_parts_) * kv_size_];
  }

  // The values of half a stack from this part on, which need not wait for the weights.
  __aicore__ inline void load_values(const FlashWalk& walk, int32_t part) {
    if (!to_load(walk, part)) return;
    const int32_t place = half_place(walk, part);
    WaitFlag<HardEvent::MTE1_MTE2>(v_places_.emptied[place]);
    load_half(part_in(v_buffer_, walk, part), v_[walk.tile().v], shape_.v_stride, walk, part);
    SetFlag<HardEvent::MTE2_MTE1>(v_places_.filled[place]);
  }

  // Scores of a part of the stack of `walk`, and word to the vector cores after the last.
  __aicore__ inline void scores(const FlashWalk& walk, int32_t part) {
    const FlashTile& tile = walk.tile();
    const int32_t rows = cube_rows(tile.rows), keys = part_of(walk, tile.keys, part), head_dim = shape_.head_dim;
    const int32_t place = factor_turn_++ % 2, k_place = half_place(walk, part);
    const bool last_part = part == walk.parts() - 1, loads = to_load(walk, part);
    const LocalTensor<T> group = q_buffer_.Get<T>()[walk.group_number() % 2 * shape_.share * q_size_];
    if (loads) {
      // Where a place of keys is empty again, the last product with q of the group before the last is done.
      WaitFlag<HardEvent::MTE1_MTE2>(k_places_.emptied[k_place]);
      if (part == 0 && walk.first()) load_group(group, walk);
      load_half(part_in(k_buffer_, walk, part), k_[tile.k], shape_.k_stride, walk, part);
      SetFlag<HardEvent::MTE2_MTE1>(k_places_.filled[k_place]);
    }

    const LocalTensor<T> left = left_buffer_.Get<T>()[place * left_size_],
                         right = right_buffer_.Get<T>()[place * kv_size_];
    const int32_t loaded = part_of(walk, walk.group_keys(), part);
    WaitFlag<HardEvent::M_MTE1>(factor_places_.emptied[place]);
    if (loads) WaitFlag<HardEvent::MTE2_MTE1>(k_places_.filled[k_place]);
    load_left(left, group[walk.member() * q_size_], rows, head_dim);
    load_right_transposed(right, part_in(k_buffer_, walk, part), loaded, head_dim);
    if (used_up(walk, part)) SetFlag<HardEvent::MTE1_MTE2>(k_places_.emptied[k_place]);
    SetFlag<HardEvent::MTE1_M>(factor_places_.filled[place]);

    const LocalTensor<float> product = score_buffer_.Get<float>();
    WaitFlag<HardEvent::MTE1_M>(factor_places_.filled[place]);
    WaitFlag<HardEvent::FIX_M>(product_places_.emptied[0]);
    multiply(product, left, right, rows, loaded, head_dim, false);
    SetFlag<HardEvent::M_MTE1>(factor_places_.emptied[place]);
    SetFlag<HardEvent::M_FIX>(product_places_.filled[0]);

    GlobalTensor<float> slot;
    slot.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(workspace_ + slots_.score_slot(walk.number())),
                         shape_.q_tile * shape_.stack);
    WaitFlag<HardEvent::M_FIX>(product_places_.filled[0]);
    store_product(slot[part * shape_.kv_tile], product, rows, keys, shape_.stack);
    SetFlag<HardEvent::FIX_M>(product_places_.emptied[0]);
    if (last_part) CrossCoreSetFlag<2, PIPE_FIX>(kScoresReady);
  }

  // Adds a part's weights v to the values of the stack, which go out after the last part.
  __aicore__ inline void values(const FlashWalk& walk, int32_t part) {
    const FlashTile& tile = walk.tile();
    const int32_t rows = cube_rows(tile.rows), keys = part_of(walk, tile.keys, part), head_dim = shape_.head_dim;
    const bool last_part = part == walk.parts() - 1;
    const int32_t weight_place = weight_turn_++ % 2, v_place = half_place(walk, part), place = factor_turn_++ % 2;
    const LocalTensor<T> weights = weight_buffer_.Get<T>()[weight_place * weight_size_];
    GlobalTensor<T> slot;
    slot.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(workspace_ + slots_.weight_slot(walk.number())),
                         shape_.q_tile * shape_.stack);
    WaitFlag<HardEvent::MTE1_MTE2>(weight_places_.emptied[weight_place]);
    load_fractals(weights, slot[part * shape_.kv_tile], rows, keys, shape_.stack, fractals(rows) * kSide);
    SetFlag<HardEvent::MTE2_MTE1>(weight_places_.filled[weight_place]);

    const LocalTensor<T> left = left_buffer_.Get<T>()[place * left_size_],
                         right = right_buffer_.Get<T>()[place * kv_size_];
    WaitFlag<HardEvent::M_MTE1>(factor_places_.emptied[place]);
    if (to_load(walk, part)) WaitFlag<HardEvent::MTE2_MTE1>(v_places_.filled[v_place]);
    load_right(right, part_in(v_buffer_, walk, part), keys, head_dim, part_of(walk, walk.group_keys(), part));
    if (used_up(walk, part)) SetFlag<HardEvent::MTE1_MTE2>(v_places_.emptied[v_place]);
    WaitFlag<HardEvent::MTE2_MTE1>(weight_places_.filled[weight_place]);
    load_left(left, weights, rows, keys);
    SetFlag<HardEvent::MTE1_MTE2>(weight_places_.emptied[weight_place]);
    SetFlag<HardEvent::MTE1_M>(factor_places_.filled[place]);

    const LocalTensor<float> product = value_buffer_.Get<float>();
    WaitFlag<HardEvent::MTE1_M>(factor_places_.filled[place]);
    if (part == 0) WaitFlag<HardEvent::FIX_M>(product_places_.emptied[1]);
    multiply(product, left, right, rows, head_dim, keys, part > 0);
    SetFlag<HardEvent::M_MTE1>(factor_places_.emptied[place]);
    if (!last_part) return;

    SetFlag<HardEvent::M_FIX>(product_places_.filled[1]);
    GlobalTensor<float> out;
    out.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(workspace_ + slots_.value_slot(walk.number())), q_size_);
    WaitFlag<HardEvent::M_FIX>(product_places_.filled[1]);
    store_product(out, product, rows, head_dim, head_dim);
    SetFlag<HardEvent::FIX_M>(product_places_.emptied[1]);
    CrossCoreSetFlag<2, PIPE_FIX>(kValuesReady);
  }

  TPipe& pipe_;
  const FlashShape& shape_;
  FlashSlots slots_;
  GlobalTensor<T> q_, k_, v_;
  GM_ADDR workspace_;
  GM_ADDR q_starts_;
  GM_ADDR kv_starts_;
  TBuf<TPosition::A1> q_buffer_, weight_buffer_;
  TBuf<TPosition::B1> k_buffer_, v_buffer_;
  TBuf<TPosition::A2> left_buffer_;
  TBuf<TPosition::B2> right_buffer_;
  TBuf<TPosition::CO1> score_buffer_, value_buffer_;
  PlacesInL1 k_places_, v_places_, weight_places_;
  PlacesOfFactors factor_places_;
  PlacesOfProducts product_places_;
  int32_t q_size_, kv_size_, weight_size_, left_size_, half_parts_;
  int32_t weight_turn_ = 0, factor_turn_ = 0;
};

}  // namespace pyalpaca_npu
