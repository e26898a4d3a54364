// rope on an NPU: of one tensor, of q and k in one launch, and of q and k while k and v go into a cache.
#include "ascend/tiling/rope.h"

#include "ascend/launch/kernels.h"
#include "ascend/launch/launch.h"

namespace pyalpaca_npu {
namespace {

// Heads side by side, tokens of all sequences the same distance apart: a part of a fused projection is, without a copy.
Tensor as_tokens(const Tensor& x) {
  const bool heads = x.stride(3) == 1 && (x.size(2) <= 1 || x.stride(2) == x.size(3));
  const bool tokens = x.size(0) <= 1 || x.stride(0) == x.size(1) * x.stride(1);
  return heads && tokens && x.stride(1) >= x.size(2) * x.size(3) ? x : x.contiguous();
}

int64_t stride_of(const Tensor& x) {
  return x.defined() ? (x.size(1) > 1 || x.size(0) > 1 ? x.stride(1) : x.size(2) * x.size(3)) : 0;
}

struct Store {
  Tensor v, slots, k_cache, v_cache;
};

std::tuple<Tensor, Tensor> turn(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin,
                                const Tensor& positions, bool inverse, const Store& store) {
  TORCH_CHECK_VALUE(
      q.dim() == 4 && (!k.defined() || (k.dim() == 4 && k.size(0) == q.size(0) && k.size(1) == q.size(1) &&
                                        k.size(3) == q.size(3) && k.scalar_type() == q.scalar_type())),
      "rope: q has shape ", q.sizes(), ", expected (B, S, H, d), and k the same but for H");
  const int64_t batch = q.size(0), length = q.size(1), head_dim = q.size(3), tokens = batch * length;
  for (const Tensor& angles : {cos, sin}) {
    TORCH_CHECK_VALUE(
        angles.scalar_type() == at::kFloat && angles.device() == q.device() && angles.size(-1) == head_dim / 2,
        "rope: angles are ", angles.scalar_type(), " ", angles.sizes(), ", expected float32 (..., ", head_dim / 2,
        ") on ", q.device());
  }
  const int64_t rows = head_dim >= 2 ? cos.numel() / (head_dim / 2) : 0;
  TORCH_CHECK_VALUE(sin.sizes() == cos.sizes() && (positions.defined() || rows == length || rows == tokens),
                    "rope: angles of ", rows, " positions, expected ", length, " or ", tokens);
  TORCH_CHECK_VALUE(!positions.defined() || (positions.scalar_type() == at::kLong && positions.numel() == tokens),
                    "rope: positions are ", positions.sizes(), ", expected int64, one for each of ", tokens, " tokens");
  const c10::OptionalDeviceGuard guard(q.device());
  const Tensor q_out = at::empty_like(q, at::MemoryFormat::Contiguous);
  const Tensor k_out = k.defined() ? at::empty_like(k, at::MemoryFormat::Contiguous) : Tensor();
  if (tokens == 0) return {q_out, k_out};
  const Tensor from_q = as_tokens(q), from_k = k.defined() ? as_tokens(k) : k;
  const Tensor from_v = store.v.defined() ? as_tokens(store.v) : store.v;
  const Tensor c = cos.contiguous(), s = sin.contiguous();
  const Tensor at = positions.defined() ? positions.contiguous() : positions;
  const Tensor slots = store.slots.defined() ? store.slots.contiguous() : store.slots;
  const int64_t q_heads = q.size(2), k_heads = k.defined() ? k.size(2) : 0;
  const RopeTiling tiling =
      rope_tiling(tokens, q_heads, k_heads, head_dim, q.element_size(), store.v.defined(), vector_cores(q.device()));
  TORCH_CHECK_VALUE(tiling.cores > 0, "rope: head_dim ", head_dim,
                    ", expected a multiple of 16 up to 128; torch_npu's own operator takes others");
  const Tensor k_cache = store.k_cache, v_cache = store.v_cache;
  const auto kernel = kernel_for(q, aclrtlaunch_rope_half, aclrtlaunch_rope_bfloat16, aclrtlaunch_rope_float);
  enqueue("pyalpaca_rope", {from_q, from_k, from_v, c, s, at, slots, q_out, k_out, k_cache, v_cache},
          [=](aclrtStream stream) {
            return kernel(tiling.cores, stream, address(from_q), address(from_k), address(from_v), address(c),
                          address(s), address(at), address(slots), address(q_out), address(k_out), address(k_cache),
                          address(v_cache), tokens, stride_of(from_q), stride_of(from_k), stride_of(from_v),
                          q_heads * head_dim, k_heads * head_dim, k_heads * head_dim, rows,
                          static_cast<int32_t>(q_heads), static_cast<int32_t>(k_heads), static_cast<int32_t>(head_dim),
                          tiling.tile_tokens, tiling.tile_heads, static_cast<int32_t>(inverse));
          });
  return {q_out, k_out};
}

Tensor rope(const Tensor& x, const Tensor& cos, const Tensor& sin, bool inverse) {
  return std::get<0>(turn(x, Tensor(), cos, sin, Tensor(), inverse, {}));
}

std::tuple<Tensor, Tensor> rope_qk(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin,
                                   const std::optional<Tensor>& positions, bool inverse) {
  return turn(q, k, cos, sin, positions.value_or(Tensor()), inverse, {});
}

std::tuple<Tensor, Tensor> rope_qk_store(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos,
                                         const Tensor& sin, const std::optional<Tensor>& positions, const Tensor& slots,
                                         const Tensor& k_cache, const Tensor& v_cache) {
  TORCH_CHECK_VALUE(v.sizes() == k.sizes() && v.scalar_type() == k.scalar_type(), "rope_qk_store: v has shape ",
                    v.sizes(), ", expected that of k, ", k.sizes());
  TORCH_CHECK_VALUE(slots.scalar_type() == at::kLong && slots.numel() == q.size(0) * q.size(1),
                    "rope_qk_store: slots are ", slots.sizes(), ", expected int64, one a token");
  for (const Tensor& cache : {k_cache, v_cache}) {
    TORCH_CHECK_VALUE(cache.is_contiguous() && cache.scalar_type() == k.scalar_type() && cache.dim() >= 2 &&
                          cache.size(-1) == k.size(3) && cache.size(-2) == k.size(2),
                      "rope_qk_store: a cache has shape ", cache.sizes(), ", expected contiguous (..., ", k.size(2),
                      ", ", k.size(3), ")");
  }
  return turn(q, k, cos, sin, positions.value_or(Tensor()), false, {v, slots, k_cache, v_cache});
}

}  // namespace

TORCH_LIBRARY_IMPL(pyalpaca, PrivateUse1, m) {
  m.impl("rope", rope);
  m.impl("rope_qk", rope_qk);
  m.impl("rope_qk_store", rope_qk_store);
}

}  // namespace pyalpaca_npu
