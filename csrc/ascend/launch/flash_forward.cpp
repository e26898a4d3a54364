// Attention on an NPU: sequences of one length, or packed side by side.
#include "ascend/tiling/flash_forward.h"

#include "ascend/launch/flash_attention.h"

namespace pyalpaca_npu {
namespace {

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, const Sequences& sequences,
                                   bool causal, int64_t q_offset, double scale) {
  const c10::OptionalDeviceGuard guard(q.device());
  const bool packed = sequences.q_starts.defined();
  const int64_t heads = q.size(-2), kv_heads = k.size(-2), head_dim = q.size(-1);
  const Tensor out = at::empty_like(q, at::MemoryFormat::Contiguous);
  const auto wide = q.options().dtype(at::kFloat);
  const Tensor lse = at::empty(
      packed ? std::vector<int64_t>{heads, q.size(0)} : std::vector<int64_t>{q.size(0), heads, q.size(1)}, wide);
  if (q.numel() == 0) return {out, lse};
  const FlashTiling tiling = flash_forward_tiling(sequences.batch, sequences.q_len, sequences.kv_len, heads, kv_heads,
                                                  head_dim, cube_cores(q.device()));
  TORCH_CHECK(tiling.cores > 0, "flash_attention: no tiling for q of shape ", q.sizes(), " and k ", k.sizes());
  const Tensor from_q = with_near_tokens(q), from_k = with_near_tokens(k), from_v = with_near_tokens(v);
  const Tensor workspace = at::empty({tiling.workspace}, q.options().dtype(at::kByte));
  const AttentionPlace place = attention_place(from_q, from_k, from_v, sequences);
  const auto kernel = kernel_for_half(q, aclrtlaunch_flash_forward_half, aclrtlaunch_flash_forward_bfloat16);
  enqueue("pyalpaca_flash_forward",
          {from_q, from_k, from_v, sequences.q_starts, sequences.kv_starts, out, lse, workspace},
          [=](aclrtStream stream) {
            return kernel(tiling.cores, stream, address(from_q), address(from_k), address(from_v),
                          address(sequences.q_starts), address(sequences.kv_starts), address(out), address(lse),
                          address(workspace), sequences.batch, sequences.q_len, sequences.kv_len, place.q.batch,
                          place.q.token, place.q.head, place.k.batch, place.k.token, place.k.head, place.v.batch,
                          place.v.token, place.v.head, place.lse_batch, place.lse_head, q_offset,
                          static_cast<int32_t>(heads), static_cast<int32_t>(kv_heads), static_cast<int32_t>(head_dim),
                          static_cast<int32_t>(causal), tiling.q_tile, tiling.kv_tile, tiling.stack, tiling.chunk,
                          tiling.share, static_cast<float>(scale));
          });
  return {out, lse};
}

std::tuple<Tensor, Tensor> flash_attention(const Tensor& q, const Tensor& k, const Tensor& v, bool causal,
                                           int64_t q_offset, double scale) {
  check_attention(q, k, v, 4, scale);
  if (q.size(1) == 1 && q.size(2) / k.size(2) <= kFlashRows) {  // one row sees the first keys of all
    const int64_t seen = causal ? std::clamp<int64_t>(q_offset + 1, 0, k.size(1)) : k.size(1);
    return decode(q, k, v, Tensor(), seen, scale);
  }
  return forward(q, k, v, {q.size(0), q.size(1), k.size(1), {}, {}}, causal, q_offset, scale);
}

// q (N, H, d), k and v (M, K, d); the last query of a sequence sees its last key. -> out like q, lse fp32 (H, N)
std::tuple<Tensor, Tensor> flash_attention_packed(const Tensor& q, const Tensor& k, const Tensor& v,
                                                  const Tensor& q_starts, const Tensor& kv_starts, int64_t longest_q,
                                                  int64_t longest_kv, bool causal, double scale) {
  check_attention(q, k, v, 3, scale);
  return forward(q, k, v, packed_sequences(q, q_starts, kv_starts, longest_q, longest_kv), causal, 0, scale);
}

}  // namespace

TORCH_LIBRARY_IMPL(pyalpaca, PrivateUse1, m) {
  m.impl("flash_attention", flash_attention);
  m.impl("flash_attention_packed", flash_attention_packed);
}

}  // namespace pyalpaca_npu
