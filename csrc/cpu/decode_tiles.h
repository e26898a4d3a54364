// Scores and weighted sums of a run of keys and values, for several query heads at once.
//
// What is loaded, and widened, of a key or value is multiplied for all the query heads of its key head before the next
// one is; sums stay in registers. Query heads and results lie row_of(head_dim) apart, in the order of load_two, scores
// kBlock apart.
#pragma once

#include "cpu/stream.h"
#include "cpu/vec.h"

namespace pyalpaca::cpu::PYALPACA_ISA {
namespace {

constexpr int64_t kBlock = 128;  // keys whose scores are held, and how far ahead memory is asked for

// Running sums that stay in registers, with what they are made of, and the most query heads they are shared by.
#ifdef __AVX512F__
constexpr int kSums = 16, kMostHeads = 8;
#else
constexpr int kSums = 8, kMostHeads = 4;
#endif

PYALPACA_INLINE int64_t row_of(int64_t head_dim) { return round_up(head_dim, kLanes); }

template <int n>
struct Number {
  static constexpr int value = n;
};

constexpr int largest_power(int most) { return most < 2 ? 1 : 2 * largest_power(most / 2); }
constexpr int least(int a, int b) { return a < b ? a : b; }

template <class T>
PYALPACA_INLINE void ask_for_row(const T* row, int64_t head_dim) {
  const char* bytes = reinterpret_cast<const char*>(row);
  for (int64_t i = 0; i < head_dim * static_cast<int64_t>(sizeof(T)); i += 64) __builtin_prefetch(bytes + i, 0, 2);
}

// sums[h * together + i] = the products, lane by lane, of query head h and key i.
template <int heads, int keys, int together, class K>
PYALPACA_INLINE void multiply_keys(const float* q, const K* const* rows, int64_t head_dim, Vec* sums) {
  const int64_t row = row_of(head_dim);
  Vec dots[heads][keys] = {};
  const auto step = [&](int64_t from, int64_t to, const auto& widened) {
    Vec key[keys];
#pragma GCC unroll 8
    for (int i = 0; i < keys; ++i) key[i] = widened(rows[i] + from);
#pragma GCC unroll 8
    for (int h = 0; h < heads; ++h) {
      const Vec query = load(q + h * row + to);
#pragma GCC unroll 8
      for (int i = 0; i < keys; ++i) dots[h][i] += query * key[i];
    }
  };
  int64_t c = 0;
  for (; c + kStep <= head_dim; c += kStep) {
    step(c, c, [](const K* p) { return load_two(p).a; });
    step(c, c + kLanes, [](const K* p) { return load_two(p).b; });
  }
  for (; c < head_dim; c += kLanes) step(c, c, [&](const K* p) { return load_first(p, head_dim - c); });
#pragma GCC unroll 8
  for (int h = 0; h < heads; ++h) {
#pragma GCC unroll 8
    for (int i = 0; i < keys; ++i) sums[h * together + i] = dots[h][i];
  }
}

// Scores of `count` keys, in memory up to a multiple of kLanes, for `heads` query heads.
template <int heads, class K>
__attribute__((noinline)) void add_scores(const float* q, const K* k, int64_t stride, int64_t count, int64_t head_dim,
                                          float* scores) {
  constexpr int together = largest_power(static_cast<int>(kLanes) / heads);  // keys whose sums fill a vector
  constexpr int keys = least(least(largest_power(kSums / heads), together), 4);
  for (int64_t j = 0; j < count; j += together) {
    Vec sums[kLanes] = {};
#pragma GCC unroll 4
    for (int tile = 0; tile < together; tile += keys) {
      const K* rows[keys];
      for (int i = 0; i < keys; ++i) {
        rows[i] = k + min(j + tile + i, count - 1) * stride;
        ask_for_row(rows[i] + kBlock * stride, head_dim);
      }
      multiply_keys<heads, keys, together>(q, rows, head_dim, sums + tile);
    }
    float found[kLanes];
    store(found, sum_each(sums));
    for (int h = 0; h < heads; ++h)
      std::memcpy(scores + h * kBlock + j, found + h * together, sizeof(float) * together);
  }
}

// out = out x factors + weights x values for `heads` query heads and `vecs` vectors of columns, the last one of
// `width`.
template <int heads, int vecs, class K>
PYALPACA_INLINE void add_columns(const float* weights, const K* v, int64_t stride, int64_t count, int64_t width,
                                 const float* factors, float* out, int64_t row) {
  Vec sums[heads][vecs];
#pragma GCC unroll 8
  for (int h = 0; h < heads; ++h) {
#pragma GCC unroll 8
    for (int u = 0; u < vecs; ++u) sums[h][u] = load(out + h * row + u * kLanes) * factors[h];
  }
  for (int64_t j = 0; j < count; ++j, v += stride) {
    ask_for_row(v + kBlock * stride, vecs * kLanes);
    Vec value[vecs];
#pragma GCC unroll 8
    for (int u = 0; u + 1 < vecs; u += 2) {
      const Two two = load_two(v + u * kLanes);
      value[u] = two.a, value[u + 1] = two.b;
    }
    if constexpr (vecs == 1) value[0] = load_first(v, width);
#pragma GCC unroll 8
    for (int h = 0; h < heads; ++h) {
      const Vec weight = splat(weights[h * kBlock + j]);
#pragma GCC unroll 8
      for (int u = 0; u < vecs; ++u) sums[h][u] += weight * value[u];
    }
  }
#pragma GCC unroll 8
  for (int h = 0; h < heads; ++h) {
#pragma GCC unroll 8
    for (int u = 0; u < vecs; ++u) store(out + h * row + u * kLanes, sums[h][u]);
  }
}

template <int heads, class K>
__attribute__((noinline)) void add_values(const float* weights, const K* v, int64_t stride, int64_t count,
                                          int64_t head_dim, const float* factors, float* out) {
  constexpr int vecs = least(largest_power(kSums / heads), 8);
  const int64_t row = row_of(head_dim);
  int64_t c = 0;
  const auto columns = [&](auto number) {
    constexpr int n = decltype(number)::value;
    for (; c + n * kLanes <= head_dim; c += n * kLanes) {
      add_columns<heads, n>(weights, v + c, stride, count, kLanes, factors, out + c, row);
    }
  };
  if constexpr (vecs >= 8) columns(Number<8>());
  if constexpr (vecs >= 4) columns(Number<4>());
  if constexpr (vecs >= 2) columns(Number<2>());
  for (; c < head_dim; c += kLanes) {
    add_columns<heads, 1>(weights, v + c, stride, count, head_dim - c, factors, out + c, row);
  }
}

// Calls f(first, Number<n>) for runs of n of `heads`, none longer than kMostHeads.
template <int n, class F>
PYALPACA_INLINE void with_number(int64_t wanted, int64_t first, const F& f) {
  if (wanted == n) return f(first, Number<n>());
  if constexpr (n > 1) with_number<n - 1>(wanted, first, f);
}

template <class F>
PYALPACA_INLINE void by_heads(int64_t heads, const F& f) {
  for (int64_t h = 0; h < heads; h += kMostHeads) with_number<kMostHeads>(min(heads - h, kMostHeads), h, f);
}

}  // namespace
}  // namespace pyalpaca::cpu::PYALPACA_ISA
