// Attention of one query a sequence, as in decoding: as fast as the keys and values come from memory.
//
// A task is a run of the keys of one key head, for all its query heads: each key and value is read once. With few key
// heads their keys are cut into parts for more threads, merged by their logsumexp (Dao et al. 2023, flash decoding).
// Scores are in units of ln 2.
#include <cmath>

#include "cpu/attention.h"
#include "cpu/decode_tiles.h"
#include "cpu/instruction_set.h"
#include "cpu/kernels.h"
#include "cpu/kv_cache.h"
#include "cpu/threads.h"
#include "cpu/vec.h"

namespace pyalpaca::cpu::PYALPACA_ISA {
namespace {

constexpr int64_t kLeastPart = 256;       // keys that are worth a task
constexpr int64_t kThreadBytes = 262144;  // of keys and values that are worth a thread

// What one query head has seen: its largest score, the sum of weights relative to it, and of weighted values.
struct Partial {
  float top, total;
  float* out;  // head_dim, in memory up to a multiple of kLanes
};

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

// The scores of a block times its keys' or values' factors, for `group` query heads.
PYALPACA_INLINE void multiply_by(const Strided& scales, int64_t batch, int64_t first, int64_t head, int64_t count,
                                 int64_t group, float* scores) {
  if (scales.data == nullptr) return;
  float factors[kBlock] = {};
  for (int64_t j = 0; j < count; ++j) factors[j] = cache_scale(scales, batch, first + j, head);
  for (int64_t g = 0; g < group; ++g, scores += kBlock) {
    for (int64_t j = 0; j < count; j += kLanes) store(scores + j, load(scores + j) * load(factors + j));
  }
}

// The keys [first, last) of one key head, for its query heads.
template <class T, class K>
void attend(const FlashAttention& a, int64_t batch, int64_t kv_head, int64_t first, int64_t last, Partial* partials) {
  const AttentionShape& s = a.shape;
  const int64_t group = s.heads / s.kv_heads, row = row_of(s.head_dim);
  float* q = scratch(group * (row + max(row, kBlock) + 1));
  float* const scores = q + group * row;
  float* const factors = scores + group * kBlock;
  for (int64_t g = 0; g < group; ++g) {
    const T* from = at<T>(a.q, batch, 0, kv_head * group + g);
    for (int64_t c = 0; c < row; c += kLanes) {
      store(scores + c, load_first(from + c, s.head_dim - c) * (s.scale * kLog2E));
      store(partials[g].out + c, Vec{});
    }
    order<K>(scores, q + g * row, s.head_dim);
    for (int64_t c = s.head_dim; c < row; ++c) q[g * row + c] = 0.0f;
    partials[g].top = -kInfinity, partials[g].total = 0.0f;
  }
  for (int64_t block = first; block < last; block += kBlock) {
    const int64_t count = min(kBlock, last - block);
    const K *k = at<K>(a.k, batch, block, kv_head), *v = at<K>(a.v, batch, block, kv_head);
    by_heads(group, [&](int64_t h, auto heads) {
      add_scores<decltype(heads)::value>(q + h * row, k, a.k.token, count, s.head_dim, scores + h * kBlock);
    });
    multiply_by(a.k_scales, batch, block, kv_head, count, group, scores);
    for (int64_t g = 0; g < group; ++g) factors[g] = online_softmax(scores + g * kBlock, count, partials[g]);
    multiply_by(a.v_scales, batch, block, kv_head, count, group, scores);
    by_heads(group, [&](int64_t h, auto heads) {
      add_values<decltype(heads)::value>(scores + h * kBlock, v, a.v.token, count, s.head_dim, factors + h,
                                         partials[h].out);
    });
  }
  for (int64_t g = 0; g < group; ++g) restore_order<K>(partials[g].out, s.head_dim);
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
