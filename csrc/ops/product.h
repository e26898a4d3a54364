// Tensors as operands of the CPU's matrix product, and the call of it.
#pragma once

#include "ops/common.h"

namespace pyalpaca {

inline cpu::Storage storage_of(const Tensor& x) {
  if (x.scalar_type() == at::kFloat) return cpu::Storage::kFloat;
  return x.scalar_type() == at::kBFloat16 ? cpu::Storage::kBFloat16 : cpu::Storage::kHalf;
}

// (..., width) as a matrix, also where one of the dimensions is 0; a view where the strides allow it.
inline Tensor lines_of(const Tensor& x) {
  const int64_t width = x.size(-1);
  const int64_t lines = c10::multiply_integers(x.sizes().slice(0, x.dim() - 1));
  return last_contiguous(x.reshape({lines, width}));
}

// A matrix whose rows are what is summed over; the tensor must outlive it.
inline cpu::Matrix matrix(const Tensor& x) { return {storage_of(x), x.const_data_ptr(), x.stride(0)}; }

inline cpu::Matrix transposed(cpu::Matrix m) {
  m.transposed = true;
  return m;
}

// out = a b^T, or += if `add`, of `rows` and `columns` lines of `depth` numbers.
inline void product(const cpu::Matrix& a, const cpu::Matrix& b, int64_t rows, int64_t columns, int64_t depth,
                    const Tensor& out, bool add = false) {
  if (out.numel() == 0) return;
  if (depth == 0) {
    if (!add) out.zero_();
    return;
  }
  const Tensor panels = reused_empty({cpu::panel_floats(rows, depth)}, out.options().dtype(at::kFloat));
  cpu::kernels().linear(
      {a, b, dtype_of(out), out.mutable_data_ptr(), add, rows, columns, depth, panels.mutable_data_ptr<float>()});
}

}  // namespace pyalpaca
