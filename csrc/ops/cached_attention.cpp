// store_cache(x (B, S, K, d), cache (B, T, K, d), scales fp32 (B, T, K) if the cache is int8, start): x becomes the
// cache's positions from `start` on. cached_attention(q (B, S, H, d), k, v and their scales, length, scale) -> like q:
// the last queries of a sequence of `length` over such a cache.
#include "ops/common.h"

namespace pyalpaca {
namespace {

using OptionalTensor = std::optional<Tensor>;

void check_cache(const std::string& name, const Tensor& cache, const OptionalTensor& scales, const Tensor& x) {
  const bool int8 = cache.scalar_type() == at::kChar;
  TORCH_CHECK_VALUE(int8 || is_supported(cache.scalar_type()), name, " is ", cache.scalar_type(),
                    ", expected float32, bfloat16, float16 or int8");
  TORCH_CHECK_VALUE(cache.device() == x.device() && cache.dim() == 4 && cache.sym_size(0) == x.sym_size(0) &&
                        cache.sym_size(3) == x.sym_size(3) && cache.stride(3) == 1,
                    name, " has shape ", cache.sym_sizes(), " on ", cache.device(),
                    ", expected (B, T, K, d), d contiguous, with batch, head_dim and device of ", x.sym_sizes(), " on ",
                    x.device());
  TORCH_CHECK_VALUE(int8 == scales.has_value(), name, " is ", cache.scalar_type(), " and its scales are ",
                    scales.has_value() ? "given" : "absent", ", expected scales for int8 and only for it");
  if (!int8) return;
  check_shape((name + " scales").c_str(), *scales, cache.sym_sizes().slice(0, 3));
  TORCH_CHECK_VALUE(scales->scalar_type() == at::kFloat && scales->device() == x.device(), name, " scales are ",
                    scales->scalar_type(), " on ", scales->device(), ", expected float32 on ", x.device());
}

void check_head_dim(const char* name, const Tensor& x) {
  check_dtype(name, x);
  TORCH_CHECK_VALUE(x.dim() == 4, name, " has shape ", x.sym_sizes(), ", expected four dimensions");
  const c10::SymInt d = x.sym_size(3);
  TORCH_CHECK_VALUE(d > 0 && d <= 256 && d % 8 == 0, name, " has head_dim ", d,
                    ", expected a multiple of 8 up to 256; the backend \"reference\" takes any");
}

void check_store(const Tensor& x, const Tensor& cache, const OptionalTensor& scales, int64_t start) {
  check_head_dim("store_cache: x", x);
  check_cache("store_cache: cache", cache, scales, x);
  TORCH_CHECK_VALUE(x.sym_size(2) == cache.sym_size(2) && start >= 0 && start + x.sym_size(1) <= cache.sym_size(1),
                    "store_cache: x has shape ", x.sym_sizes(), " for position ", start, " of a cache of ",
                    cache.sym_sizes(), ", expected as many heads and room for it");
}

void store_meta(const Tensor& x, const Tensor& cache, const OptionalTensor& scales, int64_t start) {
  check_store(x, cache, scales, start);
}

void store_cpu(const Tensor& x, const Tensor& cache, const OptionalTensor& scales, int64_t start) {
  check_store(x, cache, scales, start);
  const Tensor x1 = last_contiguous(x);
  const Tensor part = cache.narrow(1, start, x.size(1));
  cpu::StoreCache arguments{};
  arguments.dtype = dtype_of(x), arguments.cache_dtype = cache_dtype_of(cache);
  arguments.x = strided(x1), arguments.cache = strided(part);
  if (scales.has_value()) arguments.scales = strided(scales->narrow(1, start, x.size(1)));
  arguments.batch = x.size(0), arguments.tokens = x.size(1);
  arguments.heads = x.size(2), arguments.head_dim = x.size(3);
  cpu::kernels().store_cache(arguments);
}

Tensor attention_meta(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& k_scales,
                      const OptionalTensor& v_scales, int64_t length, double) {
  check_head_dim("cached_attention: q", q);
  check_cache("cached_attention: k", k, k_scales, q);
  check_cache("cached_attention: v", v, v_scales, q);
  check_same("cached_attention: v", v, "k", k);
  check_shape("cached_attention: v", v, k.sym_sizes());
  TORCH_CHECK_VALUE(k.sym_size(2) > 0 && q.sym_size(2) % k.sym_size(2) == 0, "cached_attention: q has ", q.sym_size(2),
                    " heads and k ", k.sym_size(2), ", expected a number that the heads of k divide");
  TORCH_CHECK_VALUE(q.sym_size(1) <= length && length <= k.sym_size(1), "cached_attention: the length is ", length,
                    ", expected from ", q.sym_size(1), ", the queries, to ", k.sym_size(1), ", the cache");
  return reused_like(q);
}

Tensor attention_cpu(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& k_scales,
                     const OptionalTensor& v_scales, int64_t length, double scale) {
  Tensor out = attention_meta(q, k, v, k_scales, v_scales, length, scale);
  const Tensor q1 = last_contiguous(q);
  Tensor lse = at::empty({q.size(0), q.size(2), q.size(1)}, q.options().dtype(at::kFloat));
  cpu::FlashAttention arguments{};
  arguments.dtype = dtype_of(q), arguments.cache_dtype = cache_dtype_of(k);
  arguments.shape = {q.size(0), q.size(1),          length,
                     q.size(2), k.size(2),          q.size(3),
                     true,      length - q.size(1), static_cast<float>(scale)};
  arguments.q = strided(q1), arguments.k = strided(k), arguments.v = strided(v);
  if (k_scales.has_value()) arguments.k_scales = strided(*k_scales), arguments.v_scales = strided(*v_scales);
  arguments.out = out.mutable_data_ptr(), arguments.lse = lse.mutable_data_ptr<float>(), arguments.lse_head = q.size(1);
  cpu::kernels().flash_attention(arguments);
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pyalpaca, m) {
  m.def("store_cache(Tensor x, Tensor(a!) cache, Tensor(b!)? scales, int start) -> ()", {at::Tag::pt2_compliant_tag});
  m.def(
      "cached_attention(Tensor q, Tensor k, Tensor v, Tensor? k_scales, Tensor? v_scales, int length, float scale) -> "
      "Tensor",
      {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(pyalpaca, Meta, m) {
  m.impl("store_cache", store_meta);
  m.impl("cached_attention", attention_meta);
}
TORCH_LIBRARY_IMPL(pyalpaca, CPU, m) {
  m.impl("store_cache", store_cpu);
  m.impl("cached_attention", attention_cpu);
}

}  // namespace pyalpaca
