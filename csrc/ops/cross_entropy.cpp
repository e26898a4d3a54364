// The cross entropy of logits that a head has just made, in their own memory, and the sum of the head's gradients over
// chunks of tokens.
//
// logit_sums(logits (T, V), labels int64 (T), start) -> fp32 (3, T): the largest logit, the sum of exp(logit - largest)
// and the label's logit, 0 where it is not among the V from `start` on. logit_loss_(logits, labels, start, sums, scale,
// gradient) -> fp32 (T): log(sums[1]) + sums[0] - sums[2], 0 for the label -100; if `gradient`, the logits become scale
// x its gradient. linear_dweight_split(dy (T, N), x (T, K), of a half type) -> total like x (N, K), lower int16 (N, K):
// the upper and lower halves of dy^T x in fp32. linear_dweight_add_split_(total, lower, dy, x, last) adds another one;
// with the last one total becomes the sum itself, rounded.
#include "ops/common.h"
#include "ops/product.h"

namespace pyalpaca {
namespace {

void check_logits(const std::string& name, const Tensor& logits, const Tensor& labels) {
  check_dtype((name + ": logits").c_str(), logits);
  TORCH_CHECK_VALUE(logits.dim() == 2, name, ": logits have shape ", logits.sym_sizes(), ", expected (T, V)");
  check_shape((name + ": labels").c_str(), labels, {logits.sym_size(0)});
  TORCH_CHECK_VALUE(labels.scalar_type() == at::kLong && labels.device() == logits.device(), name, ": labels are ",
                    labels.scalar_type(), " on ", labels.device(), ", expected int64 on ", logits.device());
}

void check_contiguous(const char* name, const Tensor& x) {
  TORCH_CHECK_VALUE(x.is_contiguous(), name, " has strides ", x.strides(), ", expected a contiguous tensor");
}

cpu::LogitRows rows_of_logits(const Tensor& logits, const Tensor& labels, int64_t start) {
  return {dtype_of(logits),
          const_cast<void*>(logits.const_data_ptr()),
          labels.const_data_ptr<int64_t>(),
          start,
          logits.size(0),
          logits.size(1)};
}

Tensor sums_meta(const Tensor& logits, const Tensor& labels, int64_t) {
  check_logits("logit_sums", logits, labels);
  return at::empty_symint({3, logits.sym_size(0)}, logits.options().dtype(at::kFloat));
}

Tensor sums_cpu(const Tensor& logits, const Tensor& labels, int64_t start) {
  const Tensor sums = sums_meta(logits, labels, start);
  const Tensor logits1 = logits.contiguous(), labels1 = labels.contiguous();
  float* to = sums.mutable_data_ptr<float>();
  const int64_t rows = logits.size(0);
  cpu::kernels().logit_sums({rows_of_logits(logits1, labels1, start), to, to + rows, to + 2 * rows});
  return sums;
}

Tensor loss_meta(Tensor& logits, const Tensor& labels, int64_t, const Tensor& sums, double, bool) {
  check_logits("logit_loss_", logits, labels);
  check_shape("logit_loss_: sums", sums, {3, logits.sym_size(0)});
  TORCH_CHECK_VALUE(sums.scalar_type() == at::kFloat && sums.device() == logits.device(), "logit_loss_: sums are ",
                    sums.scalar_type(), " on ", sums.device(), ", expected float32 on ", logits.device());
  return at::empty_symint({logits.sym_size(0)}, sums.options());
}

Tensor loss_cpu(Tensor& logits, const Tensor& labels, int64_t start, const Tensor& sums, double scale, bool gradient) {
  const Tensor losses = loss_meta(logits, labels, start, sums, scale, gradient);
  check_contiguous("logit_loss_: logits", logits);
  const Tensor labels1 = labels.contiguous(), sums1 = sums.contiguous();
  const float* from = sums1.const_data_ptr<float>();
  const int64_t rows = logits.size(0);
  cpu::kernels().logit_loss({rows_of_logits(logits, labels1, start), from, from + rows, from + 2 * rows,
                             static_cast<float>(scale), gradient, losses.mutable_data_ptr<float>()});
  return losses;
}

void check_split(const std::string& name, const Tensor& dy, const Tensor& x) {
  TORCH_CHECK_VALUE(dy.dim() == 2 && x.dim() == 2 && dy.sym_size(0) == x.sym_size(0), name, ": dy has shape ",
                    dy.sym_sizes(), " and x ", x.sym_sizes(), ", expected (T, N) and (T, K)");
  check_same((name + ": dy").c_str(), dy, "x", x);
  TORCH_CHECK_VALUE(x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kHalf, name, ": x is ", x.scalar_type(),
                    ", expected bfloat16 or float16");
}

std::tuple<Tensor, Tensor> split_meta(const Tensor& dy, const Tensor& x) {
  check_split("linear_dweight_split", dy, x);
  const c10::SymInt sizes[] = {dy.sym_size(1), x.sym_size(1)};
  return {reused_empty(sizes, x.options()), reused_empty(sizes, x.options().dtype(at::kShort))};
}

void add_split_meta(Tensor& total, Tensor& lower, const Tensor& dy, const Tensor& x, bool) {
  check_split("linear_dweight_add_split_", dy, x);
  check_same("linear_dweight_add_split_: total", total, "x", x);
  check_shape("linear_dweight_add_split_: total", total, {dy.sym_size(1), x.sym_size(1)});
  check_shape("linear_dweight_add_split_: lower", lower, total.sym_sizes());
  TORCH_CHECK_VALUE(lower.scalar_type() == at::kShort && lower.device() == x.device(),
                    "linear_dweight_add_split_: lower is ", lower.scalar_type(), " on ", lower.device(),
                    ", expected int16 on ", x.device());
}

void add_product(const Tensor& total, const Tensor& lower, const Tensor& dy, const Tensor& x, bool first, bool last) {
  if (total.numel() == 0) return;
  const Tensor dy_lines = last_contiguous(dy), x_lines = last_contiguous(x);
  const int64_t rows = dy.size(1), depth = x.size(0);
  const Tensor panels = reused_empty({cpu::panel_floats(rows, depth)}, x.options().dtype(at::kFloat));
  cpu::kernels().product_sum(
      {{transposed(matrix(dy_lines)), transposed(matrix(x_lines)), dtype_of(total), total.mutable_data_ptr(), !first,
        rows, x.size(1), depth, panels.mutable_data_ptr<float>()},
       static_cast<uint16_t*>(lower.mutable_data_ptr()),
       last});
}

std::tuple<Tensor, Tensor> split_cpu(const Tensor& dy, const Tensor& x) {
  auto [total, lower] = split_meta(dy, x);
  if (x.size(0) == 0) {
    total.zero_(), lower.zero_();
  } else {
    add_product(total, lower, dy, x, /*first=*/true, /*last=*/false);
  }
  return {total, lower};
}

void add_split_cpu(Tensor& total, Tensor& lower, const Tensor& dy, const Tensor& x, bool last) {
  add_split_meta(total, lower, dy, x, last);
  check_contiguous("linear_dweight_add_split_: total", total);
  check_contiguous("linear_dweight_add_split_: lower", lower);
  TORCH_CHECK_VALUE(x.size(0) > 0, "linear_dweight_add_split_: x has shape ", x.sizes(), ", expected tokens");
  add_product(total, lower, dy, x, /*first=*/false, last);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pyalpaca, m) {
  m.def("logit_sums(Tensor logits, Tensor labels, int start) -> Tensor", {at::Tag::pt2_compliant_tag});
  m.def("logit_loss_(Tensor(a!) logits, Tensor labels, int start, Tensor sums, float scale, bool gradient) -> Tensor",
        {at::Tag::pt2_compliant_tag});
  m.def("linear_dweight_split(Tensor dy, Tensor x) -> (Tensor, Tensor)", {at::Tag::pt2_compliant_tag});
  m.def("linear_dweight_add_split_(Tensor(a!) total, Tensor(b!) lower, Tensor dy, Tensor x, bool last) -> ()",
        {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(pyalpaca, Meta, m) {
  m.impl("logit_sums", sums_meta);
  m.impl("logit_loss_", loss_meta);
  m.impl("linear_dweight_split", split_meta);
  m.impl("linear_dweight_add_split_", add_split_meta);
}
TORCH_LIBRARY_IMPL(pyalpaca, CPU, m) {
  m.impl("logit_sums", sums_cpu);
  m.impl("logit_loss_", loss_cpu);
  m.impl("linear_dweight_split", split_cpu);
  m.impl("linear_dweight_add_split_", add_split_cpu);
}

}  // namespace pyalpaca
