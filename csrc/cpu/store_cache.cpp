// Stores keys or values into a cache: converted, or quantized to int8 with a factor a token and head.
#include <cmath>

#include "cpu/instruction_set.h"
#include "cpu/kernels.h"
#include "cpu/kv_cache.h"
#include "cpu/threads.h"
#include "cpu/vec.h"

namespace pyalpaca::cpu::PYALPACA_ISA {
namespace {

constexpr int64_t kGrain = 65536;  // elements that are worth a thread

template <class T, class To>
void convert_row(const T* x, To* to, int64_t width) {
  for (int64_t i = 0; i < width; i += kLanes) store_first(to + i, load_first(x + i, width - i), width - i);
}

// An infinity or NaN makes the whole row NaN, by its scale, rather than wrong numbers.
template <class T>
float quantize_row(const T* x, Int8* to, int64_t width) {
  float top = 0.0f;
  bool finite = true;
  for (int64_t i = 0; i < width; ++i) {
    const float magnitude = std::fabs(load_one(x + i));
    finite &= magnitude < kInfinity;
    top = magnitude > top ? magnitude : top;
  }
  const float scale = finite ? top / 127.0f : __builtin_nanf("");
  const float inverse = scale >= 0x1p-126f ? 1.0f / scale : 0.0f;
  for (int64_t i = 0; i < width; ++i) {
    float step = load_one(x + i) * inverse;
    step = finite ? (step > 127.0f ? 127.0f : step < -127.0f ? -127.0f : step) : 0.0f;
    to[i].value = static_cast<int8_t>((step + 0x1.8p23f) - 0x1.8p23f);  // to the nearest, ties to even
  }
  return scale;
}

}  // namespace

void store_cache(const StoreCache& a) {
  const int64_t rows = a.batch * a.tokens * a.heads;
  if (rows == 0) return;
  parallel(rows, max(kGrain / a.head_dim, 1), [&](int64_t begin, int64_t end) {
    with_type(a.dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      for (int64_t row = begin; row < end; ++row) {
        const int64_t head = row % a.heads, token = row / a.heads % a.tokens, batch = row / a.heads / a.tokens;
        const T* x = at<T>(a.x, batch, token, head);
        with_cache_type(a.cache_dtype, [&](auto cache_type) {
          using To = typename decltype(cache_type)::type;
          To* to = const_cast<To*>(at<To>(a.cache, batch, token, head));
          if constexpr (sizeof(To) == 1) {
            *const_cast<float*>(at<float>(a.scales, batch, token, head)) = quantize_row(x, to, a.head_dim);
          } else {
            convert_row(x, to, a.head_dim);
          }
        });
      }
    });
  });
}

}  // namespace pyalpaca::cpu::PYALPACA_ISA
