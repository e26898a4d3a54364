// flash_attention(q (B, S, H, d), k and v (B, T, K, d), causal, q_offset, scale) -> out like q, lse fp32 (B, H, S)
#include "ops/common.h"

namespace pyalpaca {
namespace {

void check(const Tensor& q, const Tensor& k, const Tensor& v) {
  check_dtype("flash_attention: q", q);
  check_same("flash_attention: k", k, "q", q);
  check_same("flash_attention: v", v, "q", q);
  TORCH_CHECK_VALUE(q.dim() == 4 && k.dim() == 4, "flash_attention: q has shape ", q.sym_sizes(), " and k ",
                    k.sym_sizes(), ", expected (B, S, H, d) and (B, T, K, d)");
  check_shape("flash_attention: v", v, k.sym_sizes());
  TORCH_CHECK_VALUE(q.sym_size(0) == k.sym_size(0) && q.sym_size(3) == k.sym_size(3), "flash_attention: k has shape ",
                    k.sym_sizes(), ", expected the batch and head_dim of q, ", q.sym_sizes());
  TORCH_CHECK_VALUE(k.sym_size(2) > 0 && q.sym_size(2) % k.sym_size(2) == 0, "flash_attention: q has ", q.sym_size(2),
                    " heads and k ", k.sym_size(2), ", expected a number that the heads of k divide");
  const c10::SymInt head_dim = q.sym_size(3);
  TORCH_CHECK_VALUE(head_dim > 0 && head_dim <= 256 && head_dim % 8 == 0, "flash_attention: head_dim is ", head_dim,
                    ", expected a multiple of 8 up to 256; the backend \"reference\" takes any");
}

c10::SymDimVector lse_sizes(const Tensor& q) { return {q.sym_size(0), q.sym_size(2), q.sym_size(1)}; }

void check_backward(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                    const Tensor& lse) {
  check(q, k, v);
  check_same("flash_attention_backward: dout", dout, "q", q);
  check_same("flash_attention_backward: out", out, "q", q);
  check_shape("flash_attention_backward: dout", dout, q.sym_sizes());
  check_shape("flash_attention_backward: out", out, q.sym_sizes());
  check_shape("flash_attention_backward: lse", lse, lse_sizes(q));
  TORCH_CHECK_VALUE(lse.scalar_type() == at::kFloat, "flash_attention_backward: lse is ", lse.scalar_type(),
                    ", expected float32");
}

std::tuple<Tensor, Tensor> meta(const Tensor& q, const Tensor& k, const Tensor& v, bool, int64_t, double) {
  check(q, k, v);
  return {reused_like(q), q.new_empty_symint(lse_sizes(q), q.options().dtype(at::kFloat))};
}

std::tuple<Tensor, Tensor, Tensor> meta_backward(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
                                                 const Tensor& out, const Tensor& lse, bool, int64_t, double) {
  check_backward(dout, q, k, v, out, lse);
  return {reused_like(q), reused_like(k), reused_like(v)};
}

cpu::AttentionShape shape(const Tensor& q, const Tensor& k, bool causal, int64_t q_offset, double scale) {
  return {
      q.size(0), q.size(1), k.size(1), q.size(2), k.size(2), q.size(3), causal, q_offset, static_cast<float>(scale)};
}

std::tuple<Tensor, Tensor> forward_cpu(const Tensor& q, const Tensor& k, const Tensor& v, bool causal, int64_t q_offset,
                                       double scale) {
  auto [out, lse] = meta(q, k, v, causal, q_offset, scale);
  const Tensor q1 = last_contiguous(q), k1 = last_contiguous(k), v1 = last_contiguous(v);
  cpu::FlashAttention arguments{};
  arguments.dtype = dtype_of(q), arguments.cache_dtype = cache_dtype_of(k);
  arguments.shape = shape(q, k, causal, q_offset, scale);
  arguments.q = strided(q1), arguments.k = strided(k1), arguments.v = strided(v1);
  arguments.out = out.mutable_data_ptr(), arguments.lse = lse.mutable_data_ptr<float>(), arguments.lse_head = q.size(1);
  cpu::kernels().flash_attention(arguments);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> backward_cpu(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
                                                const Tensor& out, const Tensor& lse, bool causal, int64_t q_offset,
                                                double scale) {
  auto [dq, dk, dv] = meta_backward(dout, q, k, v, out, lse, causal, q_offset, scale);
  const Tensor q1 = last_contiguous(q), k1 = last_contiguous(k), v1 = last_contiguous(v), out1 = last_contiguous(out);
  const Tensor dout1 = last_contiguous(dout), lse1 = lse.contiguous();
  cpu::FlashAttentionBackward arguments{};
  arguments.dtype = dtype_of(q), arguments.shape = shape(q, k, causal, q_offset, scale);
  arguments.q = strided(q1), arguments.k = strided(k1), arguments.v = strided(v1);
  arguments.out = strided(out1), arguments.dout = strided(dout1);
  arguments.lse = lse1.const_data_ptr<float>(), arguments.lse_head = q.size(1);
  arguments.dq = dq.mutable_data_ptr(), arguments.dk = dk.mutable_data_ptr(), arguments.dv = dv.mutable_data_ptr();
  cpu::kernels().flash_attention_backward(arguments);
  return {dq, dk, dv};
}

std::tuple<Tensor, Tensor> call(const Tensor& q, const Tensor& k, const Tensor& v, bool causal, int64_t q_offset,
                                double scale) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("pyalpaca::flash_attention", "")
          .typed<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, bool, int64_t, double)>();
  at::AutoDispatchBelowADInplaceOrView below;
  return op.call(q, k, v, causal, q_offset, scale);
}

std::tuple<Tensor, Tensor, Tensor> call_backward(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
                                                 const Tensor& out, const Tensor& lse, bool causal, int64_t q_offset,
                                                 double scale) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("pyalpaca::flash_attention_backward", "")
          .typed<std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                                    const Tensor&, const Tensor&, bool, int64_t, double)>();
  return op.call(dout, q, k, v, out, lse, causal, q_offset, scale);
}

struct Gradient : torch::autograd::Function<Gradient> {
  static variable_list forward(AutogradContext*, const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
                               const Tensor& out, const Tensor& lse, bool causal, int64_t q_offset, double scale) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [dq, dk, dv] = call_backward(dout, q, k, v, out, lse, causal, q_offset, scale);
    return {dq, dk, dv};
  }
  static variable_list backward(AutogradContext*, const variable_list&) {
    no_second_derivative("flash_attention");
    return {};
  }
};

struct Attention : torch::autograd::Function<Attention> {
  static variable_list forward(AutogradContext* context, const Tensor& q, const Tensor& k, const Tensor& v, bool causal,
                               int64_t q_offset, double scale) {
    auto [out, lse] = call(q, k, v, causal, q_offset, scale);
    context->save_for_backward({q, k, v, out, lse});
    context->mark_non_differentiable({lse});
    context->saved_data["causal"] = causal;
    context->saved_data["q_offset"] = q_offset;
    context->saved_data["scale"] = scale;
    return {out, lse};
  }
  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const auto saved = context->get_saved_variables();
    auto [dq, dk, dv] = call_backward(gradients[0], saved[0], saved[1], saved[2], saved[3], saved[4],
                                      context->saved_data["causal"].toBool(), context->saved_data["q_offset"].toInt(),
                                      context->saved_data["scale"].toDouble());
    return {dq, dk, dv, Tensor(), Tensor(), Tensor()};
  }
};

std::tuple<Tensor, Tensor> forward_autograd(const Tensor& q, const Tensor& k, const Tensor& v, bool causal,
                                            int64_t q_offset, double scale) {
  auto outputs = Attention::apply(q, k, v, causal, q_offset, scale);
  return {outputs[0], outputs[1]};
}

std::tuple<Tensor, Tensor, Tensor> backward_autograd(const Tensor& dout, const Tensor& q, const Tensor& k,
                                                     const Tensor& v, const Tensor& out, const Tensor& lse, bool causal,
                                                     int64_t q_offset, double scale) {
  auto outputs = Gradient::apply(dout, q, k, v, out, lse, causal, q_offset, scale);
  return {outputs[0], outputs[1], outputs[2]};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pyalpaca, m) {
  m.def(
      "flash_attention(Tensor q, Tensor k, Tensor v, bool causal, int q_offset, float scale) -> (Tensor out, Tensor "
      "lse)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "flash_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, bool causal, "
      "int q_offset, float scale) -> (Tensor dq, Tensor dk, Tensor dv)",
      {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(pyalpaca, Meta, m) {
  m.impl("flash_attention", meta);
  m.impl("flash_attention_backward", meta_backward);
}
TORCH_LIBRARY_IMPL(pyalpaca, CPU, m) {
  m.impl("flash_attention", forward_cpu);
  m.impl("flash_attention_backward", backward_cpu);
}
TORCH_LIBRARY_IMPL(pyalpaca, Autograd, m) {
  m.impl("flash_attention", forward_autograd);
  m.impl("flash_attention_backward", backward_autograd);
}

}  // namespace pyalpaca
