// The cube core's part of attention: scores = q k^T of the stack after next, and values = weights v of this one, by
// turns.
//
// A part of a stack is `kv_tile` keys: its scores fill one half of L0C while the weights of another part are multiplied
// into the other half, so that the scores leave L0C under cover of that product. Each factor has two places in L1 and
// in L0.
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
    left_size_ = q_size_ > weight_size_ ? q_size_ : weight_size_;
    pipe_.InitBuffer(q_buffer_, 2 * q_size_ * sizeof(T));
    pipe_.InitBuffer(k_buffer_, 2 * kv_size_ * sizeof(T));
    pipe_.InitBuffer(weight_buffer_, 2 * weight_size_ * sizeof(T));
    pipe_.InitBuffer(v_buffer_, 2 * kv_size_ * sizeof(T));
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
      for (int32_t part = 0; part < score_parts || part < now.parts(); ++part) {
        if (part < score_parts) scores(ahead, part);
        if (part == 0) CrossCoreWaitFlag(kWeightsReady);
        if (part < now.parts()) values(now, part);
      }
      if (ahead.valid()) ahead.next();
    }
    close();
  }

 private:
  __aicore__ inline void open() {
    for (int32_t i = 0; i < 2; ++i) {
      q_filled_[i] = pipe_.AllocEventID<HardEvent::MTE2_MTE1>();
      k_filled_[i] = pipe_.AllocEventID<HardEvent::MTE2_MTE1>();
      v_filled_[i] = pipe_.AllocEventID<HardEvent::MTE2_MTE1>();
      q_emptied_[i] = pipe_.AllocEventID<HardEvent::MTE1_MTE2>();
      k_emptied_[i] = pipe_.AllocEventID<HardEvent::MTE1_MTE2>();
      v_emptied_[i] = pipe_.AllocEventID<HardEvent::MTE1_MTE2>();
      factors_filled_[i] = pipe_.AllocEventID<HardEvent::MTE1_M>();
      factors_emptied_[i] = pipe_.AllocEventID<HardEvent::M_MTE1>();
      product_filled_[i] = pipe_.AllocEventID<HardEvent::M_FIX>();
      product_emptied_[i] = pipe_.AllocEventID<HardEvent::FIX_M>();
      SetFlag<HardEvent::MTE1_MTE2>(q_emptied_[i]);
      SetFlag<HardEvent::MTE1_MTE2>(k_emptied_[i]);
      SetFlag<HardEvent::MTE1_MTE2>(v_emptied_[i]);
      SetFlag<HardEvent::M_MTE1>(factors_emptied_[i]);
      SetFlag<HardEvent::FIX_M>(product_emptied_[i]);
    }
  }

  __aicore__ inline void close() {
    for (int32_t i = 0; i < 2; ++i) {
      WaitFlag<HardEvent::MTE1_MTE2>(q_emptied_[i]);
      WaitFlag<HardEvent::MTE1_MTE2>(k_emptied_[i]);
      WaitFlag<HardEvent::MTE1_MTE2>(v_emptied_[i]);
      WaitFlag<HardEvent::M_MTE1>(factors_emptied_[i]);
      WaitFlag<HardEvent::FIX_M>(product_emptied_[i]);
      pipe_.ReleaseEventID<HardEvent::MTE2_MTE1>(q_filled_[i]);
      pipe_.ReleaseEventID<HardEvent::MTE2_MTE1>(k_filled_[i]);
      pipe_.ReleaseEventID<HardEvent::MTE2_MTE1>(v_filled_[i]);
      pipe_.ReleaseEventID<HardEvent::MTE1_MTE2>(q_emptied_[i]);
      pipe_.ReleaseEventID<HardEvent::MTE1_MTE2>(k_emptied_[i]);
      pipe_.ReleaseEventID<HardEvent::MTE1_MTE2>(v_emptied_[i]);
      pipe_.ReleaseEventID<HardEvent::MTE1_M>(factors_filled_[i]);
      pipe_.ReleaseEventID<HardEvent::M_MTE1>(factors_emptied_[i]);
      pipe_.ReleaseEventID<HardEvent::M_FIX>(product_filled_[i]);
      pipe_.ReleaseEventID<HardEvent::FIX_M>(product_emptied_[i]);
    }
  }

  __aicore__ inline int32_t keys_of(const FlashWalk& walk, int32_t part) const {
    const int32_t rest = walk.columns() - part * shape_.kv_tile;
    return rest < shape_.kv_tile ? rest : shape_.kv_tile;
  }

  // Scores of a part of the stack of `walk`, and word to the vector cores after the last.
  __aicore__ inline void scores(const FlashWalk& walk, int32_t part) {
    const FlashTile& tile = walk.tile();
    const int32_t rows = cube_rows(tile.rows), keys = keys_of(walk, part), head_dim = shape_.head_dim;
    const bool first = walk.first() && part == 0, last_part = part == walk.parts() - 1;
    const int32_t q_place = walk.tile_number() % 2, k_place = k_turn_++ % 2, place = factor_turn_++ % 2;
    const LocalTensor<T> q = q_buffer_.Get<T>()[q_place * q_size_], k = k_buffer_.Get<T>()[k_place * kv_size_];
    if (first) {
      WaitFlag<HardEvent::MTE1_MTE2>(q_emptied_[q_place]);
      load_left_rows(q, q_[tile.q], tile.rows, head_dim, shape_.q_stride);
      SetFlag<HardEvent::MTE2_MTE1>(q_filled_[q_place]);
    }
    WaitFlag<HardEvent::MTE1_MTE2>(k_emptied_[k_place]);
    const int64_t key = walk.key() + part * shape_.kv_tile;
    load_fractals(k, k_[tile.k + key * shape_.k_stride], keys, head_dim, shape_.k_stride, fractals(keys) * kSide);
    SetFlag<HardEvent::MTE2_MTE1>(k_filled_[k_place]);

    const LocalTensor<T> left = left_buffer_.Get<T>()[place * left_size_],
                         right = right_buffer_.Get<T>()[place * kv_size_];
    WaitFlag<HardEvent::M_MTE1>(factors_emptied_[place]);
    if (first) WaitFlag<HardEvent::MTE2_MTE1>(q_filled_[q_place]);
    load_left(left, q, rows, head_dim);
    if (walk.last() && last_part) SetFlag<HardEvent::MTE1_MTE2>(q_emptied_[q_place]);
    WaitFlag<HardEvent::MTE2_MTE1>(k_filled_[k_place]);
    load_right_transposed(right, k, keys, head_dim);
    SetFlag<HardEvent::MTE1_MTE2>(k_emptied_[k_place]);
    SetFlag<HardEvent::MTE1_M>(factors_filled_[place]);

    const LocalTensor<float> product = score_buffer_.Get<float>();
    WaitFlag<HardEvent::MTE1_M>(factors_filled_[place]);
    WaitFlag<HardEvent::FIX_M>(product_emptied_[0]);
    multiply(product, left, right, rows, keys, head_dim, false);
    SetFlag<HardEvent::M_MTE1>(factors_emptied_[place]);
    SetFlag<HardEvent::M_FIX>(product_filled_[0]);

    GlobalTensor<float> slot;
    slot.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(workspace_ + slots_.score_slot(walk.number())),
                         shape_.q_tile * shape_.stack);
    WaitFlag<HardEvent::M_FIX>(product_filled_[0]);
    store_product(slot[part * shape_.kv_tile], product, rows, keys, shape_.stack);
    SetFlag<HardEvent::FIX_M>(product_emptied_[0]);
    if (last_part) CrossCoreSetFlag<2, PIPE_FIX>(kScoresReady);
  }

  // Adds a part's weights v to the values of the stack, which go out after the last part.
  __aicore__ inline void values(const FlashWalk& walk, int32_t part) {
    const FlashTile& tile = walk.tile();
    const int32_t rows = cube_rows(tile.rows), keys = keys_of(walk, part), head_dim = shape_.head_dim;
    const bool last_part = part == walk.parts() - 1;
    const int32_t v_place = v_turn_++ % 2, place = factor_turn_++ % 2;
    const LocalTensor<T> weights = weight_buffer_.Get<T>()[v_place * weight_size_],
                         v = v_buffer_.Get<T>()[v_place * kv_size_];
    GlobalTensor<T> slot;
    slot.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(workspace_ + slots_.weight_slot(walk.number())),
                         shape_.q_tile * shape_.stack);
    WaitFlag<HardEvent::MTE1_MTE2>(v_emptied_[v_place]);
    load_fractals(weights, slot[part * shape_.kv_tile], rows, keys, shape_.stack, fractals(rows) * kSide);
    const int64_t key = walk.key() + part * shape_.kv_tile;
    load_fractals(v, v_[tile.v + key * shape_.v_stride], keys, head_dim, shape_.v_stride, fractals(keys) * kSide);
    SetFlag<HardEvent::MTE2_MTE1>(v_filled_[v_place]);

    const LocalTensor<T> left = left_buffer_.Get<T>()[place * left_size_],
                         right = right_buffer_.Get<T>()[place * kv_size_];
    WaitFlag<HardEvent::M_MTE1>(factors_emptied_[place]);
    WaitFlag<HardEvent::MTE2_MTE1>(v_filled_[v_place]);
    load_left(left, weights, rows, keys);
    load_right(right, v, keys, head_dim);
    SetFlag<HardEvent::MTE1_MTE2>(v_emptied_[v_place]);
    SetFlag<HardEvent::MTE1_M>(factors_filled_[place]);

    const LocalTensor<float> product = value_buffer_.Get<float>();
    WaitFlag<HardEvent::MTE1_M>(factors_filled_[place]);
    if (part == 0) WaitFlag<HardEvent::FIX_M>(product_emptied_[1]);
    multiply(product, left, right, rows, head_dim, keys, part > 0);
    SetFlag<HardEvent::M_MTE1>(factors_emptied_[place]);
    if (!last_part) return;

    SetFlag<HardEvent::M_FIX>(product_filled_[1]);
    GlobalTensor<float> out;
    out.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(workspace_ + slots_.value_slot(walk.number())), q_size_);
    WaitFlag<HardEvent::M_FIX>(product_filled_[1]);
    store_product(out, product, rows, head_dim, head_dim);
    SetFlag<HardEvent::FIX_M>(product_emptied_[1]);
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
  TEventID q_filled_[2], k_filled_[2], v_filled_[2], q_emptied_[2], k_emptied_[2], v_emptied_[2];
  TEventID factors_filled_[2], factors_emptied_[2], product_filled_[2], product_emptied_[2];
  int32_t q_size_, kv_size_, weight_size_, left_size_, k_turn_ = 0, v_turn_ = 0, factor_turn_ = 0;
};

}  // namespace pyalpaca_npu
