// What every launch shares: how many vector cores there are, and the way onto torch_npu's stream.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <acl/acl_base_rt.h>
#include <acl/acl_rt.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>
#include <torch_npu/csrc/core/npu/NPUStream.h>
#include <torch_npu/csrc/framework/OpCommand.h>

#include <array>
#include <string_view>
#include <utility>
#include <vector>

namespace pyalpaca_npu {

using at::Tensor;

// On a processor of another family the toolkit's launches print a line, do nothing and report success.
inline void check_family(const char* soc) {
  const std::string_view name(soc == nullptr ? "unknown" : soc);
  const bool known = (name.rfind("Ascend910B", 0) == 0 && name != "Ascend910B") || name.rfind("Ascend910_93", 0) == 0;
  TORCH_CHECK(known, "pyalpaca: the NPU is ", name,
              ", expected Ascend 910B1 to B4 or 910_93; set PYALPACA_BACKEND=reference");
}

// How many cores of a kind a device has; asked once.
template <aclDeviceInfo kind>
int64_t cores_of(const at::Device& device) {
  static std::array<int64_t, 64> known{};
  const auto index = static_cast<size_t>(device.index());
  TORCH_CHECK(device.has_index() && index < known.size(), "pyalpaca: device ", device, ", expected one of the first ",
              known.size());
  if (known[index] == 0) {
    check_family(aclrtGetSocName());
    int64_t count = 0;
    const aclError error = aclGetDeviceCapability(static_cast<uint32_t>(index), kind, &count);
    TORCH_CHECK(error == ACL_SUCCESS && count > 0, "pyalpaca: the number of cores of ", device,
                " could not be read (error ", error, ")");
    known[index] = count;
  }
  return known[index];
}
inline int64_t vector_cores(const at::Device& device) { return cores_of<ACL_DEVICE_INFO_VECTOR_CORE_NUM>(device); }
// Cube cores; each has two vector cores beside it.
inline int64_t cube_cores(const at::Device& device) { return cores_of<ACL_DEVICE_INFO_AI_CORE_NUM>(device); }

// Puts a launch into torch_npu's own queue, behind what is waiting there: a launch straight onto the stream could
// overtake it. `kept` lives until the launch is made.
template <typename Launch>
void enqueue(const char* name, std::vector<Tensor> kept, Launch launch) {
  const aclrtStream stream = c10_npu::getCurrentNPUStream().stream(false);
  at_npu::native::OpCommand::RunOpApiV2(
      name, [stream, kept = std::move(kept), launch]() -> int { return static_cast<int>(launch(stream)); });
}

inline void* address(const Tensor& x) { return x.defined() ? const_cast<void*>(x.const_data_ptr()) : nullptr; }

// The kernel for a type, out of those for half, bfloat16 and float.
template <typename Kernel>
Kernel kernel_for(const Tensor& x, Kernel half, Kernel bfloat16, Kernel single) {
  switch (x.scalar_type()) {
    case at::kHalf:
      return half;
    case at::kBFloat16:
      return bfloat16;
    case at::kFloat:
      return single;
    default:
      TORCH_CHECK_VALUE(false, "pyalpaca: a tensor is ", x.scalar_type(), ", expected float32, bfloat16 or float16");
  }
}

// (..., D) as rows of D any distance apart; a view where the strides allow it.
inline Tensor rows_of(const Tensor& x) {
  const int64_t width = x.size(-1);
  const Tensor rows = x.reshape({x.numel() / width, width});
  return rows.stride(1) == 1 && rows.stride(0) >= width ? rows : rows.contiguous();
}

}  // namespace pyalpaca_npu
