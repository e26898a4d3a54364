// A vector core's part of attention, half of a tile's rows: scores to weights (the softmax of Milakov and Gimelshein
// 2018, kept up from stack to stack), and the values of an earlier stack added to what the rows have so far.
//
// Scores and values come in through one ring of two places, weights and results go out through another.
#pragma once

#include "flash_softmax.h"
#include "flash_tasks.h"

namespace pyalpaca_npu {

template <typename T, typename Out>  // of the tensors; of the results: T, or float
class FlashForwardVector {
 public:
  __aicore__ inline FlashForwardVector(TPipe& pipe, const FlashShape& shape)
      : pipe_(pipe), shape_(shape), slots_(shape) {}

  __aicore__ inline void init(GM_ADDR out, GM_ADDR lse, GM_ADDR workspace, GM_ADDR q_starts, GM_ADDR kv_starts) {
    out_.SetGlobalBuffer(reinterpret_cast<__gm__ Out*>(out));
    lse_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(lse));
    core_ = GetBlockIdx() / 2;  // two vector cores beside each cube core
    second_ = GetSubBlockIdx() == 1;
    workspace_ = workspace + core_ * slots_.bytes;
    q_starts_ = q_starts;
    kv_starts_ = kv_starts;
    pipe_.InitBuffer(in_buffer_, 2 * shape_.chunk * sizeof(float));
    pipe_.InitBuffer(out_buffer_, 2 * shape_.chunk * sizeof(Out));
    pipe_.InitBuffer(lse_buffer_, 2 * kMostRows * sizeof(float));
    pipe_.InitBuffer(result_buffer_, shape_.share * first_rows(shape_.q_tile) * shape_.head_dim * sizeof(float));
    pipe_.InitBuffer(wide_buffer_, shape_.chunk / kLanes * kBlock * sizeof(float));
    pipe_.InitBuffer(blocks_buffer_, 4 * kMostRows * kBlock * sizeof(float));
    pipe_.InitBuffer(numbers_buffer_, kNumbers * kMostRows * sizeof(float));
    pipe_.InitBuffer(bits_buffer_, kMostRows * kLanes / 8);
    blocks_ = blocks_buffer_.Get<float>();
    parts_ = blocks_[kMostRows * kBlock];
    triangle_ = {numbers(kIndex), blocks_[2 * kMostRows * kBlock], blocks_[3 * kMostRows * kBlock],
                 bits_buffer_.Get<uint8_t>()};
  }

  __aicore__ inline void run() {
    incoming_.open(pipe_);
    outgoing_.open(pipe_);
    // What lies past the rows of a tile is computed with and goes nowhere.
    Duplicate(parts_, 0.0f, kMostRows * kBlock);
    Duplicate(numbers(0), 1.0f, kNumbers * kMostRows);
    CreateVecIndex(numbers(kIndex), 0.0f, static_cast<uint32_t>(kMostRows));
    as_blocks(triangle_.rows, numbers(kIndex), kMostRows);
    Duplicate(numbers(kFactor), shape_.scale, kMostRows);
    const int64_t cores = GetBlockNum();
    if (shape_.causal || shape_.kv_len == 0 || kv_starts_ != nullptr) {
      FlashWalk all(shape_, q_starts_, kv_starts_, core_, cores);
      while (all.next_group()) {
        for (int32_t member = 0; member < shape_.share; ++member) {
          const FlashTile& tile = all.tile(member);
          if (tile.rows > 0 && tile.keys == 0) store_nothing_seen(tile);
        }
      }
    }
    FlashWalk now(shape_, q_starts_, kv_starts_, core_, cores), before(shape_, q_starts_, kv_starts_, core_, cores);
    for (int32_t stacks = 0; now.next(); ++stacks) {
      softmax(now);
      if (stacks >= kLag && before.next()) add_values(before);
    }
    while (before.next()) add_values(before);
    incoming_.close(pipe_);
    outgoing_.close(pipe_);
  }

 private:
  // Numbers a row. Maxima and sums of a tile outlive the first stacks of the next: kLate of each.
  enum : int32_t {
    kMax = 0,
    kSum = kLate,
    kRescale = 2 * kLate,
    kNow = 3 * kLate,
    kSafe,
    kOnes,
    kIndex,
    kFactor,
    kNumbers
  };
  __aicore__ inline LocalTensor<float> numbers(int32_t which) {
    return numbers_buffer_.Get<float>()[which * kMostRows];
  }
  __aicore__ inline int32_t first_row(const FlashTile& tile) const {
    return second_ ? first_rows(cube_rows(tile.rows)) : 0;
  }
  // Rows that are computed: those of the cube core, of which a tile of one row has two.
  __aicore__ inline int32_t rows_of(const FlashTile& tile) const {
    const int32_t rows = cube_rows(tile.rows), first = first_rows(rows);
    return second_ ? rows - first : first;
  }
  // Of rows from `row` on, those that belong to the tile.
  __aicore__ inline int32_t stored(const FlashTile& tile, int32_t row, int32_t rows) const {
    const int32_t rest = tile.rows - first_row(tile) - row;
    return rest < rows ? rest : rows;
  }

  __aicore__ inline void softmax(const FlashWalk& walk) {
    const FlashTile& tile = walk.tile();
    const int32_t rows = rows_of(tile), first = first_row(tile), columns = walk.columns();
    const int32_t pitch = round_up(columns, kLanes), most = shape_.chunk / pitch / kBlock * kBlock;
    GlobalTensor<float> scores;
    scores.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(workspace_ + slots_.score_slot(walk.number())),
                           shape_.q_tile * shape_.stack);
    GlobalTensor<T> weights;
    weights.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(workspace_ + slots_.weight_slot(walk.number())),
                            shape_.q_tile * shape_.stack);
    if (walk.first()) {
      const int32_t turn = tile.number % kLate;
      Duplicate(numbers(kMax + turn), minus_infinity(), kMostRows);
      Duplicate(numbers(kSum + turn), 0.0f, kMostRows);
    }
    CrossCoreWaitFlag(kScoresReady);
    for (int32_t row = 0; row < rows; row += most) {
      const Rows shape{rows - row < most ? rows - row : most, pitch};
      const LocalTensor<float> x = load(scores[(first + row) * shape_.stack], shape.rows, columns, shape_.stack, pitch);
      fill_rest(x, minus_infinity(), columns, shape);
      const int64_t visible = tile.visible + first + row - walk.key();
      if (shape_.causal && visible < columns) hide_later(x, visible, columns, triangle_, shape);
      const LocalTensor<T> y = place_out<T>();
      to_weights(y, x, walk, row, shape);
      give_back();
      SetFlag<HardEvent::V_MTE3>(outgoing_.filled[out_turn_]);
      WaitFlag<HardEvent::V_MTE3>(outgoing_.filled[out_turn_]);
      store_rows_apart(weights[(first + row) * shape_.stack], y, shape.rows, columns, shape_.stack, pitch);
      sent();
    }
    CrossCoreSetFlag<2, PIPE_MTE3>(kWeightsReady);
  }

  // y = exp(scale x - the greatest so far); that, the sum of a row and what earlier sums and values are to be scaled by
  // are kept. Before it is written, y is room for the half of x.
  __aicore__ inline void to_weights(const LocalTensor<T>& y, const LocalTensor<float>& x, const FlashWalk& walk,
                                    int32_t row, const Rows& shape) {
    const int32_t groups = shape.pitch / kLanes, turn = walk.tile().number % kLate, up = round_up(shape.rows, kBlock);
    const LocalTensor<float> max = numbers(kMax + turn)[row], total = numbers(kSum + turn)[row];
    const LocalTensor<float> rescale = numbers(kRescale + walk.number() % kLate)[row];
    const LocalTensor<float> now = numbers(kNow), safe = numbers(kSafe);
    greatest(now, x, groups, y.template ReinterpretCast<float>(), parts_, shape);
    Muls(now, now, shape_.scale, up);
    Max(now, now, max, up);
    Maxs(safe, now, kLowest, up);
    Sub(rescale, max, safe, up);
    Exp(rescale, rescale, up);
    Max(max, now, max, up);
    Muls(safe, safe, -1.0f, up);
    scale_and_add_blocks(x, numbers(kFactor), safe, blocks_, wide_buffer_.Get<float>(), groups, shape);
    Exp(x, x, shape.rows * shape.pitch);
    Cast(y, x, RoundMode::CAST_RINT, shape.rows * shape.pitch);
    sum(now, x, groups, parts_, shape);
    Mul(total, total, rescale, up);
    Add(total, total, now, up);
  }

  __aicore__ inline void add_values(const FlashWalk& walk) {
    const FlashTile& tile = walk.tile();
    const int32_t rows = rows_of(tile), first = first_row(tile), width = shape_.head_dim;
    const int32_t most = most_results();
    const LocalTensor<float> result = result_of(tile);
    GlobalTensor<float> values;
    values.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(workspace_ + slots_.value_slot(walk.number())),
                           shape_.q_tile * width);
    CrossCoreWaitFlag(kValuesReady);
    for (int32_t row = 0; row < rows; row += most) {
      const Rows shape{rows - row < most ? rows - row : most, width};
      const LocalTensor<float> x = load(values[(first + row) * width], shape.rows, width, width, width);
      if (walk.first()) {
        Adds(result[row * width], x, 0.0f, shape.rows * width);
      } else {
        as_blocks(blocks_, numbers(kRescale + walk.number() % kLate)[row], shape.rows);
        rescale_and_add(result[row * width], blocks_, x, width, shape);
      }
      give_back();
    }
    if (walk.last()) store_results(tile);
  }

  // What the rows of a tile have so far; those of a group's tiles grow side by side.
  __aicore__ inline LocalTensor<float> result_of(const FlashTile& tile) {
    return result_buffer_.Get<float>()[tile.number % shape_.share * first_rows(shape_.q_tile) * shape_.head_dim];
  }

  __aicore__ inline void store_results(const FlashTile& tile) {
    const int32_t turn = tile.number % kLate;
    const int32_t rows = rows_of(tile), width = shape_.head_dim, most = most_results();
    const LocalTensor<float> max = numbers(kMax + turn), total = numbers(kSum + turn), safe = numbers(kSafe);
    const LocalTensor<float> result = result_of(tile);
    for (int32_t row = 0; row < rows; row += most) {
      const Rows shape{rows - row < most ? rows - row : most, width};
      const int32_t up = round_up(shape.rows, kBlock);
      Maxs(safe, total[row], kSmallestSum, up);
      Div(safe, numbers(kOnes), safe, up);
      as_blocks(blocks_, safe, shape.rows);
      multiply_blocks(result[row * width], blocks_, width, shape);
      const LocalTensor<Out> y = place_out<Out>();
      const LocalTensor<float> lse = lse_buffer_.Get<float>()[out_turn_ * kMostRows];
      if constexpr (Wide<Out>::needs_cast)
        Cast(y, result[row * width], RoundMode::CAST_RINT, shape.rows * width);
      else
        Adds(y, result[row * width], 0.0f, shape.rows * width);
      // max + ln(sum); a row that has seen an infinity has an infinite one, though its sum is NaN.
      Ln(lse, total[row], up);
      Add(lse, lse, max[row], up);
      CompareScalar(triangle_.bits, max[row], kHighest, CMPMODE::GT, static_cast<uint32_t>(kMostRows));
      Select(lse, triangle_.bits, max[row], lse, SELMODE::VSEL_TENSOR_TENSOR_MODE, static_cast<uint32_t>(up));
      store(tile, row, shape.rows, y, lse);
    }
  }

  // Rows that see no key: results 0, lse -inf.
  __aicore__ inline void store_nothing_seen(const FlashTile& tile) {
    const int32_t rows = rows_of(tile), most = most_results();
    for (int32_t row = 0; row < rows; row += most) {
      const int32_t count = rows - row < most ? rows - row : most;
      const LocalTensor<Out> y = place_out<Out>();
      const LocalTensor<float> lse = lse_buffer_.Get<float>()[out_turn_ * kMostRows];
      constexpr int32_t halves = sizeof(Out) / sizeof(half);  // a zero of any type is as many zeros of half
      Duplicate(y.template ReinterpretCast<half>(), half(0.0f), count * shape_.head_dim * halves);
      Duplicate(lse, minus_infinity(), kMostRows);
      store(tile, row, count, y, lse);
    }
  }

  // Rows of a result, a head apart in memory, and their lse.
  __aicore__ inline void store(const FlashTile& tile, int32_t row, int32_t rows, const LocalTensor<Out>& y,
                               const LocalTensor<float>& lse) {
    const int32_t width = shape_.head_dim, count = stored(tile, row, rows);
    const int64_t at = first_row(tile) + row;
    SetFlag<HardEvent::V_MTE3>(outgoing_.filled[out_turn_]);
    WaitFlag<HardEvent::V_MTE3>(outgoing_.filled[out_turn_]);
    store_rows_apart(out_[tile.out + at * shape_.out_stride], y, count, width, shape_.out_stride, width);
    store_rows(lse_[tile.lse + at], lse, 1, count);
    sent();
  }

  __aicore__ inline int32_t most_results() const { return shape_.chunk / shape_.head_dim / kBlock * kBlock; }

  // The next place of the ring, filled; the vector pipe has waited for it.
  __aicore__ inline LocalTensor<float> load(const GlobalTensor<float>& from, int32_t rows, int32_t columns,
                                            int32_t stride, int32_t pitch) {
    const LocalTensor<float> to = in_buffer_.Get<float>()[in_turn_ * shape_.chunk];
    WaitFlag<HardEvent::V_MTE2>(incoming_.emptied[in_turn_]);
    load_rows_apart(to, from, rows, columns, stride, pitch);
    SetFlag<HardEvent::MTE2_V>(incoming_.filled[in_turn_]);
    WaitFlag<HardEvent::MTE2_V>(incoming_.filled[in_turn_]);
    return to;
  }
  __aicore__ inline void give_back() {
    SetFlag<HardEvent::V_MTE2>(incoming_.emptied[in_turn_]);
    in_turn_ = 1 - in_turn_;
  }
  template <typename U>
  __aicore__ inline LocalTensor<U> place_out() {
    WaitFlag<HardEvent::MTE3_V>(outgoing_.emptied[out_turn_]);
    return out_buffer_.Get<U>()[out_turn_ * shape_.chunk * (sizeof(Out) / sizeof(U))];
  }
  __aicore__ inline void sent() {
    SetFlag<HardEvent::MTE3_V>(outgoing_.emptied[out_turn_]);
    out_turn_ = 1 - out_turn_;
  }

  TPipe& pipe_;
  const FlashShape& shape_;
  FlashSlots slots_;
  GlobalTensor<Out> out_;
  GlobalTensor<float> lse_;
  GM_ADDR workspace_;
  GM_ADDR q_starts_;
  GM_ADDR kv_starts_;
  TBuf<TPosition::VECIN> in_buffer_;
  TBuf<TPosition::VECOUT> out_buffer_, lse_buffer_;
  TBuf<TPosition::VECCALC> result_buffer_, wide_buffer_, blocks_buffer_, numbers_buffer_, bits_buffer_;
  LocalTensor<float> blocks_, parts_;
  Triangle triangle_;
  PlacesIn incoming_;
  PlacesOut outgoing_;
  int64_t core_;
  int32_t in_turn_ = 0, out_turn_ = 0;
  bool second_;
};

}  // namespace pyalpaca_npu
