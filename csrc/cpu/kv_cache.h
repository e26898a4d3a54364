// Keys and values as a cache keeps them: fp32, bf16, fp16, or int8 with a factor a token and head.
#pragma once

#include "cpu/attention.h"
#include "cpu/gemm.h"
#include "cpu/kernels.h"
#include "cpu/vec.h"

namespace pyalpaca::cpu::PYALPACA_ISA {
namespace {

// Calls f with the element type of the cache, as an empty value Type<T>.
template <class F>
PYALPACA_INLINE void with_cache_type(CacheDtype dtype, const F& f) {
  switch (dtype) {
    case CacheDtype::kFloat:
      return f(Type<float>());
    case CacheDtype::kBFloat16:
      return f(Type<BFloat16>());
    case CacheDtype::kHalf:
      return f(Type<Half>());
    case CacheDtype::kInt8:
      return f(Type<Int8>());
  }
}

// The factor of a token and head; 1 where there is none.
PYALPACA_INLINE float cache_scale(const Strided& scales, int64_t batch, int64_t token, int64_t head) {
  return scales.data == nullptr ? 1.0f : *at<float>(scales, batch, token, head);
}

// Tokens [first, first + count) of one head -> to[count][to_row] in fp32.
inline void copy_cached(CacheDtype dtype, const Strided& x, const Strided& scales, int64_t batch, int64_t head,
                        int64_t first, int64_t count, int64_t head_dim, float* to, int64_t to_row) {
  with_cache_type(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (scales.data == nullptr)
      return copy_tile(at<T>(x, batch, first, head), x.token, count, head_dim, 1.0f, to, to_row);
    for (int64_t i = 0; i < count; ++i) {
      copy_tile(at<T>(x, batch, first + i, head), 0, 1, head_dim, cache_scale(scales, batch, first + i, head),
                to + i * to_row, to_row);
    }
  });
}

PYALPACA_INLINE int64_t cache_element(CacheDtype dtype) {
  return dtype == CacheDtype::kFloat ? 4 : dtype == CacheDtype::kInt8 ? 1 : 2;
}

}  // namespace
}  // namespace pyalpaca::cpu::PYALPACA_ISA
