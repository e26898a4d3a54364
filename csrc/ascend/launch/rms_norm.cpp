// rms_norm and its gradient on an NPU, and rms_norm of a sum: (x, residual) -> y, x + residual, rstd.
#include "ascend/tiling/rms_norm.h"

#include <ATen/ops/zeros_like.h>

#include "ascend/launch/kernels.h"
#include "ascend/launch/launch.h"

namespace pyalpaca_npu {
namespace {

void check(const Tensor& x, const Tensor& weight) {
  TORCH_CHECK_VALUE(x.dim() >= 1 && weight.dim() == 1 && weight.size(0) == x.size(-1), "rms_norm: x has shape ",
                    x.sizes(), " and weight ", weight.sizes(), ", expected (..., D) and (D)");
  TORCH_CHECK_VALUE(x.size(-1) >= kNarrowestRow && x.size(-1) <= kWidestRow, "rms_norm: rows of ", x.size(-1),
                    ", expected at most ", kWidestRow, "; torch_npu's own operator takes longer ones");
  TORCH_CHECK_VALUE(weight.device() == x.device(), "rms_norm: weight is on ", weight.device(), ", expected ",
                    x.device());
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps) {
  check(x, weight);
  const c10::OptionalDeviceGuard guard(x.device());
  const Tensor y = at::empty_like(x, at::MemoryFormat::Contiguous);
  const Tensor sum = residual.defined() ? at::empty_like(y) : Tensor();
  const Tensor rstd = at::empty(x.sizes().slice(0, x.dim() - 1), x.options().dtype(at::kFloat));
  if (x.numel() == 0) return {y, sum, rstd};
  const Tensor rows = rows_of(x), wide = weight.to(at::kFloat).contiguous();
  const Tensor other = residual.defined() ? residual.contiguous() : residual;
  const auto count = rows.size(0), width = rows.size(1);
  const RmsNormTiling tiling =
      rms_norm_tiling(count, width, x.element_size(), other.defined(), vector_cores(x.device()));
  TORCH_CHECK(tiling.cores > 0, "rms_norm: no tiling for rows of ", width);
  const auto kernel =
      kernel_for(x, aclrtlaunch_rms_norm_half, aclrtlaunch_rms_norm_bfloat16, aclrtlaunch_rms_norm_float);
  enqueue("pyalpaca_rms_norm", {rows, other, wide, y, sum, rstd}, [=](aclrtStream stream) {
    return kernel(tiling.cores, stream, address(rows), address(other), address(wide), address(y), address(sum),
                  address(rstd), count, rows.stride(0), static_cast<int32_t>(width), tiling.tile_rows,
                  static_cast<float>(eps), 1.0f / static_cast<float>(width));
  });
  return {y, sum, rstd};
}

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  auto [y, sum, rstd] = forward(x, Tensor(), weight, eps);
  return {y, rstd};
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                                double eps) {
  TORCH_CHECK_VALUE(
      residual.sizes() == x.sizes() && residual.scalar_type() == x.scalar_type() && residual.device() == x.device(),
      "add_rms_norm: residual is ", residual.scalar_type(), " ", residual.sizes(),
      ", expected that of x: ", x.scalar_type(), " ", x.sizes());
  return forward(x, residual, weight, eps);
}

// `dsum`, if there, is what came to x by way of the sum: it is added to dx.
std::tuple<Tensor, Tensor> backward(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& rstd,
                                    const Tensor& dsum) {
  check(x, weight);
  for (const Tensor& gradient : {dy, dsum}) {
    TORCH_CHECK_VALUE(
        !gradient.defined() || (gradient.sizes() == x.sizes() && gradient.scalar_type() == x.scalar_type()),
        "rms_norm_backward: a gradient is ", gradient.scalar_type(), " ", gradient.sizes(),
        ", expected that of x: ", x.scalar_type(), " ", x.sizes());
  }
  const c10::OptionalDeviceGuard guard(x.device());
  const Tensor dx = at::empty_like(x, at::MemoryFormat::Contiguous);
  if (x.numel() == 0) return {dx, at::zeros_like(weight)};
  const Tensor dweight = at::empty_like(weight, at::MemoryFormat::Contiguous);
  const Tensor rows = rows_of(x), dy_rows = rows_of(dy), wide = weight.to(at::kFloat).contiguous();
  const Tensor scale = rstd.contiguous(), other = dsum.defined() ? dsum.contiguous() : dsum;
  const auto count = rows.size(0), width = rows.size(1), cores = vector_cores(x.device());
  const RmsNormTiling tiling = rms_norm_backward_tiling(count, width, x.element_size(), cores);
  TORCH_CHECK(tiling.cores > 0, "rms_norm_backward: no tiling for rows of ", width);
  const Tensor parts = at::empty({tiling.cores, width}, x.options().dtype(at::kFloat));
  const auto kernel = kernel_for(x, aclrtlaunch_rms_norm_backward_half, aclrtlaunch_rms_norm_backward_bfloat16,
                                 aclrtlaunch_rms_norm_backward_float);
  enqueue("pyalpaca_rms_norm_backward", {dy_rows, rows, wide, scale, other, dx, parts}, [=](aclrtStream stream) {
    return kernel(tiling.cores, stream, address(dy_rows), address(rows), address(wide), address(scale), address(other),
                  address(dx), address(parts), count, dy_rows.stride(0), rows.stride(0), static_cast<int32_t>(width),
                  tiling.tile_rows, tiling.buffers, 1.0f / static_cast<float>(width));
  });
  const DgammaTiling second = dgamma_tiling(tiling.cores, width, cores);
  const auto sum = kernel_for(weight, aclrtlaunch_rms_norm_dgamma_half, aclrtlaunch_rms_norm_dgamma_bfloat16,
                              aclrtlaunch_rms_norm_dgamma_float);
  enqueue("pyalpaca_rms_norm_dgamma", {parts, dweight}, [=](aclrtStream stream) {
    return sum(second.cores, stream, address(parts), address(dweight), tiling.cores, static_cast<int32_t>(width),
               second.columns);
  });
  return {dx, dweight};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                             const Tensor& rstd) {
  return backward(dy, x, weight, rstd, Tensor());
}

std::tuple<Tensor, Tensor> add_rms_norm_backward(const Tensor& dy, const Tensor& dsum, const Tensor& sum,
                                                 const Tensor& weight, const Tensor& rstd) {
  return backward(dy, sum, weight, rstd, dsum);
}

}  // namespace

TORCH_LIBRARY_IMPL(pyalpaca, PrivateUse1, m) {
  m.impl("rms_norm", rms_norm);
  m.impl("rms_norm_backward", rms_norm_backward);
  m.impl("add_rms_norm", add_rms_norm);
  m.impl("add_rms_norm_backward", add_rms_norm_backward);
}

}  // namespace pyalpaca_npu
