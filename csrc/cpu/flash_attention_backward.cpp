// Gradients of attention, the probabilities computed anew from the logsumexp (Dao 2023, algorithm 2).
//
// A task is one key head with all its query heads: it owns dk and dv and the dq of those heads, so nothing is shared
// between threads and the sums have one order. Where that makes too few tasks, as of one sequence with one key head,
// the query heads of a key head are dealt out too, and the parts of dk and dv added up at the end, always in one order.
// With p = exp(q k^T - lse) and delta = sum(dout * out):
//   dv = p^T dout,   ds = p * (dout v^T - delta),   dq = scale ds k,   dk = scale ds^T q.
#include "cpu/attention.h"
#include "cpu/gemm.h"
#include "cpu/instruction_set.h"
#include "cpu/kernels.h"
#include "cpu/threads.h"
#include "cpu/vec.h"

namespace pyalpaca::cpu::PYALPACA_ISA {
namespace {

constexpr int64_t kTile = 128;                 // queries, in panels of kColumns
constexpr int64_t kBlock = 128;                // keys
constexpr int64_t kFewTasks = 8;               // that are worth cutting
constexpr int64_t kScoreRow = kTile + kLanes;  // not a power of two, which would share cache sets

// The row length of what is multiplied column panel by column panel.
int64_t padded(int64_t head_dim) { return round_up(head_dim, kColumns) + kLanes; }

// Everything fp32. One head's queries, in memory up to a multiple of kColumns; q is scaled. What ends in _T lies in
// panels of kColumns queries, head_dim x kColumns each.
struct Memory {
  float *q, *dout;             // queries x width
  float *q_T, *dout_T, *dq_T;  // panels
  float *delta, *lse;          // queries; lse in units of ln 2
  float *dk, *dv;              // keys x width
  float *keys, *values;        // one block: kBlock x width
  float *p, *ds;               // kBlock x kScoreRow: a key's row holds the queries of a tile
};

FlashAttentionBackward alone(FlashAttentionBackward a, int64_t sequence) {
  const int64_t heads = a.shape.heads, kv_heads = a.shape.kv_heads, d = a.shape.head_dim, element = element_of(a.dtype);
  const int64_t batch_rows = a.shape.queries, batch_keys = a.shape.keys;
  const Start start = start_alone(a.packed, sequence, a.shape);
  advance(a.q, start.batch, start.query, element);
  advance(a.out, start.batch, start.query, element);
  advance(a.dout, start.batch, start.query, element);
  advance(a.k, start.batch, start.key, element);
  advance(a.v, start.batch, start.key, element);
  const int64_t query = start.batch * batch_rows + start.query, key = start.batch * batch_keys + start.key;
  advance(a.dq, query * heads * d, element);
  advance(a.dk, key * kv_heads * d, element);
  advance(a.dv, key * kv_heads * d, element);
  a.lse += start.batch * heads * a.lse_head + start.query;
  return a;
}

template <class T>
void load_head(const FlashAttentionBackward& a, const Memory& m, int64_t head) {
  const AttentionShape& s = a.shape;
  const int64_t d = s.head_dim, width = padded(d), end = round_up(s.queries, kColumns);
  if (d % kColumns != 0) {  // a panel of columns that goes beyond head_dim
    std::memset(m.q, 0, static_cast<size_t>(s.queries * width) * sizeof(float));
    std::memset(m.dout, 0, static_cast<size_t>(s.queries * width) * sizeof(float));
  }
  std::memset(m.dq_T, 0, static_cast<size_t>(end * d) * sizeof(float));
  copy_tile(at<T>(a.q, kAlone, 0, head), a.q.token, s.queries, d, s.scale, m.q, width);
  copy_tile(at<T>(a.dout, kAlone, 0, head), a.dout.token, s.queries, d, 1.0f, m.dout, width);
  for (int64_t i = 0; i < end; i += kColumns) {
    const int64_t rows = min(kColumns, s.queries - i);
    transpose_tile(m.q + i * width, width, rows, d, m.q_T + i * d, kColumns, kColumns);
    transpose_tile(m.dout + i * width, width, rows, d, m.dout_T + i * d, kColumns, kColumns);
  }
  for (int64_t i = 0; i < end; ++i) {
    // A row that sees nothing, or is none: with this logsumexp all its probabilities come out 0.
    m.delta[i] = 0.0f, m.lse[i] = kInfinity;
    if (i >= s.queries) continue;
    const T* out = at<T>(a.out, kAlone, i, head);
    Vec delta = {};
    for (int64_t c = 0; c < d; c += kLanes) {
      delta += load_first(out + c, d - c) * load_first(m.dout + i * width + c, d - c);
    }
    m.delta[i] = sum(delta);
    const float lse = a.lse[head * a.lse_head + i];
    if (lse != -kInfinity) m.lse[i] = lse * kLog2E;
  }
}

// Scores -> probabilities, and dout v^T -> ds, of one panel of queries and `keys` keys.
void softmax_backward(float* p, float* ds, int64_t keys, const float* lse, const float* delta) {
  const Vec lses[2] = {load(lse), load(lse + kLanes)}, deltas[2] = {load(delta), load(delta + kLanes)};
  for (int64_t j = 0; j < keys; ++j) {
    for (int u = 0; u < 2; ++u) {
      const int64_t at = j * kScoreRow + u * kLanes;
      const Vec weight = exp2(load(p + at) * kLog2E - lses[u]);
      store(p + at, weight);
      store(ds + at, weight * (load(ds + at) - deltas[u]));
    }
  }
}

// sum (keys x width) += weights (keys x queries) x (queries x width), for keys [first, last) of the block and the
// queries of the tile from `begin` on.
void add_product(const float* weights, const float* x, int64_t first, int64_t last, int64_t begin, int64_t queries,
                 int64_t width, int64_t head_dim, float* sum) {
  for (int64_t c = 0; c < head_dim; c += kColumns) {
    multiply<Lies::kAlongDepth>(last - first, queries - begin, weights + first * kScoreRow + begin, kScoreRow,
                                x + begin * width + c, width, sum + first * width + c, width, kAdd);
  }
}

// The tile of queries [query, query + queries) against the block of keys in memory.
void attend(const AttentionShape& s, const Memory& m, int64_t query, int64_t queries, int64_t block, int64_t keys) {
  const int64_t d = s.head_dim, width = padded(d);
  int64_t most = 0;
  for (int64_t i = 0; i < queries; i += kColumns) {
    const int64_t panel = (query + i) * d, count = seen(s, query + min(i + kColumns, queries) - 1, block, keys);
    float *p = m.p + i, *ds = m.ds + i;
    multiply<Lies::kAlongDepth>(count, d, m.keys, width, m.q_T + panel, kColumns, p, kScoreRow, kSet);
    multiply<Lies::kAlongDepth>(count, d, m.values, width, m.dout_T + panel, kColumns, ds, kScoreRow, kSet);
    if (s.causal) hide(p, kScoreRow, count, query + i + s.q_offset - block);
    softmax_backward(p, ds, count, m.lse + query + i, m.delta + query + i);
    multiply<Lies::kAlongRows>(d, count, m.keys, width, ds, kScoreRow, m.dq_T + panel, kColumns, kAdd);
    // Up to the next multiple the keys are taken together below.
    for (int64_t j = count; j < min(round_up(count, kColumns), keys); ++j) {
      for (int u = 0; u < 2; ++u) {
        store(p + j * kScoreRow + u * kLanes, Vec{});
        store(ds + j * kScoreRow + u * kLanes, Vec{});
      }
    }
    most = max(most, count);
  }
  // Keys that the first panel sees, then kColumns of them at a time, each from the first panel that sees one on.
  const auto products = [&](int64_t first, int64_t last, int64_t begin) {
    add_product(m.p, m.dout + query * width, first, last, begin, queries, width, d, m.dv + block * width);
    add_product(m.ds, m.q + query * width, first, last, begin, queries, width, d, m.dk + block * width);
  };
  const int64_t all = seen(s, query + min(kColumns, queries) - 1, block, keys);
  int64_t first = min(round_up(all, kColumns), keys);
  if (first > 0) products(0, first, 0);
  for (; first < most; first += kColumns) {
    const int64_t begin = (block + first - s.q_offset - query) / kColumns * kColumns;
    products(first, min(first + kColumns, keys), begin);
  }
}

template <class T>
void store_head(const float* from, float factor, void* to, int64_t tokens, int64_t heads, int64_t head,
                int64_t head_dim) {
  const int64_t width = padded(head_dim);
  for (int64_t i = 0; i < tokens; ++i) {
    T* row = static_cast<T*>(to) + (i * heads + head) * head_dim;
    for (int64_t c = 0; c < head_dim; c += kLanes) {
      store_first(row + c, load_first(from + i * width + c, head_dim - c) * factor, head_dim - c);
    }
  }
}

// A task: query heads [group part / parts, group (part + 1) / parts) of a key head. `sums`: room for dk and dv, keys x
// width each, that are to be added to others'; null if they are all there is.
struct Task {
  int64_t kv_head, part, parts;
  float* sums;
};

template <class T>
void run(const FlashAttentionBackward& a, const Task& task) {
  const AttentionShape& s = a.shape;
  const int64_t kv_head = task.kv_head;
  const int64_t d = s.head_dim, width = padded(d), group = s.heads / s.kv_heads, end = round_up(s.queries, kColumns);
  const int64_t floats =
      2 * end * width + 3 * end * d + 2 * end + 2 * s.keys * width + 2 * kBlock * width + 2 * kBlock * kScoreRow;
  float* memory = scratch(floats);
  auto take = [&](int64_t count) { return (memory += count) - count; };
  Memory m;
  m.q = take(end * width), m.dout = take(end * width);
  m.q_T = take(end * d), m.dout_T = take(end * d), m.dq_T = take(end * d);
  m.delta = take(end), m.lse = take(end);
  m.dk = task.sums == nullptr ? take(2 * s.keys * width) : task.sums, m.dv = m.dk + s.keys * width;
  m.keys = take(kBlock * width), m.values = take(kBlock * width);
  m.p = take(kBlock * kScoreRow), m.ds = take(kBlock * kScoreRow);

  std::memset(m.dk, 0, static_cast<size_t>(s.keys * width) * sizeof(float));
  std::memset(m.dv, 0, static_cast<size_t>(s.keys * width) * sizeof(float));
  const int64_t first_head = kv_head * group + group * task.part / task.parts;
  for (int64_t head = first_head; head < kv_head * group + group * (task.part + 1) / task.parts; ++head) {
    load_head<T>(a, m, head);
    const int64_t last_key = seen(s, s.queries - 1, 0, s.keys);
    for (int64_t block = 0; block < last_key; block += kBlock) {
      const int64_t keys = min(kBlock, last_key - block);
      copy_tile(at<T>(a.k, kAlone, block, kv_head), a.k.token, keys, d, 1.0f, m.keys, width);
      copy_tile(at<T>(a.v, kAlone, block, kv_head), a.v.token, keys, d, 1.0f, m.values, width);
      // The first query that sees a key of this block, at the start of its panel.
      const int64_t first = s.causal ? max(block - s.q_offset, 0) / kColumns * kColumns : 0;
      for (int64_t query = first; query < s.queries; query += kTile) {
        attend(s, m, query, min(kTile, s.queries - query), block, keys);
      }
    }
    for (int64_t i = 0; i < end; i += kColumns) {  // q is not needed any more
      transpose_tile(m.dq_T + i * d, kColumns, d, kColumns, m.q + i * width, width, d);
    }
    store_head<T>(m.q, s.scale, a.dq, s.queries, s.heads, head, d);
  }
  if (task.sums != nullptr) return;
  store_head<T>(m.dk, 1.0f, a.dk, s.keys, s.kv_heads, kv_head, d);
  store_head<T>(m.dv, 1.0f, a.dv, s.keys, s.kv_heads, kv_head, d);
}

// dk and dv of keys [first, last) of a key head: the sum of its parts, which lie one after the other from `sums` on.
template <class T>
void add_parts(FlashAttentionBackward a, int64_t kv_head, int64_t parts, float* sums, int64_t first, int64_t last) {
  const AttentionShape& s = a.shape;
  const int64_t d = s.head_dim, width = padded(d);
  void* results[] = {a.dk, a.dv};
  for (void* to : results) {
    for (int64_t part = 1; part < parts; ++part) {
      const float* from = sums + 2 * part * s.keys * width;
      for (int64_t i = first * width; i < last * width; i += kLanes) store(sums + i, load(sums + i) + load(from + i));
    }
    advance(to, first * s.kv_heads * d, element_of(a.dtype));
    store_head<T>(sums + first * width, 1.0f, to, last - first, s.kv_heads, kv_head, d);
    sums += s.keys * width;
  }
}

}  // namespace

void flash_attention_backward(const FlashAttentionBackward& a) {
  const AttentionShape& s = a.shape;
  const int64_t tasks = s.batch * s.kv_heads;
  if (tasks == 0) return;
  const int64_t work = 5 * count_scores(s, a.packed) * s.head_dim, threads = worthy_threads(work, num_threads());
  // Of the shapes alone, so that the sums are the same for any number of threads.
  const bool few = tasks < kFewTasks && worthy_threads(work, 2) > 1;
  const int64_t parts = few ? max(min(s.heads / s.kv_heads, (kFewTasks + tasks - 1) / tasks), 1) : 1;
  const bool packed = a.packed.q_starts != nullptr;
  const int64_t width = padded(s.head_dim), all_keys = packed ? a.packed.kv_starts[s.batch] : s.batch * s.keys;
  float* const sums = parts == 1 ? nullptr : scratch(2 * all_keys * s.kv_heads * parts * width, 1);
  // Calls f(the sequence alone, key head, where its parts' sums begin).
  const auto of_pair = [&](int64_t pair, const auto& f) {
    const int64_t sequence = sequence_at(a.packed, pair / s.kv_heads), kv_head = pair % s.kv_heads;
    const FlashAttentionBackward own = alone(a, sequence);
    const int64_t key = packed ? a.packed.kv_starts[sequence] : sequence * s.keys;
    float* const begin =
        parts == 1 ? nullptr : sums + 2 * (key * s.kv_heads + kv_head * own.shape.keys) * parts * width;
    with_type(a.dtype, [&](auto type) { f(type, own, kv_head, begin); });
  };
  Queue queue;
  parallel(min(threads, tasks * parts), 1, [&](int64_t, int64_t) {
    for (int64_t t = queue.take(); t < tasks * parts; t = queue.take()) {
      of_pair(t / parts, [&](auto type, const FlashAttentionBackward& own, int64_t kv_head, float* begin) {
        const int64_t part = t % parts;
        float* const own_sums = parts == 1 ? nullptr : begin + 2 * part * own.shape.keys * width;
        run<typename decltype(type)::type>(own, {kv_head, part, parts, own_sums});
      });
    }
  });
  if (parts == 1) return;
  for (int64_t pair = 0; pair < tasks; ++pair) {
    of_pair(pair, [&](auto type, const FlashAttentionBackward& own, int64_t kv_head, float* begin) {
      parallel(own.shape.keys, kBlock, [&](int64_t first, int64_t last) {
        add_parts<typename decltype(type)::type>(own, kv_head, parts, begin, first, last);
      });
    });
  }
}

}  // namespace pyalpaca::cpu::PYALPACA_ISA
