// add_rms_norm(x (..., D), residual like x, weight (D), eps) -> y like x, sum = x + residual, rstd fp32 (...)
//
// The step between two blocks in one pass: the residual stream goes on as `sum`, its norm into the next block. Both
// come back as one gradient, of x and of the residual alike.
#include "ops/rms_norm.h"

namespace pyalpaca {
namespace {

std::tuple<Tensor, Tensor, Tensor> meta(const Tensor& x, const Tensor& residual, const Tensor& weight, double) {
  check_norm(x, weight);
  check_same("add_rms_norm: residual", residual, "x", x);
  check_shape("add_rms_norm: residual", residual, x.sym_sizes());
  return {reused_like(x), reused_like(x), empty_rstd(x)};
}

std::tuple<Tensor, Tensor> meta_backward(const Tensor& dy, const Tensor& dsum, const Tensor& sum, const Tensor& weight,
                                         const Tensor& rstd) {
  check_norm_backward(dy, sum, weight, rstd);
  check_same("add_rms_norm_backward: dsum", dsum, "sum", sum);
  check_shape("add_rms_norm_backward: dsum", dsum, sum.sym_sizes());
  return {reused_like(sum), reused_like(weight)};
}

std::tuple<Tensor, Tensor, Tensor> forward_cpu(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                               double eps) {
  auto [y, sum, rstd] = meta(x, residual, weight, eps);
  norm_cpu(x, residual, weight, eps, y, sum, rstd);
  return {y, sum, rstd};
}

std::tuple<Tensor, Tensor> backward_cpu(const Tensor& dy, const Tensor& dsum, const Tensor& sum, const Tensor& weight,
                                        const Tensor& rstd) {
  check_norm_backward(dy, sum, weight, rstd);
  check_same("add_rms_norm_backward: dsum", dsum, "sum", sum);
  check_shape("add_rms_norm_backward: dsum", dsum, sum.sym_sizes());
  return norm_backward_cpu(dy, dsum, sum, weight, rstd);
}

std::tuple<Tensor, Tensor, Tensor> call(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("pyalpaca::add_rms_norm", "")
          .typed<std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, double)>();
  at::AutoDispatchBelowADInplaceOrView below;
  return op.call(x, residual, weight, eps);
}

std::tuple<Tensor, Tensor> call_backward(const Tensor& dy, const Tensor& dsum, const Tensor& sum, const Tensor& weight,
                                         const Tensor& rstd) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("pyalpaca::add_rms_norm_backward", "")
                             .typed<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&,
                                                               const Tensor&, const Tensor&)>();
  return op.call(dy, dsum, sum, weight, rstd);
}

struct Gradient : torch::autograd::Function<Gradient> {
  static variable_list forward(AutogradContext*, const Tensor& dy, const Tensor& dsum, const Tensor& sum,
                               const Tensor& weight, const Tensor& rstd) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [dx, dweight] = call_backward(dy, dsum, sum, weight, rstd);
    return {dx, dweight};
  }
  static variable_list backward(AutogradContext*, const variable_list&) {
    no_second_derivative("add_rms_norm");
    return {};
  }
};

struct AddNorm : torch::autograd::Function<AddNorm> {
  static variable_list forward(AutogradContext* context, const Tensor& x, const Tensor& residual, const Tensor& weight,
                               double eps) {
    auto [y, sum, rstd] = call(x, residual, weight, eps);
    context->save_for_backward({sum, weight, rstd});
    context->mark_non_differentiable({rstd});
    context->set_materialize_grads(false);
    return {y, sum, rstd};
  }
  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const Tensor &dy = gradients[0], &dsum = gradients[1];
    if (!dy.defined()) return {dsum, dsum, Tensor(), Tensor()};
    const auto saved = context->get_saved_variables();
    auto [dx, dweight] = dsum.defined() ? call_backward(dy, dsum, saved[0], saved[1], saved[2])
                                        : call_norm_backward(dy, saved[0], saved[1], saved[2]);
    return {dx, dx, dweight, Tensor()};
  }
};

std::tuple<Tensor, Tensor, Tensor> forward_autograd(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                                    double eps) {
  auto outputs = AddNorm::apply(x, residual, weight, eps);
  return {outputs[0], outputs[1], outputs[2]};
}

std::tuple<Tensor, Tensor> backward_autograd(const Tensor& dy, const Tensor& dsum, const Tensor& sum,
                                             const Tensor& weight, const Tensor& rstd) {
  auto outputs = Gradient::apply(dy, dsum, sum, weight, rstd);
  return {outputs[0], outputs[1]};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pyalpaca, m) {
  m.def("add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor y, Tensor sum, Tensor rstd)",
        {at::Tag::pt2_compliant_tag});
  m.def(
      "add_rms_norm_backward(Tensor dy, Tensor dsum, Tensor sum, Tensor weight, Tensor rstd) -> (Tensor dx, Tensor "
      "dweight)",
      {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(pyalpaca, Meta, m) {
  m.impl("add_rms_norm", meta);
  m.impl("add_rms_norm_backward", meta_backward);
}
TORCH_LIBRARY_IMPL(pyalpaca, CPU, m) {
  m.impl("add_rms_norm", forward_cpu);
  m.impl("add_rms_norm_backward", backward_cpu);
}
TORCH_LIBRARY_IMPL(pyalpaca, Autograd, m) {
  m.impl("add_rms_norm", forward_autograd);
  m.impl("add_rms_norm_backward", backward_autograd);
}

}  // namespace pyalpaca
