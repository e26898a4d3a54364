// What the forward and the backward pass of attention share.
#pragma once
#include "cpu/gemm.h"
#include "cpu/kernels.h"
#include "cpu/vec.h"

namespace pyalpaca::cpu::PYALPACA_ISA {

// flash_attention of one query a sequence.
void decode_attention(const FlashAttention& a);

namespace {

constexpr float kInfinity = __builtin_huge_valf();
constexpr float kLog2E = 0x1.715476p0f, kLn2 = 0x1.62e430p-1f;

template <class T>
const T* at(const Strided& x, int64_t batch, int64_t token, int64_t head) {
  return static_cast<const T*>(x.data) + batch * x.batch + token * x.token + head * x.head;
}

constexpr int64_t kAlone = 0;  // the batch entry of a sequence that stands alone

// Where a sequence begins: in which entry of the batch, and with which query and key of it.
struct Start {
  int64_t batch, query, key;
};

// Of sequence `sequence`; the shape becomes that of the sequence alone.
PYALPACA_INLINE Start start_alone(const Packed& packed, int64_t sequence, AttentionShape& shape) {
  shape.batch = 1;
  if (packed.q_starts == nullptr) return {sequence, 0, 0};
  const int64_t query = packed.q_starts[sequence], key = packed.kv_starts[sequence];
  shape.queries = packed.q_starts[sequence + 1] - query, shape.keys = packed.kv_starts[sequence + 1] - key;
  shape.q_offset = shape.keys - shape.queries;
  return {0, query, key};
}

// The same tensors from that token on, of whose elements each takes `element` bytes.
PYALPACA_INLINE void advance(Strided& x, int64_t batch, int64_t token, int64_t element) {
  if (x.data != nullptr) x.data = static_cast<const char*>(x.data) + (batch * x.batch + token * x.token) * element;
}
PYALPACA_INLINE void advance(void*& contiguous, int64_t elements, int64_t element) {
  contiguous = static_cast<char*>(contiguous) + elements * element;
}

PYALPACA_INLINE int64_t element_of(Dtype dtype) { return dtype == Dtype::kFloat ? 4 : 2; }

// The sequence that is number `place` in the order of work.
PYALPACA_INLINE int64_t sequence_at(const Packed& packed, int64_t place) {
  return packed.order == nullptr ? place : packed.order[place];
}

// Scores to be computed of all heads of all sequences, about.
PYALPACA_INLINE int64_t count_scores(const AttentionShape& shape, const Packed& packed) {
  int64_t scores = packed.q_starts == nullptr ? shape.batch * shape.queries * shape.keys : 0;
  for (int64_t i = 0; packed.q_starts != nullptr && i < shape.batch; ++i) {
    AttentionShape alone = shape;
    start_alone(packed, i, alone);
    scores += alone.queries * alone.keys;
  }
  return scores * shape.heads / (shape.causal ? 2 : 1);
}

// How many of the keys from `block` on, at most `keys`, query `query` sees.
PYALPACA_INLINE int64_t seen(const AttentionShape& s, int64_t query, int64_t block, int64_t keys) {
  return s.causal ? max(min(query + s.q_offset + 1 - block, keys), 0) : keys;
}

// Scores that a query may not see become -inf: lane i of row j (row[j * stride + i]) where j > last + i.
PYALPACA_INLINE void hide(float* scores, int64_t stride, int64_t keys, int64_t last) {
  Ints lanes[2];
  for (int32_t i = 0; i < kLanes; ++i) lanes[0][i] = i, lanes[1][i] = static_cast<int32_t>(kLanes) + i;
  for (int64_t j = max(last + 1, 0); j < keys; ++j) {
    float* row = scores + j * stride;
    const int32_t least = static_cast<int32_t>(min(j - last, kColumns));  // the first lane that sees key j
    for (int half = 0; half < 2; ++half) {
      store(row + half * kLanes, lanes[half] < least ? splat(-kInfinity) : load(row + half * kLanes));
    }
  }
}

}  // namespace
}  // namespace pyalpaca::cpu::PYALPACA_ISA
