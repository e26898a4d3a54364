// rope(x (B, S, H, d), cos and sin fp32 (S, d/2) or (B, S, d/2), inverse) -> like x
//
// Its gradient is the rotation back: the operator itself with `inverse` turned, so derivatives of any order exist.
#include "ops/rope.h"

namespace pyalpaca {
namespace {

void check_angles(const char* name, const Tensor& angles, const Tensor& q, bool by_position) {
  TORCH_CHECK_VALUE(angles.scalar_type() == at::kFloat && angles.device() == q.device(), name, " is ",
                    angles.scalar_type(), " on ", angles.device(), ", expected float32 on ", q.device());
  const c10::SymInt half = q.sym_size(3) / 2;
  if (by_position) {
    TORCH_CHECK_VALUE(angles.dim() == 2 && angles.sym_size(1) == half, name, " has shape ", angles.sym_sizes(),
                      ", expected a row of ", half, " for each position");
  } else if (angles.dim() == 2) {
    check_shape(name, angles, {q.sym_size(1), half});
  } else {
    check_shape(name, angles, {q.sym_size(0), q.sym_size(1), half});
  }
}

// ValueError unless every number is below `limit`, and none negative unless `skips`.
void check_range(const char* name, const Tensor& numbers, int64_t limit, bool skips) {
  const int64_t* values = numbers.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < numbers.numel(); ++i) {
    TORCH_CHECK_VALUE(values[i] < limit && (skips || values[i] >= 0), name, " hold ", values[i],
                      ", expected numbers below ", limit);
  }
}

}  // namespace

void check_rope(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin, const Tensor& positions) {
  const char* name = k.defined() ? "rope: q" : "rope: x";
  check_dtype(name, q);
  TORCH_CHECK_VALUE(q.dim() == 4 && q.sym_size(3) % 2 == 0, name, " has shape ", q.sym_sizes(),
                    ", expected (B, S, H, d) with d even");
  if (k.defined()) {
    check_same("rope: k", k, "q", q);
    TORCH_CHECK_VALUE(k.dim() == 4 && k.sym_size(0) == q.sym_size(0) && k.sym_size(1) == q.sym_size(1) &&
                          k.sym_size(3) == q.sym_size(3),
                      "rope: k has shape ", k.sym_sizes(),
                      ", expected that of q but for the number of heads: ", q.sym_sizes());
  }
  if (positions.defined()) {
    TORCH_CHECK_VALUE(positions.scalar_type() == at::kLong && positions.device() == q.device(), "rope: positions are ",
                      positions.scalar_type(), " on ", positions.device(), ", expected int64 on ", q.device());
    check_shape("rope: positions", positions, {q.sym_size(0), q.sym_size(1)});
  }
  check_angles("rope: cos", cos, q, positions.defined());
  check_angles("rope: sin", sin, q, positions.defined());
  check_shape("rope: sin", sin, cos.sym_sizes());
}

void rope_cpu(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin, const Tensor& positions,
              bool inverse, const CacheEntry& entry, const Tensor& q_out, const Tensor& k_out) {
  if (q_out.numel() == 0 && (!k.defined() || k_out.numel() == 0)) return;
  const Tensor from_q = last_contiguous(q), from_k = k.defined() ? last_contiguous(k) : k;
  const Tensor c = cos.contiguous(), s = sin.contiguous();
  const Tensor places = positions.defined() ? positions.contiguous() : positions;
  const Tensor slots = entry.slots.defined() ? entry.slots.contiguous() : entry.slots;
  const Tensor from_v = entry.v.defined() ? last_contiguous(entry.v) : entry.v;
  if (places.defined()) check_range("rope: positions", places, c.size(0), false);
  cpu::Rope a{};
  a.dtype = dtype_of(q);
  a.q = {from_q.const_data_ptr(), from_q.stride(0),         from_q.stride(1),
         from_q.stride(2),        q_out.mutable_data_ptr(), q.size(2)};
  if (k.defined()) {
    a.k = {from_k.const_data_ptr(), from_k.stride(0),         from_k.stride(1),
           from_k.stride(2),        k_out.mutable_data_ptr(), k.size(2)};
  }
  a.cos = c.const_data_ptr<float>();
  a.sin = s.const_data_ptr<float>();
  a.angle_batch = c.dim() == 3 ? c.stride(0) : 0;
  a.positions = places.defined() ? places.const_data_ptr<int64_t>() : nullptr;
  a.batch = q.size(0);
  a.tokens = q.size(1);
  a.head_dim = q.size(3);
  a.inverse = inverse;
  if (slots.defined()) {
    check_range("rope_qk_store: slots", slots, entry.k_cache.numel() / (k.size(2) * k.size(3)), true);
    a.store = {slots.const_data_ptr<int64_t>(),
               from_v.const_data_ptr(),
               from_v.stride(0),
               from_v.stride(1),
               from_v.stride(2),
               entry.k_cache.mutable_data_ptr(),
               entry.v_cache.mutable_data_ptr()};
  }
  cpu::kernels().rope(a);
}

namespace {

Tensor meta(const Tensor& x, const Tensor& cos, const Tensor& sin, bool) {
  check_rope(x, Tensor(), cos, sin, Tensor());
  return reused_like(x);
}

Tensor one_cpu(const Tensor& x, const Tensor& cos, const Tensor& sin, bool inverse) {
  Tensor y = meta(x, cos, sin, inverse);
  rope_cpu(x, Tensor(), cos, sin, Tensor(), inverse, {}, y, Tensor());
  return y;
}

Tensor call(const Tensor& x, const Tensor& cos, const Tensor& sin, bool inverse) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("pyalpaca::rope", "")
                             .typed<Tensor(const Tensor&, const Tensor&, const Tensor&, bool)>();
  return op.call(x, cos, sin, inverse);
}

struct Rotation : torch::autograd::Function<Rotation> {
  static Tensor forward(AutogradContext* context, const Tensor& x, const Tensor& cos, const Tensor& sin, bool inverse) {
    context->save_for_backward({cos, sin});
    context->saved_data["inverse"] = inverse;
    at::AutoDispatchBelowADInplaceOrView below;
    return call(x, cos, sin, inverse);
  }
  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const auto saved = context->get_saved_variables();
    return {call(gradients[0], saved[0], saved[1], !context->saved_data["inverse"].toBool()), Tensor(), Tensor(),
            Tensor()};
  }
};

Tensor rope_autograd(const Tensor& x, const Tensor& cos, const Tensor& sin, bool inverse) {
  return Rotation::apply(x, cos, sin, inverse);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pyalpaca, m) {
  m.def("rope(Tensor x, Tensor cos, Tensor sin, bool inverse=False) -> Tensor", {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(pyalpaca, Meta, m) { m.impl("rope", meta); }
TORCH_LIBRARY_IMPL(pyalpaca, CPU, m) { m.impl("rope", one_cpu); }
TORCH_LIBRARY_IMPL(pyalpaca, Autograd, m) { m.impl("rope", rope_autograd); }

}  // namespace pyalpaca
