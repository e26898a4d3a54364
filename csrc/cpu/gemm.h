// Matrix products of the small fp32 tiles that attention is made of, held in the nearest caches.
//
// A library's sgemm packs its operands and starts its machinery at each call; for tiles of about 100 x 100 that costs
// as much as it gains. Tiles here have rows padded to whole micro-tiles (`padded`), so columns have no tails.
#pragma once

#include "cpu/vec.h"

namespace pyalpaca::cpu::PYALPACA_ISA {
namespace {

constexpr int64_t kColumns = 2 * kLanes;  // of one micro-tile
constexpr int64_t kRows = 6;              // 6 x 2 accumulators, 2 of b and 1 of a fit 16 registers

// How many threads a product of that many multiplications is worth: waking one for less than about 30 us gains nothing,
// and where other processes use the processor too it costs milliseconds.
PYALPACA_INLINE int64_t worthy_threads(int64_t multiplications, int64_t threads) {
  return max(min(multiplications >> 20, threads), 1);
}

// The row length of a tile of `width` columns. The extra 64 bytes keep rows off each other's cache sets: with a power
// of two between rows, a column of micro-tiles would fall into a few sets and evict itself.
PYALPACA_INLINE int64_t padded(int64_t width) { return round_up(width, kColumns) + kColumns; }

// An operand read element by element: element (i, k) at data[i * row + k * depth], so a transposed tile needs no copy.
struct Left {
  const float* data;
  int64_t row, depth;
};

template <int rows>
PYALPACA_INLINE void micro_tile(int64_t depth, Left a, const float* b, int64_t b_row, float* c, int64_t c_row,
                                bool add) {
  Vec sums[rows][2];
#pragma GCC unroll 6
  for (int i = 0; i < rows; ++i) {
    sums[i][0] = add ? load(c + i * c_row) : Vec{};
    sums[i][1] = add ? load(c + i * c_row + kLanes) : Vec{};
  }
  const float* first = a.data;
  const float* fourth = a.data + 3 * a.row;  // two bases keep the six row offsets within addressing modes
  for (int64_t k = 0; k < depth; ++k) {
    const Vec b0 = load(b), b1 = load(b + kLanes);
#pragma GCC unroll 6
    for (int i = 0; i < rows; ++i) {
      const Vec left = splat(i < 3 ? first[i * a.row] : fourth[(i - 3) * a.row]);
      sums[i][0] += left * b0;
      sums[i][1] += left * b1;
    }
    first += a.depth;
    fourth += a.depth;
    b += b_row;
  }
#pragma GCC unroll 6
  for (int i = 0; i < rows; ++i) {
    store(c + i * c_row, sums[i][0]);
    store(c + i * c_row + kLanes, sums[i][1]);
  }
}

// c (rows x columns) = a (rows x depth) b (depth x columns), or += if `add`. Columns are rounded up to a multiple
// of kColumns. A panel of that many columns of b stays in the first cache while the rows of a pass by.
__attribute__((noinline)) void gemm(int64_t rows, int64_t columns, int64_t depth, Left a, const float* b, int64_t b_row,
                                    float* c, int64_t c_row, bool add) {
  for (int64_t j = 0; j < columns; j += kColumns) {
    int64_t i = 0;
    for (; i + kRows <= rows; i += kRows) {
      micro_tile<kRows>(depth, {a.data + i * a.row, a.row, a.depth}, b + j, b_row, c + i * c_row + j, c_row, add);
    }
    const Left rest{a.data + i * a.row, a.row, a.depth};
    float* out = c + i * c_row + j;
    switch (rows - i) {
      case 5:
        micro_tile<5>(depth, rest, b + j, b_row, out, c_row, add);
        break;
      case 4:
        micro_tile<4>(depth, rest, b + j, b_row, out, c_row, add);
        break;
      case 3:
        micro_tile<3>(depth, rest, b + j, b_row, out, c_row, add);
        break;
      case 2:
        micro_tile<2>(depth, rest, b + j, b_row, out, c_row, add);
        break;
      case 1:
        micro_tile<1>(depth, rest, b + j, b_row, out, c_row, add);
        break;
      default:
        break;
    }
  }
}

// ---- copies into tiles: converted to fp32 once, columns zero up to the next multiple of kColumns

// rows x width (a multiple of 8) times `factor` -> to[rows][to_row]
template <class T>
void copy_tile(const T* from, int64_t from_row, int64_t rows, int64_t width, float factor, float* to, int64_t to_row) {
  const int64_t end = round_up(width, kColumns);
  for (int64_t i = 0; i < rows; ++i, from += from_row, to += to_row) {
    for (int64_t j = 0; j < end; j += kLanes) store(to + j, load_first(from + j, max(width - j, 0)) * factor);
  }
}

PYALPACA_INLINE void transpose8(const float* from, int64_t from_row, float* to, int64_t to_row) {
#ifdef __AVX2__
  __m256 r[8], t[8];
  for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(from + i * from_row);
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(to + i * to_row, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
    _mm256_storeu_ps(to + (i + 4) * to_row, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
  }
#else
  for (int i = 0; i < 8; ++i) {
    for (int j = 0; j < 8; ++j) to[j * to_row + i] = from[i * from_row + j];
  }
#endif
}

// A tile of rows x width (a multiple of 8) -> to[width][to_row], its columns zero from `rows` up to a multiple of
// kColumns.
inline void transpose_tile(const float* from, int64_t from_row, int64_t rows, int64_t width, float* to,
                           int64_t to_row) {
  const int64_t whole = rows / 8 * 8, end = round_up(rows, kColumns);
  for (int64_t i = 0; i < whole; i += 8) {
    for (int64_t j = 0; j < width; j += 8) transpose8(from + i * from_row + j, from_row, to + j * to_row + i, to_row);
  }
  for (int64_t j = 0; j < width; ++j) {
    for (int64_t i = whole; i < end; ++i) to[j * to_row + i] = i < rows ? from[i * from_row + j] : 0.0f;
  }
}

}  // namespace
}  // namespace pyalpaca::cpu::PYALPACA_ISA
