// The gradient of attention on an NPU, in three launches: sums of rows, the gradient, dq rounded.
#include "ascend/tiling/flash_backward.h"

#include "ascend/launch/flash_attention.h"

namespace pyalpaca_npu {
namespace {

using Gradients = std::tuple<Tensor, Tensor, Tensor>;

Gradients backward(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                   const Tensor& lse, const Sequences& sequences, bool causal, int64_t q_offset, double scale) {
  TORCH_CHECK_VALUE(dout.sizes() == q.sizes() && out.sizes() == q.sizes() && dout.scalar_type() == q.scalar_type() &&
                        out.scalar_type() == q.scalar_type(),
                    "flash_attention_backward: dout is ", dout.scalar_type(), " ", dout.sizes(), " and out ",
                    out.scalar_type(), " ", out.sizes(), ", expected those of q: ", q.scalar_type(), " ", q.sizes());
  const c10::OptionalDeviceGuard guard(q.device());
  const Tensor dk = at::empty_like(k, at::MemoryFormat::Contiguous);
  const Tensor dv = at::empty_like(v, at::MemoryFormat::Contiguous);
  const Tensor dq = at::empty_like(q, at::MemoryFormat::Contiguous);
  if (q.numel() == 0 || k.numel() == 0) return {dq.zero_(), dk.zero_(), dv.zero_()};
  const int64_t heads = q.size(-2), kv_heads = k.size(-2), head_dim = q.size(-1);
  const int64_t cores = cube_cores(q.device()), rows_cores = vector_cores(q.device());
  const FlashGradientTiling tiling =
      flash_backward_tiling(sequences.batch, sequences.q_len, sequences.kv_len, heads, kv_heads, head_dim, cores);
  TORCH_CHECK(tiling.cores > 0, "flash_attention_backward: no tiling for q of shape ", q.sizes(), " and k ", k.sizes());
  const Tensor from_q = with_near_tokens(q), from_k = with_near_tokens(k), from_v = with_near_tokens(v);
  const Tensor from_dout = with_near_tokens(dout), from_out = out.contiguous(), sums = lse.contiguous();
  const Tensor delta = at::empty_like(sums), wide = at::empty(q.sizes(), q.options().dtype(at::kFloat));
  const Tensor workspace = at::empty({tiling.workspace}, q.options().dtype(at::kByte));
  const auto place = attention_place(from_q, from_k, from_v, sequences);
  const Lies d = lies(from_dout);

  const auto delta_kernel = kernel_for_half(q, aclrtlaunch_flash_delta_half, aclrtlaunch_flash_delta_bfloat16);
  const int64_t batch = q.dim() == 3 ? 1 : q.size(0), length = q.size(-3);
  enqueue("pyalpaca_flash_delta", {from_out, from_dout, delta, wide}, [=](aclrtStream stream) {
    return delta_kernel(static_cast<uint32_t>(rows_cores), stream, address(from_out), address(from_dout),
                        address(delta), address(wide), batch, length, d.batch, d.token, d.head,
                        static_cast<int32_t>(heads), static_cast<int32_t>(head_dim));
  });
  const auto kernel = kernel_for_half(q, aclrtlaunch_flash_backward_half, aclrtlaunch_flash_backward_bfloat16);
  enqueue("pyalpaca_flash_backward",
          {from_dout, from_q, from_k, from_v, sums, delta, sequences.q_starts, sequences.kv_starts, wide, dk, dv,
           workspace},
          [=](aclrtStream stream) {
            return kernel(tiling.cores, stream, address(from_dout), address(from_q), address(from_k), address(from_v),
                          address(sums), address(delta), address(sequences.q_starts), address(sequences.kv_starts),
                          address(wide), address(dk), address(dv), address(workspace), sequences.batch, sequences.q_len,
                          sequences.kv_len, place.q.batch, place.q.token, place.q.head, place.k.batch, place.k.token,
                          place.k.head, place.v.batch, place.v.token, place.v.head, d.batch, d.token, d.head,
                          place.lse_batch, place.lse_head, q_offset, static_cast<int32_t>(heads),
                          static_cast<int32_t>(kv_heads), static_cast<int32_t>(head_dim), static_cast<int32_t>(causal),
                          tiling.side, tiling.q_block, tiling.kv_block, tiling.chunk, static_cast<float>(scale));
          });
  const auto round = kernel_for_half(q, aclrtlaunch_flash_round_half, aclrtlaunch_flash_round_bfloat16);
  const int64_t count = q.numel();
  enqueue("pyalpaca_flash_round", {wide, dq}, [=](aclrtStream stream) {
    return round(static_cast<uint32_t>(rows_cores), stream, address(wide), address(dq), count,
                 static_cast<float>(scale));
  });
  return {dq, dk, dv};
}

Gradients flash_attention_backward(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
                                   const Tensor& out, const Tensor& lse, bool causal, int64_t q_offset, double scale) {
  check_attention(q, k, v, 4, scale);
  return backward(dout, q, k, v, out, lse, {q.size(0), q.size(1), k.size(1), {}, {}}, causal, q_offset, scale);
}

Gradients flash_attention_packed_backward(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
                                          const Tensor& out, const Tensor& lse, const Tensor& q_starts,
                                          const Tensor& kv_starts, int64_t longest_q, int64_t longest_kv, bool causal,
                                          double scale) {
  check_attention(q, k, v, 3, scale);
  return backward(dout, q, k, v, out, lse, packed_sequences(q, q_starts, kv_starts, longest_q, longest_kv), causal, 0,
                  scale);
}

}  // namespace

TORCH_LIBRARY_IMPL(pyalpaca, PrivateUse1, m) {
  m.impl("flash_attention_backward", flash_attention_backward);
  m.impl("flash_attention_packed_backward", flash_attention_packed_backward);
}

}  // namespace pyalpaca_npu
