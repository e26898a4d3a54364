// Attention tile by tile with an online softmax (Milakov and Gimelshein 2018; Dao 2023, algorithm 1).
//
// A task is a run of queries of all heads that share a key head, so that each block of keys is converted, transposed
// and brought into the cache once for all of them. Within the task: for each block of keys, for each tile of queries,
// scores = q k^T, their softmax so far, out += p v. Memory beyond the arguments is a few hundred KB per thread,
// whatever the lengths.
#include <cmath>

#include "cpu/attention.h"
#include "cpu/gemm.h"
#include "cpu/instruction_set.h"
#include "cpu/kernels.h"
#include "cpu/threads.h"
#include "cpu/vec.h"

namespace pyalpaca::cpu::PYALPACA_ISA {
namespace {

constexpr int64_t kTile = 48;       // queries whose scores are computed together
constexpr int64_t kBlock = 128;     // keys brought in together
constexpr int64_t kTaskRows = 192;  // queries times heads of a task
constexpr int64_t kFewRows = 4;     // up to which a transposed copy of the keys does not pay

// The softmax so far of one row: its maximum, and the sum of exponentials relative to it.
struct Softmax {
  float maximum, total;
};

// Turns `count` scores into exponentials relative to the new maximum, zero from there up to `end` (a multiple of 16).
// Returns the factor for what was summed relative to the old maximum.
PYALPACA_INLINE float online_softmax(float* scores, int64_t count, int64_t end, Softmax& row) {
  for (int64_t j = count; j < end; ++j) scores[j] = -kInfinity;
  Vec top = splat(row.maximum);
  for (int64_t j = 0; j < end; j += kLanes) {
    const Vec x = load(scores + j);
    top = x > top ? x : top;
  }
  const float maximum = max(top);
  Vec total = {};
  if (maximum == -kInfinity) {  // nothing seen yet; keep a NaN, which no comparison above finds
    for (int64_t j = 0; j < end; j += kLanes) {
      const Vec x = load(scores + j);
      const Vec p = x == x ? splat(0.0f) : x;
      store(scores + j, p);
      total += p;
    }
    row.total += sum(total);
    return 1.0f;
  }
  for (int64_t j = 0; j < end; j += kLanes) {
    const Vec p = exp(load(scores + j) - maximum);
    store(scores + j, p);
    total += p;
  }
  const float factor = row.maximum == maximum ? 1.0f : std::exp(row.maximum - maximum);
  row.total = row.total * factor + sum(total);
  row.maximum = maximum;
  return factor;
}

struct Task {
  int64_t batch, kv_head, first, queries;  // queries [first, first + queries)
};

struct Memory {
  float *q, *out, *keys, *keys_T, *values, *scores;
  Softmax* softmax;
};

// The tile of queries [row, row + rows) of the task against one block of keys in memory.
void attend(const AttentionShape& s, const Memory& m, int64_t row, int64_t rows, int64_t query, int64_t block,
            int64_t keys) {
  const int64_t width = padded(s.head_dim), score_row = padded(kBlock);
  const int64_t count = seen(s, query + rows - 1, block, keys), end = round_up(count, kColumns);
  if (count == 0) return;
  float* out = m.out + row * width;
  gemm(rows, count, s.head_dim, {m.q + row * width, width, 1}, m.keys_T, score_row, m.scores, score_row, false);
  for (int64_t i = 0; i < rows; ++i) {
    const float factor =
        online_softmax(m.scores + i * score_row, seen(s, query + i, block, keys), end, m.softmax[row + i]);
    if (factor != 1.0f) {
      for (int64_t j = 0; j < width; j += kLanes) store(out + i * width + j, load(out + i * width + j) * factor);
    }
  }
  gemm(rows, s.head_dim, count, {m.scores, score_row, 1}, m.values, width, out, width, true);
}

// The same for a handful of rows, as in decoding: the keys are read once and used in place.
template <class T>
void attend_few(const AttentionShape& s, const Memory& m, int64_t row, int64_t query, const T* k, int64_t k_row,
                const T* v, int64_t v_row, int64_t block, int64_t keys) {
  const int64_t count = seen(s, query, block, keys), width = padded(s.head_dim);
  if (count == 0) return;
  const float* q = m.q + row * width;
  for (int64_t j = 0; j < count; ++j) {
    Vec sums[2] = {};
    int64_t c = 0;
    for (; c + 2 * kLanes <= s.head_dim; c += 2 * kLanes) {
      sums[0] += load(q + c) * load(k + j * k_row + c);
      sums[1] += load(q + c + kLanes) * load(k + j * k_row + c + kLanes);
    }
    for (; c < s.head_dim; c += kLanes) {
      sums[0] += load_first(q + c, s.head_dim - c) * load_first(k + j * k_row + c, s.head_dim - c);
    }
    m.scores[j] = sum(sums[0] + sums[1]);
  }
  const float factor = online_softmax(m.scores, count, round_up(count, kColumns), m.softmax[row]);
  float* out = m.out + row * width;
  for (int64_t c = 0; c < s.head_dim; c += kLanes) store(out + c, load(out + c) * factor);
  for (int64_t j = 0; j < count; ++j) {
    const Vec p = splat(m.scores[j]);
    for (int64_t c = 0; c < s.head_dim; c += kLanes) {
      store(out + c, load(out + c) + p * load_first(v + j * v_row + c, s.head_dim - c));
    }
  }
}

template <class T>
void run(const FlashAttention& a, const Task& task, int64_t most_rows) {
  const AttentionShape& s = a.shape;
  const int64_t group = s.heads / s.kv_heads, rows = task.queries * group;
  const int64_t width = padded(s.head_dim), score_row = padded(kBlock);
  float* memory = scratch(most_rows * (2 * width + 2) + kBlock * 2 * width + (s.head_dim + kTile) * score_row);
  Memory m;
  m.q = memory;
  m.out = m.q + most_rows * width;
  m.keys = m.out + most_rows * width;
  m.values = m.keys + kBlock * width;
  m.keys_T = m.values + kBlock * width;
  m.scores = m.keys_T + s.head_dim * score_row;
  m.softmax = reinterpret_cast<Softmax*>(m.scores + kTile * score_row);

  for (int64_t g = 0; g < group; ++g) {
    copy_tile(at<T>(a.q, task.batch, task.first, task.kv_head * group + g), a.q.token, task.queries, s.head_dim,
              s.scale, m.q + g * task.queries * width, width);
  }
  for (int64_t i = 0; i < rows * width; i += kLanes) store(m.out + i, Vec{});
  for (int64_t i = 0; i < rows; ++i) m.softmax[i] = {-kInfinity, 0.0f};

  const int64_t last_key = seen(s, task.first + task.queries - 1, 0, s.keys);
  for (int64_t block = 0; block < last_key; block += kBlock) {
    const int64_t keys = min(kBlock, last_key - block);
    const T* k = at<T>(a.k, task.batch, block, task.kv_head);
    const T* v = at<T>(a.v, task.batch, block, task.kv_head);
    if (rows <= kFewRows) {
      for (int64_t i = 0; i < rows; ++i) {
        attend_few(s, m, i, task.first + i % task.queries, k, a.k.token, v, a.v.token, block, keys);
      }
      continue;
    }
    copy_tile(k, a.k.token, keys, s.head_dim, 1.0f, m.keys, width);
    transpose_tile(m.keys, width, keys, s.head_dim, m.keys_T, score_row);
    copy_tile(v, a.v.token, keys, s.head_dim, 1.0f, m.values, width);
    for (int64_t g = 0; g < group; ++g) {
      for (int64_t i = 0; i < task.queries; i += kTile) {
        attend(s, m, g * task.queries + i, min(kTile, task.queries - i), task.first + i, block, keys);
      }
    }
  }

  for (int64_t i = 0; i < rows; ++i) {
    const int64_t query = task.first + i % task.queries, head = task.kv_head * group + i / task.queries;
    const Softmax& row = m.softmax[i];
    T* out = static_cast<T*>(a.out) + ((task.batch * s.queries + query) * s.heads + head) * s.head_dim;
    const float inverse = row.total == 0.0f ? 0.0f : 1.0f / row.total;
    for (int64_t c = 0; c < s.head_dim; c += kLanes) {
      store_first(out + c, load(m.out + i * width + c) * inverse, s.head_dim - c);
    }
    a.lse[(task.batch * s.heads + head) * s.queries + query] = row.maximum + std::log(row.total);
  }
}

}  // namespace

void flash_attention(const FlashAttention& a) {
  const AttentionShape& s = a.shape;
  if (s.batch * s.queries * s.heads == 0) return;
  const int64_t group = s.heads / s.kv_heads, pairs = s.batch * s.kv_heads;
  const int64_t scores = s.batch * s.heads * s.queries * s.keys / (s.causal && s.queries > 1 ? 2 : 1);
  const int64_t threads = worthy_threads(2 * scores * s.head_dim, num_threads());
  int64_t queries = min(max(kTaskRows / group, 1), s.queries);
  // With few heads, shorter runs give every thread something to do.
  while (threads > 1 && queries > kTile && pairs * ((s.queries + queries - 1) / queries) < 4 * threads)
    queries = (queries + 1) / 2;
  const int64_t runs = (s.queries + queries - 1) / queries, tasks = pairs * runs;
  Queue queue;
  parallel(min(threads, tasks), 1, [&](int64_t, int64_t) {
    for (int64_t t = queue.take(); t < tasks; t = queue.take()) {
      const int64_t pair = t / runs, first = (runs - 1 - t % runs) * queries;  // the last queries see most: first
      const Task task{pair / s.kv_heads, pair % s.kv_heads, first, min(queries, s.queries - first)};
      with_type(a.dtype, [&](auto type) { run<typename decltype(type)::type>(a, task, queries * group); });
    }
  });
}

}  // namespace pyalpaca::cpu::PYALPACA_ISA
