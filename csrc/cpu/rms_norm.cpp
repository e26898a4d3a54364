// Root-mean-square normalisation, each row read once from memory (and once more from the cache).
#include <cmath>

#include "cpu/instruction_set.h"
#include "cpu/kernels.h"
#include "cpu/threads.h"
#include "cpu/vec.h"

namespace pyalpaca::cpu::PYALPACA_ISA {
namespace {

constexpr int64_t kGrain = 65536;  // elements that are worth a thread

template <class T>
float sum_of_squares(const T* x, int64_t width) {
  Vec sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= width; i += 4 * kLanes) {
    for (int u = 0; u < 4; ++u) {
      const Vec value = load(x + i + u * kLanes);
      sums[u] += value * value;
    }
  }
  float rest = 0.0f;
  for (; i < width; ++i) rest += load_one(x + i) * load_one(x + i);
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3])) + rest;
}

template <class T>
void forward_row(const T* x, const float* weight, float rstd, T* y, int64_t width) {
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) store(y + i, load(x + i) * rstd * load(weight + i));
  for (; i < width; ++i) store_one(y + i, load_one(x + i) * rstd * weight[i]);
}

// With g = dy * weight and n = x * rstd:  dx = rstd * (g - n * mean(g * n)),  dweight += dy * n.
template <class T>
void backward_row(const T* x, const T* dy, const float* weight, float rstd, T* dx, float* dweight, int64_t width) {
  Vec sums[2] = {};
  int64_t i = 0;
  for (; i + 2 * kLanes <= width; i += 2 * kLanes) {
    for (int u = 0; u < 2; ++u) {
      const int64_t at = i + u * kLanes;
      sums[u] += load(dy + at) * load(weight + at) * load(x + at);
    }
  }
  float rest = 0.0f;
  for (; i < width; ++i) rest += load_one(dy + i) * weight[i] * load_one(x + i);
  const float mean = (sum(sums[0] + sums[1]) + rest) * rstd / static_cast<float>(width);

  for (i = 0; i + kLanes <= width; i += kLanes) {
    const Vec n = load(x + i) * rstd, d = load(dy + i);
    store(dx + i, (d * load(weight + i) - n * mean) * rstd);
    store(dweight + i, load(dweight + i) + d * n);
  }
  for (; i < width; ++i) {
    const float n = load_one(x + i) * rstd, d = load_one(dy + i);
    store_one(dx + i, (d * weight[i] - n * mean) * rstd);
    dweight[i] += d * n;
  }
}

}  // namespace

void rms_norm(const RmsNorm& a) {
  with_type(a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    parallel(a.rows, max(kGrain / a.width, 1), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
        const float mean = sum_of_squares(x, a.width) / static_cast<float>(a.width);
        a.rstd[row] = 1.0f / std::sqrt(mean + a.eps);
        forward_row(x, a.weight, a.rstd[row], static_cast<T*>(a.y) + row * a.width, a.width);
      }
    });
  });
}

// The rows are cut into `parts` whatever thread runs them, so that dweight is the same sum in every run.
void rms_norm_backward(const RmsNormBackward& a) {
  with_type(a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    parallel(a.parts, 1, [&](int64_t first, int64_t last) {
      for (int64_t part = first; part < last; ++part) {
        float* dweight = a.dweight + part * a.width;
        std::memset(dweight, 0, static_cast<size_t>(a.width) * sizeof(float));
        for (int64_t row = a.rows * part / a.parts; row < a.rows * (part + 1) / a.parts; ++row) {
          backward_row(static_cast<const T*>(a.x) + row * a.x_stride, static_cast<const T*>(a.dy) + row * a.dy_stride,
                       a.weight, a.rstd[row], static_cast<T*>(a.dx) + row * a.width, dweight, a.width);
        }
      }
    });
  });
  for (int64_t part = 1; part < a.parts; ++part) {
    const float* more = a.dweight + part * a.width;
    for (int64_t i = 0; i < a.width; ++i) a.dweight[i] += more[i];
  }
}

}  // namespace pyalpaca::cpu::PYALPACA_ISA
