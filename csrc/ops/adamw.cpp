// adamw_(weights fp32[], grads[], exp_avgs fp32[], exp_avg_sqs fp32[], copies[], weight_decays[], step, lr, ...): in
// place grad_norm(grads[]) -> the 2-norm of all of them together, fp64 ()
//
// One pass over each tensor, all tensors in one call. `copies` is empty, or holds a narrower copy of each weight that
// follows it. The norm is summed in fp64, in which no square of a finite gradient overflows: it is infinite or NaN just
// if a gradient is.
#include <cmath>
#include <vector>

#include "ops/common.h"

namespace pyalpaca {
namespace {

void check_like(const char* name, const Tensor& x, const Tensor& weight, bool written) {
  check_shape(name, x, weight.sym_sizes());
  TORCH_CHECK_VALUE(x.device() == weight.device(), name, " is on ", x.device(), ", expected ", weight.device());
  TORCH_CHECK_VALUE(!written || x.is_contiguous(), name, " of shape ", x.sym_sizes(),
                    " is not contiguous, expected a tensor that can be updated in one pass; give x.contiguous()");
}

void check_float(const char* name, const Tensor& x) {
  TORCH_CHECK_VALUE(x.scalar_type() == at::kFloat, name, " is ", x.scalar_type(), ", expected float32");
}

void meta(at::TensorList weights, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs,
          at::TensorList copies, at::ArrayRef<double> weight_decays, int64_t step, double, double, double, double,
          double) {
  const size_t count = weights.size();
  TORCH_CHECK_VALUE(grads.size() == count && exp_avgs.size() == count && exp_avg_sqs.size() == count &&
                        weight_decays.size() == count && (copies.empty() || copies.size() == count),
                    "adamw_: ", count, " weights, ", grads.size(), " grads, ", exp_avgs.size(), " exp_avgs, ",
                    exp_avg_sqs.size(), " exp_avg_sqs, ", weight_decays.size(), " weight_decays and ", copies.size(),
                    " copies, expected as many of each, or no copies");
  TORCH_CHECK_VALUE(step >= 1, "adamw_: step is ", step, ", expected the number of this step, from 1 on");
  for (size_t i = 0; i < count; ++i) {
    check_float("adamw_: a weight", weights[i]);
    check_float("adamw_: an exp_avg", exp_avgs[i]);
    check_float("adamw_: an exp_avg_sq", exp_avg_sqs[i]);
    check_dtype("adamw_: a grad", grads[i]);
    check_like("adamw_: a weight", weights[i], weights[i], true);
    check_like("adamw_: a grad", grads[i], weights[i], false);
    check_like("adamw_: an exp_avg", exp_avgs[i], weights[i], true);
    check_like("adamw_: an exp_avg_sq", exp_avg_sqs[i], weights[i], true);
    if (copies.empty()) continue;
    check_dtype("adamw_: a copy", copies[i]);
    check_like("adamw_: a copy", copies[i], weights[i], true);
  }
}

void adamw_cpu(at::TensorList weights, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs,
               at::TensorList copies, at::ArrayRef<double> weight_decays, int64_t step, double lr, double beta1,
               double beta2, double eps, double grad_scale) {
  meta(weights, grads, exp_avgs, exp_avg_sqs, copies, weight_decays, step, lr, beta1, beta2, eps, grad_scale);
  std::vector<Tensor> held;
  std::vector<cpu::AdamwTensor> tensors;
  held.reserve(weights.size());
  tensors.reserve(weights.size());
  for (size_t i = 0; i < weights.size(); ++i) {
    held.push_back(grads[i].contiguous());
    tensors.push_back({weights[i].mutable_data_ptr<float>(), exp_avgs[i].mutable_data_ptr<float>(),
                       exp_avg_sqs[i].mutable_data_ptr<float>(), held[i].const_data_ptr(), dtype_of(held[i]),
                       copies.empty() ? nullptr : copies[i].mutable_data_ptr(),
                       copies.empty() ? cpu::Dtype::kFloat : dtype_of(copies[i]), weights[i].numel(),
                       weight_decays[i]});
  }
  cpu::kernels().adamw({tensors.data(), static_cast<int64_t>(tensors.size()), step, lr, beta1, beta2, eps,
                        static_cast<float>(grad_scale)});
}

Tensor meta_norm(at::TensorList grads) {
  TORCH_CHECK_VALUE(!grads.empty(), "grad_norm: no gradients, expected at least one");
  for (const Tensor& grad : grads) {
    check_dtype("grad_norm: a grad", grad);
    TORCH_CHECK_VALUE(grad.device() == grads[0].device(), "grad_norm: grads are on ", grads[0].device(), " and ",
                      grad.device(), ", expected one device");
  }
  return at::empty({}, grads[0].options().dtype(at::kDouble).requires_grad(false));
}

Tensor norm_cpu(at::TensorList grads) {
  Tensor norm = meta_norm(grads);
  std::vector<Tensor> held;
  std::vector<cpu::Flat> tensors;
  held.reserve(grads.size());
  tensors.reserve(grads.size());
  int64_t pieces = 0;
  for (const Tensor& grad : grads) {
    held.push_back(grad.is_non_overlapping_and_dense() ? grad : grad.contiguous());
    tensors.push_back({held.back().const_data_ptr(), dtype_of(grad), grad.numel()});
    pieces += cpu::pieces_of(grad.numel());
  }
  std::vector<double> parts(static_cast<size_t>(pieces));
  double total = 0.0;
  cpu::kernels().sum_of_squares({tensors.data(), static_cast<int64_t>(tensors.size()), parts.data(), &total});
  *norm.mutable_data_ptr<double>() = std::sqrt(total);
  return norm;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pyalpaca, m) {
  m.def(
      "adamw_(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] "
      "copies, float[] weight_decays, int step, float lr, float beta1, float beta2, float eps, float grad_scale=1.0) "
      "-> ()",
      {at::Tag::pt2_compliant_tag});
  m.def("grad_norm(Tensor[] grads) -> Tensor", {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(pyalpaca, Meta, m) {
  m.impl("adamw_", meta);
  m.impl("grad_norm", meta_norm);
}
TORCH_LIBRARY_IMPL(pyalpaca, CPU, m) {
  m.impl("adamw_", adamw_cpu);
  m.impl("grad_norm", norm_cpu);
}

}  // namespace pyalpaca
