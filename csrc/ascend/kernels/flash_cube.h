// What the cube core does with matrices of 16-bit elements: into L1 in fractals, on to L0 in the order in which Mmad
// reads its factors, products, and out as rows.
//
// A fractal is 16 rows of 32 bytes. L1 and L0C hold columns of fractals one after the other, L0A rows of fractals, L0B
// rows of fractals whose elements go down first.
#pragma once

#include "flash_places.h"

namespace pyalpaca_npu {

constexpr int32_t kSide = 16, kFractalElements = kSide * kSide;

// A field of 16 bits, as narrow() is for 8.
__aicore__ inline uint16_t field(int64_t value) {
#ifdef ASCENDC_CPU_DEBUG
  ASSERT(value >= 0 && value <= 65535);
#endif
  return static_cast<uint16_t>(value);
}

__aicore__ inline int32_t fractals(int32_t n) { return (n + kSide - 1) / kSide; }

// Rows of a matrix into L1; `height` (a multiple of 16) rows apart are its columns of fractals.
template <typename T>
__aicore__ inline void load_fractals(const LocalTensor<T>& to, const GlobalTensor<T>& from, int32_t rows,
                                     int32_t columns, int64_t pitch, int32_t height) {
  DataCopy(to, from, Nd2NzParams(1, field(rows), field(columns), 0, field(pitch), field(height), 1, 0));
}

// The same for a first factor: Mmad of one row would read it in another layout, so a single row comes twice.
template <typename T>
__aicore__ inline void load_left_rows(const LocalTensor<T>& to, const GlobalTensor<T>& from, int32_t rows,
                                      int32_t columns, int64_t pitch) {
  const int32_t height = fractals(rows) * kSide;
  load_fractals(to, from, rows, columns, pitch, height);
  if (rows == 1) load_fractals(to[kSide], from, 1, columns, pitch, height);
}
__aicore__ inline int32_t cube_rows(int32_t rows) { return rows == 1 ? 2 : rows; }

// What L1 holds as (m, k) -> the first factor.
template <typename T>
__aicore__ inline void load_left(const LocalTensor<T>& to, const LocalTensor<T>& from, int32_t m, int32_t k) {
  const int32_t down = fractals(m), across = fractals(k);
  for (int32_t i = 0; i < down; ++i) {
    LoadData(to[i * across * kFractalElements], from[i * kFractalElements],
             LoadData2DParams(0, narrow(across), field(down), 0, 0, false, 0));
  }
}

// What L1 holds as (k, m) -> the first factor (m, k): the same order of fractals, each turned over.
template <typename T>
__aicore__ inline void load_left_transposed(const LocalTensor<T>& to, const LocalTensor<T>& from, int32_t m,
                                            int32_t k) {
  LoadData(to, from, LoadData2DParams(0, narrow(fractals(m) * fractals(k)), 1, 0, 0, true, 0));
}

// What L1 holds as (n, k) -> the second factor (k, n): the same order already.
template <typename T>
__aicore__ inline void load_right_transposed(const LocalTensor<T>& to, const LocalTensor<T>& from, int32_t n,
                                             int32_t k) {
  LoadData(to, from, LoadData2DParams(0, narrow(fractals(n) * fractals(k)), 1, 0, 0, false, 0));
}

// What L1 holds as (k, n) -> the second factor; of the rows in L1, `height` or k, the first k.
template <typename T>
__aicore__ inline void load_right(const LocalTensor<T>& to, const LocalTensor<T>& from, int32_t k, int32_t n,
                                  int32_t height = 0) {
  const int32_t down = fractals(k), across = fractals(n), step = height > 0 ? fractals(height) : down;
  for (int32_t i = 0; i < down; ++i) {
    LoadData(to[i * across * kFractalElements], from[i * kFractalElements],
             LoadData2DParams(0, narrow(across), field(step), 0, 0, true, 0));
  }
}

// c (m, n) = a b, or c += a b. The products of small matrices may overtake each other: between two that add to the same
// place stands a barrier (asc-devkit: Mmad, notes on synchronisation).
template <typename T>
__aicore__ inline void multiply(const LocalTensor<float>& c, const LocalTensor<T>& a, const LocalTensor<T>& b,
                                int32_t m, int32_t n, int32_t k, bool add) {
  if (add && (m / kSide) * (n / kSide) < 10) PipeBarrier<PIPE_M>();
  Mmad(c, a, b, MmadParams(field(m), field(n), field(k), 0, false, !add));
}

// c out of L0C as rows of fp32, `pitch` apart; columns are stored in sixteens, whatever is in the last ones.
__aicore__ inline void store_product(const GlobalTensor<float>& to, const LocalTensor<float>& c, int32_t m, int32_t n,
                                     int32_t pitch) {
  const FixpipeParamsV220 shape(field(fractals(n) * kSide), field(m), field(fractals(m) * kSide),
                                static_cast<uint32_t>(pitch), false);
  Fixpipe<float, float, CFG_ROW_MAJOR>(to, c, shape);
}

}  // namespace pyalpaca_npu
