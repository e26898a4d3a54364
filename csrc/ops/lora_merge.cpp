// lora_merge(weight (O, I), b fp32 (O, r)[], a fp32 (r, I)[], scale[]) -> like weight
//
// weight + scale * (b a) for one pair of factors after the other, rounded after each. For merging adapters, not for
// training: it has no gradient.
#include <vector>

#include "ops/common.h"

namespace pyalpaca {
namespace {

Tensor meta(const Tensor& weight, at::TensorList b, at::TensorList a, at::ArrayRef<double> scale) {
  check_dtype("lora_merge: weight", weight);
  TORCH_CHECK_VALUE(weight.dim() == 2, "lora_merge: weight has shape ", weight.sym_sizes(), ", expected a matrix");
  TORCH_CHECK_VALUE(!b.empty() && b.size() == a.size() && b.size() == scale.size(), "lora_merge: ", b.size(), " b, ",
                    a.size(), " a and ", scale.size(), " scales, expected as many of each and at least one");
  for (size_t i = 0; i < b.size(); ++i) {
    for (const Tensor* factor : {&b[i], &a[i]}) {
      TORCH_CHECK_VALUE(
          factor->scalar_type() == at::kFloat && factor->device() == weight.device() && factor->dim() == 2,
          "lora_merge: a factor is ", factor->scalar_type(), " ", factor->sym_sizes(), " on ", factor->device(),
          ", expected a float32 matrix on ", weight.device());
    }
    check_shape("lora_merge: b", b[i], {weight.sym_size(0), b[i].sym_size(1)});
    check_shape("lora_merge: a", a[i], {b[i].sym_size(1), weight.sym_size(1)});
  }
  return reused_like(weight);
}

Tensor lora_merge_cpu(const Tensor& weight, at::TensorList b, at::TensorList a, at::ArrayRef<double> scale) {
  Tensor out = meta(weight, b, a, scale);
  if (out.numel() == 0) return out;
  const Tensor from = last_contiguous(weight);
  std::vector<Tensor> held;
  std::vector<cpu::LoraFactors> factors;
  for (size_t i = 0; i < b.size(); ++i) {
    held.push_back(b[i].contiguous());
    held.push_back(a[i].contiguous());
    factors.push_back({held[2 * i].const_data_ptr<float>(), held[2 * i + 1].const_data_ptr<float>(), b[i].size(1),
                       static_cast<float>(scale[i])});
  }
  cpu::kernels().lora_merge({dtype_of(weight), from.const_data_ptr(), from.stride(0), factors.data(),
                             static_cast<int64_t>(factors.size()), out.mutable_data_ptr(), out.size(0), out.size(1)});
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pyalpaca, m) {
  m.def("lora_merge(Tensor weight, Tensor[] b, Tensor[] a, float[] scale) -> Tensor", {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(pyalpaca, Meta, m) { m.impl("lora_merge", meta); }
TORCH_LIBRARY_IMPL(pyalpaca, CPU, m) { m.impl("lora_merge", lora_merge_cpu); }

}  // namespace pyalpaca
