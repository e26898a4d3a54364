// The cube core's part of attention's gradient: scores = q k^T and dout v^T of the step after next, by turns with the
// sums of this one: dv += weights^T dout, dk += dscores^T q, dq += dscores k.
//
// Blocks of keys stay in L1 while rows go by; a product is q_tile by q_tile, in one of two places in L0C, and leaves
// one while the other is computed. dk and dv are summed in the core's own part of the workspace, dq where all cores
// add.
#pragma once

#include "flash_backward_tasks.h"
#include "flash_cube.h"

namespace pyalpaca_npu {

template <typename T>
class FlashBackwardCube {
 public:
  __aicore__ inline FlashBackwardCube(TPipe& pipe, const FlashGradientShape& shape)
      : pipe_(pipe), shape_(shape), of_(shape.of), slots_(shape) {}

  __aicore__ inline void init(GM_ADDR dout, GM_ADDR q, GM_ADDR k, GM_ADDR v, GM_ADDR dq, GM_ADDR workspace,
                              GM_ADDR q_starts, GM_ADDR kv_starts) {
    dout_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(dout));
    q_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(q));
    k_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(k));
    v_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(v));
    dq_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(dq));
    workspace_ = workspace + GetBlockIdx() * slots_.bytes;
    q_starts_ = q_starts;
    kv_starts_ = kv_starts;
    side_ = of_.q_tile;
    width_ = side_ * of_.head_dim;
    square_ = side_ * side_;
    block_ = of_.stack * of_.head_dim;
    factor_ = width_ > square_ ? width_ : square_;
    pipe_.InitBuffer(k_buffer_, 2 * block_ * sizeof(T));
    pipe_.InitBuffer(v_buffer_, 2 * block_ * sizeof(T));
    pipe_.InitBuffer(rows_buffer_, 2 * width_ * sizeof(T));
    pipe_.InitBuffer(pair_buffer_, 2 * (square_ + width_) * sizeof(T));
    pipe_.InitBuffer(left_buffer_, 2 * factor_ * sizeof(T));
    pipe_.InitBuffer(right_buffer_, 2 * width_ * sizeof(T));
    pipe_.InitBuffer(product_buffer_, 2 * factor_ * sizeof(float));
  }

  __aicore__ inline void run() {
    open();
    const int64_t core = GetBlockIdx(), cores = GetBlockNum();
    FlashGradientWalk ahead(shape_, q_starts_, kv_starts_, core, cores);
    FlashGradientWalk now(shape_, q_starts_, kv_starts_, core, cores);
    ahead.next();
    for (int32_t i = 0; i < kGradientAhead && ahead.valid(); ++i, ahead.next()) {
      for (int32_t part = 0; part < score_parts(ahead); ++part) scores(ahead, part);
    }
    for (now.next(); now.valid(); now.next()) {
      // Keys that wait for the place of these can't be loaded before these are done with.
      const bool in_turn = ahead.valid() && ahead.first() && ahead.keys_number() - now.keys_number() > 1;
      const int32_t some = score_parts(ahead), more = sum_parts(now), delay = in_turn ? more : 0;
      for (int32_t part = 0; part < some + delay || part < more; ++part) {
        if (part >= delay && part < some + delay) scores(ahead, part - delay);
        if (part == 0) CrossCoreWaitFlag(kWeightsReady);
        if (part < more) sums(now, part);
      }
      if (now.last()) CrossCoreSetFlag<2, PIPE_FIX>(kSumsReady);
      if (ahead.valid()) ahead.next();
    }
    close();
  }

 private:
  __aicore__ inline void open() {
    k_places_.open(pipe_);
    row_places_.open(pipe_);
    pair_places_.open(pipe_);
    factor_places_.open(pipe_);
    product_places_.open(pipe_);
  }
  __aicore__ inline void close() {
    k_places_.close(pipe_);
    row_places_.close(pipe_);
    pair_places_.close(pipe_);
    factor_places_.close(pipe_);
    product_places_.close(pipe_);
  }

  __aicore__ inline int32_t score_parts(const FlashGradientWalk& walk) const {
    return walk.valid() ? walk.q_parts() * walk.kv_parts() : 0;
  }
  __aicore__ inline int32_t sum_parts(const FlashGradientWalk& walk) const {
    return 2 * walk.kv_parts() + walk.q_parts();
  }
  __aicore__ inline int32_t part_of(int32_t all, int32_t part) const {
    return all - part * side_ < side_ ? all - part * side_ : side_;
  }

  // Scores and their gradients of a part of a step: some rows by some keys.
  __aicore__ inline void scores(const FlashGradientWalk& walk, int32_t part) {
    const int32_t i = part / walk.kv_parts(), j = part % walk.kv_parts(), place = walk.keys_number() % 2;
    const int32_t rows = part_of(walk.rows().rows, i), keys = part_of(walk.keys().keys, j);
    const LocalTensor<T> k = k_buffer_.Get<T>()[place * block_], v = v_buffer_.Get<T>()[place * block_];
    const bool first = walk.first() && part == 0;
    if (first) load_keys(walk, k, v, place);
    if (j == 0) {
      load_rows(0, q_[walk.rows().q + i * side_ * of_.q_stride], rows, of_.q_stride);
      load_rows(1, dout_[walk.rows().dout + i * side_ * shape_.dout_stride], rows, shape_.dout_stride);
    }
    if (first) WaitFlag<HardEvent::MTE2_MTE1>(k_places_.filled[place]);
    const int64_t at = int64_t{i} * side_ * of_.stack + j * side_;
    GlobalTensor<float> slot;
    slot.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(workspace_ + slots_.score_slot(walk.number())),
                         2 * shape_.q_block * of_.stack);
    const bool last_of_rows = j == walk.kv_parts() - 1;
    score(0, slot[at], k[j * width_], rows, keys, j == 0, last_of_rows);
    score(1, slot[shape_.q_block * of_.stack + at], v[j * width_], rows, keys, j == 0, last_of_rows);
    if (part == score_parts(walk) - 1) CrossCoreSetFlag<2, PIPE_FIX>(kScoresReady);
  }

  __aicore__ inline void load_keys(const FlashGradientWalk& walk, const LocalTensor<T>& k, const LocalTensor<T>& v,
                                   int32_t place) {
    WaitFlag<HardEvent::MTE1_MTE2>(k_places_.emptied[place]);
    for (int32_t part = 0; part < walk.kv_parts(); ++part) {
      const int32_t keys = part_of(walk.keys().keys, part), height = fractals(keys) * kSide;
      const int64_t key = int64_t{part} * side_;
      load_fractals(k[part * width_], k_[walk.keys().k + key * of_.k_stride], keys, of_.head_dim, of_.k_stride, height);
      load_fractals(v[part * width_], v_[walk.keys().v + key * of_.v_stride], keys, of_.head_dim, of_.v_stride, height);
    }
    SetFlag<HardEvent::MTE2_MTE1>(k_places_.filled[place]);
  }

  // Rows of q (which = 0) or of dout (1), for all the keys of the block.
  __aicore__ inline void load_rows(int32_t which, const GlobalTensor<T>& from, int32_t rows, int64_t stride) {
    WaitFlag<HardEvent::MTE1_MTE2>(row_places_.emptied[which]);
    load_left_rows(rows_buffer_.Get<T>()[which * width_], from, rows, of_.head_dim, stride);
    SetFlag<HardEvent::MTE2_MTE1>(row_places_.filled[which]);
  }

  // to = (q or dout) (k or v)^T
  __aicore__ inline void score(int32_t which, const GlobalTensor<float>& to, const LocalTensor<T>& keys_in_l1,
                               int32_t rows, int32_t keys, bool first_of_rows, bool last_of_rows) {
    const LocalTensor<T> left = factor_place(left_buffer_, factor_), right = factor_place(right_buffer_, width_);
    WaitFlag<HardEvent::M_MTE1>(factor_places_.emptied[factor_turn_]);
    if (first_of_rows) WaitFlag<HardEvent::MTE2_MTE1>(row_places_.filled[which]);
    load_left(left, rows_buffer_.Get<T>()[which * width_], cube_rows(rows), of_.head_dim);
    if (last_of_rows) SetFlag<HardEvent::MTE1_MTE2>(row_places_.emptied[which]);
    load_right_transposed(right, keys_in_l1, keys, of_.head_dim);
    SetFlag<HardEvent::MTE1_M>(factor_places_.filled[factor_turn_]);
    product(left, right, cube_rows(rows), keys, of_.head_dim, true);
    store(to, rows, keys, of_.stack);
  }

  // A sum of a step: dv of some keys, then dk of some, then dq of some rows.
  __aicore__ inline void sums(const FlashGradientWalk& walk, int32_t part) {
    const int32_t kv_parts = walk.kv_parts(), q_parts = walk.q_parts(), place = walk.keys_number() % 2;
    GlobalTensor<T> weights;
    weights.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(workspace_ + slots_.weight_slot(walk.number())),
                            2 * shape_.q_block * of_.stack);
    if (part >= 2 * kv_parts) {
      const int32_t i = part - 2 * kv_parts, rows = part_of(walk.rows().rows, i);
      const bool last = walk.last() && i == q_parts - 1;
      for (int32_t j = 0; j < kv_parts; ++j) {
        const int64_t at = int64_t{shape_.q_block + i * side_} * of_.stack + j * side_;
        row_sum(weights[at], k_buffer_.Get<T>()[place * block_ + j * width_], rows, part_of(walk.keys().keys, j),
                j == 0);
      }
      if (last) SetFlag<HardEvent::MTE1_MTE2>(k_places_.emptied[place]);
      SetAtomicAdd<float>();
      store(dq_[walk.rows().dq + int64_t{i} * side_ * of_.heads * of_.head_dim], rows, of_.head_dim,
            of_.heads * of_.head_dim);
      SetAtomicNone();
      return;
    }
    const bool of_keys = part >= kv_parts;  // dk, else dv
    const int32_t j = of_keys ? part - kv_parts : part, keys = part_of(walk.keys().keys, j);
    for (int32_t i = 0; i < q_parts; ++i) {
      const int64_t row = int64_t{i} * side_, at = (of_keys ? shape_.q_block + row : row) * of_.stack + j * side_;
      if (of_keys) {
        key_sum(weights[at], q_[walk.rows().q + row * of_.q_stride], of_.q_stride, part_of(walk.rows().rows, i), keys,
                i == 0);
      } else {
        key_sum(weights[at], dout_[walk.rows().dout + row * shape_.dout_stride], shape_.dout_stride,
                part_of(walk.rows().rows, i), keys, i == 0);
      }
    }
    GlobalTensor<float> slot;
    slot.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(workspace_ + slots_.sum_slot(walk.keys_number())), 2 * block_);
    if (!walk.first()) SetAtomicAdd<float>();
    store(slot[(of_keys ? 0 : block_) + j * width_], keys, of_.head_dim, of_.head_dim);
    if (!walk.first()) SetAtomicNone();
  }

  // += factors^T rows, for keys; columns of factors past the last key are zeros.
  __aicore__ inline void key_sum(const GlobalTensor<T>& factors, const GlobalTensor<T>& from, int64_t stride,
                                 int32_t rows, int32_t keys, bool first) {
    const LocalTensor<T> pair = pair_buffer_.Get<T>()[pair_turn_ * (square_ + width_)], others = pair[square_];
    WaitFlag<HardEvent::MTE1_MTE2>(pair_places_.emptied[pair_turn_]);
    load_fractals(pair, factors, rows, keys, of_.stack, fractals(rows) * kSide);
    load_fractals(others, from, rows, of_.head_dim, stride, fractals(rows) * kSide);
    SetFlag<HardEvent::MTE2_MTE1>(pair_places_.filled[pair_turn_]);
    const LocalTensor<T> left = factor_place(left_buffer_, factor_), right = factor_place(right_buffer_, width_);
    WaitFlag<HardEvent::M_MTE1>(factor_places_.emptied[factor_turn_]);
    WaitFlag<HardEvent::MTE2_MTE1>(pair_places_.filled[pair_turn_]);
    load_left_transposed(left, pair, cube_rows(keys), rows);
    load_right(right, others, rows, of_.head_dim);
    SetFlag<HardEvent::MTE1_MTE2>(pair_places_.emptied[pair_turn_]);
    SetFlag<HardEvent::MTE1_M>(factor_places_.filled[factor_turn_]);
    pair_turn_ = 1 - pair_turn_;
    product(left, right, cube_rows(keys), of_.head_dim, rows, first);
  }

  // += factors keys, for rows.
  __aicore__ inline void row_sum(const GlobalTensor<T>& factors, const LocalTensor<T>& keys_in_l1, int32_t rows,
                                 int32_t keys, bool first) {
    const LocalTensor<T> pair = pair_buffer_.Get<T>()[pair_turn_ * (square_ + width_)];
    WaitFlag<HardEvent::MTE1_MTE2>(pair_places_.emptied[pair_turn_]);
    load_left_rows(pair, factors, rows, keys, of_.stack);
    SetFlag<HardEvent::MTE2_MTE1>(pair_places_.filled[pair_turn_]);
    const LocalTensor<T> left = factor_place(left_buffer_, factor_), right = factor_place(right_buffer_, width_);
    WaitFlag<HardEvent::M_MTE1>(factor_places_.emptied[factor_turn_]);
    WaitFlag<HardEvent::MTE2_MTE1>(pair_places_.filled[pair_turn_]);
    load_left(left, pair, cube_rows(rows), keys);
    SetFlag<HardEvent::MTE1_MTE2>(pair_places_.emptied[pair_turn_]);
    load_right(right, keys_in_l1, keys, of_.head_dim);
    SetFlag<HardEvent::MTE1_M>(factor_places_.filled[factor_turn_]);
    pair_turn_ = 1 - pair_turn_;
    product(left, right, cube_rows(rows), of_.head_dim, keys, first);
  }

  template <typename Buffer>
  __aicore__ inline LocalTensor<T> factor_place(Buffer& buffer, int32_t size) {
    return buffer.template Get<T>()[factor_turn_ * size];
  }

  // The product of the factors that were filled last, or what it adds to the one before.
  __aicore__ inline void product(const LocalTensor<T>& left, const LocalTensor<T>& right, int32_t m, int32_t n,
                                 int32_t k, bool first) {
    WaitFlag<HardEvent::MTE1_M>(factor_places_.filled[factor_turn_]);
    if (first) WaitFlag<HardEvent::FIX_M>(product_places_.emptied[product_turn_]);
    multiply(product_buffer_.Get<float>()[product_turn_ * factor_], left, right, m, n, k, !first);
    SetFlag<HardEvent::M_MTE1>(factor_places_.emptied[factor_turn_]);
    factor_turn_ = 1 - factor_turn_;
  }
  __aicore__ inline void store(const GlobalTensor<float>& to, int32_t m, int32_t n, int32_t pitch) {
    SetFlag<HardEvent::M_FIX>(product_places_.filled[product_turn_]);
    WaitFlag<HardEvent::M_FIX>(product_places_.filled[product_turn_]);
    store_product(to, product_buffer_.Get<float>()[product_turn_ * factor_], m, n, pitch);
    SetFlag<HardEvent::FIX_M>(product_places_.emptied[product_turn_]);
    product_turn_ = 1 - product_turn_;
  }

  TPipe& pipe_;
  const FlashGradientShape& shape_;
  const FlashShape& of_;
  FlashGradientSlots slots_;
  GlobalTensor<T> dout_, q_, k_, v_;
  GlobalTensor<float> dq_;
  GM_ADDR workspace_;
  GM_ADDR q_starts_;
  GM_ADDR kv_starts_;
  TBuf<TPosition::A1> rows_buffer_, pair_buffer_;
  TBuf<TPosition::B1> k_buffer_, v_buffer_;
  TBuf<TPosition::A2> left_buffer_;
  TBuf<TPosition::B2> right_buffer_;
  TBuf<TPosition::CO1> product_buffer_;
  PlacesInL1 k_places_, row_places_, pair_places_;
  PlacesOfFactors factor_places_;
  PlacesOfProducts product_places_;
  int32_t side_, width_, square_, block_, factor_, factor_turn_ = 0, pair_turn_ = 0, product_turn_ = 0;
};

}  // namespace pyalpaca_npu
