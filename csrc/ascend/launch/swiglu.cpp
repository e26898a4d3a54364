// swiglu on an NPU, and its gradient: gate and up may be halves of one tensor.
#include "ascend/tiling/swiglu.h"

#include "ascend/launch/kernels.h"
#include "ascend/launch/launch.h"

namespace pyalpaca_npu {
namespace {

void check(const Tensor& gate, const Tensor& other, const char* name) {
  TORCH_CHECK_VALUE(gate.dim() >= 1 && other.sizes() == gate.sizes() && other.scalar_type() == gate.scalar_type() &&
                        other.device() == gate.device(),
                    "swiglu: ", name, " is ", other.scalar_type(), " ", other.sizes(), " on ", other.device(),
                    ", expected that of gate: ", gate.scalar_type(), " ", gate.sizes(), " on ", gate.device());
}

SwigluTiling tiling_of(const Tensor& rows, bool backward) {
  const SwigluTiling tiling =
      swiglu_tiling(rows.size(0), rows.size(1), rows.element_size(), backward, vector_cores(rows.device()));
  TORCH_CHECK(tiling.cores > 0, "swiglu: no tiling for rows of ", rows.size(1));
  return tiling;
}

Tensor swiglu(const Tensor& gate, const Tensor& up) {
  check(gate, up, "up");
  const c10::OptionalDeviceGuard guard(gate.device());
  const Tensor y = at::empty_like(gate, at::MemoryFormat::Contiguous);
  if (y.numel() == 0) return y;
  const Tensor gates = rows_of(gate), ups = rows_of(up);
  const SwigluTiling tiling = tiling_of(gates, false);
  const auto kernel = kernel_for(gate, aclrtlaunch_swiglu_half, aclrtlaunch_swiglu_bfloat16, aclrtlaunch_swiglu_float);
  enqueue("pyalpaca_swiglu", {gates, ups, y}, [=](aclrtStream stream) {
    return kernel(tiling.cores, stream, address(gates), address(ups), address(y), gates.size(0), gates.stride(0),
                  ups.stride(0), static_cast<int32_t>(gates.size(1)), tiling.tile_rows, tiling.tile_columns);
  });
  return y;
}

std::tuple<Tensor, Tensor> swiglu_backward(const Tensor& dy, const Tensor& gate, const Tensor& up) {
  check(gate, up, "up");
  check(gate, dy, "dy");
  const c10::OptionalDeviceGuard guard(gate.device());
  const Tensor dgate = at::empty_like(gate, at::MemoryFormat::Contiguous), dup = at::empty_like(dgate);
  if (dgate.numel() == 0) return {dgate, dup};
  const Tensor dys = rows_of(dy), gates = rows_of(gate), ups = rows_of(up);
  const SwigluTiling tiling = tiling_of(gates, true);
  const auto kernel = kernel_for(gate, aclrtlaunch_swiglu_backward_half, aclrtlaunch_swiglu_backward_bfloat16,
                                 aclrtlaunch_swiglu_backward_float);
  enqueue("pyalpaca_swiglu_backward", {dys, gates, ups, dgate, dup}, [=](aclrtStream stream) {
    return kernel(tiling.cores, stream, address(dys), address(gates), address(ups), address(dgate), address(dup),
                  gates.size(0), dys.stride(0), gates.stride(0), ups.stride(0), static_cast<int32_t>(gates.size(1)),
                  tiling.tile_rows, tiling.tile_columns);
  });
  return {dgate, dup};
}

}  // namespace

TORCH_LIBRARY_IMPL(pyalpaca, PrivateUse1, m) {
  m.impl("swiglu", swiglu);
  m.impl("swiglu_backward", swiglu_backward);
}

}  // namespace pyalpaca_npu
