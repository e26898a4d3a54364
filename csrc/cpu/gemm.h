// Matrix products of the small fp32 tiles that attention is made of, held in the nearest caches.
//
// A library's sgemm packs its operands and starts its machinery at each call; for tiles of about 100 x 100 that costs
// as much as it gains. Here b lies in panels of kColumns columns, so its rows are two aligned vectors one after the
// other; a is read element by element and may lie along its rows or along the depth, so neither is ever packed twice.
#pragma once

#include "cpu/vec.h"

namespace pyalpaca::cpu::PYALPACA_ISA {
namespace {

constexpr int64_t kColumns = 2 * kLanes;  // of a panel
// Rows of a micro-tile: twice as many running sums, 2 vectors of b and 1 of a fill the registers (32 or 16).
#if defined(__AVX512F__)
constexpr int kRows = 14;
#elif defined(__AVX2__) || defined(__aarch64__)
constexpr int kRows = 6;
#else
constexpr int kRows = 2;
#endif

// How many threads a product of that many multiplications is worth: waking one for less than about 30 us gains nothing,
// and where other processes use the processor too it costs milliseconds.
PYALPACA_INLINE int64_t worthy_threads(int64_t multiplications, int64_t threads) {
  return max(min(multiplications >> 20, threads), 1);
}

// How element (i, k) of a lies: at data[i * stride + k], or at data[i + k * stride].
enum class Lies { kAlongDepth, kAlongRows };

// What a product begins with: nothing, what c holds, or that times one factor a column.
struct Begin {
  bool add;
  const float* factors;  // kColumns, or nullptr for 1
};
constexpr Begin kSet = {false, nullptr}, kAdd = {true, nullptr};

template <Lies lies, int rows>
void micro_tile(int64_t depth, const float* a, int64_t stride, const float* b, int64_t b_row, float* c, int64_t c_row,
                Begin begin) {
  Vec sums[rows][2];
  if (!begin.add) {
#pragma GCC unroll 14
    for (int i = 0; i < rows; ++i) sums[i][0] = sums[i][1] = Vec{};
  } else if (begin.factors == nullptr) {
#pragma GCC unroll 14
    for (int i = 0; i < rows; ++i) {
      sums[i][0] = load(c + i * c_row);
      sums[i][1] = load(c + i * c_row + kLanes);
    }
  } else {
    const Vec f0 = load(begin.factors), f1 = load(begin.factors + kLanes);
#pragma GCC unroll 14
    for (int i = 0; i < rows; ++i) {
      sums[i][0] = load(c + i * c_row) * f0;
      sums[i][1] = load(c + i * c_row + kLanes) * f1;
    }
  }
  const float* bases[3] = {a, a + 5 * stride, a + 10 * stride};  // three keep all offsets within addressing modes
  for (int64_t k = 0; k < depth; ++k) {
    const Vec b0 = load(b), b1 = load(b + kLanes);
#pragma GCC unroll 14
    for (int i = 0; i < rows; ++i) {
      const Vec left = splat(lies == Lies::kAlongRows ? a[i] : bases[i / 5][i % 5 * stride]);
      sums[i][0] += left * b0;
      sums[i][1] += left * b1;
    }
    if (lies == Lies::kAlongRows) a += stride;
    for (int i = 0; i < 3; ++i) ++bases[i];
    b += b_row;
  }
#pragma GCC unroll 14
  for (int i = 0; i < rows; ++i) {
    store(c + i * c_row, sums[i][0]);
    store(c + i * c_row + kLanes, sums[i][1]);
  }
}

template <Lies lies, int rows>
PYALPACA_INLINE void micro_tile_of(int64_t count, int64_t depth, const float* a, int64_t stride, const float* b,
                                   int64_t b_row, float* c, int64_t c_row, Begin begin) {
  if (count == rows) return micro_tile<lies, rows>(depth, a, stride, b, b_row, c, c_row, begin);
  if constexpr (rows > 1) micro_tile_of<lies, rows - 1>(count, depth, a, stride, b, b_row, c, c_row, begin);
}

// One panel of columns: c (rows x kColumns) = a (rows x depth) b (depth x kColumns), or += as `begin` says. The panel
// of b stays in the first cache while the rows of a pass by, in micro-tiles of nearly the same height.
template <Lies lies>
__attribute__((noinline)) void multiply(int64_t rows, int64_t depth, const float* a, int64_t stride, const float* b,
                                        int64_t b_row, float* c, int64_t c_row, Begin begin) {
  const int64_t tiles = (rows + kRows - 1) / kRows;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t first = rows * t / tiles, count = rows * (t + 1) / tiles - first;
    micro_tile_of<lies, kRows>(count, depth, a + first * (lies == Lies::kAlongRows ? 1 : stride), stride, b, b_row,
                               c + first * c_row, c_row, begin);
  }
}

// ---- copies into tiles: converted to fp32 once

// rows x width times `factor` -> to[rows][to_row]
template <class T>
void copy_tile(const T* from, int64_t from_row, int64_t rows, int64_t width, float factor, float* to, int64_t to_row) {
  for (int64_t i = 0; i < rows; ++i, from += from_row, to += to_row) {
    for (int64_t j = 0; j < width; j += kLanes) {
      store_first(to + j, load_first(from + j, width - j) * factor, width - j);
    }
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

// A tile of rows x width (a multiple of 8) -> to[width][to_row], its columns zero from `rows` up to `end`.
inline void transpose_tile(const float* from, int64_t from_row, int64_t rows, int64_t width, float* to, int64_t to_row,
                           int64_t end) {
  const int64_t whole = rows / 8 * 8;
  for (int64_t i = 0; i < whole; i += 8) {
    for (int64_t j = 0; j < width; j += 8) transpose8(from + i * from_row + j, from_row, to + j * to_row + i, to_row);
  }
  if (whole == end) return;
  for (int64_t j = 0; j < width; ++j) {
    for (int64_t i = whole; i < end; ++i) to[j * to_row + i] = i < rows ? from[i * from_row + j] : 0.0f;
  }
}

}  // namespace
}  // namespace pyalpaca::cpu::PYALPACA_ISA
