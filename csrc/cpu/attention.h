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
