// Rotary position embedding in half-split order; the way back is the same rotation with the sine negated.
#include "cpu/instruction_set.h"
#include "cpu/kernels.h"
#include "cpu/threads.h"
#include "cpu/vec.h"

namespace pyalpaca::cpu::PYALPACA_ISA {
namespace {

constexpr int64_t kGrain = 65536;  // elements that are worth a thread

template <class T>
void rotate(const T* x, const float* cos, const float* sin, float sign, T* y, int64_t half) {
  int64_t i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const Vec first = load(x + i), second = load(x + half + i), c = load(cos + i), s = load(sin + i) * sign;
    store(y + i, first * c - second * s);
    store(y + half + i, second * c + first * s);
  }
  for (; i < half; ++i) {
    const float first = load_one(x + i), second = load_one(x + half + i), c = cos[i], s = sin[i] * sign;
    store_one(y + i, first * c - second * s);
    store_one(y + half + i, second * c + first * s);
  }
}

}  // namespace

void rope(const Rope& a) {
  const int64_t half = a.head_dim / 2;
  const float sign = a.inverse ? -1.0f : 1.0f;
  with_type(a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    parallel(a.batch * a.tokens, max(kGrain / (a.heads * a.head_dim), 1), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t entry = row / a.tokens, token = row % a.tokens;
        const T* x = static_cast<const T*>(a.x) + entry * a.x_batch + token * a.x_token;
        T* y = static_cast<T*>(a.y) + row * a.heads * a.head_dim;
        const int64_t angle = entry * a.angle_batch + token * half;
        for (int64_t head = 0; head < a.heads; ++head) {
          rotate(x + head * a.x_head, a.cos + angle, a.sin + angle, sign, y + head * a.head_dim, half);
        }
      }
    });
  });
}

}  // namespace pyalpaca::cpu::PYALPACA_ISA
