// Attention tile by tile with an online softmax (Milakov and Gimelshein 2018; Dao 2023, algorithm 1).
//
// A task is a run of queries of all heads that share a key head, so that each block of keys is converted and brought
// into the cache once for all of them. Queries lie in the lanes of vectors, in panels: with scores^T = k q^T, their
// softmax so far and out^T = v^T p^T, keys and values are used as they lie, nothing is added up across a vector, and
// the factor of the online softmax is one vector. Scores are in units of ln 2. Memory beyond the arguments is a few
// hundred KB per thread, whatever the lengths.
#include <cmath>

#include "cpu/attention.h"
#include "cpu/gemm.h"
#include "cpu/instruction_set.h"
#include "cpu/kernels.h"
#include "cpu/kv_cache.h"
#include "cpu/threads.h"
#include "cpu/vec.h"

namespace pyalpaca::cpu::PYALPACA_ISA {
namespace {

constexpr int64_t kBlock = 128;     // keys brought in together
constexpr int64_t kTaskRows = 256;  // queries times heads of a task

struct Task {
  FlashAttention attention;         // of one sequence alone
  int64_t kv_head, first, queries;  // queries [first, first + queries)
};

FlashAttention alone(FlashAttention a, int64_t sequence) {
  const int64_t heads = a.shape.heads, row = heads * a.shape.head_dim, batch_rows = a.shape.queries;
  const Start start = start_alone(a.packed, sequence, a.shape);
  const int64_t element = element_of(a.dtype), cache = cache_element(a.cache_dtype);
  advance(a.q, start.batch, start.query, element);
  advance(a.k, start.batch, start.key, cache);
  advance(a.v, start.batch, start.key, cache);
  advance(a.k_scales, start.batch, start.key, sizeof(float));
  advance(a.v_scales, start.batch, start.key, sizeof(float));
  advance(a.out, (start.batch * batch_rows + start.query) * row, element);
  a.lse += start.batch * heads * a.lse_head + start.query;
  return a;
}

// A panel of queries: transposed, what came out so far, and the softmax so far (the largest score, and the sum of the
// weights relative to it).
struct Panel {
  float *q, *out;      // head_dim x kColumns
  float *top, *total;  // kColumns
};

Panel panel(float* memory, int64_t head_dim, int64_t index) {
  float* q = memory + index * (2 * head_dim + 2) * kColumns;
  return {q, q + head_dim * kColumns, q + 2 * head_dim * kColumns, q + (2 * head_dim + 1) * kColumns};
}

// Turns scores (keys x kColumns) into weights relative to the new largest score, in place; the factors for what was
// summed relative to the old one -> factors. True if any factor is not 1.
bool online_softmax(float* scores, int64_t keys, const Panel& p, float* factors) {
  Vec tops[4] = {load(p.top), load(p.top + kLanes), load(p.top), load(p.top + kLanes)};
  int64_t j = 0;
  for (; j + 2 <= keys; j += 2) {
    for (int u = 0; u < 4; ++u) tops[u] = larger(load(scores + j * kColumns + u * kLanes), tops[u]);
  }
  for (; j < keys; ++j) {
    for (int u = 0; u < 2; ++u) tops[u] = larger(load(scores + j * kColumns + u * kLanes), tops[u]);
  }
  bool changed = false;
  Vec zero[2], totals[2] = {};
  for (int u = 0; u < 2; ++u) {
    const Vec top = larger(tops[u], tops[u + 2]), old = load(p.top + u * kLanes);
    zero[u] = top == -kInfinity ? Vec{} : top;  // nothing seen yet: every weight 2^-inf, but a NaN stays one
    const Vec factor = exp2(old - zero[u]);
    store(p.top + u * kLanes, top);
    store(factors + u * kLanes, factor);
    for (int i = 0; i < kLanes; ++i) changed |= factor[i] != 1.0f;
  }
  for (j = 0; j < keys; ++j) {
    for (int u = 0; u < 2; ++u) {
      float* x = scores + j * kColumns + u * kLanes;
      const Vec weight = exp2(load(x) - zero[u]);
      store(x, weight);
      totals[u] += weight;
    }
  }
  for (int u = 0; u < 2; ++u) {
    float* total = p.total + u * kLanes;
    store(total, load(total) * load(factors + u * kLanes) + totals[u]);
  }
  return changed;
}

// Asks for part `part` of `parts` of the rows of `x`, so that they are near when their turn comes.
PYALPACA_INLINE void prefetch(const Strided& x, int64_t element, int64_t first, int64_t count, int64_t head,
                              int64_t head_dim, int64_t part, int64_t parts) {
  const char* rows = static_cast<const char*>(x.data) + (first * x.token + head * x.head) * element;
  for (int64_t i = count * part / parts; i < count * (part + 1) / parts; ++i) {
    for (int64_t byte = 0; byte < head_dim * element; byte += 64)
      __builtin_prefetch(rows + i * x.token * element + byte, 0, 2);
  }
}

// The same for what the task needs of the block of keys that begins at `block`.
void prefetch_block(const Task& task, int64_t block, int64_t part, int64_t parts) {
  const FlashAttention& a = task.attention;
  const AttentionShape& s = a.shape;
  const int64_t keys = min(kBlock, seen(s, task.first + task.queries - 1, block, s.keys - block));
  if (keys <= 0) return;
  const int64_t element = cache_element(a.cache_dtype);
  prefetch(a.k, element, block, keys, task.kv_head, s.head_dim, part, parts);
  prefetch(a.v, element, block, keys, task.kv_head, s.head_dim, part, parts);
}

// The same for what a task begins with.
void prefetch_task(const Task& task, int64_t part, int64_t parts) {
  const FlashAttention& a = task.attention;
  const int64_t group = a.shape.heads / a.shape.kv_heads, element = element_of(a.dtype);
  for (int64_t head = task.kv_head * group; head < (task.kv_head + 1) * group; ++head) {
    prefetch(a.q, element, task.first, task.queries, head, a.shape.head_dim, part, parts);
  }
  prefetch_block(task, 0, part, parts);
}

template <class T>
void run(const Task& task, const Task* next) {
  const FlashAttention& a = task.attention;
  const AttentionShape& s = a.shape;
  const int64_t d = s.head_dim, group = s.heads / s.kv_heads;
  const int64_t panels = (task.queries + kColumns - 1) / kColumns;  // of one head
  const int64_t row = d + kLanes;  // of a block's keys and values: not a power of two, which would share cache sets
  const int64_t panel_floats = (2 * d + 2) * kColumns;
  float* memory =
      scratch(group * panels * panel_floats + 2 * kBlock * row + kBlock * kColumns + kColumns + row * kColumns);
  float* keys = memory + group * panels * panel_floats;
  float* values = keys + kBlock * row;
  float* scores = values + kBlock * row;
  float* factors = scores + kBlock * kColumns;
  float* rows = factors + kColumns;  // kColumns x row

  for (int64_t g = 0; g < group; ++g) {
    for (int64_t i = 0; i < panels; ++i) {
      const Panel p = panel(memory, d, g * panels + i);
      const int64_t first = task.first + i * kColumns, count = min(kColumns, task.first + task.queries - first);
      copy_tile(at<T>(a.q, kAlone, first, task.kv_head * group + g), a.q.token, count, d, s.scale * kLog2E, rows, row);
      transpose_tile(rows, row, count, d, p.q, kColumns, kColumns);
      for (int64_t c = 0; c < d * kColumns; c += kLanes) store(p.out + c, Vec{});
      for (int64_t c = 0; c < kColumns; c += kLanes) {
        store(p.top + c, splat(-kInfinity));
        store(p.total + c, Vec{});
      }
    }
  }

  const int64_t last_key = seen(s, task.first + task.queries - 1, 0, s.keys);
  for (int64_t block = 0; block < last_key; block += kBlock) {
    const int64_t most = min(kBlock, last_key - block);
    copy_cached(a.cache_dtype, a.k, a.k_scales, kAlone, task.kv_head, block, most, d, keys, row);
    copy_cached(a.cache_dtype, a.v, a.v_scales, kAlone, task.kv_head, block, most, d, values, row);
    for (int64_t i = 0; i < group * panels; ++i) {
      const Panel p = panel(memory, d, i);
      const int64_t first = task.first + i % panels * kColumns, end = min(first + kColumns, task.first + task.queries);
      const int64_t count = seen(s, end - 1, block, most);
      if (block + kBlock < last_key) {
        prefetch_block(task, block + kBlock, i, group * panels);
      } else if (next != nullptr) {
        prefetch_task(*next, i, group * panels);
      }
      if (count == 0) continue;
      multiply<Lies::kAlongDepth>(count, d, keys, row, p.q, kColumns, scores, kColumns, kSet);
      if (s.causal) hide(scores, kColumns, count, first + s.q_offset - block);
      const bool changed = online_softmax(scores, count, p, factors);
      multiply<Lies::kAlongRows>(d, count, values, row, scores, kColumns, p.out, kColumns,
                                 {true, changed ? factors : nullptr});
    }
  }

  for (int64_t i = 0; i < group * panels; ++i) {
    const Panel p = panel(memory, d, i);
    const int64_t head = task.kv_head * group + i / panels, first = task.first + i % panels * kColumns;
    const int64_t count = min(kColumns, task.first + task.queries - first);
    Vec inverse[2];
    for (int u = 0; u < 2; ++u) {
      const Vec total = load(p.total + u * kLanes);
      inverse[u] = total == 0.0f ? Vec{} : 1.0f / total;
    }
    for (int64_t c = 0; c < d; ++c) {
      for (int u = 0; u < 2; ++u) {
        float* out = p.out + c * kColumns + u * kLanes;
        store(out, load(out) * inverse[u]);
      }
    }
    transpose_tile(p.out, kColumns, d, kColumns, rows, row, d);
    T* out = static_cast<T*>(a.out) + (first * s.heads + head) * d;
    for (int64_t r = 0; r < count; ++r, out += s.heads * d) {
      for (int64_t c = 0; c < d; c += kLanes) store_first(out + c, load_first(rows + r * row + c, d - c), d - c);
      a.lse[head * a.lse_head + first + r] = p.top[r] * kLn2 + std::log(p.total[r]);
    }
  }
}

}  // namespace

void flash_attention(const FlashAttention& a) {
  const AttentionShape& s = a.shape;
  const bool packed = a.packed.q_starts != nullptr;
  if (s.batch * s.queries * s.heads == 0) return;
  if (s.queries == 1 && !packed) return decode_attention(a);
  const int64_t group = s.heads / s.kv_heads;
  const int64_t threads = worthy_threads(2 * count_scores(s, a.packed) * s.head_dim, num_threads());
  int64_t queries = min(max(kTaskRows / group / kColumns, 1) * kColumns, s.queries);
  // Of the sequence whose turn comes as number `place`: runs of queries, for each key head.
  const auto count_runs = [&](int64_t place) {
    AttentionShape alone = s;
    start_alone(a.packed, sequence_at(a.packed, place), alone);
    return (alone.queries + queries - 1) / queries;
  };
  const auto count_tasks = [&] {
    if (!packed) return s.batch * s.kv_heads * count_runs(0);
    int64_t tasks = 0;
    for (int64_t place = 0; place < s.batch; ++place) tasks += s.kv_heads * count_runs(place);
    return tasks;
  };
  // With few heads, shorter runs give every thread something to do.
  while (threads > 1 && queries > kColumns && count_tasks() < 4 * threads) {
    queries = round_up((queries + 1) / 2, kColumns);
  }
  const int64_t tasks = count_tasks();
  Queue queue;
  parallel(min(threads, tasks), 1, [&](int64_t, int64_t) {
    int64_t place = 0, before = 0, runs = count_runs(0);  // a thread's tasks come in rising order
    const auto task = [&](int64_t t) {
      for (; t >= before + s.kv_heads * runs; runs = count_runs(place)) before += s.kv_heads * runs, ++place;
      const FlashAttention own = alone(a, sequence_at(a.packed, place));
      const int64_t first = (runs - 1 - (t - before) % runs) * queries;  // the last queries see most: first
      return Task{own, (t - before) / runs, first, min(queries, own.shape.queries - first)};
    };
    int64_t next = queue.take();
    while (next < tasks) {
      const Task current = task(next);
      next = queue.take();
      const Task after = task(min(next, tasks - 1));
      with_type(a.dtype,
                [&](auto type) { run<typename decltype(type)::type>(current, next < tasks ? &after : nullptr); });
    }
  });
}

}  // namespace pyalpaca::cpu::PYALPACA_ISA
