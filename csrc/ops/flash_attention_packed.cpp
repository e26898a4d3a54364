// flash_attention_packed(q (N, H, d), k and v (M, K, d), q_starts and kv_starts int64 (B + 1), the longest of their
// sequences, causal, scale) -> out like q, lse fp32 (H, N)
//
// Sequences side by side: sequence b has the queries and keys from starts[b] to starts[b + 1], the first start is 0 and
// the last one their number. If causal, a sequence's last query sees its last key. The longest lengths are given so
// that a device need not be asked.
#include <algorithm>
#include <numeric>
#include <vector>

#include "ops/common.h"

namespace pyalpaca {
namespace {

void check_starts(const char* name, const Tensor& starts, const Tensor& q, const Tensor& q_starts) {
  TORCH_CHECK_VALUE(starts.scalar_type() == at::kLong && starts.device() == q.device() && starts.dim() == 1 &&
                        starts.sym_size(0) >= 2 && starts.sym_sizes() == q_starts.sym_sizes(),
                    "flash_attention_packed: ", name, " is ", starts.scalar_type(), " ", starts.sym_sizes(), " on ",
                    starts.device(), ", expected int64 (B + 1) on ", q.device(), ", as many for keys as for queries");
}

void check(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& q_starts, const Tensor& kv_starts) {
  check_dtype("flash_attention_packed: q", q);
  check_same("flash_attention_packed: k", k, "q", q);
  check_same("flash_attention_packed: v", v, "q", q);
  TORCH_CHECK_VALUE(q.dim() == 3 && k.dim() == 3 && q.sym_size(2) == k.sym_size(2),
                    "flash_attention_packed: q has shape ", q.sym_sizes(), " and k ", k.sym_sizes(),
                    ", expected (N, H, d) and (M, K, d)");
  check_shape("flash_attention_packed: v", v, k.sym_sizes());
  TORCH_CHECK_VALUE(k.sym_size(1) > 0 && q.sym_size(1) % k.sym_size(1) == 0, "flash_attention_packed: q has ",
                    q.sym_size(1), " heads and k ", k.sym_size(1), ", expected a number that the heads of k divide");
  const c10::SymInt head_dim = q.sym_size(2);
  TORCH_CHECK_VALUE(head_dim > 0 && head_dim <= 256 && head_dim % 8 == 0, "flash_attention_packed: head_dim is ",
                    head_dim, ", expected a multiple of 8 up to 256; the backend \"reference\" takes any");
  check_starts("q_starts", q_starts, q, q_starts);
  check_starts("kv_starts", kv_starts, q, q_starts);
}

c10::SymDimVector lse_sizes(const Tensor& q) { return {q.sym_size(1), q.sym_size(0)}; }

void check_backward(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                    const Tensor& lse, const Tensor& q_starts, const Tensor& kv_starts) {
  check(q, k, v, q_starts, kv_starts);
  check_same("flash_attention_packed_backward: dout", dout, "q", q);
  check_same("flash_attention_packed_backward: out", out, "q", q);
  check_shape("flash_attention_packed_backward: dout", dout, q.sym_sizes());
  check_shape("flash_attention_packed_backward: out", out, q.sym_sizes());
  check_shape("flash_attention_packed_backward: lse", lse, lse_sizes(q));
  TORCH_CHECK_VALUE(lse.scalar_type() == at::kFloat, "flash_attention_packed_backward: lse is ", lse.scalar_type(),
                    ", expected float32");
}

std::tuple<Tensor, Tensor> meta(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& q_starts,
                                const Tensor& kv_starts, int64_t, int64_t, bool, double) {
  check(q, k, v, q_starts, kv_starts);
  return {reused_like(q), q.new_empty_symint(lse_sizes(q), q.options().dtype(at::kFloat))};
}

std::tuple<Tensor, Tensor, Tensor> meta_backward(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
                                                 const Tensor& out, const Tensor& lse, const Tensor& q_starts,
                                                 const Tensor& kv_starts, int64_t, int64_t, bool, double) {
  check_backward(dout, q, k, v, out, lse, q_starts, kv_starts);
  return {reused_like(q), reused_like(k), reused_like(v)};
}

// The kernels read what lies between starts: they have to hold together.
void check_values(const char* name, const Tensor& starts, int64_t tokens, int64_t longest) {
  const int64_t *at = starts.const_data_ptr<int64_t>(), *end = at + starts.size(0) - 1;
  TORCH_CHECK_VALUE(*at == 0 && *end == tokens && std::is_sorted(at, end + 1), "flash_attention_packed: ", name,
                    " go from ", *at, " to ", *end, (std::is_sorted(at, end + 1) ? "" : " with steps back"),
                    ", expected rising numbers from 0 to ", tokens, ", the number of tokens");
  int64_t found = 0;
  for (; at < end; ++at) found = std::max(found, at[1] - at[0]);
  TORCH_CHECK_VALUE(found == longest, "flash_attention_packed: the longest sequence by ", name, " is ", found,
                    ", expected that of the arguments, ", longest);
}

// The sequences as the kernels take them, those with most to do first, so that no thread is left with a long one last.
struct Sequences {
  Tensor q_starts, kv_starts;
  std::vector<int64_t> order;
  cpu::Packed packed() const {
    return {q_starts.const_data_ptr<int64_t>(), kv_starts.const_data_ptr<int64_t>(), order.data()};
  }
};

Sequences sequences_of(const Tensor& q, const Tensor& k, const Tensor& q_starts, const Tensor& kv_starts,
                       int64_t longest_q, int64_t longest_kv) {
  Sequences s{q_starts.contiguous(), kv_starts.contiguous(), {}};
  check_values("q_starts", s.q_starts, q.size(0), longest_q);
  check_values("kv_starts", s.kv_starts, k.size(0), longest_kv);
  const cpu::Packed packed = s.packed();
  const auto scores = [&](int64_t i) {
    return (packed.q_starts[i + 1] - packed.q_starts[i]) * (packed.kv_starts[i + 1] - packed.kv_starts[i]);
  };
  s.order.resize(static_cast<size_t>(q_starts.size(0) - 1));
  std::iota(s.order.begin(), s.order.end(), 0);
  std::stable_sort(s.order.begin(), s.order.end(), [&](int64_t i, int64_t j) { return scores(i) > scores(j); });
  return s;
}

// (token, head, ...), of one batch entry.
cpu::Strided side_by_side(const Tensor& x) { return {x.const_data_ptr(), 0, x.stride(0), x.stride(1)}; }

cpu::AttentionShape shape(const Tensor& q, const Tensor& k, const Tensor& q_starts, int64_t longest_q,
                          int64_t longest_kv, bool causal, double scale) {
  return {q_starts.size(0) - 1,     longest_q, longest_kv, q.size(1), k.size(1), q.size(2), causal, 0,
          static_cast<float>(scale)};
}

std::tuple<Tensor, Tensor> forward_cpu(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& q_starts,
                                       const Tensor& kv_starts, int64_t longest_q, int64_t longest_kv, bool causal,
                                       double scale) {
  auto [out, lse] = meta(q, k, v, q_starts, kv_starts, longest_q, longest_kv, causal, scale);
  const Sequences sequences = sequences_of(q, k, q_starts, kv_starts, longest_q, longest_kv);
  const Tensor q1 = last_contiguous(q), k1 = last_contiguous(k), v1 = last_contiguous(v);
  cpu::FlashAttention arguments{};
  arguments.dtype = dtype_of(q), arguments.cache_dtype = cache_dtype_of(k);
  arguments.shape = shape(q, k, q_starts, longest_q, longest_kv, causal, scale);
  arguments.q = side_by_side(q1), arguments.k = side_by_side(k1), arguments.v = side_by_side(v1);
  arguments.out = out.mutable_data_ptr(), arguments.lse = lse.mutable_data_ptr<float>(), arguments.lse_head = q.size(0);
  arguments.packed = sequences.packed();
  cpu::kernels().flash_attention(arguments);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> backward_cpu(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
                                                const Tensor& out, const Tensor& lse, const Tensor& q_starts,
                                                const Tensor& kv_starts, int64_t longest_q, int64_t longest_kv,
                                                bool causal, double scale) {
  auto [dq, dk, dv] = meta_backward(dout, q, k, v, out, lse, q_starts, kv_starts, longest_q, longest_kv, causal, scale);
  const Sequences sequences = sequences_of(q, k, q_starts, kv_starts, longest_q, longest_kv);
  const Tensor q1 = last_contiguous(q), k1 = last_contiguous(k), v1 = last_contiguous(v), out1 = last_contiguous(out);
  const Tensor dout1 = last_contiguous(dout), lse1 = lse.contiguous();
  cpu::FlashAttentionBackward arguments{};
  arguments.dtype = dtype_of(q), arguments.shape = shape(q, k, q_starts, longest_q, longest_kv, causal, scale);
  arguments.q = side_by_side(q1), arguments.k = side_by_side(k1), arguments.v = side_by_side(v1);
  arguments.out = side_by_side(out1), arguments.dout = side_by_side(dout1);
  arguments.lse = lse1.const_data_ptr<float>(), arguments.lse_head = q.size(0);
  arguments.dq = dq.mutable_data_ptr(), arguments.dk = dk.mutable_data_ptr(), arguments.dv = dv.mutable_data_ptr();
  arguments.packed = sequences.packed();
  cpu::kernels().flash_attention_backward(arguments);
  return {dq, dk, dv};
}

std::tuple<Tensor, Tensor> call(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& q_starts,
                                const Tensor& kv_starts, int64_t longest_q, int64_t longest_kv, bool causal,
                                double scale) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("pyalpaca::flash_attention_packed", "")
                             .typed<decltype(forward_cpu)>();
  at::AutoDispatchBelowADInplaceOrView below;
  return op.call(q, k, v, q_starts, kv_starts, longest_q, longest_kv, causal, scale);
}

std::tuple<Tensor, Tensor, Tensor> call_backward(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
                                                 const Tensor& out, const Tensor& lse, const Tensor& q_starts,
                                                 const Tensor& kv_starts, int64_t longest_q, int64_t longest_kv,
                                                 bool causal, double scale) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("pyalpaca::flash_attention_packed_backward", "")
                             .typed<decltype(backward_cpu)>();
  return op.call(dout, q, k, v, out, lse, q_starts, kv_starts, longest_q, longest_kv, causal, scale);
}

struct Gradient : torch::autograd::Function<Gradient> {
  static variable_list forward(AutogradContext*, const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
                               const Tensor& out, const Tensor& lse, const Tensor& q_starts, const Tensor& kv_starts,
                               int64_t longest_q, int64_t longest_kv, bool causal, double scale) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [dq, dk, dv] =
        call_backward(dout, q, k, v, out, lse, q_starts, kv_starts, longest_q, longest_kv, causal, scale);
    return {dq, dk, dv};
  }
  static variable_list backward(AutogradContext*, const variable_list&) {
    no_second_derivative("flash_attention_packed");
    return {};
  }
};

struct Attention : torch::autograd::Function<Attention> {
  static variable_list forward(AutogradContext* context, const Tensor& q, const Tensor& k, const Tensor& v,
                               const Tensor& q_starts, const Tensor& kv_starts, int64_t longest_q, int64_t longest_kv,
                               bool causal, double scale) {
    auto [out, lse] = call(q, k, v, q_starts, kv_starts, longest_q, longest_kv, causal, scale);
    context->save_for_backward({q, k, v, out, lse, q_starts, kv_starts});
    context->mark_non_differentiable({lse});
    context->saved_data["longest_q"] = longest_q;
    context->saved_data["longest_kv"] = longest_kv;
    context->saved_data["causal"] = causal;
    context->saved_data["scale"] = scale;
    return {out, lse};
  }
  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const auto saved = context->get_saved_variables();
    auto [dq, dk, dv] =
        call_backward(gradients[0], saved[0], saved[1], saved[2], saved[3], saved[4], saved[5], saved[6],
                      context->saved_data["longest_q"].toInt(), context->saved_data["longest_kv"].toInt(),
                      context->saved_data["causal"].toBool(), context->saved_data["scale"].toDouble());
    return {dq, dk, dv, Tensor(), Tensor(), Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

std::tuple<Tensor, Tensor> forward_autograd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& q_starts,
                                            const Tensor& kv_starts, int64_t longest_q, int64_t longest_kv, bool causal,
                                            double scale) {
  auto outputs = Attention::apply(q, k, v, q_starts, kv_starts, longest_q, longest_kv, causal, scale);
  return {outputs[0], outputs[1]};
}

std::tuple<Tensor, Tensor, Tensor> backward_autograd(const Tensor& dout, const Tensor& q, const Tensor& k,
                                                     const Tensor& v, const Tensor& out, const Tensor& lse,
                                                     const Tensor& q_starts, const Tensor& kv_starts, int64_t longest_q,
                                                     int64_t longest_kv, bool causal, double scale) {
  auto outputs = Gradient::apply(dout, q, k, v, out, lse, q_starts, kv_starts, longest_q, longest_kv, causal, scale);
  return {outputs[0], outputs[1], outputs[2]};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pyalpaca, m) {
  m.def(
      "flash_attention_packed(Tensor q, Tensor k, Tensor v, Tensor q_starts, Tensor kv_starts, int longest_q, int "
      "longest_kv, bool causal, float scale) -> (Tensor out, Tensor lse)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "flash_attention_packed_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor "
      "q_starts, Tensor kv_starts, int longest_q, int longest_kv, bool causal, float scale) -> (Tensor dq, Tensor dk, "
      "Tensor dv)",
      {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(pyalpaca, Meta, m) {
  m.impl("flash_attention_packed", meta);
  m.impl("flash_attention_packed_backward", meta_backward);
}
TORCH_LIBRARY_IMPL(pyalpaca, CPU, m) {
  m.impl("flash_attention_packed", forward_cpu);
  m.impl("flash_attention_packed_backward", backward_cpu);
}
TORCH_LIBRARY_IMPL(pyalpaca, Autograd, m) {
  m.impl("flash_attention_packed", forward_autograd);
  m.impl("flash_attention_packed_backward", backward_autograd);
}

}  // namespace pyalpaca
