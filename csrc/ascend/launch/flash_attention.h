// What the launches of attention share: which tensors they take, where they lie, the kernel for a type.
#pragma once

#include "ascend/launch/kernels.h"
#include "ascend/launch/launch.h"

namespace pyalpaca_npu {

// Attention's kernels have fp32 only inside.
template <typename Kernel>
Kernel kernel_for_half(const Tensor& x, Kernel half, Kernel bfloat16) {
  TORCH_CHECK_VALUE(x.scalar_type() == at::kHalf || x.scalar_type() == at::kBFloat16, "flash_attention: q is ",
                    x.scalar_type(), ", expected bfloat16 or float16; the backend \"reference\" takes float32");
  return x.scalar_type() == at::kHalf ? half : bfloat16;
}

// A tensor whose heads are rows of contiguous elements and whose tokens are near enough for the copying instruction's
// 16 bits; the tensor itself where it is one already.
inline Tensor with_near_tokens(const Tensor& x) {
  return x.stride(-1) == 1 && x.stride(-3) >= x.size(-1) && x.stride(-3) <= 65535 ? x : x.contiguous();
}

// q (B, S, H, d) with k and v (B, T, K, d), or packed (N, H, d) with (M, K, d).
inline void check_attention(const Tensor& q, const Tensor& k, const Tensor& v, int64_t dims, double scale) {
  TORCH_CHECK_VALUE(q.dim() == dims && k.dim() == dims && v.sizes() == k.sizes(), "flash_attention: q has shape ",
                    q.sizes(), ", k ", k.sizes(), " and v ", v.sizes(), ", expected ", dims,
                    " dimensions each and v like k");
  TORCH_CHECK_VALUE(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type() &&
                        k.device() == q.device() && v.device() == q.device(),
                    "flash_attention: k is ", k.scalar_type(), " on ", k.device(), " and v ", v.scalar_type(), " on ",
                    v.device(), ", expected those of q: ", q.scalar_type(), " on ", q.device());
  const int64_t heads = q.size(-2), kv_heads = k.size(-2), head_dim = q.size(-1);
  TORCH_CHECK_VALUE(
      (dims == 3 || k.size(0) == q.size(0)) && k.size(-1) == head_dim && kv_heads > 0 && heads % kv_heads == 0,
      "flash_attention: q has shape ", q.sizes(), " and k ", k.sizes(),
      ", expected one batch and head_dim, and a number of heads that those of k divide");
  TORCH_CHECK_VALUE(head_dim >= 16 && head_dim <= 128 && head_dim % 16 == 0, "flash_attention: head_dim is ", head_dim,
                    ", expected a multiple of 16 up to 128; torch_npu's own operator takes others");
  TORCH_CHECK_VALUE(scale > 0, "flash_attention: scale is ", scale,
                    ", expected above 0; the backend \"reference\" takes any");
}

// Sequences of one length, or packed side by side.
struct Sequences {
  int64_t batch, q_len, kv_len;  // of packed ones the longest
  Tensor q_starts, kv_starts;    // of packed ones: sequence b has the rows from starts[b] to starts[b + 1]
};

inline Sequences packed_sequences(const Tensor& q, const Tensor& q_starts, const Tensor& kv_starts, int64_t longest_q,
                                  int64_t longest_kv) {
  for (const Tensor& starts : {q_starts, kv_starts}) {
    TORCH_CHECK_VALUE(starts.dim() == 1 && starts.size(0) >= 2 && starts.sizes() == q_starts.sizes() &&
                          starts.scalar_type() == at::kLong && starts.device() == q.device(),
                      "flash_attention_packed: starts are ", starts.scalar_type(), " ", starts.sizes(), " on ",
                      starts.device(), ", expected int64 (B + 1) on ", q.device(), ", as many for keys as for queries");
  }
  return {q_starts.size(0) - 1, longest_q, longest_kv, q_starts.contiguous(), kv_starts.contiguous()};
}

// How far sequences, tokens and heads are apart, in elements; a single token is as far from the next as it is long.
struct Lies {
  int64_t batch, token, head;
};
inline Lies lies(const Tensor& x) {
  return {x.dim() == 3 ? 0 : x.stride(0), x.size(-3) > 1 ? x.stride(-3) : x.size(-1), x.stride(-2)};
}

struct AttentionPlace {
  Lies q, k, v;
  int64_t lse_batch, lse_head;  // lse is (B, H, S), or (H, N) of packed sequences
};
inline AttentionPlace attention_place(const Tensor& q, const Tensor& k, const Tensor& v, const Sequences& sequences) {
  const bool packed = sequences.q_starts.defined();
  return {lies(q), lies(k), lies(v), packed ? 0 : q.size(-2) * sequences.q_len, packed ? q.size(0) : sequences.q_len};
}

// Attention of one token a sequence over its first `kv_len` keys, or the first lengths[b] of them; flash_decode.cpp.
std::tuple<Tensor, Tensor> decode(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lengths,
                                  int64_t kv_len, double scale);

}  // namespace pyalpaca_npu
