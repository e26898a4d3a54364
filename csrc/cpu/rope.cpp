// Rotary position embedding in half-split order, of q and k at once; the way back is the same with the sine negated.
#include "cpu/instruction_set.h"
#include "cpu/kernels.h"
#include "cpu/stream.h"
#include "cpu/threads.h"
#include "cpu/vec.h"

namespace pyalpaca::cpu::PYALPACA_ISA {
namespace {

constexpr int64_t kGrain = 65536;  // elements that are worth a thread

// The angles stand in the order of T, see order().
template <bool kStream, class T>
void rotate(const T* x, const float* cos, const float* sin, float sign, T* y, int64_t half) {
  int64_t i = 0;
  for (; i + kStep <= half; i += kStep) {
    const Two first = load_two(x + i), second = load_two(x + half + i), c = load_two(cos + i);
    const Two raw = load_two(sin + i), s = {raw.a * sign, raw.b * sign};
    put_two<kStream>(y + i, {first.a * c.a - second.a * s.a, first.b * c.b - second.b * s.b});
    put_two<kStream>(y + half + i, {second.a * c.a + first.a * s.a, second.b * c.b + first.b * s.b});
  }
  for (; i < half; ++i) {
    const float first = load_one(x + i), second = load_one(x + half + i), c = cos[i], s = sin[i] * sign;
    store_one(y + i, first * c - second * s);
    store_one(y + half + i, second * c + first * s);
  }
}

template <bool kStream, class T>
void rotate_heads(const RopeHeads& a, const Rope& all, int64_t row, const float* cos, const float* sin) {
  const T* x = static_cast<const T*>(a.x) + row / all.tokens * a.x_batch + row % all.tokens * a.x_token;
  T* y = static_cast<T*>(a.y) + row * a.heads * all.head_dim;
  const float sign = all.inverse ? -1.0f : 1.0f;
  for (int64_t head = 0; head < a.heads; ++head) {
    rotate<kStream>(x + head * a.x_head, cos, sin, sign, y + head * all.head_dim, all.head_dim / 2);
  }
}

template <class T>
void store_row(const Rope& a, int64_t row) {
  const int64_t width = a.k.heads * a.head_dim, slot = a.store.slots[row];
  if (slot < 0) return;
  const size_t head_bytes = static_cast<size_t>(a.head_dim) * sizeof(T);
  std::memcpy(static_cast<T*>(a.store.k_cache) + slot * width, static_cast<const T*>(a.k.y) + row * width,
              static_cast<size_t>(a.k.heads) * head_bytes);
  const T* v = static_cast<const T*>(a.store.v) + row / a.tokens * a.store.v_batch + row % a.tokens * a.store.v_token;
  T* to = static_cast<T*>(a.store.v_cache) + slot * width;
  for (int64_t head = 0; head < a.k.heads; ++head) {
    std::memcpy(to + head * a.head_dim, v + head * a.store.v_head, head_bytes);
  }
}

template <bool kStream, class T>
void rope_rows(const Rope& a, int64_t begin, int64_t end) {
  const int64_t half = a.head_dim / 2;
  float* const ordered = kInterleaved<T> ? scratch(2 * half) : nullptr;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t token = row % a.tokens;
    const int64_t angle =
        a.positions != nullptr ? a.positions[row] * half : row / a.tokens * a.angle_batch + token * half;
    const float *cos = a.cos + angle, *sin = a.sin + angle;
    if constexpr (kInterleaved<T>) {
      order<T>(cos, ordered, half);
      order<T>(sin, ordered + half, half);
      cos = ordered, sin = ordered + half;
    }
    rotate_heads<kStream, T>(a.q, a, row, cos, sin);
    rotate_heads<kStream, T>(a.k, a, row, cos, sin);
    if (a.store.slots != nullptr) store_row<T>(a, row);
  }
  if constexpr (kStream) end_of_stream();
}

}  // namespace

void rope(const Rope& a) {
  with_type(a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const int64_t bytes = static_cast<int64_t>(sizeof(T)), half_bytes = a.head_dim / 2 * bytes;
    const int64_t rows = a.batch * a.tokens, row_width = (a.q.heads + a.k.heads) * a.head_dim;
    const bool large = streams(a.q.y, half_bytes, rows * row_width * bytes) &&
                       (a.k.heads == 0 || reinterpret_cast<uintptr_t>(a.k.y) % kLine == 0);
    // What is stored in a cache is read again from the result.
    with_constant(large && a.store.slots == nullptr, [&](auto stream) {
      parallel(rows, max(kGrain / row_width, 1),
               [&](int64_t begin, int64_t end) { rope_rows<decltype(stream)::value, T>(a, begin, end); });
    });
  });
}

}  // namespace pyalpaca::cpu::PYALPACA_ISA
