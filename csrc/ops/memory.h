// Memory for large results, kept when they are gone and handed out again.
//
// A fresh page costs a fault and a fill with zeros at its first write, more than most operators here need for their
// work on it; torch's allocator on CPU gives large blocks back to the system each time.
#pragma once

#include <ATen/core/Tensor.h>

namespace pyalpaca {

// A contiguous tensor like `x` in shape, type and device, not initialised; small ones and other devices as torch has
// it.
at::Tensor reused_like(const at::Tensor& x);

// The same, of any shape.
at::Tensor reused_empty(c10::SymIntArrayRef sizes, const at::TensorOptions& options);

}  // namespace pyalpaca
