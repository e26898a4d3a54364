// Attention of one token over a cache on an NPU, in two launches: parts of the cache, and what they amount to.
#include "ascend/tiling/flash_decode.h"

#include "ascend/launch/flash_attention.h"

namespace pyalpaca_npu {

std::tuple<Tensor, Tensor> decode(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lengths,
                                  int64_t kv_len, double scale) {
  const c10::OptionalDeviceGuard guard(q.device());
  const int64_t batch = q.size(0), heads = q.size(2), kv_heads = k.size(2), head_dim = q.size(3);
  const Tensor out = at::empty_like(q, at::MemoryFormat::Contiguous);
  const auto wide = q.options().dtype(at::kFloat);
  const Tensor lse = at::empty({batch, heads, 1}, wide);
  if (q.numel() == 0) return {out, lse};
  const FlashDecodeTiling tiling =
      flash_decode_tiling(batch, kv_len, heads, kv_heads, head_dim, cube_cores(q.device()));
  TORCH_CHECK_VALUE(tiling.of.cores > 0, "flash_decode: q has ", heads, " heads and k ", kv_heads,
                    ", expected at most ", kFlashRows, " to share one; the backend \"reference\" takes any");
  // The heads that share a head of keys are rows of one tile.
  const Tensor from_q = q.stride(3) == 1 && q.stride(2) >= head_dim && q.stride(2) <= 65535 ? q : q.contiguous();
  const Tensor from_k = with_near_tokens(k), from_v = with_near_tokens(v);
  const Tensor parts = at::empty({tiling.splits, batch, heads, head_dim}, wide);
  const Tensor part_lse = at::empty({tiling.splits, batch, heads}, wide);
  const Tensor workspace = at::empty({tiling.of.workspace}, q.options().dtype(at::kByte));
  const Lies place_k = lies(from_k), place_v = lies(from_v);
  const auto kernel = kernel_for_half(q, aclrtlaunch_flash_decode_half, aclrtlaunch_flash_decode_bfloat16);
  enqueue("pyalpaca_flash_decode", {from_q, from_k, from_v, lengths, parts, part_lse, workspace},
          [=](aclrtStream stream) {
            return kernel(tiling.of.cores, stream, address(from_q), address(from_k), address(from_v), address(lengths),
                          address(parts), address(part_lse), address(workspace), batch, kv_len, from_q.stride(0),
                          from_q.stride(2), place_k.batch, place_k.token, place_k.head, place_v.batch, place_v.token,
                          place_v.head, tiling.split, static_cast<int32_t>(heads), static_cast<int32_t>(kv_heads),
                          static_cast<int32_t>(head_dim), tiling.of.q_tile, tiling.of.kv_tile, tiling.of.stack,
                          tiling.of.chunk, static_cast<float>(scale));
          });
  const auto merge = kernel_for_half(q, aclrtlaunch_flash_merge_half, aclrtlaunch_flash_merge_bfloat16);
  const int64_t rows = batch * heads, cores = std::min(vector_cores(q.device()), divide_up(rows, 64));
  enqueue("pyalpaca_flash_merge", {parts, part_lse, out, lse}, [=](aclrtStream stream) {
    return merge(static_cast<uint32_t>(cores), stream, address(parts), address(part_lse), address(out), address(lse),
                 rows, tiling.splits, static_cast<int32_t>(head_dim));
  });
  return {out, lse};
}

namespace {

// q (B, 1, H, d) over caches (B, T, K, d), of which sequence b has lengths[b] keys. -> out like q, lse fp32 (B, H, 1)
std::tuple<Tensor, Tensor> flash_decode(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                        const Tensor& lengths, double scale) {
  check_attention(q, k_cache, v_cache, 4, scale);
  TORCH_CHECK_VALUE(q.size(1) == 1, "flash_decode: q has ", q.size(1), " tokens a sequence, expected 1");
  TORCH_CHECK_VALUE(lengths.dim() == 1 && lengths.size(0) == q.size(0) && lengths.scalar_type() == at::kLong &&
                        lengths.device() == q.device(),
                    "flash_decode: lengths are ", lengths.scalar_type(), " ", lengths.sizes(), " on ", lengths.device(),
                    ", expected int64 (", q.size(0), ") on ", q.device());
  return decode(q, k_cache, v_cache, lengths.contiguous(), k_cache.size(1), scale);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pyalpaca, m) {
  m.def(
      "flash_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, float scale) -> (Tensor out, Tensor "
      "lse)");
}
TORCH_LIBRARY_IMPL(pyalpaca, PrivateUse1, m) { m.impl("flash_decode", flash_decode); }

}  // namespace pyalpaca_npu
