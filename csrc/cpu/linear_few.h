// A few tokens times a large weight: the weight's bytes are read once, as fast as memory gives them.
//
// Several rows of the weight at a time, so that a register of x serves them all: x may not fit the nearest cache, and
// what it takes from the next one is lacking to the weight. Each is widened on its way to the product.
#pragma once

#include "cpu/matrix.h"
#include "cpu/stream.h"

namespace pyalpaca::cpu::PYALPACA_ISA {
namespace {

#ifdef __AVX512F__
constexpr int kFewRows = 12;   // at once by one token: so many sums in registers
constexpr int kFewTokens = 4;  // at once by kSomeRows
#else
constexpr int kFewRows = 8;
constexpr int kFewTokens = 2;
#endif
constexpr int kSomeRows = 4;

template <class T>
PYALPACA_INLINE Vec load_end(const T* p, int64_t count) {
  if constexpr (sizeof(T) > 1) {
    return load_first(p, count);
  } else {
    Int8 row[kLanes] = {};
    for (int64_t i = 0; i < count; ++i) row[i] = p[i];
    return load(row);
  }
}

// kInt4Block numbers from 16 bytes, kLanes at a time.
constexpr int kInt4Parts = kInt4Block / kLanes;
PYALPACA_INLINE void load_int4(const uint8_t* p, Vec* to) {
#if defined(__AVX512F__)
  // A permutation looks at the low four bits of each index: it is the table of the sixteen values.
  const __m512 values = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  to[0] = as<Vec>(_mm512_permutexvar_ps(bytes, values));
  to[1] = as<Vec>(_mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), values));
#elif defined(__AVX2__)
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), four = _mm_set1_epi8(15);
  const __m128i halves[2] = {_mm_sub_epi8(_mm_and_si128(bytes, four), _mm_set1_epi8(8)),
                             _mm_sub_epi8(_mm_and_si128(_mm_srli_epi16(bytes, 4), four), _mm_set1_epi8(8))};
  for (int h = 0; h < 2; ++h) {
    to[2 * h] = as<Vec>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(halves[h])));
    to[2 * h + 1] = as<Vec>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(halves[h], 8))));
  }
#else
  for (int j = 0; j < kInt4Block / 2; ++j) {
    to[j / kLanes][j % kLanes] = static_cast<float>((p[j] & 15) - 8);
    to[(j + kInt4Block / 2) / kLanes][j % kLanes] = static_cast<float>((p[j] >> 4) - 8);
  }
#endif
}

// bf16 as load_two has it, the even numbers and the odd ones: a shift and a mask, where widening them in their order
// takes a shuffle more for each half. x is brought into that order once.
static_assert(kInt4Block % kStep == 0, "x is zero up to whole steps");
PYALPACA_INLINE Two load_two_end(const BFloat16* p, int64_t count) {
  BFloat16 row[kStep] = {};
  for (int64_t i = 0; i < count; ++i) row[i] = p[i];
  return load_two(row);
}

template <int rows, int tokens>
PYALPACA_INLINE void dot_pairs(const BFloat16* w, int64_t w_stride, const float* x, int64_t x_stride, int64_t depth,
                               Vec (&sums)[rows][tokens]) {
  const auto step = [&](int64_t k, const auto& widened) {
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) {
      const Two left = widened(w + r * w_stride + k);
#pragma GCC unroll 4
      for (int t = 0; t < tokens; ++t) {
        sums[r][t] += left.a * load(x + t * x_stride + k);
        sums[r][t] += left.b * load(x + t * x_stride + k + kLanes);
      }
    }
  };
  int64_t k = 0;
  for (; k + kStep <= depth; k += kStep) step(k, [](const BFloat16* p) { return load_two(p); });
  if (k < depth) step(k, [&](const BFloat16* p) { return load_two_end(p, depth - k); });
}

#ifdef __AVX512BF16__
// The same where x is of bf16 too and lies as the weight does: the processor multiplies pairs.
template <int rows, int tokens>
PYALPACA_INLINE void dot_both(const BFloat16* w, int64_t w_stride, const float* x, int64_t x_stride, int64_t depth,
                              Vec (&sums)[rows][tokens]) {
  const auto step = [&](int64_t k, const auto& load_pairs) {
    __m512bh right[tokens];
#pragma GCC unroll 4
    for (int t = 0; t < tokens; ++t) right[t] = (__m512bh)_mm512_loadu_ps(x + t * x_stride + k / 2);
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) {
      const __m512bh left = (__m512bh)load_pairs(w + r * w_stride + k);
#pragma GCC unroll 4
      for (int t = 0; t < tokens; ++t) sums[r][t] = as<Vec>(_mm512_dpbf16_ps(as<__m512>(sums[r][t]), left, right[t]));
    }
  };
  int64_t k = 0;
  for (; k + kStep <= depth; k += kStep) step(k, [](const BFloat16* p) { return _mm512_loadu_si512(p); });
  if (k < depth) {
    const __mmask32 some = (__mmask32{1} << (depth - k)) - 1;
    step(k, [&](const BFloat16* p) { return _mm512_maskz_loadu_epi16(some, p); });
  }
}
#endif

// Sums of x[t] times `rows` lines of floats, over [from, from + count) of the depth.
template <class T, int rows, int tokens>
PYALPACA_INLINE void dot(const T* w, int64_t w_stride, const float* x, int64_t x_stride, int64_t count,
                         Vec (&sums)[rows][tokens]) {
  const auto step = [&](int64_t k, const auto& widened) {
    Vec right[tokens];
#pragma GCC unroll 4
    for (int t = 0; t < tokens; ++t) right[t] = load(x + t * x_stride + k);
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) {
      const Vec left = widened(w + r * w_stride + k);
#pragma GCC unroll 4
      for (int t = 0; t < tokens; ++t) sums[r][t] += left * right[t];
    }
  };
  int64_t k = 0;
  for (; k + kLanes <= count; k += kLanes) step(k, [](const T* p) { return load(p); });
  if (k < count) step(k, [&](const T* p) { return load_end(p, count - k); });
}

// Lines of integers, whose sums are scaled group by group.
template <Storage storage, int rows, int tokens>
PYALPACA_INLINE void dot_scaled(const Matrix& m, int64_t line, const float* x, int64_t x_stride, int64_t depth,
                                Vec (&sums)[rows][tokens]) {
  const char* data = static_cast<const char*>(m.data) + line * m.stride;
  for (int64_t group = 0, k = 0; k < depth; ++group) {
    const int64_t end = min(k + m.group, depth);
    Vec parts[rows][tokens] = {};
    if constexpr (storage == Storage::kInt8) {
      dot<Int8, rows, tokens>(reinterpret_cast<const Int8*>(data) + k, m.stride, x + k, x_stride, end - k, parts);
      k = end;
    } else {
      for (; k < end; k += kInt4Block) {
#pragma GCC unroll 12
        for (int r = 0; r < rows; ++r) {
          Vec left[kInt4Parts];
          load_int4(reinterpret_cast<const uint8_t*>(data) + r * m.stride + k / 2, left);
#pragma GCC unroll 4
          for (int t = 0; t < tokens; ++t) {
            for (int u = 0; u < kInt4Parts; ++u) parts[r][t] += left[u] * load(x + t * x_stride + k + u * kLanes);
          }
        }
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) {
      const Vec scale = splat(m.scales[(line + r) * m.groups + group]);
#pragma GCC unroll 4
      for (int t = 0; t < tokens; ++t) sums[r][t] += parts[r][t] * scale;
    }
  }
}

template <int rows, int tokens>
PYALPACA_INLINE void dot_rows(const Matrix& m, bool both, int64_t line, const float* x, int64_t x_stride, int64_t depth,
                              float* y, int64_t y_stride) {
  (void)both;
  Vec sums[rows][tokens] = {};
  const auto floats = [&](auto type) {
    using T = typename decltype(type)::type;
    dot<T, rows, tokens>(static_cast<const T*>(m.data) + line * m.stride, m.stride, x, x_stride, depth, sums);
  };
  switch (m.storage) {
    case Storage::kFloat:
      floats(Type<float>());
      break;
    case Storage::kBFloat16:
#ifdef __AVX512BF16__
      if (both) {
        dot_both<rows, tokens>(static_cast<const BFloat16*>(m.data) + line * m.stride, m.stride, x, x_stride, depth,
                               sums);
        break;
      }
#endif
      dot_pairs<rows, tokens>(static_cast<const BFloat16*>(m.data) + line * m.stride, m.stride, x, x_stride, depth,
                              sums);
      break;
    case Storage::kHalf:
      floats(Type<Half>());
      break;
    case Storage::kInt8:
      dot_scaled<Storage::kInt8, rows, tokens>(m, line, x, x_stride, depth, sums);
      break;
    case Storage::kInt4:
      dot_scaled<Storage::kInt4, rows, tokens>(m, line, x, x_stride, depth, sums);
      break;
  }
  for (int r = 0; r < rows; ++r) {
    for (int t = 0; t < tokens; ++t) y[t * y_stride + r] = sum(sums[r][t]);
  }
}

template <int tokens>
__attribute__((noinline)) void dot_lines(const Matrix& m, bool both, int64_t line, int64_t lines, const float* x,
                                         int64_t x_stride, int64_t depth, float* y, int64_t y_stride) {
  if (tokens == 1 && lines == kFewRows) return dot_rows<kFewRows, 1>(m, both, line, x, x_stride, depth, y, y_stride);
  int64_t r = 0;
  for (; r + kSomeRows <= lines; r += kSomeRows) {
    dot_rows<kSomeRows, tokens>(m, both, line + r, x, x_stride, depth, y + r, y_stride);
  }
  for (; r < lines; ++r) dot_rows<1, tokens>(m, both, line + r, x, x_stride, depth, y + r, y_stride);
}

// y[t][r] = the products of `tokens` rows of x and at most kFewRows lines of m. x is zero from `depth` on up to a
// multiple of kInt4Block, and in bf16's order (`order`) if m is of it; `both`: m and x are of bf16, x as it is.
inline void few(const Matrix& m, bool both, int64_t line, int64_t lines, const float* x, int64_t x_stride,
                int64_t tokens, int64_t depth, float* y, int64_t y_stride) {
  for (int64_t t = 0; t < tokens;) {
    const float* from = x + t * x_stride;
    float* to = y + t * y_stride;
    if (kFewTokens >= 4 && tokens - t >= 4) {
      dot_lines<kFewTokens>(m, both, line, lines, from, x_stride, depth, to, y_stride);
      t += kFewTokens;
    } else if (tokens - t >= 2) {
      dot_lines<2>(m, both, line, lines, from, x_stride, depth, to, y_stride);
      t += 2;
    } else {
      dot_lines<1>(m, both, line, lines, from, x_stride, depth, to, y_stride);
      t += 1;
    }
  }
}

}  // namespace
}  // namespace pyalpaca::cpu::PYALPACA_ISA
