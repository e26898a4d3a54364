// A vector of floats in the compiler's vector extension: one source for every instruction set, x86 and ARM alike.
// As wide as a register of AVX-512 (16 floats) or AVX2 (8); elsewhere 8, which the compiler makes of what there is.
// bf16 and fp16 are converted where they are loaded and stored; all arithmetic is fp32.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/kernels.h"

#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#define PYALPACA_INLINE inline __attribute__((always_inline))

namespace pyalpaca::cpu::PYALPACA_ISA {
namespace {

#ifdef __AVX512F__
#define PYALPACA_LANES 16
#else
#define PYALPACA_LANES 8
#endif
constexpr int64_t kLanes = PYALPACA_LANES;
typedef float Vec __attribute__((vector_size(4 * PYALPACA_LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * PYALPACA_LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * PYALPACA_LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * PYALPACA_LANES)));

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};
struct Int8 {
  int8_t value;
};

template <class To, class From>
PYALPACA_INLINE To as(const From& x) {
  static_assert(sizeof(To) == sizeof(From), "a reinterpretation keeps the size");
  To y;
  std::memcpy(&y, &x, sizeof(To));
  return y;
}

PYALPACA_INLINE Vec splat(float x) { return x - Vec{}; }  // minus 0: a -0 keeps its sign

typedef float Eight __attribute__((vector_size(32)));

// The sum of all lanes, always in the same order.
PYALPACA_INLINE float sum(Eight x) { return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7])); }
PYALPACA_INLINE float max(Eight x) {
  float m = x[0];
  for (int i = 1; i < 8; ++i) m = x[i] > m ? x[i] : m;
  return m;
}
#ifdef __AVX512F__
PYALPACA_INLINE Eight low(Vec x) { return as<Eight>(_mm512_castps512_ps256(as<__m512>(x))); }
PYALPACA_INLINE Eight high(Vec x) { return as<Eight>(_mm512_extractf32x8_ps(as<__m512>(x), 1)); }
PYALPACA_INLINE float sum(Vec x) { return sum(low(x) + high(x)); }
PYALPACA_INLINE float max(Vec x) {
  const Eight a = low(x), b = high(x);
  return max(a > b ? a : b);
}
#endif

#if PYALPACA_LANES == 16
#define PYALPACA_HALVES_8 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23
#define PYALPACA_HALVES_4 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27
#define PYALPACA_HALVES_2 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29
#define PYALPACA_HALVES_1 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30
#else
#define PYALPACA_HALVES_4 0, 1, 2, 3, 8, 9, 10, 11
#define PYALPACA_HALVES_2 0, 1, 8, 9, 4, 5, 12, 13
#define PYALPACA_HALVES_1 0, 8, 2, 10, 4, 12, 6, 14
#endif

// Adds the halves of each run of 2 * half lanes; the runs of a and b take turns.
template <int half>
PYALPACA_INLINE Vec add_halves(Vec a, Vec b) {
#if PYALPACA_LANES == 16
  constexpr Ints first = half == 8   ? Ints{PYALPACA_HALVES_8}
                         : half == 4 ? Ints{PYALPACA_HALVES_4}
                         : half == 2 ? Ints{PYALPACA_HALVES_2}
                                     : Ints{PYALPACA_HALVES_1};
#else
  constexpr Ints first = half == 4   ? Ints{PYALPACA_HALVES_4}
                         : half == 2 ? Ints{PYALPACA_HALVES_2}
                                     : Ints{PYALPACA_HALVES_1};
#endif
  return __builtin_shuffle(a, b, first) + __builtin_shuffle(a, b, first + half);
}

// The sums of kLanes vectors, one a lane: a tree of additions in one order, and fewer shuffles than sum by sum.
PYALPACA_INLINE Vec sum_each(Vec* x) {
#if PYALPACA_LANES == 16
  for (int i = 0; i < 8; ++i) x[i] = add_halves<8>(x[i], x[i + 8]);
#endif
  for (int i = 0; i < 4; ++i) x[i] = add_halves<4>(x[i], x[i + 4]);
  for (int i = 0; i < 2; ++i) x[i] = add_halves<2>(x[i], x[i + 2]);
  return add_halves<1>(x[0], x[1]);
}

// The larger of each two lanes; y where x is NaN.
PYALPACA_INLINE Vec larger(Vec x, Vec y) {
#ifdef __AVX512F__
  return as<Vec>(_mm512_max_ps(as<__m512>(x), as<__m512>(y)));
#else
  return x > y ? x : y;
#endif
}

PYALPACA_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
PYALPACA_INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
PYALPACA_INLINE int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

// ---- fp16 where the processor does not convert it: bit by bit (IEEE 754 binary16).
PYALPACA_INLINE float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, magnitude = h & 0x7fff;
  if (magnitude >= 0x7c00) return as<float>(sign | 0x7f800000u | (magnitude & 0x3ff) << 13);
  // Exponent and mantissa in fp32's places; 2^112 makes up for the other bias and normalises subnormals.
  return as<float>(as<uint32_t>(as<float>(magnitude << 13) * 0x1p112f) | sign);
}

PYALPACA_INLINE uint16_t float_to_half(float x) {
  const uint32_t bits = as<uint32_t>(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // rounds to 65520 or more: inf
  if (magnitude < 0x38800000) {  // subnormal: adding 0.5 makes fp32 round at the last place of binary16
    return static_cast<uint16_t>(sign | (as<uint32_t>(as<float>(magnitude) + 0.5f) - 0x3f000000));
  }
  return static_cast<uint16_t>(sign | (magnitude + 0xc8000fff + (magnitude >> 13 & 1)) >> 13);
}

// ---- loads and stores of kLanes elements, and of one
PYALPACA_INLINE Vec load(const float* p) {
  Vec x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}
PYALPACA_INLINE void store(float* p, Vec x) { std::memcpy(p, &x, sizeof(x)); }

PYALPACA_INLINE Vec load(const BFloat16* p) {
  Halves h;
  std::memcpy(&h, p, sizeof(h));
  return as<Vec>(__builtin_convertvector(h, Bits) << 16);
}
PYALPACA_INLINE void store(BFloat16* p, Vec x) {
  const Bits bits = as<Bits>(x);
  const Bits rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to nearest, ties to even
  const Bits result = x == x ? rounded : (bits >> 16 | 0x40);     // a NaN stays one
  const Halves h = __builtin_convertvector(result, Halves);
  std::memcpy(p, &h, sizeof(h));
}

PYALPACA_INLINE Vec load(const Half* p) {
#if defined(__AVX512F__)
  return as<Vec>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__)
  return as<Vec>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  Vec x;
  for (int i = 0; i < kLanes; ++i) x[i] = half_to_float(p[i].bits);
  return x;
#endif
}
PYALPACA_INLINE void store(Half* p, Vec x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(as<__m512>(x), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(as<__m256>(x), _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) p[i].bits = float_to_half(x[i]);
#endif
}

PYALPACA_INLINE Vec load(const Int8* p) {
#if defined(__AVX512F__)
  return as<Vec>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))));
#elif defined(__AVX2__)
  return as<Vec>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))));
#else
  Vec x;
  for (int i = 0; i < kLanes; ++i) x[i] = static_cast<float>(p[i].value);
  return x;
#endif
}

PYALPACA_INLINE float load_one(const float* p) { return *p; }
PYALPACA_INLINE float load_one(const BFloat16* p) { return as<float>(static_cast<uint32_t>(p->bits) << 16); }
PYALPACA_INLINE float load_one(const Half* p) { return half_to_float(p->bits); }
PYALPACA_INLINE void store_one(float* p, float x) { *p = x; }
PYALPACA_INLINE void store_one(BFloat16* p, float x) {
  const uint32_t bits = as<uint32_t>(x);
  p->bits = static_cast<uint16_t>(x == x ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : (bits >> 16 | 0x40));
}
PYALPACA_INLINE void store_one(Half* p, float x) { p->bits = float_to_half(x); }

// ---- the first `count` elements, as where a row ends: the other lanes are loaded as 0 and not stored
template <class T>
PYALPACA_INLINE Vec load_first(const T* p, int64_t count) {
  if (count >= kLanes) return load(p);
#ifdef __AVX512F__
  const __mmask16 lanes = static_cast<__mmask16>((1u << count) - 1);
  if constexpr (sizeof(T) == 4) {
    return as<Vec>(_mm512_maskz_loadu_ps(lanes, p));
  } else if constexpr (sizeof(T) == 1) {
    const __m128i bytes = _mm_maskz_loadu_epi8(lanes, p);
    return load(reinterpret_cast<const T*>(&bytes));
  } else {
    const __m256i halves = _mm256_maskz_loadu_epi16(lanes, p);
    return load(reinterpret_cast<const T*>(&halves));
  }
#else
  T row[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) row[i] = p[i];
  return load(row);
#endif
}
template <class T>
PYALPACA_INLINE void store_first(T* p, Vec x, int64_t count) {
  if (count >= kLanes) return store(p, x);
#ifdef __AVX512F__
  const __mmask16 lanes = static_cast<__mmask16>((1u << count) - 1);
  if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(p, lanes, as<__m512>(x));
  } else {
    __m256i halves;
    store(reinterpret_cast<T*>(&halves), x);
    _mm256_mask_storeu_epi16(p, lanes, halves);
  }
#else
  T row[kLanes];
  store(row, x);
  for (int64_t i = 0; i < count; ++i) p[i] = row[i];
#endif
}

// e^x for x <= 88, within 2 units in the last place; 0 below -87.3 (where fp32 turns subnormal), NaN for NaN.
// x = n ln 2 + r with |r| <= ln 2 / 2, e^r by its Taylor polynomial (next term below 2^-27), 2^n by the exponent bits.
PYALPACA_INLINE Vec exp(Vec x) {
  const Vec magic = splat(0x1.8p23f);  // adding it rounds to an integer, which then stands in the low bits
  const Vec shifted = x * 0x1.715476p0f + magic;
  const Vec n = shifted - magic;
  const Vec r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;  // ln 2 in two parts: n times the first is exact
  Vec p = splat(1.0f / 5040.0f);
  p = p * r + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const Vec power = as<Vec>((as<Bits>(shifted) + 127) << 23);
  return x < -87.3f ? splat(0.0f) : p * power;
}

// 2^x for x < 128, within 2 units in the last place and exact for 0; 0 below -126 or where the result is next to it,
// NaN for NaN. x = n + f with n = floor(x); 2^f by the polynomial of its degree with the least relative error (8.3e-8).
PYALPACA_INLINE Vec exp2(Vec x) {
#ifdef __AVX512F__
  const Vec f = as<Vec>(_mm512_reduce_ps(as<__m512>(x), _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
#else
  const Vec magic = splat(0x1.8p23f);  // adding it rounds to an integer, which then stands in the low bits
  const Vec shifted = (x - 0.5f) + magic, f = x - (shifted - magic);
#endif
  Vec p = splat(0x1.e974fcp-10f);
  p = p * f + 0x1.277854p-7f;
  p = p * f + 0x1.c91ce6p-5f;
  p = p * f + 0x1.ebdb56p-3f;
  p = p * f + 0x1.62e4bap-1f;
  p = p * f + 1.0f;
#ifdef __AVX512F__
  return as<Vec>(_mm512_scalef_ps(as<__m512>(p), as<__m512>(x)));  // times 2^floor(x)
#else
  return x < -126.0f ? splat(0.0f) : p * as<Vec>((as<Bits>(shifted) + 127) << 23);
#endif
}

template <class T>
struct Type {
  using type = T;
};

// Calls f with the element type of `dtype`, as an empty value Type<T>.
template <class F>
PYALPACA_INLINE void with_type(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::kFloat:
      return f(Type<float>());
    case Dtype::kBFloat16:
      return f(Type<BFloat16>());
    case Dtype::kHalf:
      return f(Type<Half>());
  }
}

}  // namespace
}  // namespace pyalpaca::cpu::PYALPACA_ISA
