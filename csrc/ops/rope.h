// What the three rope operators share: their checks and the call of their kernel.
#pragma once

#include "ops/common.h"

namespace pyalpaca {

// What goes into a cache; no tensor is defined where nothing does.
struct CacheEntry {
  Tensor v, slots, k_cache, v_cache;
};

// ValueError unless q is (B, S, H, d) with d even, k (if defined) (B, S, K, d), cos and sin fp32: (S, d/2), (B, S, d/2)
// or, with positions int64 (B, S), (P, d/2).
void check_rope(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin, const Tensor& positions);

// Fills q_out and, if k is defined, k_out.
void rope_cpu(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin, const Tensor& positions,
              bool inverse, const CacheEntry& entry, const Tensor& q_out, const Tensor& k_out);

}  // namespace pyalpaca
