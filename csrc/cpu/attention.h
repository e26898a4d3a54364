// What the forward and the backward pass of attention share.
#pragma once
#include "cpu/kernels.h"
#include "cpu/vec.h"

namespace pyalpaca::cpu::PYALPACA_ISA {
namespace {

constexpr float kInfinity = __builtin_huge_valf();

template <class T>
const T* at(const Strided& x, int64_t batch, int64_t token, int64_t head) {
  return static_cast<const T*>(x.data) + batch * x.batch + token * x.token + head * x.head;
}

// How many of the keys from `block` on, at most `keys`, query `query` sees.
PYALPACA_INLINE int64_t seen(const AttentionShape& s, int64_t query, int64_t block, int64_t keys) {
  return s.causal ? max(min(query + s.q_offset + 1 - block, keys), 0) : keys;
}

}  // namespace
}  // namespace pyalpaca::cpu::PYALPACA_ISA
