// linear_quantized(x (..., K), weight, scale fp32 (N, G), group) -> (..., N) like x, and its gradient by x.
//
// weight: int8 (N, K), or uint8 (N, 16 ceil(K / 32)) with two numbers of four bits in a byte: byte j of each 16 holds
// numbers j and 16 + j of 32, each plus 8. A number of the weight is the integer times the scale of its group of a row.
#include "ops/common.h"
#include "ops/product.h"

namespace pyalpaca {
namespace {

c10::SymInt divided(const c10::SymInt& a, int64_t b) { return (a + (b - 1)) / b; }

// `width`: K, which a weight of four bits does not tell.
void check(const Tensor& x, const Tensor& weight, const Tensor& scale, int64_t group, const c10::SymInt& width) {
  check_dtype("linear_quantized: x", x);
  TORCH_CHECK_VALUE(x.dim() >= 1, "linear_quantized: x is a scalar, expected (..., K)");
  TORCH_CHECK_VALUE(weight.scalar_type() == at::kChar || weight.scalar_type() == at::kByte,
                    "linear_quantized: weight is ", weight.scalar_type(),
                    ", expected int8, or uint8 with two numbers in a byte");
  TORCH_CHECK_VALUE(weight.device() == x.device() && scale.device() == x.device(), "linear_quantized: weight is on ",
                    weight.device(), " and scale on ", scale.device(), ", expected ", x.device());
  TORCH_CHECK_VALUE(group >= cpu::kInt4Block && group % cpu::kInt4Block == 0, "linear_quantized: group is ", group,
                    ", expected a multiple of ", cpu::kInt4Block);
  TORCH_CHECK_VALUE(weight.dim() == 2 && scale.dim() == 2, "linear_quantized: weight has shape ", weight.sym_sizes(),
                    " and scale ", scale.sym_sizes(), ", expected matrices");
  const bool bytes = weight.scalar_type() == at::kChar;
  const c10::SymInt stored = bytes ? width : divided(width, cpu::kInt4Block) * (cpu::kInt4Block / 2);
  TORCH_CHECK_VALUE(weight.sym_size(1) == stored, "linear_quantized: weight has rows of ", weight.sym_size(1),
                    " bytes, expected ", stored, " for ", width, " numbers");
  check_shape("linear_quantized: scale", scale, {weight.sym_size(0), divided(width, group)});
  TORCH_CHECK_VALUE(scale.scalar_type() == at::kFloat, "linear_quantized: scale is ", scale.scalar_type(),
                    ", expected float32");
}

cpu::Matrix quantized(const Tensor& weight, const Tensor& scale, int64_t group) {
  const auto storage = weight.scalar_type() == at::kChar ? cpu::Storage::kInt8 : cpu::Storage::kInt4;
  return {storage,      weight.const_data_ptr(), weight.stride(0), false, scale.const_data_ptr<float>(), group,
          scale.size(1)};
}

Tensor with_width(const Tensor& x, const c10::SymInt& width) {
  c10::SymDimVector sizes(x.sym_sizes().begin(), x.sym_sizes().end());
  sizes.back() = width;
  return reused_empty(sizes, x.options());
}

Tensor meta(const Tensor& x, const Tensor& weight, const Tensor& scale, int64_t group) {
  check(x, weight, scale, group, x.dim() >= 1 ? x.sym_size(-1) : c10::SymInt(0));
  return with_width(x, weight.sym_size(0));
}

Tensor meta_dx(const Tensor& dy, const Tensor& weight, const Tensor& scale, int64_t group, c10::SymInt width) {
  check(dy, weight, scale, group, width);
  TORCH_CHECK_VALUE(dy.sym_size(-1) == weight.sym_size(0), "linear_quantized_dx: dy has shape ", dy.sym_sizes(),
                    " and weight ", weight.sym_sizes(), ", expected (..., N) and N rows");
  return with_width(dy, width);
}

Tensor forward_cpu(const Tensor& x, const Tensor& weight, const Tensor& scale, int64_t group) {
  const Tensor y = meta(x, weight, scale, group), lines = lines_of(x), w = last_contiguous(weight);
  const Tensor s = scale.contiguous();
  product(matrix(lines), quantized(w, s, group), lines.size(0), w.size(0), x.size(-1), y);
  return y;
}

Tensor dx_cpu(const Tensor& dy, const Tensor& weight, const Tensor& scale, int64_t group, int64_t width) {
  const Tensor dx = meta_dx(dy, weight, scale, group, width), lines = lines_of(dy), w = last_contiguous(weight);
  const Tensor s = scale.contiguous();
  product(matrix(lines), transposed(quantized(w, s, group)), lines.size(0), width, w.size(0), dx);
  return dx;
}

Tensor call(const Tensor& x, const Tensor& weight, const Tensor& scale, int64_t group) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("pyalpaca::linear_quantized", "")
                             .typed<Tensor(const Tensor&, const Tensor&, const Tensor&, int64_t)>();
  return op.call(x, weight, scale, group);
}

Tensor call_dx(const Tensor& dy, const Tensor& weight, const Tensor& scale, int64_t group, c10::SymInt width) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("pyalpaca::linear_quantized_dx", "")
                             .typed<Tensor(const Tensor&, const Tensor&, const Tensor&, int64_t, c10::SymInt)>();
  return op.call(dy, weight, scale, group, std::move(width));
}

// Linear in x, and the transposed product's derivative is the product again; weight and scale are constants.
struct Quantized : torch::autograd::Function<Quantized> {
  static Tensor forward(AutogradContext* context, const Tensor& x, const Tensor& weight, const Tensor& scale,
                        int64_t group) {
    context->save_for_backward({weight, scale});
    context->saved_data["group"] = group;
    context->saved_data["width"] = x.sym_size(-1);
    at::AutoDispatchBelowADInplaceOrView below;
    return call(x, weight, scale, group);
  }
  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const auto saved = context->get_saved_variables();
    return {call_dx(gradients[0], saved[0], saved[1], context->saved_data["group"].toInt(),
                    context->saved_data["width"].toSymInt()),
            Tensor(), Tensor(), Tensor()};
  }
};

struct QuantizedDx : torch::autograd::Function<QuantizedDx> {
  static Tensor forward(AutogradContext* context, const Tensor& dy, const Tensor& weight, const Tensor& scale,
                        int64_t group, c10::SymInt width) {
    context->save_for_backward({weight, scale});
    context->saved_data["group"] = group;
    at::AutoDispatchBelowADInplaceOrView below;
    return call_dx(dy, weight, scale, group, std::move(width));
  }
  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const auto saved = context->get_saved_variables();
    return {call(gradients[0], saved[0], saved[1], context->saved_data["group"].toInt()), Tensor(), Tensor(), Tensor(),
            Tensor()};
  }
};

Tensor autograd(const Tensor& x, const Tensor& weight, const Tensor& scale, int64_t group) {
  return Quantized::apply(x, weight, scale, group);
}

Tensor autograd_dx(const Tensor& dy, const Tensor& weight, const Tensor& scale, int64_t group, c10::SymInt width) {
  return QuantizedDx::apply(dy, weight, scale, group, std::move(width));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pyalpaca, m) {
  m.def("linear_quantized(Tensor x, Tensor weight, Tensor scale, int group) -> Tensor", {at::Tag::pt2_compliant_tag});
  m.def("linear_quantized_dx(Tensor dy, Tensor weight, Tensor scale, int group, SymInt width) -> Tensor",
        {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(pyalpaca, Meta, m) {
  m.impl("linear_quantized", meta);
  m.impl("linear_quantized_dx", meta_dx);
}
TORCH_LIBRARY_IMPL(pyalpaca, CPU, m) {
  m.impl("linear_quantized", forward_cpu);
  m.impl("linear_quantized_dx", dx_cpu);
}
TORCH_LIBRARY_IMPL(pyalpaca, Autograd, m) {
  m.impl("linear_quantized", autograd);
  m.impl("linear_quantized_dx", autograd_dx);
}

}  // namespace pyalpaca
