// weight + scale * (b a), for one pair of LoRA factors after the other, rounded after each, in one pass over the
// weight.
//
// Each element of b a is one chain of fused multiply-adds over the rank, in order, so its bits depend neither on the
// threads nor on how the matrix is cut; BLAS does the same for the ranks that adapters have. Compiled without
// contraction: the product is rounded, then scaled and rounded, then added, as the original merge does.
#include "cpu/instruction_set.h"
#include "cpu/kernels.h"
#include "cpu/threads.h"
#include "cpu/vec.h"

namespace pyalpaca::cpu::PYALPACA_ISA {
namespace {

constexpr int64_t kGrain = 65536;        // elements that are worth a thread
constexpr int64_t kBlockFloats = 32768;  // of a: stays in the second-level cache while rows go by
constexpr int kRows = 4, kVecs = 3;      // 12 running sums in registers

PYALPACA_INLINE Vec fused(Vec x, Vec y, Vec z) {
#if defined(__AVX512F__)
  return as<Vec>(_mm512_fmadd_ps(as<__m512>(x), as<__m512>(y), as<__m512>(z)));
#elif defined(__FMA__)
  return as<Vec>(_mm256_fmadd_ps(as<__m256>(x), as<__m256>(y), as<__m256>(z)));
#else
  for (int i = 0; i < kLanes; ++i) z[i] = __builtin_fmaf(x[i], y[i], z[i]);
  return z;
#endif
}

template <class T, int Rows, int Vecs>
PYALPACA_INLINE void tile(const LoraMerge& m, int64_t row, int64_t column) {
  const T* from = static_cast<const T*>(m.weight) + row * m.weight_stride + column;
  T* to = static_cast<T*>(m.out) + row * m.columns + column;
  int64_t stride = m.weight_stride;
  for (int64_t f = 0; f < m.count; ++f) {
    const LoraFactors& factors = m.factors[f];
    Vec sums[Rows][Vecs] = {};
    for (int64_t k = 0; k < factors.rank; ++k) {
      Vec a[Vecs];
      for (int v = 0; v < Vecs; ++v) a[v] = load(factors.a + k * m.columns + column + v * kLanes);
      for (int r = 0; r < Rows; ++r) {
        const Vec b = splat(factors.b[(row + r) * factors.rank + k]);
        for (int v = 0; v < Vecs; ++v) sums[r][v] = fused(b, a[v], sums[r][v]);
      }
    }
    for (int r = 0; r < Rows; ++r) {
      for (int v = 0; v < Vecs; ++v) {
        const Vec weight = load(from + r * stride + v * kLanes);
        store(to + r * m.columns + v * kLanes, weight + sums[r][v] * factors.scale);
      }
    }
    from = to, stride = m.columns;  // the next pair adds to what this one left
  }
}

template <class T>
PYALPACA_INLINE void element(const LoraMerge& m, int64_t row, int64_t column) {
  T* to = static_cast<T*>(m.out) + row * m.columns + column;
  *to = static_cast<const T*>(m.weight)[row * m.weight_stride + column];
  for (int64_t f = 0; f < m.count; ++f) {
    const LoraFactors& factors = m.factors[f];
    float sum = 0.0f;
    for (int64_t k = 0; k < factors.rank; ++k) {
      sum = __builtin_fmaf(factors.b[row * factors.rank + k], factors.a[k * m.columns + column], sum);
    }
    const float scaled = sum * factors.scale;
    store_one(to, load_one(to) + scaled);
  }
}

template <class T, int Rows>
PYALPACA_INLINE void rows_of_block(const LoraMerge& m, int64_t row, int64_t begin, int64_t end) {
  int64_t column = begin;
  for (; column + kVecs * kLanes <= end; column += kVecs * kLanes) tile<T, Rows, kVecs>(m, row, column);
  for (; column + kLanes <= end; column += kLanes) tile<T, Rows, 1>(m, row, column);
  for (; column < end; ++column) {
    for (int r = 0; r < Rows; ++r) element<T>(m, row + r, column);
  }
}

}  // namespace

void lora_merge(const LoraMerge& m) {
  int64_t ranks = 1;
  for (int64_t f = 0; f < m.count; ++f) ranks += m.factors[f].rank;
  const int64_t step = kVecs * kLanes, width = max(kBlockFloats / ranks / step, 1) * step;
  with_type(m.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    parallel(m.rows, max(kGrain / m.columns, kRows), [&](int64_t begin, int64_t end) {
      for (int64_t column = 0; column < m.columns; column += width) {
        const int64_t stop = min(column + width, m.columns);
        int64_t row = begin;
        for (; row + kRows <= end; row += kRows) rows_of_block<T, kRows>(m, row, column, stop);
        for (; row < end; ++row) rows_of_block<T, 1>(m, row, column, stop);
      }
    });
  });
}

}  // namespace pyalpaca::cpu::PYALPACA_ISA
