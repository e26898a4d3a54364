// What every operator file needs: torch's registration and autograd headers, and the checks they share.
//
// Gradients are registered here in C++ (the Autograd key), not in Python by torch.library.register_autograd: that costs
// some 30 us a call, more than a small operator takes, and one registration serves every device that brings kernels of
// its own.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "cpu/kernels.h"
#include "ops/memory.h"

namespace pyalpaca {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

inline bool is_supported(at::ScalarType type) {
  return type == at::kFloat || type == at::kBFloat16 || type == at::kHalf;
}

inline void check_dtype(const char* name, const Tensor& x) {
  TORCH_CHECK_VALUE(is_supported(x.scalar_type()), name, " is ", x.scalar_type(),
                    ", expected float32, bfloat16 or float16; the backend \"reference\" takes any");
}

inline void check_same(const char* name, const Tensor& x, const char* other_name, const Tensor& other) {
  TORCH_CHECK_VALUE(x.scalar_type() == other.scalar_type() && x.device() == other.device(), name, " is ",
                    x.scalar_type(), " on ", x.device(), ", expected that of ", other_name, ": ", other.scalar_type(),
                    " on ", other.device());
}

inline void check_shape(const char* name, const Tensor& x, c10::SymIntArrayRef expected) {
  TORCH_CHECK_VALUE(x.sym_sizes() == expected, name, " has shape ", x.sym_sizes(), ", expected ", expected);
}

inline cpu::Dtype dtype_of(const Tensor& x) {
  if (x.scalar_type() == at::kFloat) return cpu::Dtype::kFloat;
  return x.scalar_type() == at::kBFloat16 ? cpu::Dtype::kBFloat16 : cpu::Dtype::kHalf;
}

inline cpu::CacheDtype cache_dtype_of(const Tensor& x) {
  if (x.scalar_type() == at::kFloat) return cpu::CacheDtype::kFloat;
  if (x.scalar_type() == at::kChar) return cpu::CacheDtype::kInt8;
  return x.scalar_type() == at::kBFloat16 ? cpu::CacheDtype::kBFloat16 : cpu::CacheDtype::kHalf;
}

// (batch, token, head, ...) as the kernels of attention take it.
inline cpu::Strided strided(const Tensor& x) { return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }

// The kernels take any strides but need the last dimension contiguous.
inline Tensor last_contiguous(const Tensor& x) { return x.stride(-1) == 1 ? x : x.contiguous(); }

// (..., D) as rows of D; a view where the strides allow it.
inline Tensor rows_of(const Tensor& x) {
  const int64_t width = x.size(-1);
  return last_contiguous(x.reshape({x.numel() / width, width}));
}

inline void no_second_derivative(const char* name) {
  TORCH_CHECK_NOT_IMPLEMENTED(false, name,
                              " has no second derivative in C++; run it within pyalpaca.ops.backend(\"reference\")");
}

}  // namespace pyalpaca
