// Arithmetic on a tile of fp32 rows, `pitch` apart in unified memory.
//
// Narrow rows are worked on by columns: one instruction takes the same 64 columns of all rows, a repeat a row. Rows too
// long for its stride field (8 bits, in units of 32 bytes) are worked on one by one.
#pragma once

#include "common.h"

namespace pyalpaca_npu {

constexpr int32_t kLongestNarrow = 255 * kBlock;
constexpr int32_t kChunk = 2048;  // products of a long row that are summed at a time

struct Tile {
  int32_t rows, width, pitch;
  __aicore__ inline bool narrow_rows() const { return pitch <= kLongestNarrow; }
};

// to = a * b, where b is one row for all rows.
__aicore__ inline void multiply_by_row(const LocalTensor<float>& to, const LocalTensor<float>& a,
                                       const LocalTensor<float>& b, const Tile& tile) {
  if (!tile.narrow_rows()) {
    for (int32_t row = 0; row < tile.rows; ++row) Mul(to[row * tile.pitch], a[row * tile.pitch], b, tile.width);
    return;
  }
  const uint8_t step = narrow(tile.pitch / kBlock);
  for (int32_t column = 0; column < tile.width; column += kLanes) {
    const uint64_t mask = tile.width - column < kLanes ? tile.width - column : kLanes;
    Mul(to[column], a[column], b[column], mask, narrow(tile.rows), BinaryRepeatParams(1, 1, 1, step, step, 0));
  }
}

// to = a * b, where b has 8 copies of one number for each row.
__aicore__ inline void multiply_by_number(const LocalTensor<float>& to, const LocalTensor<float>& a,
                                          const LocalTensor<float>& b, const Tile& tile) {
  if (tile.narrow_rows()) {
    const uint8_t step = narrow(tile.pitch / kBlock);
    for (int32_t column = 0; column < tile.width; column += kLanes) {
      const uint64_t mask = tile.width - column < kLanes ? tile.width - column : kLanes;
      Mul(to[column], a[column], b, mask, narrow(tile.rows), BinaryRepeatParams(1, 1, 0, step, step, 1));
    }
    return;
  }
  const BinaryRepeatParams same(1, 1, 0, 8, 8, 0);
  const int32_t whole = tile.width / kLanes, rest = tile.width % kLanes;
  for (int32_t row = 0; row < tile.rows; ++row) {
    const LocalTensor<float> to_row = to[row * tile.pitch], from_row = a[row * tile.pitch], number = b[row * kBlock];
    Mul(to_row, from_row, number, static_cast<uint64_t>(kLanes), narrow(whole), same);
    if (rest > 0) Mul(to_row[whole * kLanes], from_row[whole * kLanes], number, static_cast<uint64_t>(rest), 1, same);
  }
}

// sums (a number a row, up to a multiple of 8 rows) = the rows of a times the rows of b.
// lanes: 64 numbers a row; products: 64 numbers a row, or kChunk for long rows; parts: 8 numbers a row, rows up to 8.
__aicore__ inline void dot_rows(const LocalTensor<float>& sums, const LocalTensor<float>& a,
                                const LocalTensor<float>& b, const LocalTensor<float>& lanes,
                                const LocalTensor<float>& products, const LocalTensor<float>& parts, const Tile& tile) {
  const int32_t rows_up = round_up(tile.rows, kBlock);
  Duplicate(lanes, 0.0f, tile.rows * kLanes);
  if (tile.narrow_rows()) {
    const uint8_t step = narrow(tile.pitch / kBlock), rows = narrow(tile.rows);
    for (int32_t column = 0; column < tile.width; column += kLanes) {
      const uint64_t mask = tile.width - column < kLanes ? tile.width - column : kLanes;
      Mul(products, a[column], b[column], mask, rows, BinaryRepeatParams(1, 1, 1, 8, step, step));
      Add(lanes, products, lanes, mask, rows, BinaryRepeatParams(1, 1, 1, 8, 8, 8));
    }
  } else {
    for (int32_t row = 0; row < tile.rows; ++row) {
      const LocalTensor<float> own = lanes[row * kLanes];
      for (int32_t column = 0; column < tile.width; column += kChunk) {
        const int32_t at = row * tile.pitch + column;
        const int32_t count = tile.width - column < kChunk ? tile.width - column : kChunk;
        const int32_t whole = count / kLanes, rest = count % kLanes;
        Mul(products, a[at], b[at], count);
        if (whole > 0) {  // each repeat adds to the same 64 lanes
          Add(own, products, own, static_cast<uint64_t>(kLanes), narrow(whole), BinaryRepeatParams(1, 1, 1, 0, 8, 0));
        }
        if (rest > 0) {
          Add(own, products[whole * kLanes], own, static_cast<uint64_t>(rest), 1, BinaryRepeatParams(1, 1, 1, 8, 8, 8));
        }
      }
    }
  }
  Duplicate(parts, 0.0f, rows_up * kBlock);
  BlockReduceSum<float>(parts, lanes, narrow(tile.rows), kLanes, 1, 1, 8);
  BlockReduceSum<float>(sums, parts, narrow(rows_up / kBlock), kLanes, 1, 1, 8);
}

// total (a row) += a * b, summed over the rows in their order; products as for dot_rows.
__aicore__ inline void add_products(const LocalTensor<float>& total, const LocalTensor<float>& a,
                                    const LocalTensor<float>& b, const LocalTensor<float>& products, const Tile& tile) {
  if (!tile.narrow_rows()) {
    for (int32_t row = 0; row < tile.rows; ++row)
      MulAddDst(total, a[row * tile.pitch], b[row * tile.pitch], tile.width);
    return;
  }
  const uint8_t step = narrow(tile.pitch / kBlock), rows = narrow(tile.rows);
  for (int32_t column = 0; column < tile.width; column += kLanes) {
    const uint64_t mask = tile.width - column < kLanes ? tile.width - column : kLanes;
    const LocalTensor<float> own = total[column];
    Mul(products, a[column], b[column], mask, rows, BinaryRepeatParams(1, 1, 1, 8, step, step));
    Add(own, products, own, mask, rows, BinaryRepeatParams(1, 1, 1, 0, 8, 0));
  }
}

}  // namespace pyalpaca_npu
