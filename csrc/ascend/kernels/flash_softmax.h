// Rows of scores in unified memory, all of them at a time: what must not be seen is hidden, extremes, sums, one number
// a row for all its columns. A row is some groups of 64 columns; an instruction takes one group of all rows.
#pragma once

#include "flash_places.h"

namespace pyalpaca_npu {

constexpr int32_t kMostRows = 64;       // of one vector core
constexpr float kLowest = -1e30f;       // stands for the greatest score of a row that sees nothing: exp(-inf - it) is 0
constexpr float kHighest = 3.4e38f;     // only infinity is above
constexpr float kSmallestSum = 1e-30f;  // a row that sees nothing has the sum 0

// Not a literal: the toolkit has none of the standard library.
__aicore__ inline float minus_infinity() { return -__builtin_inff(); }

struct Rows {
  int32_t rows, pitch;  // pitch: a multiple of 8, the distance of rows
  __aicore__ inline uint8_t count() const { return narrow(rows); }
  __aicore__ inline uint8_t step() const { return narrow(pitch / kBlock); }
};

// Columns from `columns` on to the end of their group are `value`.
__aicore__ inline void fill_rest(const LocalTensor<float>& x, float value, int32_t columns, const Rows& shape) {
  const int32_t group = columns / kLanes * kLanes, kept = columns - group;
  if (kept == 0) return;
  uint64_t lanes[2] = {~uint64_t{0} << kept, 0};
  Duplicate(x[group], value, lanes, shape.count(), 1, shape.step());
}

// What a mask needs: lanes 0 to 63, and the number of each row as a block.
struct Triangle {
  LocalTensor<float> lanes, rows, limits;
  LocalTensor<uint8_t> bits;
};

// Row i keeps its first `visible` + i columns, the others are -inf.
__aicore__ inline void hide_later(const LocalTensor<float>& x, int64_t visible, int32_t columns,
                                  const Triangle& triangle, const Rows& shape) {
  for (int32_t group = 0; group < columns; group += kLanes) {
    const int64_t kept = visible - group;  // of this group, by the first row
    if (kept >= kLanes) continue;
    const LocalTensor<float> part = x[group];
    if (kept + shape.rows - 1 <= 0) {
      Duplicate(part, minus_infinity(), static_cast<uint64_t>(kLanes), shape.count(), 1, shape.step());
      continue;
    }
    Adds(triangle.limits, triangle.rows, static_cast<float>(kept), shape.rows * kBlock);
    Compare(triangle.bits, triangle.lanes, triangle.limits, CMPMODE::LT, static_cast<uint64_t>(kLanes), shape.count(),
            BinaryRepeatParams(1, 1, 0, 8, 0, 1));
    uint64_t all[2] = {~uint64_t{0}, 0};
    Select(part, triangle.bits, part, minus_infinity(), SELMODE::VSEL_TENSOR_SCALAR_MODE, all, shape.count(),
           BinaryRepeatParams(1, 1, 1, shape.step(), shape.step(), 8));
  }
}

// to = the greater of two, or their sum, lane by lane.
template <bool kGreatest>
__aicore__ inline void combine(const LocalTensor<float>& to, const LocalTensor<float>& a, const LocalTensor<float>& b,
                               int32_t repeats, const BinaryRepeatParams& steps) {
  if constexpr (kGreatest)
    Max(to, a, b, static_cast<uint64_t>(kLanes), narrow(repeats), steps);
  else
    Add(to, a, b, static_cast<uint64_t>(kLanes), narrow(repeats), steps);
}

// Each row's groups become one, its first: neighbours as long as all have one, all rows at once, then one by one.
template <bool kGreatest>
__aicore__ inline void fold(const LocalTensor<float>& x, int32_t groups, const Rows& shape) {
  int32_t apart = 1;  // groups between those that are left
  for (; groups / apart % 2 == 0; apart *= 2) {
    const uint8_t step = narrow(2 * apart * kBlock);
    combine<kGreatest>(x, x, x[apart * kLanes], shape.rows * groups / (2 * apart),
                       BinaryRepeatParams(1, 1, 1, step, step, step));
  }
  for (int32_t group = apart; group < groups; group += apart) {
    combine<kGreatest>(x, x, x[group * kLanes], shape.rows,
                       BinaryRepeatParams(1, 1, 1, shape.step(), shape.step(), shape.step()));
  }
}

// The greatest of each row. halves: half as many numbers as x; parts: 8 a row.
__aicore__ inline void greatest(const LocalTensor<float>& to, const LocalTensor<float>& x, int32_t groups,
                                const LocalTensor<float>& halves, const LocalTensor<float>& parts, const Rows& shape) {
  if (groups == 1) {
    BlockReduceMax<float>(parts, x, shape.count(), kLanes, 1, 1, shape.step());
  } else if (groups % 2 == 0) {
    combine<true>(halves, x, x[kLanes], shape.rows * groups / 2, BinaryRepeatParams(1, 1, 1, 8, 16, 16));
    const Rows one_of_two{shape.rows, shape.pitch / 2};
    fold<true>(halves, groups / 2, one_of_two);
    BlockReduceMax<float>(parts, halves, shape.count(), kLanes, 1, 1, one_of_two.step());
  } else {
    combine<true>(halves, x, x[kLanes], shape.rows, BinaryRepeatParams(1, 1, 1, 8, shape.step(), shape.step()));
    for (int32_t group = 2; group < groups; ++group) {
      combine<true>(halves, x[group * kLanes], halves, shape.rows, BinaryRepeatParams(1, 1, 1, 8, shape.step(), 8));
    }
    BlockReduceMax<float>(parts, halves, shape.count(), kLanes, 1, 1, 8);
  }
  BlockReduceMax<float>(to, parts, narrow(round_up(shape.rows, kBlock) / kBlock), kLanes, 1, 1, 8);
}

// The sum of each row, which is no longer what it was.
__aicore__ inline void sum(const LocalTensor<float>& to, const LocalTensor<float>& x, int32_t groups,
                           const LocalTensor<float>& parts, const Rows& shape) {
  fold<false>(x, groups, shape);
  BlockReduceSum<float>(parts, x, shape.count(), kLanes, 1, 1, shape.step());
  BlockReduceSum<float>(to, parts, narrow(round_up(shape.rows, kBlock) / kBlock), kLanes, 1, 1, 8);
}

// A number a row as a block a row.
__aicore__ inline void as_blocks(const LocalTensor<float>& to, const LocalTensor<float>& numbers, int32_t rows) {
  Brcb(to, numbers, narrow(round_up(rows, kBlock) / kBlock), BrcbRepeatParams(1, 8));
}

// x -= a row's number, in whole groups.
__aicore__ inline void subtract_blocks(const LocalTensor<float>& x, const LocalTensor<float>& blocks, int32_t groups,
                                       const Rows& shape) {
  for (int32_t group = 0; group < groups; ++group) {
    Sub(x[group * kLanes], x[group * kLanes], blocks, static_cast<uint64_t>(kLanes), shape.count(),
        BinaryRepeatParams(1, 1, 0, shape.step(), shape.step(), 1));
  }
}
// x = factor x + a row's number, in whole groups; factor: a block. A row's block stands beside it for each of its
// groups where these are 8, or 16 and so on, and one instruction takes them all. wide: 8 numbers a group of x.
__aicore__ inline void scale_and_add_blocks(const LocalTensor<float>& x, const LocalTensor<float>& factor,
                                            const LocalTensor<float>& numbers, const LocalTensor<float>& blocks,
                                            const LocalTensor<float>& wide, int32_t groups, const Rows& shape) {
  if (groups % kBlock != 0) {
    as_blocks(blocks, numbers, shape.rows);
    for (int32_t group = 0; group < groups; ++group) {
      FusedMulAdd(x[group * kLanes], factor, blocks, static_cast<uint64_t>(kLanes), shape.count(),
                  BinaryRepeatParams(1, 0, 0, shape.step(), 0, 1));
    }
    return;
  }
  const int32_t times = groups / kBlock, up = round_up(shape.rows, kBlock);
  for (int32_t i = 0; i < times; ++i) {
    Brcb(blocks[i * kBlock], numbers, narrow(up / kBlock), BrcbRepeatParams(narrow(times), narrow(times * kBlock)));
  }
  as_blocks(wide, blocks, up * groups);
  FusedMulAdd(x, factor, wide, static_cast<uint64_t>(kLanes), narrow(shape.rows * groups),
              BinaryRepeatParams(1, 0, 0, 8, 0, 1));
}
// x *= a row's number.
__aicore__ inline void multiply_blocks(const LocalTensor<float>& x, const LocalTensor<float>& blocks, int32_t columns,
                                       const Rows& shape) {
  for (int32_t column = 0; column < columns; column += kLanes) {
    const uint64_t lanes = columns - column < kLanes ? columns - column : kLanes;
    Mul(x[column], x[column], blocks, lanes, shape.count(), BinaryRepeatParams(1, 1, 0, shape.step(), shape.step(), 1));
  }
}
// x = x * a row's number + more.
__aicore__ inline void rescale_and_add(const LocalTensor<float>& x, const LocalTensor<float>& blocks,
                                       const LocalTensor<float>& more, int32_t columns, const Rows& shape) {
  for (int32_t column = 0; column < columns; column += kLanes) {
    const uint64_t lanes = columns - column < kLanes ? columns - column : kLanes;
    FusedMulAdd(x[column], blocks, more[column], lanes, shape.count(),
                BinaryRepeatParams(1, 0, 1, shape.step(), 1, shape.step()));
  }
}

}  // namespace pyalpaca_npu
