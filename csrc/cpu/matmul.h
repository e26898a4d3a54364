// Matrix products of any size, summed in fp32, from operands stored in any of our types: the loops around a micro-tile.
//
// As in BLIS (Van Zee and van de Geijn 2015): both operands are copied into panels in the order in which a micro-tile
// reads them. It is in this copy that bf16, fp16, int8 and int4 become fp32, so that a product costs what one of fp32
// does. Where both are bf16 and the processor multiplies pairs of them (AVX512_BF16), the panels hold pairs instead,
// at twice the speed. What becomes of a block of the result is the caller's: to store it, or to reduce it at once.
#pragma once

#include "cpu/gemm.h"
#include "cpu/matrix.h"
#include "cpu/threads.h"

namespace pyalpaca::cpu::PYALPACA_ISA {
namespace {

constexpr int64_t kUnits = 256;         // the depth of a slice, in fp32 numbers or pairs of bf16
constexpr int64_t kBlockColumns = 128;  // a block of the result and b's panels for a slice fit the second cache
static_assert(kBlockRows % kRows == 0, "blocks are whole panels");

// The result is a b^T: a has `rows` lines and b `columns`, both of `depth` elements.
struct Product {
  Matrix a, b;
  int64_t rows, columns, depth;
};

PYALPACA_INLINE bool in_pairs(const Product& p) {
#ifdef __AVX512BF16__
  return p.a.storage == Storage::kBFloat16 && p.b.storage == Storage::kBFloat16;
#else
  return p.rows < 0;
#endif
}

// ---- panels: [panel][unit][width], zero where the operand ends

// A piece of a line as units: fp32 numbers, or pairs of bf16, the last one filled up with zero.
PYALPACA_INLINE void fetch(const Matrix& m, int64_t line, int64_t from, int64_t count, bool pairs, float* to) {
  if (!pairs) return widen(m, line, from, count, to);
  if (count % 2 != 0) to[count / 2] = 0.0f;
  std::memcpy(to, static_cast<const BFloat16*>(m.data) + line * m.stride + from, 2 * static_cast<size_t>(count));
}

// Lines whose depth is contiguous, turned: eight at a time.
void pack_lines(const Matrix& m, int64_t first, int64_t lines, int64_t k, int64_t depth, bool pairs, int64_t width,
                float* to) {
  const int64_t units = pairs ? (depth + 1) / 2 : depth;
  alignas(64) float pieces[8][kUnits];
  for (int64_t panel = 0; panel < lines; panel += width, to += units * width) {
    for (int64_t i = 0; i < width; i += 8) {
      const int64_t here = min(width - i, 8);
      for (int64_t r = 0; r < here; ++r) {
        if (panel + i + r < lines) {
          fetch(m, first + panel + i + r, k, depth, pairs, pieces[r]);
        } else {
          std::memset(pieces[r], 0, sizeof(float) * static_cast<size_t>(units));
        }
      }
      int64_t u = 0;
      for (; u + 8 <= units; u += 8) {
        if (here == 8) {
          transpose8(&pieces[0][u], kUnits, to + u * width + i, width);
        } else {
          float turned[8][8];
          transpose8(&pieces[0][u], kUnits, turned[0], 8);
          for (int64_t j = 0; j < 8; ++j) {
            std::memcpy(to + (u + j) * width + i, turned[j], sizeof(float) * static_cast<size_t>(here));
          }
        }
      }
      for (; u < units; ++u) {
        for (int64_t r = 0; r < here; ++r) to[u * width + i + r] = pieces[r][u];
      }
    }
  }
}

// Two lines interleaved: the pairs (a[j], b[j]), or (a[j], 0) without b.
PYALPACA_INLINE void interleave(const BFloat16* a, const BFloat16* b, int64_t count, float* to) {
  for (int64_t j = 0; j < count; ++j) {
    to[j] = as<float>(static_cast<uint32_t>(a[j].bits) | static_cast<uint32_t>(b == nullptr ? 0 : b[j].bits) << 16);
  }
}

// A stored transposed: its lines run along the panels.
void pack_across(const Matrix& m, int64_t first, int64_t lines, int64_t k, int64_t depth, bool pairs, int64_t width,
                 float* to) {
  const int64_t units = pairs ? (depth + 1) / 2 : depth, whole = round_up(lines, width);
  alignas(64) float line[kBlockRows];
  std::memset(line + lines, 0, sizeof(float) * static_cast<size_t>(whole - lines));
  for (int64_t u = 0; u < units; ++u) {
    if (pairs) {
      const BFloat16* pair = static_cast<const BFloat16*>(m.data) + (k + 2 * u) * m.stride + first;
      interleave(pair, 2 * u + 1 < depth ? pair + m.stride : nullptr, lines, line);
    } else {
      widen(m, k + u, first, lines, line);
    }
    for (int64_t panel = 0; panel < whole; panel += width) {
      std::memcpy(to + panel * units + u * width, line + panel, sizeof(float) * static_cast<size_t>(width));
    }
  }
}

PYALPACA_INLINE void pack(const Matrix& m, int64_t first, int64_t lines, int64_t k, int64_t depth, bool pairs,
                          int64_t width, float* to) {
  if (m.transposed) {
    pack_across(m, first, lines, k, depth, pairs, width, to);
  } else {
    pack_lines(m, first, lines, k, depth, pairs, width, to);
  }
}

// ---- micro-tiles: c (kRows x kColumns) = or += the products of two panels

__attribute__((noinline)) void tile(int64_t units, const float* a, const float* b, float* c, bool add) {
  micro_tile<Lies::kAlongRows, kRows>(units, a, kRows, b, kColumns, c, kBlockColumns, add ? kAdd : kSet);
}

#ifdef __AVX512BF16__
__attribute__((noinline)) void tile_of_pairs(int64_t units, const float* a, const float* b, float* c, bool add) {
  __m512 sums[kRows][2];
#pragma GCC unroll 14
  for (int i = 0; i < kRows; ++i) {
    sums[i][0] = add ? _mm512_loadu_ps(c + i * kBlockColumns) : _mm512_setzero_ps();
    sums[i][1] = add ? _mm512_loadu_ps(c + i * kBlockColumns + 16) : _mm512_setzero_ps();
  }
  for (int64_t u = 0; u < units; ++u, a += kRows, b += kColumns) {
    const __m512bh b0 = (__m512bh)_mm512_loadu_ps(b), b1 = (__m512bh)_mm512_loadu_ps(b + 16);
#pragma GCC unroll 14
    for (int i = 0; i < kRows; ++i) {
      const __m512bh left = (__m512bh)_mm512_set1_ps(a[i]);
      sums[i][0] = _mm512_dpbf16_ps(sums[i][0], left, b0);
      sums[i][1] = _mm512_dpbf16_ps(sums[i][1], left, b1);
    }
  }
#pragma GCC unroll 14
  for (int i = 0; i < kRows; ++i) {
    _mm512_storeu_ps(c + i * kBlockColumns, sums[i][0]);
    _mm512_storeu_ps(c + i * kBlockColumns + 16, sums[i][1]);
  }
}
#endif

PYALPACA_INLINE void any_tile(bool pairs, int64_t units, const float* a, const float* b, float* c, bool add) {
#ifdef __AVX512BF16__
  if (pairs) return tile_of_pairs(units, a, b, c, add);
#endif
  (void)pairs;
  tile(units, a, b, c, add);
}

// ---- the loops

// Calls finish(row, rows, column, columns, c) for each block of the result, c fp32 with kBlockColumns between its rows;
// on several threads at once, but each block is the same sum whatever the threads. `panels`: panel_floats(rows, depth).
template <class Finish>
void matmul(const Product& p, float* panels, const Finish& finish) {
  const bool pairs = in_pairs(p);
  const int64_t slice = pairs ? 2 * kUnits : kUnits, slices = (p.depth + slice - 1) / slice;
  const int64_t column_blocks = (p.columns + kBlockColumns - 1) / kBlockColumns;
  for (int64_t row = 0; row < p.rows; row += kBlockRows) {
    const int64_t rows = min(p.rows - row, kBlockRows), tiles = (rows + kRows - 1) / kRows;
    const int64_t threads = worthy_threads(rows * p.columns * p.depth, num_threads());
    const auto panel_of = [&](int64_t s, int64_t first_tile) {  // a slice has all its rows' panels together
      const int64_t depth = min(p.depth - s * slice, slice), units = pairs ? (depth + 1) / 2 : depth;
      return panels + s * kUnits * tiles * kRows + first_tile * units * kRows;
    };
    Queue pack_queue;
    parallel(threads, 1, [&](int64_t, int64_t) {
      for (int64_t s; (s = pack_queue.take()) < slices;) {
        pack(p.a, row, rows, s * slice, min(p.depth - s * slice, slice), pairs, kRows, panel_of(s, 0));
      }
    });
    // A narrow result is cut by rows too, so that every thread has some of it.
    const int64_t cuts = max(min((4 * threads + column_blocks - 1) / column_blocks, (tiles + 3) / 4), 1);
    const int64_t part = (tiles + cuts - 1) / cuts;
    const int64_t tasks = threads == 1 ? column_blocks : column_blocks * ((tiles + part - 1) / part);
    const int64_t part_tiles = threads == 1 ? tiles : part;
    Queue queue;
    parallel(threads, 1, [&](int64_t, int64_t) {
      float* c = scratch(part_tiles * kRows * kBlockColumns + kUnits * kBlockColumns);
      float* b = c + part_tiles * kRows * kBlockColumns;
      for (int64_t task; (task = queue.take()) < tasks;) {
        const int64_t column = task % column_blocks * kBlockColumns, first = task / column_blocks * part_tiles;
        const int64_t columns = min(p.columns - column, kBlockColumns), last = min(first + part_tiles, tiles);
        for (int64_t s = 0; s < slices; ++s) {
          const int64_t depth = min(p.depth - s * slice, slice), units = pairs ? (depth + 1) / 2 : depth;
          pack(p.b, column, columns, s * slice, depth, pairs, kColumns, b);
          for (int64_t j = 0; j < columns; j += kColumns) {
            for (int64_t t = first; t < last; ++t) {
              any_tile(pairs, units, panel_of(s, t), b + j * units, c + (t - first) * kRows * kBlockColumns + j, s > 0);
            }
          }
        }
        const int64_t top = first * kRows;
        finish(row + top, min(rows - top, (last - first) * kRows), column, columns, c);
      }
    });
  }
}

}  // namespace
}  // namespace pyalpaca::cpu::PYALPACA_ISA
