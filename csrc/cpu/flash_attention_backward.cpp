// Gradients of attention, the probabilities computed anew from the logsumexp (Dao 2023, algorithm 2).
//
// A task is one key head with all its query heads: it owns dk and dv and the dq of those heads, so nothing is shared
// between threads and the sums have one order. With p = exp(q k^T - lse) and delta = sum(dout * out):
//   dv = p^T dout,   ds = p * (dout v^T - delta),   dq = scale ds k,   dk = scale ds^T q.
#include "cpu/attention.h"
#include "cpu/gemm.h"
#include "cpu/instruction_set.h"
#include "cpu/kernels.h"
#include "cpu/threads.h"
#include "cpu/vec.h"

namespace pyalpaca::cpu::PYALPACA_ISA {
namespace {

constexpr int64_t kTile = 96;   // queries
constexpr int64_t kBlock = 96;  // keys

// Everything fp32. One head's queries: q is scaled.
struct Memory {
  float *q, *dout, *dq, *delta, *lse;        // queries x width; the last two: queries
  float *dk, *dv;                            // keys x width
  float *keys, *values, *keys_T, *values_T;  // one block: kBlock x width, and transposed
  float *p, *ds;                             // kTile x score_row
};

template <class T>
void load_head(const FlashAttentionBackward& a, const Memory& m, int64_t batch, int64_t head) {
  const AttentionShape& s = a.shape;
  const int64_t width = padded(s.head_dim);
  copy_tile(at<T>(a.q, batch, 0, head), a.q.token, s.queries, s.head_dim, s.scale, m.q, width);
  copy_tile(at<T>(a.dout, batch, 0, head), a.dout.token, s.queries, s.head_dim, 1.0f, m.dout, width);
  for (int64_t i = 0; i < s.queries * width; i += kLanes) store(m.dq + i, Vec{});
  for (int64_t i = 0; i < s.queries; ++i) {
    const T* out = at<T>(a.out, batch, i, head);
    Vec delta = {};
    for (int64_t c = 0; c < s.head_dim; c += kLanes) {
      delta += load_first(out + c, s.head_dim - c) * load(m.dout + i * width + c);
    }
    m.delta[i] = sum(delta);
    const float lse = a.lse[(batch * s.heads + head) * s.queries + i];
    m.lse[i] = lse == -kInfinity ? kInfinity : lse;  // a row that sees nothing: all its probabilities come out 0
  }
}

template <class T>
void load_block(const FlashAttentionBackward& a, const Memory& m, int64_t batch, int64_t kv_head, int64_t block,
                int64_t keys) {
  const int64_t head_dim = a.shape.head_dim, width = padded(head_dim), score_row = padded(kBlock);
  copy_tile(at<T>(a.k, batch, block, kv_head), a.k.token, keys, head_dim, 1.0f, m.keys, width);
  transpose_tile(m.keys, width, keys, head_dim, m.keys_T, score_row);
  copy_tile(at<T>(a.v, batch, block, kv_head), a.v.token, keys, head_dim, 1.0f, m.values, width);
  transpose_tile(m.values, width, keys, head_dim, m.values_T, score_row);
}

// One row of scores -> probabilities, and of dout v^T -> ds; both 0 from `count` up to `end`.
PYALPACA_INLINE void softmax_backward(float* p, float* ds, int64_t count, int64_t end, float lse, float delta) {
  for (int64_t j = count; j < end; ++j) p[j] = -kInfinity;
  for (int64_t j = 0; j < end; j += kLanes) {
    const Vec weight = exp(load(p + j) - lse);
    store(p + j, weight);
    store(ds + j, weight * (load(ds + j) - delta));
  }
  for (int64_t j = count; j < end; ++j) ds[j] = 0.0f;
}

// The tile of queries [query, query + rows) against the block of keys in memory.
void attend(const AttentionShape& s, const Memory& m, int64_t query, int64_t rows, int64_t block, int64_t keys) {
  const int64_t head_dim = s.head_dim, width = padded(head_dim), score_row = padded(kBlock);
  const int64_t count = seen(s, query + rows - 1, block, keys), end = round_up(count, kColumns);
  if (count == 0) return;
  const float *q = m.q + query * width, *dout = m.dout + query * width;
  gemm(rows, count, head_dim, {q, width, 1}, m.keys_T, score_row, m.p, score_row, false);
  gemm(rows, count, head_dim, {dout, width, 1}, m.values_T, score_row, m.ds, score_row, false);
  for (int64_t i = 0; i < rows; ++i) {
    softmax_backward(m.p + i * score_row, m.ds + i * score_row, seen(s, query + i, block, keys), end, m.lse[query + i],
                     m.delta[query + i]);
  }
  gemm(count, head_dim, rows, {m.p, 1, score_row}, dout, width, m.dv + block * width, width, true);
  gemm(count, head_dim, rows, {m.ds, 1, score_row}, q, width, m.dk + block * width, width, true);
  gemm(rows, head_dim, count, {m.ds, score_row, 1}, m.keys, width, m.dq + query * width, width, true);
}

template <class T>
void store_head(const float* from, float factor, void* to, int64_t batch, int64_t tokens, int64_t heads, int64_t head,
                int64_t head_dim) {
  const int64_t width = padded(head_dim);
  for (int64_t i = 0; i < tokens; ++i) {
    T* row = static_cast<T*>(to) + ((batch * tokens + i) * heads + head) * head_dim;
    for (int64_t c = 0; c < head_dim; c += kLanes) {
      store_first(row + c, load(from + i * width + c) * factor, head_dim - c);
    }
  }
}

template <class T>
void run(const FlashAttentionBackward& a, int64_t batch, int64_t kv_head) {
  const AttentionShape& s = a.shape;
  const int64_t width = padded(s.head_dim), score_row = padded(kBlock), group = s.heads / s.kv_heads;
  const int64_t statistics = round_up(s.queries, kColumns);
  float* memory = scratch(3 * s.queries * width + 2 * statistics + 2 * s.keys * width + 2 * kBlock * width +
                          2 * (s.head_dim + kTile) * score_row);
  auto take = [&](int64_t floats) { return (memory += floats) - floats; };
  const Memory m{
      take(s.queries * width), take(s.queries * width),      take(s.queries * width),      take(statistics),
      take(statistics),        take(s.keys * width),         take(s.keys * width),         take(kBlock * width),
      take(kBlock * width),    take(s.head_dim * score_row), take(s.head_dim * score_row), take(kTile * score_row),
      take(kTile * score_row)};

  for (int64_t i = 0; i < s.keys * width; i += kLanes) {
    store(m.dk + i, Vec{});
    store(m.dv + i, Vec{});
  }
  for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    load_head<T>(a, m, batch, head);
    const int64_t last_key = seen(s, s.queries - 1, 0, s.keys);
    for (int64_t block = 0; block < last_key; block += kBlock) {
      const int64_t keys = min(kBlock, last_key - block);
      load_block<T>(a, m, batch, kv_head, block, keys);
      // The first query that sees a key of this block, at the start of its tile.
      const int64_t first = s.causal ? max(block - s.q_offset, 0) / kTile * kTile : 0;
      for (int64_t query = first; query < s.queries; query += kTile) {
        attend(s, m, query, min(kTile, s.queries - query), block, keys);
      }
    }
    store_head<T>(m.dq, s.scale, a.dq, batch, s.queries, s.heads, head, s.head_dim);
  }
  store_head<T>(m.dk, 1.0f, a.dk, batch, s.keys, s.kv_heads, kv_head, s.head_dim);
  store_head<T>(m.dv, 1.0f, a.dv, batch, s.keys, s.kv_heads, kv_head, s.head_dim);
}

}  // namespace

void flash_attention_backward(const FlashAttentionBackward& a) {
  const AttentionShape& s = a.shape;
  const int64_t tasks = s.batch * s.kv_heads, scores = s.batch * s.heads * s.queries * s.keys / (s.causal ? 2 : 1);
  const int64_t threads = worthy_threads(5 * scores * s.head_dim, num_threads());
  Queue queue;
  parallel(min(threads, tasks), 1, [&](int64_t, int64_t) {
    for (int64_t t = queue.take(); t < tasks; t = queue.take()) {
      with_type(a.dtype, [&](auto type) { run<typename decltype(type)::type>(a, t / s.kv_heads, t % s.kv_heads); });
    }
  });
}

}  // namespace pyalpaca::cpu::PYALPACA_ISA
