// Memory for large tensors out of the pool: for results of operators, and if wanted for all of torch's on the CPU.
#pragma once

#include <ATen/core/Tensor.h>

namespace pyalpaca {

// A contiguous tensor like `x` in shape, type and device, not initialised; small ones and other devices as torch has
// it.
at::Tensor reused_like(const at::Tensor& x);

// The same, of any shape.
at::Tensor reused_empty(c10::SymIntArrayRef sizes, const at::TensorOptions& options);

// Whether all tensors on the CPU that torch makes from here on come from the pool, which then keeps what the process
// has needed at most; or from torch's own allocator again. To be called while no other thread makes tensors.
void reuse_memory(bool on);

}  // namespace pyalpaca
