// rope(x (B, S, H, d), cos and sin fp32 (S, d/2) or (B, S, d/2), inverse) -> like x
//
// Its gradient is the rotation back: the operator itself with `inverse` turned, so derivatives of any order exist.
#include "ops/common.h"

namespace pyalpaca {
namespace {

void check_angles(const char* name, const Tensor& angles, const Tensor& x) {
  TORCH_CHECK_VALUE(angles.scalar_type() == at::kFloat && angles.device() == x.device(), name, " is ",
                    angles.scalar_type(), " on ", angles.device(), ", expected float32 on ", x.device());
  const c10::SymInt half = x.sym_size(3) / 2;
  if (angles.dim() == 2) return check_shape(name, angles, {x.sym_size(1), half});
  check_shape(name, angles, {x.sym_size(0), x.sym_size(1), half});
}

Tensor meta(const Tensor& x, const Tensor& cos, const Tensor& sin, bool) {
  check_dtype("rope: x", x);
  TORCH_CHECK_VALUE(x.dim() == 4 && x.sym_size(3) % 2 == 0, "rope: x has shape ", x.sym_sizes(),
                    ", expected (B, S, H, d) with d even");
  check_angles("rope: cos", cos, x);
  check_angles("rope: sin", sin, x);
  check_shape("rope: sin", sin, cos.sym_sizes());
  return reused_like(x);
}

Tensor rope_cpu(const Tensor& x, const Tensor& cos, const Tensor& sin, bool inverse) {
  Tensor y = meta(x, cos, sin, inverse);
  if (y.numel() == 0) return y;
  const Tensor from = last_contiguous(x), c = cos.contiguous(), s = sin.contiguous();
  cpu::kernels().rope({dtype_of(x), from.const_data_ptr(), from.stride(0), from.stride(1), from.stride(2),
                       c.const_data_ptr<float>(), s.const_data_ptr<float>(), c.dim() == 3 ? c.stride(0) : 0,
                       y.mutable_data_ptr(), x.size(0), x.size(1), x.size(2), x.size(3), inverse});
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
TORCH_LIBRARY_IMPL(pyalpaca, CPU, m) { m.impl("rope", rope_cpu); }
TORCH_LIBRARY_IMPL(pyalpaca, Autograd, m) { m.impl("rope", rope_autograd); }

}  // namespace pyalpaca
