// The gate of a SwiGLU feed-forward network (Shazeer 2020), in one pass over its arguments.
#include "cpu/instruction_set.h"
#include "cpu/kernels.h"
#include "cpu/stream.h"
#include "cpu/threads.h"
#include "cpu/vec.h"

namespace pyalpaca::cpu::PYALPACA_ISA {
namespace {

constexpr int64_t kGrain = 16384;  // elements that are worth a thread
constexpr int64_t kBlock = 8192;   // of a row, so that a single long row is divided too

#ifdef __AVX512F__

// 1 / (1 + e^-x), of e^-x = 2^t, which scalef makes without a care for its range, and of the processor's estimate with
// a step of Newton's, where a division takes three times as long. 0 below -87.3, where the estimate would turn
// subnormal.
PYALPACA_INLINE Vec sigmoid(Vec x) {
  const Vec t = x * -0x1.715476p0f, below = 1.0f + exp2(t), y = as<Vec>(_mm512_rcp14_ps(as<__m512>(below)));
  const __mmask16 kept = _mm512_cmp_ps_mask(as<__m512>(t), _mm512_set1_ps(126.0f), _CMP_NGT_UQ);
  return as<Vec>(_mm512_maskz_mul_ps(kept, as<__m512>(y), as<__m512>(2.0f - below * y)));
}

#else

// e^x for x <= 0, within 3e-7 of itself: here it is only taken beside 1. As exp(), but with a shorter way from x to the
// result, which is what the time goes by: ln 2 in one part (fused, its error is n times 2e-9), and the polynomial of
// degree 5 whose largest relative error on |r| <= ln 2 / 2 is least, 1.05e-7 by Lawson's iteration, from three parts at
// once.
PYALPACA_INLINE Vec exp_below_zero(Vec x) {
  const Vec magic = splat(0x1.8p23f);
  const Vec shifted = x * 0x1.715476p0f + magic;
  const Vec r = x - (shifted - magic) * 0x1.62e43p-1f, r2 = r * r;
  const Vec high = 0.0418901145f + r * 0.00831252523f, low = 0.499992311f + r * 0.166671142f;
  const Vec p = (1.0f + r) + r2 * (low + r2 * high);
  const Vec power = as<Vec>((as<Bits>(shifted) + 127) << 23);
  return x < -87.3f ? splat(0.0f) : p * power;
}

// 1 / x for x from 1 to 2, or NaN: the processor's estimate and a step of Newton's, where a division takes three times
// as long.
PYALPACA_INLINE Vec reciprocal(Vec x) {
#ifdef __AVX__
  const Vec y = as<Vec>(_mm256_rcp_ps(as<__m256>(x)));
  return y * (2.0f - x * y);
#else
  return 1.0f / x;
#endif
}

// 1 / (1 + e^-x) by way of e^-|x|, which can't overflow.
PYALPACA_INLINE Vec sigmoid(Vec x) {
  const Vec e = exp_below_zero(as<Vec>(as<Bits>(x) | 0x80000000u));
  const Vec one = splat(1.0f);
  return (x < 0.0f ? e : one) * reciprocal(one + e);
}

#endif

PYALPACA_INLINE Vec gated(Vec gate, Vec up) { return gate * sigmoid(gate) * up; }

struct Gradients {
  Vec gate, up;
};

// silu'(x) = s (1 + x (1 - s)), s = sigmoid(x)
PYALPACA_INLINE Gradients gradients(Vec dy, Vec gate, Vec up) {
  const Vec s = sigmoid(gate);
  return {dy * up * (s * (1.0f + gate * (1.0f - s))), dy * (gate * s)};
}

template <bool kStream, class T>
void forward_part(const T* gate, const T* up, T* y, int64_t width) {
  int64_t i = 0;
  for (; i + kStep <= width; i += kStep) {
    const Two g = load_two(gate + i), u = load_two(up + i);
    put_two<kStream>(y + i, {gated(g.a, u.a), gated(g.b, u.b)});
  }
  for (; i < width; i += kLanes) {
    const int64_t count = min(width - i, kLanes);
    store_some(y + i, gated(load_some(gate + i, count), load_some(up + i, count)), count);
  }
}

template <bool kStream, class T>
void backward_part(const T* dy, const T* gate, const T* up, T* dgate, T* dup, int64_t width) {
  int64_t i = 0;
  for (; i + kStep <= width; i += kStep) {
    const Two d = load_two(dy + i), g = load_two(gate + i), u = load_two(up + i);
    const Gradients first = gradients(d.a, g.a, u.a), second = gradients(d.b, g.b, u.b);
    put_two<kStream>(dgate + i, {first.gate, second.gate});
    put_two<kStream>(dup + i, {first.up, second.up});
  }
  for (; i < width; i += kLanes) {
    const int64_t count = min(width - i, kLanes);
    const Gradients some = gradients(load_some(dy + i, count), load_some(gate + i, count), load_some(up + i, count));
    store_some(dgate + i, some.gate, count);
    store_some(dup + i, some.up, count);
  }
}

// Calls part(row, first column, columns) for blocks of rows, on all threads.
template <bool kStream, class Part>
void for_blocks(int64_t rows, int64_t width, const Part& part) {
  const int64_t blocks = (width + kBlock - 1) / kBlock;
  parallel(rows * blocks, max(kGrain / min(width, kBlock), 1), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t column = task % blocks * kBlock;
      part(task / blocks, column, min(width - column, kBlock));
    }
    if constexpr (kStream) end_of_stream();
  });
}

}  // namespace

void swiglu(const Swiglu& a) {
  with_type(a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const int64_t row_bytes = a.width * static_cast<int64_t>(sizeof(T));
    with_constant(streams(a.y, row_bytes, a.rows * row_bytes), [&](auto stream) {
      constexpr bool kStream = decltype(stream)::value;
      for_blocks<kStream>(a.rows, a.width, [&](int64_t row, int64_t column, int64_t width) {
        forward_part<kStream>(static_cast<const T*>(a.gate) + row * a.gate_stride + column,
                              static_cast<const T*>(a.up) + row * a.up_stride + column,
                              static_cast<T*>(a.y) + row * a.width + column, width);
      });
    });
  });
}

void swiglu_backward(const SwigluBackward& a) {
  with_type(a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const int64_t row_bytes = a.width * static_cast<int64_t>(sizeof(T));
    const bool both = streams(a.dgate, row_bytes, a.rows * row_bytes) && streams(a.dup, row_bytes, a.rows * row_bytes);
    with_constant(both, [&](auto stream) {
      constexpr bool kStream = decltype(stream)::value;
      for_blocks<kStream>(a.rows, a.width, [&](int64_t row, int64_t column, int64_t width) {
        backward_part<kStream>(static_cast<const T*>(a.dy) + row * a.dy_stride + column,
                               static_cast<const T*>(a.gate) + row * a.gate_stride + column,
                               static_cast<const T*>(a.up) + row * a.up_stride + column,
                               static_cast<T*>(a.dgate) + row * a.width + column,
                               static_cast<T*>(a.dup) + row * a.width + column, width);
      });
    });
  });
}

}  // namespace pyalpaca::cpu::PYALPACA_ISA
