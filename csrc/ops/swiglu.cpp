// swiglu(gate (..., F), up like gate) -> silu(gate) * up; the two may be halves of one tensor.
#include "ops/common.h"

namespace pyalpaca {
namespace {

Tensor meta(const Tensor& gate, const Tensor& up) {
  check_dtype("swiglu: gate", gate);
  TORCH_CHECK_VALUE(gate.dim() >= 1, "swiglu: gate has shape ", gate.sym_sizes(), ", expected (..., F)");
  check_same("swiglu: up", up, "gate", gate);
  check_shape("swiglu: up", up, gate.sym_sizes());
  return reused_like(gate);
}

std::tuple<Tensor, Tensor> meta_backward(const Tensor& dy, const Tensor& gate, const Tensor& up) {
  Tensor dgate = meta(gate, up);
  check_same("swiglu_backward: dy", dy, "gate", gate);
  check_shape("swiglu_backward: dy", dy, gate.sym_sizes());
  return {dgate, reused_like(gate)};
}

Tensor forward_cpu(const Tensor& gate, const Tensor& up) {
  Tensor y = meta(gate, up);
  if (y.numel() == 0) return y;
  const Tensor gates = rows_of(gate), ups = rows_of(up);
  cpu::kernels().swiglu({dtype_of(gate), gates.const_data_ptr(), ups.const_data_ptr(), gates.stride(0), ups.stride(0),
                         y.mutable_data_ptr(), gates.size(0), gates.size(1)});
  return y;
}

std::tuple<Tensor, Tensor> backward_cpu(const Tensor& dy, const Tensor& gate, const Tensor& up) {
  auto [dgate, dup] = meta_backward(dy, gate, up);
  if (dgate.numel() == 0) return {dgate, dup};
  const Tensor dys = rows_of(dy), gates = rows_of(gate), ups = rows_of(up);
  cpu::kernels().swiglu_backward({dtype_of(gate), dys.const_data_ptr(), gates.const_data_ptr(), ups.const_data_ptr(),
                                  dys.stride(0), gates.stride(0), ups.stride(0), dgate.mutable_data_ptr(),
                                  dup.mutable_data_ptr(), gates.size(0), gates.size(1)});
  return {dgate, dup};
}

Tensor call(const Tensor& gate, const Tensor& up) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("pyalpaca::swiglu", "")
                             .typed<Tensor(const Tensor&, const Tensor&)>();
  at::AutoDispatchBelowADInplaceOrView below;
  return op.call(gate, up);
}

std::tuple<Tensor, Tensor> call_backward(const Tensor& dy, const Tensor& gate, const Tensor& up) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("pyalpaca::swiglu_backward", "")
                             .typed<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&)>();
  return op.call(dy, gate, up);
}

struct Gradient : torch::autograd::Function<Gradient> {
  static variable_list forward(AutogradContext*, const Tensor& dy, const Tensor& gate, const Tensor& up) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [dgate, dup] = call_backward(dy, gate, up);
    return {dgate, dup};
  }
  static variable_list backward(AutogradContext*, const variable_list&) {
    no_second_derivative("swiglu");
    return {};
  }
};

struct Gated : torch::autograd::Function<Gated> {
  static Tensor forward(AutogradContext* context, const Tensor& gate, const Tensor& up) {
    context->save_for_backward({gate, up});
    return call(gate, up);
  }
  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const auto saved = context->get_saved_variables();
    auto [dgate, dup] = call_backward(gradients[0], saved[0], saved[1]);
    return {dgate, dup};
  }
};

Tensor forward_autograd(const Tensor& gate, const Tensor& up) { return Gated::apply(gate, up); }

std::tuple<Tensor, Tensor> backward_autograd(const Tensor& dy, const Tensor& gate, const Tensor& up) {
  auto outputs = Gradient::apply(dy, gate, up);
  return {outputs[0], outputs[1]};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pyalpaca, m) {
  m.def("swiglu(Tensor gate, Tensor up) -> Tensor", {at::Tag::pt2_compliant_tag});
  m.def("swiglu_backward(Tensor dy, Tensor gate, Tensor up) -> (Tensor dgate, Tensor dup)",
        {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(pyalpaca, Meta, m) {
  m.impl("swiglu", meta);
  m.impl("swiglu_backward", meta_backward);
}
TORCH_LIBRARY_IMPL(pyalpaca, CPU, m) {
  m.impl("swiglu", forward_cpu);
  m.impl("swiglu_backward", backward_cpu);
}
TORCH_LIBRARY_IMPL(pyalpaca, Autograd, m) {
  m.impl("swiglu", forward_autograd);
  m.impl("swiglu_backward", backward_autograd);
}

}  // namespace pyalpaca
