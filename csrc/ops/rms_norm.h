// What rms_norm and add_rms_norm share: their checks and the calls of their kernels.
#pragma once

#include "ops/common.h"

namespace pyalpaca {

// ValueError unless x is (..., D) with D at least 1 and weight (D), of supported types on one device.
void check_norm(const Tensor& x, const Tensor& weight);

// The same of what comes back to the norm of x, and of rstd.
void check_norm_backward(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& rstd);

// rstd for x, not initialised.
Tensor empty_rstd(const Tensor& x);

// Fills y and rstd, and sum where there is a residual.
void norm_cpu(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps, const Tensor& y,
              const Tensor& sum, const Tensor& rstd);

// dx and dweight; dsum, where there is one, is added to dx.
std::tuple<Tensor, Tensor> norm_backward_cpu(const Tensor& dy, const Tensor& dsum, const Tensor& x,
                                             const Tensor& weight, const Tensor& rstd);

// The operator rms_norm_backward through the dispatcher.
std::tuple<Tensor, Tensor> call_norm_backward(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                              const Tensor& rstd);

}  // namespace pyalpaca
