// The kernels on a thread pool that ThreadSanitizer can see, each compared with its own result on one thread.
//
// Built and run by `python tests/ops/sanitize.py thread`; it ends with 0 if no race was found and all results are
// equal.
#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "cpu/instruction_set.h"
#include "cpu/threads.h"

namespace pyalpaca::cpu {
namespace {

int64_t threads = 1;

// Workers that wait for a call's parts, as those of an OpenMP runtime do.
class Pool {
 public:
  explicit Pool(int64_t workers) {
    for (int64_t i = 0; i < workers; ++i) workers_.emplace_back([this] { work(); });
  }
  ~Pool() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }
  void run(std::vector<std::function<void()>> parts) {
    std::unique_lock<std::mutex> lock(mutex_);
    left_ = parts.size();
    parts_ = std::move(parts);
    wake_.notify_all();
    done_.wait(lock, [this] { return left_ == 0; });
  }

 private:
  void work() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      wake_.wait(lock, [this] { return stop_ || !parts_.empty(); });
      if (parts_.empty()) return;
      const std::function<void()> part = std::move(parts_.back());
      parts_.pop_back();
      lock.unlock();
      part();
      lock.lock();
      if (--left_ == 0) done_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::function<void()>> parts_;
  size_t left_ = 0;
  bool stop_ = false;
  std::vector<std::thread> workers_;
};

}  // namespace

int64_t num_threads() { return threads; }
int64_t last_level_cache() { return 1 << 16; }  // so that small results are streamed too

void parallel_for(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  static Pool pool(4);
  const int64_t parts = std::min(threads, (count + grain - 1) / grain);
  if (count <= 0) return;
  if (parts <= 1) return body(0, count, context);
  std::vector<std::function<void()>> calls;
  for (int64_t i = 0; i < parts; ++i) {
    calls.push_back([=] { body(count * i / parts, count * (i + 1) / parts, context); });
  }
  pool.run(std::move(calls));
}

float* scratch(int64_t floats, int slot) {
  thread_local std::vector<float> slots[2];
  std::vector<float>& memory = slots[slot];
  if (memory.size() < static_cast<size_t>(floats) + 16) memory.resize(static_cast<size_t>(floats) + 16);
  return memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64 / sizeof(float);
}

}  // namespace pyalpaca::cpu

namespace {

using namespace pyalpaca::cpu;
using Floats = std::vector<float>;

Floats numbers(int64_t count, uint32_t seed) {
  Floats values(static_cast<size_t>(count));
  for (float& value : values) {
    seed = seed * 1664525u + 1013904223u;
    value = static_cast<float>(seed >> 8) / static_cast<float>(1 << 23) - 1.0f;
  }
  return values;
}

// Results of `call` on one thread and on four; false if they differ by more than `tolerance`.
bool same(const char* name, int64_t size, const std::function<void(float*)>& call, float tolerance = 0.0f) {
  Floats found[2];
  for (int i = 0; i < 2; ++i) {
    threads = i == 0 ? 1 : 4;
    found[i].resize(static_cast<size_t>(size));
    call(found[i].data());
  }
  bool equal = std::memcmp(found[0].data(), found[1].data(), found[0].size() * sizeof(float)) == 0;
  if (tolerance > 0.0f) {
    equal = std::equal(found[0].begin(), found[0].end(), found[1].begin(),
                       [&](float a, float b) { return std::abs(a - b) <= tolerance; });
  }
  std::printf("%-34s %s\n", name, equal ? "ok" : "differs between one thread and four");
  return equal;
}

bool rows_are_the_same() {
  const int64_t rows = 700, width = 192, size = rows * width;
  const Floats x = numbers(size, 1), y = numbers(size, 2), z = numbers(size, 3), weight = numbers(width, 4);
  bool ok = same("add_rms_norm", 2 * size + rows, [&](float* out) {
    baseline::rms_norm({Dtype::kFloat, x.data(), width, y.data(), width, weight.data(), out, out + size, out + 2 * size,
                        rows, width, 1e-6f});
  });
  const Floats rstd(static_cast<size_t>(rows), 0.5f);
  ok &= same("rms_norm_backward", size + width, [&](float* out) {
    Floats dweight(static_cast<size_t>(4 * width));
    baseline::rms_norm_backward({Dtype::kFloat, x.data(), width, y.data(), width, z.data(), width, weight.data(),
                                 rstd.data(), out, dweight.data(), rows, width, 4});
    std::memcpy(out + size, dweight.data(), static_cast<size_t>(width) * sizeof(float));
  });
  ok &= same("swiglu", size, [&](float* out) {
    baseline::swiglu({Dtype::kFloat, x.data(), y.data(), width, width, out, rows, width});
  });
  ok &= same("swiglu_backward", 2 * size, [&](float* out) {
    baseline::swiglu_backward(
        {Dtype::kFloat, z.data(), x.data(), y.data(), width, width, width, out, out + size, rows, width});
  });
  return ok;
}

bool heads_are_the_same() {
  const int64_t batch = 2, tokens = 150, heads = 4, head_dim = 32, width = heads * head_dim;
  const int64_t size = batch * tokens * width;
  const Floats q = numbers(size, 1), k = numbers(size, 2), v = numbers(size, 3), dout = numbers(size, 4);
  const Floats cos = numbers(tokens * head_dim / 2, 5), sin = numbers(tokens * head_dim / 2, 6);
  bool ok = same("rope", 2 * size, [&](float* out) {
    Rope a{};
    a.q = {q.data(), tokens * width, width, head_dim, out, heads};
    a.k = {k.data(), tokens * width, width, head_dim, out + size, heads};
    a.cos = cos.data(), a.sin = sin.data();
    a.batch = batch, a.tokens = tokens, a.head_dim = head_dim;
    baseline::rope(a);
  });
  const int64_t scores = batch * heads * tokens;
  const auto strided = [&](const float* data) { return Strided{data, tokens * width, width, head_dim}; };
  AttentionShape shape{};
  shape.batch = batch, shape.queries = tokens, shape.keys = tokens, shape.heads = heads, shape.kv_heads = heads;
  shape.head_dim = head_dim, shape.causal = true, shape.scale = 0.2f;
  const auto forward = [&](float* out) {
    FlashAttention a{};
    a.shape = shape, a.q = strided(q.data()), a.k = strided(k.data()), a.v = strided(v.data());
    a.out = out, a.lse = out + size, a.lse_head = tokens;
    baseline::flash_attention(a);
  };
  ok &= same("flash_attention", size + scores, forward);
  Floats result(static_cast<size_t>(size + scores));
  forward(result.data());
  ok &= same("flash_attention_backward", 3 * size, [&](float* out) {
    FlashAttentionBackward a{};
    a.shape = shape, a.q = strided(q.data()), a.k = strided(k.data()), a.v = strided(v.data());
    a.out = strided(result.data()), a.dout = strided(dout.data()), a.lse = result.data() + size, a.lse_head = tokens;
    a.dq = out, a.dk = out + size, a.dv = out + 2 * size;
    baseline::flash_attention_backward(a);
  });
  return ok;
}

bool sequences_are_the_same() {
  const int64_t starts[] = {0, 120, 121, 121, 200, 300}, order[] = {0, 4, 3, 1, 2}, tokens = 300;
  const int64_t heads = 4, kv_heads = 2, head_dim = 32, size = tokens * heads * head_dim, kv_size = size / 2;
  const Floats q = numbers(size, 1), k = numbers(kv_size, 2), v = numbers(kv_size, 3), dout = numbers(size, 4);
  const auto strided = [&](const float* data, int64_t rows) { return Strided{data, 0, rows * head_dim, head_dim}; };
  const AttentionShape shape = {5, 120, 120, heads, kv_heads, head_dim, true, 0, 0.2f};
  const auto forward = [&](float* out) {
    FlashAttention a{};
    a.shape = shape, a.packed = {starts, starts, order};
    a.q = strided(q.data(), heads), a.k = strided(k.data(), kv_heads), a.v = strided(v.data(), kv_heads);
    a.out = out, a.lse = out + size, a.lse_head = tokens;
    baseline::flash_attention(a);
  };
  bool ok = same("flash_attention, packed", size + heads * tokens, forward);
  Floats result(static_cast<size_t>(size + heads * tokens));
  forward(result.data());
  ok &= same("flash_attention_backward, packed", size + 2 * kv_size, [&](float* out) {
    FlashAttentionBackward a{};
    a.shape = shape, a.packed = {starts, starts, order};
    a.q = strided(q.data(), heads), a.k = strided(k.data(), kv_heads), a.v = strided(v.data(), kv_heads);
    a.out = strided(result.data(), heads), a.dout = strided(dout.data(), heads);
    a.lse = result.data() + size, a.lse_head = tokens;
    a.dq = out, a.dk = out + size, a.dv = out + size + kv_size;
    baseline::flash_attention_backward(a);
  });
  return ok;
}

bool caches_are_the_same() {
  const int64_t batch = 2, tokens = 2048, heads = 8, kv_heads = 2, head_dim = 64, row = kv_heads * head_dim;
  const int64_t size = batch * tokens * row, scales = batch * tokens * kv_heads;
  const Floats x = numbers(size, 1), q = numbers(batch * heads * head_dim, 2);
  bool ok = true;
  for (const CacheDtype dtype : {CacheDtype::kFloat, CacheDtype::kInt8}) {
    const bool int8 = dtype == CacheDtype::kInt8;
    const auto fill = [&](float* out) {
      StoreCache a{};
      a.cache_dtype = dtype, a.x = {x.data(), tokens * row, row, head_dim},
      a.cache = {out, tokens * row, row, head_dim};
      if (int8) a.scales = {out + size, tokens * kv_heads, kv_heads, 1};
      a.batch = batch, a.tokens = tokens, a.heads = kv_heads, a.head_dim = head_dim;
      baseline::store_cache(a);
    };
    ok &= same(int8 ? "store_cache, int8" : "store_cache", size + scales, fill);
    Floats cache(static_cast<size_t>(size + scales));
    fill(cache.data());
    const auto decode = [&](float* out) {
      FlashAttention a{};
      // A cache that is long enough to be cut among threads.
      a.cache_dtype = dtype, a.shape = {batch, 1, tokens, heads, kv_heads, head_dim, true, tokens - 1, 0.125f};
      a.q = {q.data(), heads * head_dim, heads * head_dim, head_dim};
      a.k = a.v = {cache.data(), tokens * row, row, head_dim};
      if (int8) a.k_scales = a.v_scales = {cache.data() + size, tokens * kv_heads, kv_heads, 1};
      a.out = out, a.lse = out + batch * heads * head_dim, a.lse_head = 1;
      baseline::flash_attention(a);
    };
    // More threads cut the keys into more parts, which are summed in another order.
    const char* name = int8 ? "decode_attention, int8" : "decode_attention";
    ok &= same(name, batch * heads * (head_dim + 1), decode, 1e-5f);
  }
  return ok;
}

bool products_are_the_same() {
  const int64_t columns = 300, depth = 512, most = 500;
  const Floats x = numbers(most * depth, 1), weight = numbers(columns * depth, 2), scale = numbers(columns, 3);
  bool ok = true;
  for (const int64_t rows : {int64_t{1}, int64_t{5}, most}) {
    for (const Storage storage : {Storage::kFloat, Storage::kInt8}) {
      const char* name = storage == Storage::kInt8 ? "linear, int8" : "linear";
      ok &= same(name, rows * columns, [&](float* out) {
        Floats panels(static_cast<size_t>(panel_floats(rows, depth)) + 16);
        Linear a{};
        a.a = {Storage::kFloat, x.data(), depth};
        a.b = {storage, weight.data(), depth};
        if (storage == Storage::kInt8) a.b.scales = scale.data(), a.b.group = depth, a.b.groups = 1;
        a.out = out, a.rows = rows, a.columns = columns, a.depth = depth, a.panels = panels.data();
        baseline::linear(a);
      });
    }
  }
  return ok;
}

bool logits_are_the_same() {
  const int64_t rows = 300, columns = 700, width = 96, size = rows * columns;
  Floats logits = numbers(size, 1);
  const Floats x = numbers(rows * width, 2);
  std::vector<int64_t> labels(static_cast<size_t>(rows), 5);
  const auto rows_of = [&](void* data, Dtype dtype) { return LogitRows{dtype, data, labels.data(), 3, rows, columns}; };
  Floats sums(static_cast<size_t>(3 * rows));
  bool ok = same("logit_sums", 3 * rows, [&](float* out) {
    baseline::logit_sums({rows_of(logits.data(), Dtype::kFloat), out, out + rows, out + 2 * rows});
    sums.assign(out, out + 3 * rows);
  });
  ok &= same("logit_loss", size + rows, [&](float* out) {
    std::memcpy(out, logits.data(), logits.size() * sizeof(float));
    const float *top = sums.data(), *total = top + rows, *target = total + rows;
    baseline::logit_loss({rows_of(out, Dtype::kFloat), top, total, target, 0.5f, true, out + size});
  });
  ok &= same("product_sum", columns * width, [&](float* out) {  // the result, then the lower halves
    std::memset(out, 0, static_cast<size_t>(columns * width) * sizeof(float));
    uint16_t* const halves = reinterpret_cast<uint16_t*>(out);
    Floats panels(static_cast<size_t>(panel_floats(columns, rows)) + 16);
    for (const bool first : {true, false}) {
      Linear a{};
      a.a = {Storage::kFloat, logits.data(), columns, true}, a.b = {Storage::kFloat, x.data(), width, true};
      a.dtype = Dtype::kBFloat16, a.out = halves, a.add = !first;
      a.rows = columns, a.columns = width, a.depth = rows, a.panels = panels.data();
      baseline::product_sum({a, halves + columns * width, !first});
    }
  });
  return ok;
}

bool lists_are_the_same() {
  const int64_t counts[] = {100000, 7, 40000}, total = 140007;
  const Floats gradient = numbers(total, 1), start = numbers(total, 2);
  bool ok = same("adamw", 3 * total, [&](float* out) {
    std::memcpy(out, start.data(), start.size() * sizeof(float));
    std::vector<AdamwTensor> tensors;
    for (int64_t i = 0, at = 0; i < 3; at += counts[i++]) {
      tensors.push_back({out + at, out + total + at, out + 2 * total + at, gradient.data() + at, Dtype::kFloat, nullptr,
                         Dtype::kFloat, counts[i], 0.1});
    }
    baseline::adamw({tensors.data(), 3, 1, 0.1, 0.9, 0.99, 1e-8, 1.0f});
  });
  ok &= same("sum_of_squares", 2, [&](float* out) {
    std::vector<Flat> tensors;
    int64_t pieces = 0;
    for (int64_t i = 0, at = 0; i < 3; at += counts[i++]) {
      tensors.push_back({gradient.data() + at, Dtype::kFloat, counts[i]});
      pieces += pieces_of(counts[i]);
    }
    std::vector<double> parts(static_cast<size_t>(pieces));
    double sum = 0.0;
    baseline::sum_of_squares({tensors.data(), 3, parts.data(), &sum});
    std::memcpy(out, &sum, sizeof(sum));
  });
  return ok;
}

}  // namespace

int main() {
  const bool ok = rows_are_the_same() & heads_are_the_same() & sequences_are_the_same() & caches_are_the_same() &
                  products_are_the_same() & logits_are_the_same() & lists_are_the_same();
  return ok ? 0 : 1;
}
