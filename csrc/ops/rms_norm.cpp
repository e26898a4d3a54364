// rms_norm(x (..., D), weight (D), eps) -> y like x, rstd fp32 (...)
#include "ops/rms_norm.h"

#include <algorithm>

#include "cpu/threads.h"

namespace pyalpaca {

void check_norm(const Tensor& x, const Tensor& weight) {
  check_dtype("rms_norm: x", x);
  check_dtype("rms_norm: weight", weight);
  TORCH_CHECK_VALUE(x.device() == weight.device(), "rms_norm: weight is on ", weight.device(), ", expected ",
                    x.device());
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.sym_size(-1) > 0, "rms_norm: x has shape ", x.sym_sizes(),
                    ", expected (..., D) with D at least 1");
  check_shape("rms_norm: weight", weight, {x.sym_size(-1)});
}

void check_norm_backward(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& rstd) {
  check_norm(x, weight);
  check_same("rms_norm_backward: dy", dy, "x", x);
  check_shape("rms_norm_backward: dy", dy, x.sym_sizes());
  check_shape("rms_norm_backward: rstd", rstd, x.sym_sizes().slice(0, x.dim() - 1));
  TORCH_CHECK_VALUE(rstd.scalar_type() == at::kFloat, "rms_norm_backward: rstd is ", rstd.scalar_type(),
                    ", expected float32");
}

Tensor empty_rstd(const Tensor& x) {
  return x.new_empty_symint(x.sym_sizes().slice(0, x.dim() - 1), x.options().dtype(at::kFloat));
}

void norm_cpu(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps, const Tensor& y,
              const Tensor& sum, const Tensor& rstd) {
  const Tensor rows = rows_of(x), wide = weight.to(at::kFloat).contiguous();
  const Tensor other = residual.defined() ? rows_of(residual) : residual;
  cpu::kernels().rms_norm({dtype_of(x), rows.const_data_ptr(), rows.stride(0),
                           other.defined() ? other.const_data_ptr() : nullptr, other.defined() ? other.stride(0) : 0,
                           wide.const_data_ptr<float>(), y.mutable_data_ptr(),
                           sum.defined() ? sum.mutable_data_ptr() : nullptr, rstd.mutable_data_ptr<float>(),
                           rows.size(0), rows.size(1), static_cast<float>(eps)});
}

std::tuple<Tensor, Tensor> norm_backward_cpu(const Tensor& dy, const Tensor& dsum, const Tensor& x,
                                             const Tensor& weight, const Tensor& rstd) {
  const Tensor dx = reused_like(x), x_rows = rows_of(x), dy_rows = rows_of(dy);
  const Tensor other = dsum.defined() ? rows_of(dsum) : dsum;
  const Tensor wide = weight.to(at::kFloat).contiguous(), rstd_rows = rstd.contiguous();
  // A part of the rows for each thread, but not for a few rows: summing the parts costs as much as a row each.
  const int64_t rows = x_rows.size(0), parts = std::max<int64_t>(std::min(cpu::num_threads(), rows / 8), 1);
  const Tensor dweight = at::empty({parts, x_rows.size(1)}, weight.options().dtype(at::kFloat));
  cpu::kernels().rms_norm_backward({dtype_of(x), x_rows.const_data_ptr(), x_rows.stride(0), dy_rows.const_data_ptr(),
                                    dy_rows.stride(0), other.defined() ? other.const_data_ptr() : nullptr,
                                    other.defined() ? other.stride(0) : 0, wide.const_data_ptr<float>(),
                                    rstd_rows.const_data_ptr<float>(), dx.mutable_data_ptr(),
                                    dweight.mutable_data_ptr<float>(), rows, x_rows.size(1), parts});
  return {dx, dweight.select(0, 0).to(weight.scalar_type(), /*non_blocking=*/false, /*copy=*/parts > 1)};
}

std::tuple<Tensor, Tensor> call_norm_backward(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                              const Tensor& rstd) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("pyalpaca::rms_norm_backward", "")
          .typed<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&)>();
  return op.call(dy, x, weight, rstd);
}

namespace {

std::tuple<Tensor, Tensor> meta(const Tensor& x, const Tensor& weight, double) {
  check_norm(x, weight);
  return {reused_like(x), empty_rstd(x)};
}

std::tuple<Tensor, Tensor> meta_backward(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& rstd) {
  check_norm_backward(dy, x, weight, rstd);
  return {reused_like(x), reused_like(weight)};
}

std::tuple<Tensor, Tensor> forward_cpu(const Tensor& x, const Tensor& weight, double eps) {
  auto [y, rstd] = meta(x, weight, eps);
  norm_cpu(x, Tensor(), weight, eps, y, Tensor(), rstd);
  return {y, rstd};
}

std::tuple<Tensor, Tensor> backward_cpu(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& rstd) {
  check_norm_backward(dy, x, weight, rstd);
  return norm_backward_cpu(dy, Tensor(), x, weight, rstd);
}

std::tuple<Tensor, Tensor> call(const Tensor& x, const Tensor& weight, double eps) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("pyalpaca::rms_norm", "")
                             .typed<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, double)>();
  at::AutoDispatchBelowADInplaceOrView below;
  return op.call(x, weight, eps);
}

struct Gradient : torch::autograd::Function<Gradient> {
  static variable_list forward(AutogradContext*, const Tensor& dy, const Tensor& x, const Tensor& weight,
                               const Tensor& rstd) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [dx, dweight] = call_norm_backward(dy, x, weight, rstd);
    return {dx, dweight};
  }
  static variable_list backward(AutogradContext*, const variable_list&) {
    no_second_derivative("rms_norm");
    return {};
  }
};

struct Norm : torch::autograd::Function<Norm> {
  static variable_list forward(AutogradContext* context, const Tensor& x, const Tensor& weight, double eps) {
    auto [y, rstd] = call(x, weight, eps);
    context->save_for_backward({x, weight, rstd});
    context->mark_non_differentiable({rstd});
    return {y, rstd};
  }
  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const auto saved = context->get_saved_variables();
    auto [dx, dweight] = call_norm_backward(gradients[0], saved[0], saved[1], saved[2]);
    return {dx, dweight, Tensor()};
  }
};

std::tuple<Tensor, Tensor> forward_autograd(const Tensor& x, const Tensor& weight, double eps) {
  auto outputs = Norm::apply(x, weight, eps);
  return {outputs[0], outputs[1]};
}

std::tuple<Tensor, Tensor> backward_autograd(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                             const Tensor& rstd) {
  auto outputs = Gradient::apply(dy, x, weight, rstd);
  return {outputs[0], outputs[1]};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pyalpaca, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor y, Tensor rstd)", {at::Tag::pt2_compliant_tag});
  m.def("rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor rstd) -> (Tensor dx, Tensor dweight)",
        {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(pyalpaca, Meta, m) {
  m.impl("rms_norm", meta);
  m.impl("rms_norm_backward", meta_backward);
}
TORCH_LIBRARY_IMPL(pyalpaca, CPU, m) {
  m.impl("rms_norm", forward_cpu);
  m.impl("rms_norm_backward", backward_cpu);
}
TORCH_LIBRARY_IMPL(pyalpaca, Autograd, m) {
  m.impl("rms_norm", forward_autograd);
  m.impl("rms_norm_backward", backward_autograd);
}

}  // namespace pyalpaca
