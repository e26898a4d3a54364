// Rotary position embedding in half-split order, of q and k at once; the way back is the same with the sine negated.
#include "cpu/instruction_set.h"
#include "cpu/kernels.h"
#include "cpu/stream.h"
#include "cpu/threads.h"
#include "cpu/vec.h"

namespace pyalpaca::cpu::PYALPACA_ISA {
namespace {

constexpr int64_t kGrain = 65536;  // elements that are worth a thread

// The angles stand in the order of T, see order(). What goes to y goes to `copy` too, if kCopy.
template <bool kStream, bool kCopy, class T>
void rotate(const T* x, const float* cos, const float* sin, float sign, T* y, T* copy, int64_t half) {
  int64_t i = 0;
  for (; i + kStep <= half; i += kStep) {
    const Two first = load_two(x + i), second = load_two(x + half + i), c = load_two(cos + i);
    const Two raw = load_two(sin + i), s = {raw.a * sign, raw.b * sign};
    const Two low = {first.a * c.a - second.a * s.a, first.b * c.b - second.b * s.b};
    const Two high = {second.a * c.a + first.a * s.a, second.b * c.b + first.b * s.b};
    put_two<kStream>(y + i, low);
    put_two<kStream>(y + half + i, high);
    if constexpr (kCopy) {
      put_two<kStream>(copy + i, low);
      put_two<kStream>(copy + half + i, high);
    }
  }
  for (; i < half; ++i) {
    const float first = load_one(x + i), second = load_one(x + half + i), c = cos[i], s = sin[i] * sign;
    store_one(y + i, first * c - second * s);
    store_one(y + half + i, second * c + first * s);
    if constexpr (kCopy) copy[i] = y[i], copy[half + i] = y[half + i];
  }
}

template <bool kStream, bool kCopy, class T>
void rotate_heads(const RopeHeads& a, const Rope& all, int64_t row, const float* cos, const float* sin, T* copy) {
  const T* x = static_cast<const T*>(a.x) + row / all.tokens * a.x_batch + row % all.tokens * a.x_token;
  T* y = static_cast<T*>(a.y) + row * a.heads * all.head_dim;
  const float sign = all.inverse ? -1.0f : 1.0f;
  for (int64_t head = 0; head < a.heads; ++head) {
    const int64_t at = head * all.head_dim;
    rotate<kStream, kCopy>(x + head * a.x_head, cos, sin, sign, y + at, kCopy ? copy + at : nullptr, all.head_dim / 2);
  }
}

template <bool kStream, class T>
void copy_heads(const T* x, int64_t x_head, T* to, int64_t heads, int64_t head_dim) {
  for (int64_t head = 0; head < heads; ++head) {
    const T* from = x + head * x_head;
    int64_t i = 0;
    for (; i + kStep <= head_dim; i += kStep) copy_two<kStream>(from + i, to + i);
    for (; i < head_dim; ++i) to[i] = from[i];
    to += head_dim;
  }
}

// Rotates the heads of k, which go to the cache in the same breath, as v does beside them, if the token has a place
// there.
template <bool kStream, class T>
void rotate_keys(const Rope& a, int64_t row, const float* cos, const float* sin) {
  const int64_t slot = a.store.slots == nullptr ? -1 : a.store.slots[row], width = a.k.heads * a.head_dim;
  if (slot < 0) return rotate_heads<kStream, false, T>(a.k, a, row, cos, sin, nullptr);
  rotate_heads<kStream, true>(a.k, a, row, cos, sin, static_cast<T*>(a.store.k_cache) + slot * width);
  const T* v = static_cast<const T*>(a.store.v) + row / a.tokens * a.store.v_batch + row % a.tokens * a.store.v_token;
  copy_heads<kStream>(v, a.store.v_head, static_cast<T*>(a.store.v_cache) + slot * width, a.k.heads, a.head_dim);
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
    rotate_heads<kStream, false, T>(a.q, a, row, cos, sin, nullptr);
    rotate_keys<kStream, T>(a, row, cos, sin);
  }
  if constexpr (kStream) end_of_stream();
}

}  // namespace

void rope(const Rope& a) {
  with_type(a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const int64_t bytes = static_cast<int64_t>(sizeof(T)), half_bytes = a.head_dim / 2 * bytes;
    const int64_t rows = a.batch * a.tokens, row_width = (a.q.heads + a.k.heads) * a.head_dim;
    const auto at_a_line = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % kLine == 0; };
    const bool stores = a.store.slots != nullptr;
    const bool large = streams(a.q.y, half_bytes, rows * row_width * bytes) && (a.k.heads == 0 || at_a_line(a.k.y)) &&
                       (!stores || (at_a_line(a.store.k_cache) && at_a_line(a.store.v_cache)));
    with_constant(large, [&](auto stream) {
      parallel(rows, max(kGrain / row_width, 1),
               [&](int64_t begin, int64_t end) { rope_rows<decltype(stream)::value, T>(a, begin, end); });
    });
  });
}

}  // namespace pyalpaca::cpu::PYALPACA_ISA
