// rope_qk(q (B, S, H, d), k (B, S, K, d), cos, sin, positions (B, S)?, inverse) -> (like q, like k)
// rope_qk_store(q, k, v like k, cos, sin, positions?, slots (B, S), k_cache and v_cache (..., K, d)) -> the same two
//
// q and k in one pass, wherever they lie, as in a fused projection. The second is for inference: k as turned and v as
// it is go to row slots[token] of their caches; a negative slot stores nothing.
#include "ops/rope.h"

namespace pyalpaca {
namespace {

using QK = std::tuple<Tensor, Tensor>;

QK meta(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin, const std::optional<Tensor>& positions,
        bool) {
  check_rope(q, k, cos, sin, positions.value_or(Tensor()));
  return {reused_like(q), reused_like(k)};
}

QK qk_cpu(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin,
          const std::optional<Tensor>& positions, bool inverse) {
  auto [q_out, k_out] = meta(q, k, cos, sin, positions, inverse);
  rope_cpu(q, k, cos, sin, positions.value_or(Tensor()), inverse, {}, q_out, k_out);
  return {q_out, k_out};
}

QK meta_store(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos, const Tensor& sin,
              const std::optional<Tensor>& positions, const Tensor& slots, const Tensor& k_cache,
              const Tensor& v_cache) {
  QK turned = meta(q, k, cos, sin, positions, false);
  check_same("rope_qk_store: v", v, "k", k);
  check_shape("rope_qk_store: v", v, k.sym_sizes());
  TORCH_CHECK_VALUE(slots.scalar_type() == at::kLong && slots.device() == q.device(), "rope_qk_store: slots are ",
                    slots.scalar_type(), " on ", slots.device(), ", expected int64 on ", q.device());
  check_shape("rope_qk_store: slots", slots, {q.sym_size(0), q.sym_size(1)});
  for (const Tensor* cache : {&k_cache, &v_cache}) {
    check_same("rope_qk_store: a cache", *cache, "k", k);
    TORCH_CHECK_VALUE(cache->is_contiguous() && cache->dim() >= 2 && cache->sym_size(-1) == k.sym_size(3) &&
                          cache->sym_size(-2) == k.sym_size(2),
                      "rope_qk_store: a cache has shape ", cache->sym_sizes(), ", expected contiguous (..., ",
                      k.sym_size(2), ", ", k.sym_size(3), ")");
  }
  check_shape("rope_qk_store: v_cache", v_cache, k_cache.sym_sizes());
  return turned;
}

QK store_cpu(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos, const Tensor& sin,
             const std::optional<Tensor>& positions, const Tensor& slots, const Tensor& k_cache,
             const Tensor& v_cache) {
  auto [q_out, k_out] = meta_store(q, k, v, cos, sin, positions, slots, k_cache, v_cache);
  rope_cpu(q, k, cos, sin, positions.value_or(Tensor()), false, {v, slots, k_cache, v_cache}, q_out, k_out);
  return {q_out, k_out};
}

QK call(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin, const std::optional<Tensor>& positions,
        bool inverse) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("pyalpaca::rope_qk", "")
          .typed<QK(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, bool)>();
  return op.call(q, k, cos, sin, positions, inverse);
}

struct Rotation : torch::autograd::Function<Rotation> {
  static variable_list forward(AutogradContext* context, const Tensor& q, const Tensor& k, const Tensor& cos,
                               const Tensor& sin, const std::optional<Tensor>& positions, bool inverse) {
    context->save_for_backward({cos, sin, positions.value_or(Tensor())});
    context->saved_data["inverse"] = inverse;
    at::AutoDispatchBelowADInplaceOrView below;
    auto [q_out, k_out] = call(q, k, cos, sin, positions, inverse);
    return {q_out, k_out};
  }
  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const auto saved = context->get_saved_variables();
    const std::optional<Tensor> positions = saved[2].defined() ? std::optional(saved[2]) : std::nullopt;
    auto [dq, dk] =
        call(gradients[0], gradients[1], saved[0], saved[1], positions, !context->saved_data["inverse"].toBool());
    return {dq, dk, Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

QK qk_autograd(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin,
               const std::optional<Tensor>& positions, bool inverse) {
  auto outputs = Rotation::apply(q, k, cos, sin, positions, inverse);
  return {outputs[0], outputs[1]};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pyalpaca, m) {
  m.def(
      "rope_qk(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? positions=None, bool inverse=False) -> (Tensor, "
      "Tensor)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "rope_qk_store(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor? positions, Tensor slots, "
      "Tensor(a!) k_cache, Tensor(b!) v_cache) -> (Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(pyalpaca, Meta, m) {
  m.impl("rope_qk", meta);
  m.impl("rope_qk_store", meta_store);
}
TORCH_LIBRARY_IMPL(pyalpaca, CPU, m) {
  m.impl("rope_qk", qk_cpu);
  m.impl("rope_qk_store", store_cpu);
}
TORCH_LIBRARY_IMPL(pyalpaca, Autograd, m) { m.impl("rope_qk", qk_autograd); }

}  // namespace pyalpaca
