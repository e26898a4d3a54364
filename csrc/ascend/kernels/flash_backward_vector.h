// A vector core's part of attention's gradient, half of a step's rows: weights p = exp(scores - lse) and the gradients
// of scores, p (dout v^T - delta), delta the sum of dout * out of a row; and half of the rows of dk and dv when their
// sums are done.
#pragma once

#include "flash_backward_tasks.h"
#include "flash_softmax.h"

namespace pyalpaca_npu {

template <typename T>
class FlashBackwardVector {
 public:
  __aicore__ inline FlashBackwardVector(TPipe& pipe, const FlashGradientShape& shape)
      : pipe_(pipe), shape_(shape), of_(shape.of), slots_(shape) {}

  __aicore__ inline void init(GM_ADDR lse, GM_ADDR delta, GM_ADDR dk, GM_ADDR dv, GM_ADDR workspace, GM_ADDR q_starts,
                              GM_ADDR kv_starts) {
    lse_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(lse));
    delta_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(delta));
    dk_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(dk));
    dv_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(dv));
    core_ = GetBlockIdx() / 2;
    second_ = GetSubBlockIdx() == 1;
    workspace_ = workspace + core_ * slots_.bytes;
    q_starts_ = q_starts;
    kv_starts_ = kv_starts;
    pipe_.InitBuffer(in_buffer_, 2 * in_size() * sizeof(float));
    pipe_.InitBuffer(out_buffer_, 4 * of_.chunk * sizeof(T));
    pipe_.InitBuffer(blocks_buffer_, 3 * kMostRows * kBlock * sizeof(float));
    pipe_.InitBuffer(numbers_buffer_, 2 * kMostRows * sizeof(float));
    pipe_.InitBuffer(bits_buffer_, kMostRows * kLanes / 8);
    blocks_ = blocks_buffer_.Get<float>();
    safe_ = numbers_buffer_.Get<float>();
    triangle_ = {safe_[kMostRows], blocks_[kMostRows * kBlock], blocks_[2 * kMostRows * kBlock],
                 bits_buffer_.Get<uint8_t>()};
  }

  __aicore__ inline void run() {
    incoming_.open(pipe_);
    outgoing_.open(pipe_);
    CreateVecIndex(triangle_.lanes, 0.0f, static_cast<uint32_t>(kMostRows));
    as_blocks(triangle_.rows, triangle_.lanes, kMostRows);
    const int64_t cores = GetBlockNum();
    FlashGradientWalk all(shape_, q_starts_, kv_starts_, core_, cores);
    while (all.next_keys()) {
      if (all.keys().first_row >= all.keys().q_len) store_nothing(all.keys());
    }
    FlashGradientWalk now(shape_, q_starts_, kv_starts_, core_, cores);
    FlashGradientWalk before(shape_, q_starts_, kv_starts_, core_, cores);
    for (now.next(); now.valid(); now.next(), before.next()) {
      to_gradients(now);
      if (before.valid() && before.last()) store_sums(before);
    }
    if (before.valid()) store_sums(before);
    incoming_.close(pipe_);
    outgoing_.close(pipe_);
  }

 private:
  // A place of the ring: scores, gradients of weights, lse and delta of their rows.
  __aicore__ inline int32_t in_size() const { return 2 * of_.chunk + 2 * kMostRows; }
  __aicore__ inline int32_t first_row(int32_t rows) const { return second_ ? first_rows(rows) : 0; }
  __aicore__ inline int32_t rows_of(int32_t rows) const {
    const int32_t first = first_rows(rows);
    return second_ ? rows - first : first;
  }
  // Rows of `pitch` elements that a place has room for.
  __aicore__ inline int32_t most(int32_t pitch) const {
    const int32_t fit = of_.chunk / pitch / kBlock * kBlock;
    return fit < kMostRows ? fit : kMostRows;
  }

  __aicore__ inline void to_gradients(const FlashGradientWalk& walk) {
    const FlashRows& of_rows = walk.rows();
    const int32_t first = first_row(of_rows.rows), rows = rows_of(of_rows.rows), keys = walk.keys().keys;
    const int32_t pitch = round_up(keys, kLanes), fit = most(pitch), size = shape_.q_block * of_.stack;
    GlobalTensor<float> scores;
    scores.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(workspace_ + slots_.score_slot(walk.number())), 2 * size);
    GlobalTensor<T> weights;
    weights.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(workspace_ + slots_.weight_slot(walk.number())), 2 * size);
    CrossCoreWaitFlag(kScoresReady);
    for (int32_t row = 0; row < rows; row += fit) {
      const Rows shape{rows - row < fit ? rows - row : fit, pitch};
      const LocalTensor<float> x = in_place(), y = x[of_.chunk], lse = y[of_.chunk], delta = lse[kMostRows];
      const int64_t at = int64_t{first + row} * of_.stack, number = of_rows.lse + first + row;
      load_rows_apart(x, scores[at], shape.rows, keys, of_.stack, pitch);
      load_rows_apart(y, scores[size + at], shape.rows, keys, of_.stack, pitch);
      load_rows(lse, lse_[number], 1, shape.rows, shape.rows, round_up(shape.rows, kBlock));
      load_rows(delta, delta_[number], 1, shape.rows, shape.rows, round_up(shape.rows, kBlock));
      filled();
      fill_rest(x, minus_infinity(), keys, shape);
      fill_rest(y, 0.0f, keys, shape);
      Muls(x, x, of_.scale, shape.rows * pitch);
      const int64_t visible = of_rows.visible + first + row;
      if (of_.causal && visible < keys) hide_later(x, visible, keys, triangle_, shape);
      Maxs(safe_, lse, kLowest, round_up(shape.rows, kBlock));
      as_blocks(blocks_, safe_, shape.rows);
      subtract_blocks(x, blocks_, pitch / kLanes, shape);
      Exp(x, x, shape.rows * pitch);
      as_blocks(blocks_, delta, shape.rows);
      subtract_blocks(y, blocks_, pitch / kLanes, shape);
      Mul(y, y, x, shape.rows * pitch);
      const LocalTensor<T> p = out_place(), ds = p[of_.chunk];
      Cast(p, x, RoundMode::CAST_RINT, shape.rows * pitch);
      Cast(ds, y, RoundMode::CAST_RINT, shape.rows * pitch);
      read();
      computed();
      store_rows_apart(weights[at], p, shape.rows, keys, of_.stack, pitch);
      store_rows_apart(weights[size + at], ds, shape.rows, keys, of_.stack, pitch);
      sent();
    }
    CrossCoreSetFlag<2, PIPE_MTE3>(kWeightsReady);
  }

  __aicore__ inline void store_sums(const FlashGradientWalk& walk) {
    const FlashKeys& keys = walk.keys();
    const int32_t width = of_.head_dim, first = first_row(keys.keys), rows = rows_of(keys.keys), fit = most(width);
    const int32_t size = of_.stack * width;
    GlobalTensor<float> sums;
    sums.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(workspace_ + slots_.sum_slot(walk.keys_number())), 2 * size);
    CrossCoreWaitFlag(kSumsReady);
    for (int32_t row = 0; row < rows; row += fit) {
      const int32_t count = rows - row < fit ? rows - row : fit;
      const LocalTensor<float> x = in_place(), y = x[of_.chunk];
      load_rows_apart(x, sums[(first + row) * width], count, width, width, width);
      load_rows_apart(y, sums[size + (first + row) * width], count, width, width, width);
      filled();
      Muls(x, x, of_.scale, count * width);
      const LocalTensor<T> dk = out_place(), dv = dk[of_.chunk];
      Cast(dk, x, RoundMode::CAST_RINT, count * width);
      Cast(dv, y, RoundMode::CAST_RINT, count * width);
      read();
      store_both(keys, first + row, count, dk, dv);
    }
  }

  // Keys that no row sees.
  __aicore__ inline void store_nothing(const FlashKeys& keys) {
    const int32_t width = of_.head_dim, first = first_row(keys.keys), rows = rows_of(keys.keys), fit = most(width);
    for (int32_t row = 0; row < rows; row += fit) {
      const int32_t count = rows - row < fit ? rows - row : fit;
      const LocalTensor<T> dk = out_place(), dv = dk[of_.chunk];
      Duplicate(dk.template ReinterpretCast<half>(), half(0.0f), count * width);
      Duplicate(dv.template ReinterpretCast<half>(), half(0.0f), count * width);
      store_both(keys, first + row, count, dk, dv);
    }
  }

  __aicore__ inline void store_both(const FlashKeys& keys, int32_t row, int32_t count, const LocalTensor<T>& dk,
                                    const LocalTensor<T>& dv) {
    const int32_t width = of_.head_dim, stride = of_.kv_heads * width;
    computed();
    store_rows_apart(dk_[keys.dk + int64_t{row} * stride], dk, count, width, stride, width);
    store_rows_apart(dv_[keys.dk + int64_t{row} * stride], dv, count, width, stride, width);
    sent();
  }

  // The next place of each ring; it is filled, read, computed and sent in this order.
  __aicore__ inline LocalTensor<float> in_place() {
    WaitFlag<HardEvent::V_MTE2>(incoming_.emptied[in_turn_]);
    return in_buffer_.Get<float>()[in_turn_ * in_size()];
  }
  __aicore__ inline void filled() {
    SetFlag<HardEvent::MTE2_V>(incoming_.filled[in_turn_]);
    WaitFlag<HardEvent::MTE2_V>(incoming_.filled[in_turn_]);
  }
  __aicore__ inline void read() {
    SetFlag<HardEvent::V_MTE2>(incoming_.emptied[in_turn_]);
    in_turn_ = 1 - in_turn_;
  }
  __aicore__ inline LocalTensor<T> out_place() {
    WaitFlag<HardEvent::MTE3_V>(outgoing_.emptied[out_turn_]);
    return out_buffer_.Get<T>()[out_turn_ * 2 * of_.chunk];
  }
  __aicore__ inline void computed() {
    SetFlag<HardEvent::V_MTE3>(outgoing_.filled[out_turn_]);
    WaitFlag<HardEvent::V_MTE3>(outgoing_.filled[out_turn_]);
  }
  __aicore__ inline void sent() {
    SetFlag<HardEvent::MTE3_V>(outgoing_.emptied[out_turn_]);
    out_turn_ = 1 - out_turn_;
  }

  TPipe& pipe_;
  const FlashGradientShape& shape_;
  const FlashShape& of_;
  FlashGradientSlots slots_;
  GlobalTensor<float> lse_, delta_;
  GlobalTensor<T> dk_, dv_;
  GM_ADDR workspace_;
  GM_ADDR q_starts_;
  GM_ADDR kv_starts_;
  TBuf<TPosition::VECIN> in_buffer_;
  TBuf<TPosition::VECOUT> out_buffer_;
  TBuf<TPosition::VECCALC> blocks_buffer_, numbers_buffer_, bits_buffer_;
  LocalTensor<float> blocks_, safe_;
  Triangle triangle_;
  PlacesIn incoming_;
  PlacesOut outgoing_;
  int64_t core_;
  int32_t in_turn_ = 0, out_turn_ = 0;
  bool second_;
};

}  // namespace pyalpaca_npu
