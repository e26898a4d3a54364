// Root-mean-square normalisation, each row read once from memory (and once more from the cache).
//
// While a row is read again and written, the next one is asked for: otherwise the memory would rest during one half of
// the work and the processor during the other.
#include <cmath>

#include "cpu/instruction_set.h"
#include "cpu/kernels.h"
#include "cpu/stream.h"
#include "cpu/threads.h"
#include "cpu/vec.h"

namespace pyalpaca::cpu::PYALPACA_ISA {
namespace {

constexpr int64_t kGrain = 65536;  // elements that are worth a thread

// Asks for kStep values, to be in the second cache when their turn comes: the first one holds the row at work.
template <class T>
PYALPACA_INLINE void ask_for(const T* p) {
  for (int64_t byte = 0; byte < kStep * static_cast<int64_t>(sizeof(T)); byte += kLine) {
    __builtin_prefetch(reinterpret_cast<const char*>(p) + byte, 0, 2);
  }
}

// Weights and their gradient stand in the order of T here, see order().
template <class T>
float sum_of_squares(const T* x, int64_t width) {
  Vec sums[4] = {};
  int64_t i = 0;
  for (; i + 2 * kStep <= width; i += 2 * kStep) {
    for (int u = 0; u < 2; ++u) {
      const Two value = load_two(x + i + u * kStep);
      sums[2 * u] += value.a * value.a;
      sums[2 * u + 1] += value.b * value.b;
    }
  }
  float rest = 0.0f;
  for (; i < width; ++i) rest += load_one(x + i) * load_one(x + i);
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3])) + rest;
}

template <class T>
void add_row(const T* x, const T* residual, T* h, int64_t width) {
  int64_t i = 0;
  for (; i + kStep <= width; i += kStep) {
    const Two first = load_two(x + i), second = load_two(residual + i);
    put_two<false>(h + i, {first.a + second.a, first.b + second.b});
  }
  for (; i < width; ++i) store_one(h + i, load_one(x + i) + load_one(residual + i));
}

// y = h * rstd * weight, and h itself goes to `sum` if there is one. next_x, next_residual: of the next row.
template <bool kStream, bool kSum, class T>
void forward_row(const T* h, const float* weight, float rstd, T* y, T* sum, const T* next_x, const T* next_residual,
                 int64_t width) {
  int64_t i = 0;
  for (; i + kStep <= width; i += kStep) {
    ask_for(next_x + i);
    if constexpr (kSum) ask_for(next_residual + i);
    const Two x = load_two(h + i), w = load_two(weight + i);
    put_two<kStream>(y + i, {x.a * rstd * w.a, x.b * rstd * w.b});
    if constexpr (kSum) copy_two<kStream>(h + i, sum + i);
  }
  for (; i < width; ++i) {
    store_one(y + i, load_one(h + i) * rstd * weight[i]);
    if constexpr (kSum) sum[i] = h[i];
  }
}

template <bool kStream, bool kSum, class T>
void forward(const RmsNorm& a) {
  parallel(a.rows, max(kGrain / a.width, 1), [&](int64_t begin, int64_t end) {
    float* const weight = scratch(2 * a.width);
    order<T>(a.weight, weight, a.width);
    T* const added = reinterpret_cast<T*>(weight + a.width);
    const auto x = [&](int64_t row) { return static_cast<const T*>(a.x) + row * a.x_stride; };
    const auto residual = [&](int64_t row) {
      return kSum ? static_cast<const T*>(a.residual) + row * a.residual_stride : nullptr;
    };
    for (int64_t row = begin; row < end; ++row) {
      const T* h = x(row);
      if constexpr (kSum) {
        add_row(h, residual(row), added, a.width);
        h = added;
      }
      const float rstd = 1.0f / std::sqrt(sum_of_squares(h, a.width) / static_cast<float>(a.width) + a.eps);
      a.rstd[row] = rstd;
      T* const sum = kSum ? static_cast<T*>(a.sum) + row * a.width : nullptr;
      const int64_t next = min(row + 1, end - 1);
      forward_row<kStream, kSum>(h, weight, rstd, static_cast<T*>(a.y) + row * a.width, sum, x(next), residual(next),
                                 a.width);
    }
    if constexpr (kStream) end_of_stream();
  });
}

// Some rows of the gradient's arguments and results, together: a weight's gradient is loaded and stored once for all.
template <class T>
struct Rows {
  const T *x, *dy, *dsum;
  int64_t x_stride, dy_stride, dsum_stride;
  const float* rstd;
  T* dx;
  int64_t ahead;  // so many rows further on lie the next ones
};

// Of each of the rows, with g = dy * weight:  sum(g * x)
template <int kRows, class T>
void sums_of_products(const Rows<T>& a, const float* weight, int64_t width, float* totals) {
  Vec first[kRows] = {}, second[kRows] = {};
  int64_t i = 0;
  for (; i + kStep <= width; i += kStep) {
    const Two w = load_two(weight + i);
    for (int r = 0; r < kRows; ++r) {
      ask_for(a.x + (r + a.ahead) * a.x_stride + i);
      const Two x = load_two(a.x + r * a.x_stride + i), d = load_two(a.dy + r * a.dy_stride + i);
      first[r] += d.a * w.a * x.a;
      second[r] += d.b * w.b * x.b;
    }
  }
  for (int r = 0; r < kRows; ++r) {
    float rest = 0.0f;
    for (int64_t k = i; k < width; ++k) {
      rest += load_one(a.dy + r * a.dy_stride + k) * weight[k] * load_one(a.x + r * a.x_stride + k);
    }
    totals[r] = sum(first[r] + second[r]) + rest;
  }
}

// With g = dy * weight and n = x * rstd:  dx = rstd * (g - n * mean(g * n)) + dsum,  dweight += dy * n.
template <int kRows, bool kStream, bool kSum, class T>
void backward_rows(const Rows<T>& a, const float* weight, float* dweight, int64_t width) {
  float rstd[kRows], totals[kRows], mean[kRows];
  sums_of_products<kRows>(a, weight, width, totals);
  for (int r = 0; r < kRows; ++r) {
    rstd[r] = a.rstd[r];
    mean[r] = totals[r] * rstd[r] / static_cast<float>(width);
  }
  int64_t i = 0;
  for (; i + kStep <= width; i += kStep) {
    const Two w = load_two(weight + i);
    Two total = load_two(dweight + i);
    for (int r = 0; r < kRows; ++r) {
      ask_for(a.dy + (r + a.ahead) * a.dy_stride + i);
      if constexpr (kSum) ask_for(a.dsum + (r + a.ahead) * a.dsum_stride + i);
      const Two x = load_two(a.x + r * a.x_stride + i), d = load_two(a.dy + r * a.dy_stride + i);
      const Vec first = x.a * rstd[r], second = x.b * rstd[r];
      Two dx = {(d.a * w.a - first * mean[r]) * rstd[r], (d.b * w.b - second * mean[r]) * rstd[r]};
      if constexpr (kSum) {
        const Two more = load_two(a.dsum + r * a.dsum_stride + i);
        dx.a += more.a;
        dx.b += more.b;
      }
      total.a += d.a * first;
      total.b += d.b * second;
      put_two<kStream>(a.dx + r * width + i, dx);
    }
    put_two<false>(dweight + i, total);
  }
  for (; i < width; ++i) {
    for (int r = 0; r < kRows; ++r) {
      const float n = load_one(a.x + r * a.x_stride + i) * rstd[r], d = load_one(a.dy + r * a.dy_stride + i);
      const float more = kSum ? load_one(a.dsum + r * a.dsum_stride + i) : 0.0f;
      store_one(a.dx + r * width + i, (d * weight[i] - n * mean[r]) * rstd[r] + more);
      dweight[i] += d * n;
    }
  }
}

template <bool kStream, bool kSum, class T>
void backward_part(const RmsNormBackward& a, int64_t part) {
  float *const dweight = a.dweight + part * a.width, *const weight = scratch(a.width);
  order<T>(a.weight, weight, a.width);
  std::memset(dweight, 0, static_cast<size_t>(a.width) * sizeof(float));
  const auto rows = [&](int64_t row, int64_t ahead) {
    return Rows<T>{static_cast<const T*>(a.x) + row * a.x_stride,
                   static_cast<const T*>(a.dy) + row * a.dy_stride,
                   kSum ? static_cast<const T*>(a.dsum) + row * a.dsum_stride : nullptr,
                   a.x_stride,
                   a.dy_stride,
                   a.dsum_stride,
                   a.rstd + row,
                   static_cast<T*>(a.dx) + row * a.width,
                   ahead};
  };
  int64_t row = a.rows * part / a.parts;
  const int64_t end = a.rows * (part + 1) / a.parts;
  for (; row + 4 <= end; row += 4) {
    backward_rows<4, kStream, kSum>(rows(row, row + 8 <= end ? 4 : 0), weight, dweight, a.width);
  }
  for (; row < end; ++row) backward_rows<1, kStream, kSum>(rows(row, 0), weight, dweight, a.width);
  restore_order<T>(dweight, a.width);
  if constexpr (kStream) end_of_stream();
}

}  // namespace

void rms_norm(const RmsNorm& a) {
  with_type(a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const int64_t row_bytes = a.width * static_cast<int64_t>(sizeof(T));
    with_constant(streams(a.y, row_bytes, a.rows * row_bytes), [&](auto stream) {
      with_constant(a.residual != nullptr,
                    [&](auto sum) { forward<decltype(stream)::value, decltype(sum)::value, T>(a); });
    });
  });
}

// The rows are cut into `parts` whatever thread runs them, so that dweight is the same sum in every run.
void rms_norm_backward(const RmsNormBackward& a) {
  with_type(a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const int64_t row_bytes = a.width * static_cast<int64_t>(sizeof(T));
    with_constant(streams(a.dx, row_bytes, a.rows * row_bytes), [&](auto stream) {
      with_constant(a.dsum != nullptr, [&](auto sum) {
        parallel(a.parts, 1, [&](int64_t first, int64_t last) {
          for (int64_t part = first; part < last; ++part) {
            backward_part<decltype(stream)::value, decltype(sum)::value, T>(a, part);
          }
        });
      });
    });
  });
  for (int64_t part = 1; part < a.parts; ++part) {
    const float* more = a.dweight + part * a.width;
    for (int64_t i = 0; i < a.width; ++i) a.dweight[i] += more[i];
  }
}

}  // namespace pyalpaca::cpu::PYALPACA_ISA
