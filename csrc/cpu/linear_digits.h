// A token times a weight of integers, by dot products of bytes (AVX512_VNNI): no number of the weight is widened.
//
// Each chunk of the token's numbers becomes integers X = x / scale, the scale a power of two, and these become signed
// digits of 8 bits, X = 65536 d2 + 256 d1 + d0. So 64 integers of the weight take an instruction a digit, and the sums
// are exact within a chunk. An fp32 x is given three digits, and is off by at most 2^-23 of its chunk's largest; bf16
// and fp16, in which the result is rounded too, are given two, for 2^-15.
#pragma once

#ifdef __AVX512VNNI__

#include "cpu/matrix.h"

namespace pyalpaca::cpu::PYALPACA_ISA {
namespace {

constexpr int64_t kChunkBytes = 64;  // of a line of the weight: a register

// How a chunk of the weight is multiplied. The instruction's first operand is unsigned: bytes are given 128 more than
// they stand for, numbers of four bits have 8 more as they are stored; `surplus` of a chunk of x takes it off again.
template <Storage storage_, int digits_>
struct Digital {
  static constexpr Storage storage = storage_;
  static constexpr int digits = digits_;
  static constexpr int halves = storage == Storage::kInt4 ? 2 : 1;  // registers that a chunk's numbers fill as bytes
  static constexpr int64_t numbers = kChunkBytes * halves;
  static constexpr int bias = storage == Storage::kInt4 ? 8 : 128;
  // A lane sums 4 products of at most 128 X, or 8 of at most 8 X: without the first of three digits, or all.
  static constexpr bool apart = storage == Storage::kInt8 && digits == 3;
  static constexpr int top = 127 * (digits == 3 ? 0x10101 : 0x101);  // of X: all digits are 127
  static constexpr int bits = 8 * digits - 1;                        // of top
};

// A chunk of x. Each lane of 32 bits sums four bytes' products, and those of both halves.
template <class D>
struct alignas(64) DigitChunk {
  int8_t digits[D::digits][D::halves][kChunkBytes];  // the lowest first
  int32_t surplus[D::apart ? 2 : 1][kLanes];         // `apart`: the last digit's in the second
  float scale[kLanes];                               // of X
};

PYALPACA_INLINE __m512i dot_bytes(__m512i sum, __m512i bytes, const int8_t* digits) {
  return _mm512_dpbusd_epi32(sum, bytes, _mm512_load_si512(digits));
}

// The exponent (as fp32 has it) of a chunk's scale times 2^(bits - 1), for its largest magnitude as bits: one more
// where the mantissa is above that of `top`, so that X stays below. Not so small that a scale would be subnormal.
template <class D>
PYALPACA_INLINE __m512i exponent_of(int largest) {
  constexpr int above = 0xffffff - (D::top << (24 - D::bits));
  const __m512i carried = _mm512_srli_epi32(_mm512_add_epi32(_mm512_set1_epi32(largest), _mm512_set1_epi32(above)), 23);
  return _mm512_max_epi32(carried, _mm512_set1_epi32(23));
}
PYALPACA_INLINE __m512 power_of_two(__m512i exponent) { return _mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23)); }

// One token as digits; false if they do not stand for it: its largest is infinite, NaN, or so small (2^-87) that the
// least scale is not small beside it. x is zero from `depth` up to a multiple of kInt4Block.
template <class D>
bool to_digits(const float* x, int64_t depth, DigitChunk<D>* to) {
  constexpr int vectors = D::numbers / kLanes;
  const __m512i offset = _mm512_set1_epi32(D::digits == 3 ? 0x808080 : 0x8080);  // X plus it: bytes of digit + 128
  __m512i most = _mm512_setzero_si512();
  for (int64_t k = 0; k < depth; k += D::numbers, ++to) {
    const int64_t end = round_up(depth, kInt4Block) - k;
    __m512 row[vectors];
    __m512i largest[vectors], all = _mm512_setzero_si512();
    for (int v = 0; v < vectors; ++v) {
      row[v] = v * kLanes < end ? _mm512_loadu_ps(x + k + v * kLanes) : _mm512_setzero_ps();
      largest[v] = _mm512_and_si512(_mm512_castps_si512(row[v]), _mm512_set1_epi32(0x7fffffff));
      all = _mm512_max_epu32(all, largest[v]);
    }
    most = _mm512_max_epu32(most, all);
    for (int v = 0; v < vectors; ++v) {
      // A chunk of bytes has one scale; one of four bits has a scale for each block of 32, which lies in four lanes.
      const __m512i here = D::halves == 1 ? all : _mm512_max_epu32(largest[v & ~1], largest[v | 1]);
      const __m512i exponent = exponent_of<D>(static_cast<int>(_mm512_reduce_max_epu32(here)));
      const __m512 factor = power_of_two(_mm512_sub_epi32(_mm512_set1_epi32(253 + D::bits), exponent));
      const __m512 scale = power_of_two(_mm512_sub_epi32(exponent, _mm512_set1_epi32(D::bits - 1)));
      const __m512i integers = _mm512_cvtps_epi32(_mm512_mul_ps(row[v], factor));
      const __m512i bytes = _mm512_xor_si512(_mm512_add_epi32(integers, offset), offset);
      const int half = v % D::halves, place = v / D::halves;
      for (int d = 0; d < D::digits; ++d) {
        _mm_store_si128(reinterpret_cast<__m128i*>(to->digits[d][half] + place * kLanes),
                        _mm512_cvtepi32_epi8(_mm512_srli_epi32(bytes, 8 * d)));
      }
      if (D::halves == 1) {
        _mm512_store_ps(to->scale, scale);
      } else {
        _mm_store_ps(to->scale + 4 * place, _mm512_castps512_ps128(scale));
      }
    }
    __m512i surplus = _mm512_setzero_si512();
    for (int d = D::digits - 1; d >= 0; --d) {
      surplus = _mm512_slli_epi32(surplus, 8);
      for (int half = 0; half < D::halves; ++half) {
        surplus = dot_bytes(surplus, _mm512_set1_epi8(static_cast<char>(D::bias)), to->digits[d][half]);
      }
      if (D::apart && d == D::digits - 1) {
        _mm512_store_si512(to->surplus[D::apart], _mm512_sub_epi32(_mm512_setzero_si512(), surplus));
        surplus = _mm512_setzero_si512();
      }
    }
    _mm512_store_si512(to->surplus[0], _mm512_sub_epi32(_mm512_setzero_si512(), surplus));
  }
  const int top = static_cast<int>(_mm512_reduce_max_epu32(most));
  return top >= 40 << 23 && top < 0x7f800000;
}

// A chunk's sums of products, in units of x's scale.
template <class D>
PYALPACA_INLINE __m512 chunk_product(const __m512i* w, const DigitChunk<D>& x) {
  __m512i sum = _mm512_setzero_si512();
#pragma GCC unroll 3
  for (int d = D::apart ? D::digits - 2 : D::digits - 1; d >= 0; --d) {
    sum = _mm512_slli_epi32(sum, 8);
#pragma GCC unroll 2
    for (int half = 0; half < D::halves; ++half) sum = dot_bytes(sum, w[half], x.digits[d][half]);
  }
  const __m512 all = _mm512_cvtepi32_ps(_mm512_add_epi32(sum, _mm512_load_si512(x.surplus[0])));
  if constexpr (!D::apart) return all;
  const __m512i high = dot_bytes(_mm512_load_si512(x.surplus[D::apart]), w[0], x.digits[D::digits - 1][0]);
  return _mm512_fmadd_ps(_mm512_cvtepi32_ps(high), _mm512_set1_ps(65536.0f), all);
}

// Whether a group is whole chunks, or a chunk whole groups.
template <class D>
PYALPACA_INLINE bool by_digits(const Matrix& m) {
  return m.storage == D::storage && (m.groups == 1 || m.group % D::numbers == 0 || D::numbers % m.group == 0);
}

// y[r] = the product of a token and line + r. A line has `bytes` bytes.
template <class D, bool one_scale, int rows>
PYALPACA_INLINE void digit_rows(const Matrix& m, int64_t line, int64_t bytes, const DigitChunk<D>* x, float* y) {
  const char* data = static_cast<const char*>(m.data) + line * m.stride;
  const float* scales = m.scales + line * m.groups;
  const int64_t chunk_groups = max(D::numbers / m.group, 1), group_chunks = max(m.group / D::numbers, 1);
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i lane_group =
      _mm512_srli_epi32(_mm512_mullo_epi32(lanes, _mm512_set1_epi32(static_cast<int>(chunk_groups))), 4);
  __m512 sums[rows];
  for (int r = 0; r < rows; ++r) sums[r] = _mm512_setzero_ps();
  int64_t group = 0, left = group_chunks;
  const auto step = [&](const DigitChunk<D>& here, const auto& load_bytes) {
    const auto wanted = static_cast<__mmask8>((1u << min(chunk_groups, m.groups - group)) - 1);
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) {
      const __m512i stored = load_bytes(data + r * m.stride);
      __m512i w[2];
      if constexpr (D::halves == 2) {
        const __m512i four = _mm512_set1_epi8(15);
        w[0] = _mm512_and_si512(stored, four);
        w[1] = _mm512_and_si512(_mm512_srli_epi16(stored, 4), four);
      } else {
        w[0] = _mm512_xor_si512(stored, _mm512_set1_epi8(-128));
      }
      __m512 scale = _mm512_load_ps(here.scale);
      if constexpr (!one_scale) {
        const __m128 some = _mm_maskz_loadu_ps(wanted, scales + r * m.groups + group);
        scale = _mm512_mul_ps(scale, _mm512_permutexvar_ps(lane_group, _mm512_castps128_ps512(some)));
      }
      sums[r] = _mm512_fmadd_ps(chunk_product<D>(w, here), scale, sums[r]);
    }
    data += kChunkBytes;
    if (!one_scale && --left == 0) left = group_chunks, group += chunk_groups;
  };
  for (; bytes >= kChunkBytes; bytes -= kChunkBytes) {
    step(*x++, [](const char* p) { return _mm512_loadu_si512(p); });
  }
  if (bytes != 0) {
    const __mmask64 some = (__mmask64{1} << bytes) - 1;
    step(*x, [&](const char* p) { return _mm512_maskz_loadu_epi8(some, p); });
  }
  for (int r = 0; r < rows; ++r) y[r] = sum(as<Vec>(sums[r])) * (one_scale ? scales[r] : 1.0f);
}

// Lines at a time: so many that loading x, which may not fit the nearest cache, costs little beside them.
constexpr int64_t kDigitRows = 12;

template <class D, bool one_scale>
__attribute__((noinline)) void digit_lines(const Matrix& m, int64_t line, int64_t lines, int64_t bytes,
                                           const DigitChunk<D>* x, float* y) {
  if (lines == kDigitRows) return digit_rows<D, one_scale, kDigitRows>(m, line, bytes, x, y);
  int64_t r = 0;
  for (; r + 4 <= lines; r += 4) digit_rows<D, one_scale, 4>(m, line + r, bytes, x, y + r);
  for (; r < lines; ++r) digit_rows<D, one_scale, 1>(m, line + r, bytes, x, y + r);
}

}  // namespace
}  // namespace pyalpaca::cpu::PYALPACA_ISA

#endif  // __AVX512VNNI__
