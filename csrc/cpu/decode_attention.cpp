// Attention of one query a sequence, as in decoding: as fast as the keys and values come from memory.
//
// A task is a run of the keys of one key head, for all its query heads: each key and value is read once. With few key
// heads their keys are cut into parts for more threads, merged by their logsumexp (Dao et al. 2023, flash decoding).
// Scores are in units of ln 2.
#include <cmath>

#include "cpu/attention.h"
#include "cpu/instruction_set.h"
#include "cpu/kernels.h"
#include "cpu/kv_cache.h"
#include "cpu/threads.h"
#include "cpu/vec.h"

namespace pyalpaca::cpu::PYALPACA_ISA {
namespace {

constexpr int64_t kBlock = 128;           // keys whose scores are held, and how far ahead memory is asked for
constexpr int64_t kLeastPart = 256;       // keys that are worth a task
constexpr int64_t kThreadBytes = 262144;  // of keys and values that are worth a thread

// What one query head has seen: its largest score, the sum of weights relative to it, and of weighted values.
struct Partial {
  float top, total;
  float* out;  // head_dim, in memory up to a multiple of kLanes
};

PYALPACA_INLINE int64_t row_of(int64_t head_dim) { return round_up(head_dim, kLanes); }

// Scores of `count` keys, in memory up to a multiple of kLanes, for `heads` query heads at once.
template <int heads, class K>
void add_scores(const float* q, const K* k, int64_t stride, int64_t count, int64_t head_dim, float* scores) {
  const int64_t row = row_of(head_dim), whole = head_dim / kLanes * kLanes;
  for (int64_t j = 0; j < count; j += kLanes) {
    Vec dots[heads][kLanes] = {};
    for (int64_t i = 0; i < min(kLanes, count - j); ++i) {
      const K* key = k + (j + i) * stride;
      const char* later = reinterpret_cast<const char*>(key + kBlock * stride);
      for (int64_t byte = 0; byte < head_dim * static_cast<int64_t>(sizeof(K)); byte += 64)
        __builtin_prefetch(later + byte, 0, 2);
      Vec sums[heads][2] = {};
      int64_t c = 0;
      for (; c + 2 * kLanes <= whole; c += 2 * kLanes) {
        const Vec first = load(key + c), second = load(key + c + kLanes);
        for (int h = 0; h < heads; ++h) {
          sums[h][0] += first * load(q + h * row + c);
          sums[h][1] += second * load(q + h * row + c + kLanes);
        }
      }
      for (; c < head_dim; c += kLanes) {
        const Vec last = load_first(key + c, head_dim - c);
        for (int h = 0; h < heads; ++h) sums[h][0] += last * load(q + h * row + c);
      }
      for (int h = 0; h < heads; ++h) dots[h][i] = sums[h][0] + sums[h][1];
    }
    for (int h = 0; h < heads; ++h) store(scores + h * kBlock + j, sum_each(dots[h]));
  }
}

// out += weights x values for `heads` query heads and `vecs` vectors of columns, of the last `width` columns.
template <int heads, int vecs, class K>
PYALPACA_INLINE void add_columns(const float* weights, const K* v, int64_t stride, int64_t count, int64_t width,
                                 const float* factors, float* out, int64_t row) {
  Vec sums[heads][vecs];
  for (int h = 0; h < heads; ++h) {
    for (int u = 0; u < vecs; ++u) sums[h][u] = load(out + h * row + u * kLanes) * factors[h];
  }
  for (int64_t j = 0; j < count; ++j, v += stride) {
    Vec value[vecs];
    for (int u = 0; u < vecs; ++u) {
      __builtin_prefetch(v + kBlock * stride + u * kLanes, 0, 2);
      value[u] = vecs == 1 ? load_first(v, width) : load(v + u * kLanes);
    }
    for (int h = 0; h < heads; ++h) {
      const Vec weight = splat(weights[h * kBlock + j]);
      for (int u = 0; u < vecs; ++u) sums[h][u] += weight * value[u];
    }
  }
  for (int h = 0; h < heads; ++h) {
    for (int u = 0; u < vecs; ++u) store(out + h * row + u * kLanes, sums[h][u]);
  }
}

template <int heads, class K>
void add_values(const float* weights, const K* v, int64_t stride, int64_t count, int64_t head_dim, const float* factors,
                float* out) {
  const int64_t row = row_of(head_dim);
  int64_t c = 0;
  if constexpr (heads <= 2) {  // the whole row at once, as it comes from memory
    for (; c + 8 * kLanes <= head_dim; c += 8 * kLanes) {
      add_columns<heads, 8>(weights, v + c, stride, count, kLanes, factors, out + c, row);
    }
  }
  for (; c + 4 * kLanes <= head_dim; c += 4 * kLanes) {
    add_columns<heads, 4>(weights, v + c, stride, count, kLanes, factors, out + c, row);
  }
  for (; c + 2 * kLanes <= head_dim; c += 2 * kLanes) {
    add_columns<heads, 2>(weights, v + c, stride, count, kLanes, factors, out + c, row);
  }
  for (; c < head_dim; c += kLanes) {
    add_columns<heads, 1>(weights, v + c, stride, count, head_dim - c, factors, out + c, row);
  }
}

// Calls f(first, Constant<n>) for runs of n = 4, 2 or 1 of `heads`.
template <int n>
struct Constant {
  static constexpr int value = n;
};
template <class F>
PYALPACA_INLINE void by_heads(int64_t heads, const F& f) {
  int64_t h = 0;
  for (; h + 4 <= heads; h += 4) f(h, Constant<4>());
  for (; h + 2 <= heads; h += 2) f(h, Constant<2>());
  for (; h < heads; ++h) f(h, Constant<1>());
}

// Scores -> weights relative to the new largest score; the factor for what was summed relative to the old one.
PYALPACA_INLINE float online_softmax(float* scores, int64_t count, Partial& p) {
  const int64_t end = round_up(count, kLanes);
  for (int64_t j = count; j < end; ++j) scores[j] = -kInfinity;
  Vec tops = splat(p.top), total = {};
  for (int64_t j = 0; j < end; j += kLanes) tops = larger(load(scores + j), tops);
  const float top = max(tops), zero = top == -kInfinity ? 0.0f : top;
  for (int64_t j = 0; j < end; j += kLanes) {
    const Vec weight = exp2(load(scores + j) - zero);
    store(scores + j, weight);
    total += weight;
  }
  const float factor = exp2(splat(p.top - zero))[0];
  p.total = p.total * factor + sum(total);
  p.top = top;
  return factor;
}

// The keys [first, last) of one key head, for its query heads.
template <class T, class K>
void attend(const FlashAttention& a, int64_t batch, int64_t kv_head, int64_t first, int64_t last, Partial* partials) {
  const AttentionShape& s = a.shape;
  const int64_t group = s.heads / s.kv_heads, row = row_of(s.head_dim);
  float* q = scratch(group * (row + kBlock + 1));
  float* scores = q + group * row;
  float* factors = scores + group * kBlock;
  for (int64_t g = 0; g < group; ++g) {
    const T* from = at<T>(a.q, batch, 0, kv_head * group + g);
    for (int64_t c = 0; c < row; c += kLanes) {
      store(q + g * row + c, load_first(from + c, s.head_dim - c) * (s.scale * kLog2E));
      store(partials[g].out + c, Vec{});
    }
    partials[g].top = -kInfinity, partials[g].total = 0.0f;
  }
  for (int64_t block = first; block < last; block += kBlock) {
    const int64_t count = min(kBlock, last - block);
    const K *k = at<K>(a.k, batch, block, kv_head), *v = at<K>(a.v, batch, block, kv_head);
    by_heads(group, [&](int64_t h, auto heads) {
      add_scores<decltype(heads)::value>(q + h * row, k, a.k.token, count, s.head_dim, scores + h * kBlock);
    });
    for (int64_t g = 0; g < group; ++g) {
      float* weights = scores + g * kBlock;
      if (a.k_scales.data != nullptr) {
        for (int64_t j = 0; j < count; ++j) weights[j] *= cache_scale(a.k_scales, batch, block + j, kv_head);
      }
      factors[g] = online_softmax(weights, count, partials[g]);
      if (a.v_scales.data != nullptr) {
        for (int64_t j = 0; j < count; ++j) weights[j] *= cache_scale(a.v_scales, batch, block + j, kv_head);
      }
    }
    by_heads(group, [&](int64_t h, auto heads) {
      add_values<decltype(heads)::value>(scores + h * kBlock, v, a.v.token, count, s.head_dim, factors + h,
                                         partials[h].out);
    });
  }
}

// Merges the parts of one query head, in their order, and stores the result.
template <class T>
void finish(const FlashAttention& a, int64_t batch, int64_t head, const Partial* first, int64_t parts, int64_t stride) {
  const AttentionShape& s = a.shape;
  float top = -kInfinity, total = 0.0f;
  for (int64_t i = 0; i < parts; ++i) top = first[i * stride].top > top ? first[i * stride].top : top;
  float* out = first->out;
  for (int64_t i = 0; i < parts; ++i) {
    const Partial& part = first[i * stride];
    const float factor = exp2(splat(part.top - (top == -kInfinity ? 0.0f : top)))[0];
    total += part.total * factor;
    for (int64_t c = 0; c < s.head_dim; c += kLanes) {
      const Vec before = i == 0 ? Vec{} : load(out + c);
      store(out + c, before + load(part.out + c) * factor);
    }
  }
  const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
  T* to = static_cast<T*>(a.out) + (batch * s.heads + head) * s.head_dim;
  for (int64_t c = 0; c < s.head_dim; c += kLanes) store_first(to + c, load(out + c) * inverse, s.head_dim - c);
  a.lse[batch * s.heads + head] = top * kLn2 + std::log(total);
}

}  // namespace

void decode_attention(const FlashAttention& a) {
  const AttentionShape& s = a.shape;
  const int64_t pairs = s.batch * s.kv_heads, group = s.heads / s.kv_heads, row = row_of(s.head_dim);
  const int64_t keys = seen(s, 0, 0, s.keys);
  const int64_t bytes = 2 * pairs * keys * s.head_dim * cache_element(a.cache_dtype);
  const int64_t threads = max(min(bytes / kThreadBytes, num_threads()), 1);
  const int64_t wanted = threads == 1 ? 1 : (4 * threads + pairs - 1) / pairs;
  const int64_t length = round_up(max((keys + wanted - 1) / wanted, kLeastPart), kBlock);
  const int64_t parts = max((keys + length - 1) / length, 1);

  const int64_t count = pairs * parts * group;  // of partial results: (pairs, parts, group)
  float* memory = scratch(count * (row + static_cast<int64_t>(sizeof(Partial) / sizeof(float))), 1);
  Partial* partials = reinterpret_cast<Partial*>(memory + count * row);
  for (int64_t i = 0; i < count; ++i) partials[i].out = memory + i * row;
  Queue queue;
  parallel(min(threads, pairs * parts), 1, [&](int64_t, int64_t) {
    for (int64_t t = queue.take(); t < pairs * parts; t = queue.take()) {
      const int64_t pair = t / parts, first = t % parts * length;
      with_type(a.dtype, [&](auto type) {
        with_cache_type(a.cache_dtype, [&](auto cache_type) {
          attend<typename decltype(type)::type, typename decltype(cache_type)::type>(
              a, pair / s.kv_heads, pair % s.kv_heads, first, min(first + length, keys), partials + t * group);
        });
      });
    }
  });
  with_type(a.dtype, [&](auto type) {
    for (int64_t i = 0; i < pairs * group; ++i) {
      finish<typename decltype(type)::type>(a, i / s.heads, i % s.heads,
                                            partials + (i / group * parts) * group + i % group, parts, group);
    }
  });
}

}  // namespace pyalpaca::cpu::PYALPACA_ISA
