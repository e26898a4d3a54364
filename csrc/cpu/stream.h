// Two vectors at a time: half types in the order in which they come without a shuffle, large results past the caches.
//
// A plain store reads the line that it is going to overwrite and drives out what the caches hold; a streamed one does
// neither. It pays from where a result would not stay in the cache until somebody reads it.
#pragma once

#ifdef __SSE2__
#include <immintrin.h>
#endif

#include "cpu/threads.h"
#include "cpu/vec.h"

namespace pyalpaca::cpu::PYALPACA_ISA {
namespace {

constexpr int64_t kLine = 64;  // bytes
constexpr int64_t kStep = 2 * kLanes;

// Whether rows of `row_bytes` side by side from `p` on, `bytes` in all, are to be streamed: too large for the cache,
// and every row begins at a line.
PYALPACA_INLINE bool streams(const void* p, int64_t row_bytes, int64_t bytes) {
#ifdef __SSE2__
  return bytes >= last_level_cache() / 2 && row_bytes % kLine == 0 && reinterpret_cast<uintptr_t>(p) % kLine == 0;
#else
  (void)p, (void)row_bytes, (void)bytes;
  return false;
#endif
}

// To be called by each thread behind its last streamed store: such stores are not ordered with what follows otherwise.
PYALPACA_INLINE void end_of_stream() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

template <bool kStream, class V>
PYALPACA_INLINE void put_bits(void* p, const V& v) {
#ifdef __AVX512F__
  if constexpr (kStream && sizeof(V) == 64) return _mm512_stream_si512(static_cast<__m512i*>(p), as<__m512i>(v));
#endif
#ifdef __AVX__
  if constexpr (kStream && sizeof(V) == 32) return _mm256_stream_si256(static_cast<__m256i*>(p), as<__m256i>(v));
#endif
#ifdef __SSE2__
  if constexpr (kStream) {
    struct Parts {
      __m128i parts[sizeof(V) / 16];
    };
    const Parts all = as<Parts>(v);
    for (size_t i = 0; i < sizeof(V) / 16; ++i) _mm_stream_si128(static_cast<__m128i*>(p) + i, all.parts[i]);
    return;
  }
#endif
  std::memcpy(p, &v, sizeof(V));
}

// kStep neighbours. fp32 and fp16: the first half of them in a, the second in b. bf16: those at even places in a, those
// at odd places in b, each of which is one instruction away from two that lie in one word of 32 bits.
struct Two {
  Vec a, b;
};

template <class T>
constexpr bool kInterleaved = false;
template <>
constexpr bool kInterleaved<BFloat16> = true;

template <class T>
PYALPACA_INLINE Two load_two(const T* p) {
  return {load(p), load(p + kLanes)};
}

PYALPACA_INLINE Two load_two(const BFloat16* p) {
  Bits words;
  std::memcpy(&words, p, sizeof(words));
  return {as<Vec>(words << 16), as<Vec>(words & 0xffff0000u)};
}

template <bool kStream>
PYALPACA_INLINE void put_two(float* p, Two x) {
  put_bits<kStream>(p, x.a);
  put_bits<kStream>(p + kLanes, x.b);
}

template <bool kStream>
PYALPACA_INLINE void put_two(Half* p, Two x) {
#if defined(__F16C__) && !defined(__AVX512F__)
  // Together in a register: two halves just stored and read back as one would have to wait for the memory.
  const __m128i first = _mm256_cvtps_ph(as<__m256>(x.a), _MM_FROUND_TO_NEAREST_INT);
  const __m128i second = _mm256_cvtps_ph(as<__m256>(x.b), _MM_FROUND_TO_NEAREST_INT);
  put_bits<kStream>(p, _mm256_set_m128i(second, first));
#else
  Halves parts[2];
  store(reinterpret_cast<Half*>(&parts[0]), x.a);
  store(reinterpret_cast<Half*>(&parts[1]), x.b);
  put_bits<kStream>(p, parts[0]);
  put_bits<kStream>(p + kLanes, parts[1]);
#endif
}

// Whether there may be a NaN in x.
PYALPACA_INLINE bool maybe_nan(Two x) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(as<__m512>(x.a), as<__m512>(x.b), _CMP_UNORD_Q) != 0;
#elif defined(__AVX__)
  return _mm256_movemask_ps(_mm256_cmp_ps(as<__m256>(x.a), as<__m256>(x.b), _CMP_UNORD_Q)) != 0;
#else
  (void)x;
  return true;
#endif
}

// In each word of 32 bits the one at the even place and, above it, the one at the odd place: to nearest, ties to even.
PYALPACA_INLINE Bits rounded(Two x) {
  const Bits a = as<Bits>(x.a), b = as<Bits>(x.b);
  Bits even = a + 0x7fff + (a >> 16 & 1), odd = b + 0x7fff + (b >> 16 & 1);
  if (__builtin_expect(maybe_nan(x), false)) {  // which stays one
    even = x.a == x.a ? even : (a | 0x400000);
    odd = x.b == x.b ? odd : (b | 0x400000);
  }
  return even >> 16 | (odd & 0xffff0000u);
}

#ifdef __AVX512BF16__
// The processor rounds alike, but makes zeros of subnormal values.
PYALPACA_INLINE bool maybe_subnormal(Two x) {
  constexpr int kSubnormal = 0x20;
  return (_mm512_fpclass_ps_mask(as<__m512>(x.a), kSubnormal) | _mm512_fpclass_ps_mask(as<__m512>(x.b), kSubnormal)) !=
         0;
}

PYALPACA_INLINE Bits rounded_by_processor(Two x) {
  const Bits halves = as<Bits>(_mm512_cvtne2ps_pbh(as<__m512>(x.b), as<__m512>(x.a)));  // those of a, then those of b
  constexpr Bits kPlaces = {0x100000, 0x110001, 0x120002, 0x130003, 0x140004, 0x150005, 0x160006, 0x170007,
                            0x180008, 0x190009, 0x1a000a, 0x1b000b, 0x1c000c, 0x1d000d, 0x1e000e, 0x1f000f};
  return as<Bits>(_mm512_permutexvar_epi16(as<__m512i>(kPlaces), as<__m512i>(halves)));
}
#endif

template <bool kStream>
PYALPACA_INLINE void put_two(BFloat16* p, Two x) {
#ifdef __AVX512BF16__
  if (__builtin_expect(!maybe_subnormal(x), true)) return put_bits<kStream>(p, rounded_by_processor(x));
#endif
  put_bits<kStream>(p, rounded(x));
}

// What lies at `from`, kStep of it, to `to` as it is.
template <bool kStream, class T>
PYALPACA_INLINE void copy_two(const T* from, T* to) {
  struct Block {
    T values[kStep];
  } block;
  std::memcpy(&block, from, sizeof(block));
  if constexpr (sizeof(block) > sizeof(Vec)) {
    put_two<kStream>(to, as<Two>(block));
  } else {
    put_bits<kStream>(to, as<Vec>(block));
  }
}

// fp32 values in the order that load_two gives those of type T, so that both can be taken together; what is left behind
// the last kStep stays as it is. `to` may be `from`.
template <class T>
void order(const float* from, float* to, int64_t width) {
  int64_t i = 0;
  if constexpr (kInterleaved<T>) {
    for (; i + kStep <= width; i += kStep) {
      float step[kStep];
      std::memcpy(step, from + i, sizeof(step));
      for (int64_t u = 0; u < kLanes; ++u) to[i + u] = step[2 * u], to[i + kLanes + u] = step[2 * u + 1];
    }
  }
  for (; i < width; ++i) to[i] = from[i];
}

// The way back, in place.
template <class T>
void restore_order(float* values, int64_t width) {
  if constexpr (kInterleaved<T>) {
    for (int64_t i = 0; i + kStep <= width; i += kStep) {
      float from[kStep];
      std::memcpy(from, values + i, sizeof(from));
      for (int64_t u = 0; u < kLanes; ++u) values[i + 2 * u] = from[u], values[i + 2 * u + 1] = from[kLanes + u];
    }
  }
}

// One vector of which only the first `count` elements exist.
template <class T>
Vec load_some(const T* p, int64_t count) {
  T values[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) values[i] = p[i];
  return load(values);
}

template <class T>
void store_some(T* p, Vec x, int64_t count) {
  T values[kLanes];
  store(values, x);
  for (int64_t i = 0; i < count; ++i) p[i] = values[i];
}

// Calls f with `value` as a constant: Constant<true>() or Constant<false>().
template <bool kValue>
struct Constant {
  static constexpr bool value = kValue;
};

template <class F>
PYALPACA_INLINE void with_constant(bool value, const F& f) {
  if (value) return f(Constant<true>());
  f(Constant<false>());
}

}  // namespace
}  // namespace pyalpaca::cpu::PYALPACA_ISA
