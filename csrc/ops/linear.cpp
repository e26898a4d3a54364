// linear(x (..., K), weight (N, K)) -> (..., N) like x, and its gradients, which are products of the same kind:
// linear_dx(dy (..., N), weight) -> (..., K), linear_dweight(dy (..., N), x (..., K)) -> (N, K).
//
// The derivative of each of the three is made of the other two, so there is one of any order. For gradients that are
// summed up piece by piece, linear_dweight_add_ adds to what is there.
#include <ATen/ops/mm.h>

#include "ops/common.h"
#include "ops/product.h"

namespace pyalpaca {
namespace {

void check_operand(const char* name, const Tensor& x) {
  check_dtype(name, x);
  TORCH_CHECK_VALUE(x.dim() >= 1, name, " is a scalar, expected (..., width)");
}

void check_weight(const char* name, const Tensor& weight, const Tensor& x) {
  check_dtype(name, weight);
  TORCH_CHECK_VALUE(weight.device() == x.device(), name, " is on ", weight.device(), ", expected ", x.device());
  TORCH_CHECK_VALUE(weight.dim() == 2, name, " has shape ", weight.sym_sizes(), ", expected a matrix");
}

// The shape of x with another last dimension.
c10::SymDimVector with_width(const Tensor& x, const c10::SymInt& width) {
  c10::SymDimVector sizes(x.sym_sizes().begin(), x.sym_sizes().end());
  sizes.back() = width;
  return sizes;
}

Tensor meta(const Tensor& x, const Tensor& weight) {
  check_operand("linear: x", x);
  check_weight("linear: weight", weight, x);
  TORCH_CHECK_VALUE(x.sym_size(-1) == weight.sym_size(1), "linear: x has shape ", x.sym_sizes(), " and weight ",
                    weight.sym_sizes(), ", expected (..., K) and (N, K)");
  return reused_empty(with_width(x, weight.sym_size(0)), x.options());
}

Tensor meta_dx(const Tensor& dy, const Tensor& weight) {
  check_operand("linear_dx: dy", dy);
  check_weight("linear_dx: weight", weight, dy);
  TORCH_CHECK_VALUE(dy.sym_size(-1) == weight.sym_size(0), "linear_dx: dy has shape ", dy.sym_sizes(), " and weight ",
                    weight.sym_sizes(), ", expected (..., N) and (N, K)");
  return reused_empty(with_width(dy, weight.sym_size(1)), dy.options());
}

Tensor meta_dweight(const Tensor& dy, const Tensor& x) {
  check_operand("linear_dweight: dy", dy);
  check_operand("linear_dweight: x", x);
  check_same("linear_dweight: dy", dy, "x", x);
  TORCH_CHECK_VALUE(dy.sym_sizes().slice(0, dy.dim() - 1) == x.sym_sizes().slice(0, x.dim() - 1),
                    "linear_dweight: dy has shape ", dy.sym_sizes(), " and x ", x.sym_sizes(),
                    ", expected (..., N) and (..., K)");
  return reused_empty({dy.sym_size(-1), x.sym_size(-1)}, x.options());
}

// out = a b by torch, if it is to be: where there is so little to do that it counts how soon a product begins, torch's
// is ahead, but not for a few lines by a weight, whose bytes are all that counts.
bool small_product(const Tensor& a, const Tensor& b, const Tensor& out) {
  constexpr int64_t kFewLines = 8, kProducts = int64_t{1} << 23;
  const int64_t lines = a.size(0), columns = b.size(1);
  if (lines <= kFewLines || lines * columns * a.size(1) >= kProducts) return false;
  if (a.scalar_type() != at::kFloat || b.scalar_type() != at::kFloat) return false;
  Tensor matrix = out.view({lines, columns});
  at::mm_out(matrix, a, b);
  return true;
}

Tensor forward_cpu(const Tensor& x, const Tensor& weight) {
  const Tensor y = meta(x, weight), lines = lines_of(x), w = last_contiguous(weight);
  if (small_product(lines, w.t(), y)) return y;
  product(matrix(lines), matrix(w), y.numel() / std::max<int64_t>(w.size(0), 1), w.size(0), w.size(1), y);
  return y;
}

Tensor dx_cpu(const Tensor& dy, const Tensor& weight) {
  const Tensor dx = meta_dx(dy, weight), lines = lines_of(dy), w = last_contiguous(weight);
  if (small_product(lines, w, dx)) return dx;
  product(matrix(lines), transposed(matrix(w)), lines.size(0), w.size(1), w.size(0), dx);
  return dx;
}

Tensor dweight_cpu(const Tensor& dy, const Tensor& x) {
  const Tensor dweight = meta_dweight(dy, x), dy_lines = lines_of(dy), x_lines = lines_of(x);
  if (small_product(dy_lines.t(), x_lines, dweight)) return dweight;
  product(transposed(matrix(dy_lines)), transposed(matrix(x_lines)), dy.size(-1), x.size(-1), x_lines.size(0), dweight);
  return dweight;
}

void check_add(const Tensor& total, const Tensor& dy, const Tensor& x) {
  TORCH_CHECK_VALUE(dy.dim() == 2 && x.dim() == 2 && dy.sym_size(0) == x.sym_size(0),
                    "linear_dweight_add_: dy has shape ", dy.sym_sizes(), " and x ", x.sym_sizes(),
                    ", expected (T, N) and (T, K)");
  check_dtype("linear_dweight_add_: total", total);
  check_dtype("linear_dweight_add_: dy", dy);
  check_dtype("linear_dweight_add_: x", x);
  check_shape("linear_dweight_add_: total", total, {dy.sym_size(1), x.sym_size(1)});
}

void add_cpu(Tensor& total, const Tensor& dy, const Tensor& x) {
  check_add(total, dy, x);
  TORCH_CHECK_VALUE(total.is_contiguous(), "linear_dweight_add_: total has strides ", total.strides(),
                    ", expected a contiguous tensor");
  const Tensor dy_lines = last_contiguous(dy), x_lines = last_contiguous(x);
  product(transposed(matrix(dy_lines)), transposed(matrix(x_lines)), dy.size(1), x.size(1), x.size(0), total,
          /*add=*/true);
}

void add_meta(Tensor& total, const Tensor& dy, const Tensor& x) { check_add(total, dy, x); }

template <int which>
Tensor call(const Tensor& a, const Tensor& b) {
  constexpr const char* names[] = {"pyalpaca::linear", "pyalpaca::linear_dx", "pyalpaca::linear_dweight"};
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow(names[which], "").typed<Tensor(const Tensor&, const Tensor&)>();
  return op.call(a, b);
}
constexpr int kForward = 0, kDx = 1, kDweight = 2;

// In each case the derivative by the first operand, then by the second.
template <int which>
struct Differentiable : torch::autograd::Function<Differentiable<which>> {
  static Tensor forward(AutogradContext* context, const Tensor& a, const Tensor& b) {
    // The derivative by either operand takes the other one: that of a frozen weight would keep the input for nothing.
    context->save_for_backward({b.requires_grad() ? a : Tensor(), a.requires_grad() ? b : Tensor()});
    context->saved_data["dtype"] = b.scalar_type();
    at::AutoDispatchBelowADInplaceOrView below;
    return call<which>(a, b);
  }
  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const auto saved = context->get_saved_variables();
    const Tensor &a = saved[0], &b = saved[1], &g = gradients[0];
    Tensor da, db;
    if (context->needs_input_grad(0)) {
      if constexpr (which == kForward) da = call<kDx>(g, b);
      if constexpr (which == kDx) da = call<kForward>(g, b);
      if constexpr (which == kDweight) da = call<kForward>(b, g);
    }
    if (context->needs_input_grad(1)) {
      if constexpr (which == kForward) db = call<kDweight>(g, a);
      if constexpr (which == kDx) db = call<kDweight>(a, g);
      if constexpr (which == kDweight) db = call<kDx>(a, g);
      db = db.to(context->saved_data["dtype"].toScalarType());
    }
    return {da, db};
  }
};

template <int which>
Tensor autograd(const Tensor& a, const Tensor& b) {
  return Differentiable<which>::apply(a, b);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pyalpaca, m) {
  m.def("linear(Tensor x, Tensor weight) -> Tensor", {at::Tag::pt2_compliant_tag});
  m.def("linear_dx(Tensor dy, Tensor weight) -> Tensor", {at::Tag::pt2_compliant_tag});
  m.def("linear_dweight(Tensor dy, Tensor x) -> Tensor", {at::Tag::pt2_compliant_tag});
  m.def("linear_dweight_add_(Tensor(a!) total, Tensor dy, Tensor x) -> ()", {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(pyalpaca, Meta, m) {
  m.impl("linear", meta);
  m.impl("linear_dx", meta_dx);
  m.impl("linear_dweight", meta_dweight);
  m.impl("linear_dweight_add_", add_meta);
}
TORCH_LIBRARY_IMPL(pyalpaca, CPU, m) {
  m.impl("linear", forward_cpu);
  m.impl("linear_dx", dx_cpu);
  m.impl("linear_dweight", dweight_cpu);
  m.impl("linear_dweight_add_", add_cpu);
}
TORCH_LIBRARY_IMPL(pyalpaca, Autograd, m) {
  m.impl("linear", autograd<kForward>);
  m.impl("linear_dx", autograd<kDx>);
  m.impl("linear_dweight", autograd<kDweight>);
}

}  // namespace pyalpaca
