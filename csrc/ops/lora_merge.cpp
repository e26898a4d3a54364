// lora_merge(weight (O, I), b fp32 (O, r), a fp32 (r, I), scale) -> like weight: weight + scale * (b a)
//
// For merging adapters, not for training: it has no gradient.
#include "ops/common.h"

namespace pyalpaca {
namespace {

Tensor meta(const Tensor& weight, const Tensor& b, const Tensor& a, double) {
  check_dtype("lora_merge: weight", weight);
  TORCH_CHECK_VALUE(weight.dim() == 2 && b.dim() == 2, "lora_merge: weight has shape ", weight.sym_sizes(), " and b ",
                    b.sym_sizes(), ", expected matrices");
  for (const Tensor* factor : {&b, &a}) {
    TORCH_CHECK_VALUE(factor->scalar_type() == at::kFloat && factor->device() == weight.device(),
                      "lora_merge: a factor is ", factor->scalar_type(), " on ", factor->device(),
                      ", expected float32 on ", weight.device());
  }
  check_shape("lora_merge: b", b, {weight.sym_size(0), b.sym_size(1)});
  check_shape("lora_merge: a", a, {b.sym_size(1), weight.sym_size(1)});
  return contiguous_like(weight);
}

Tensor lora_merge_cpu(const Tensor& weight, const Tensor& b, const Tensor& a, double scale) {
  Tensor out = meta(weight, b, a, scale);
  if (out.numel() == 0) return out;
  const Tensor from = last_contiguous(weight), left = b.contiguous(), right = a.contiguous();
  cpu::kernels().lora_merge({dtype_of(weight), from.const_data_ptr(), from.stride(0), left.const_data_ptr<float>(),
                             right.const_data_ptr<float>(), out.mutable_data_ptr(), out.size(0), out.size(1),
                             left.size(1), static_cast<float>(scale)});
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pyalpaca, m) {
  m.def("lora_merge(Tensor weight, Tensor b, Tensor a, float scale) -> Tensor", {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(pyalpaca, Meta, m) { m.impl("lora_merge", meta); }
TORCH_LIBRARY_IMPL(pyalpaca, CPU, m) { m.impl("lora_merge", lora_merge_cpu); }

}  // namespace pyalpaca
