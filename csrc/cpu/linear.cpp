// A linear layer, forward and both gradients: a product of matrices of any type, stored in the type of its result.
#include "cpu/instruction_set.h"
#include "cpu/kernels.h"
#include "cpu/linear_few.h"
#include "cpu/matmul.h"

namespace pyalpaca::cpu::PYALPACA_ISA {
namespace {

constexpr int64_t kMostFew = 8;         // rows from which on it pays to copy the weight into panels
constexpr int64_t kFewGrain = 1 << 17;  // products that are worth a thread

template <class T>
void store_row(const float* from, int64_t count, bool add, T* to) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vec x = load(from + i);  // a block's rows are whole vectors
    store_first(to + i, add ? load_first(to + i, count - i) + x : x, count - i);
  }
}

void few_rows(const Linear& a) {
  const int64_t width = round_up(a.depth, kInt4Block);
  float* x = scratch(a.rows * width);
  for (int64_t t = 0; t < a.rows; ++t) {
    widen(a.a, t, 0, a.depth, x + t * width);
    for (int64_t k = a.depth; k < width; ++k) x[t * width + k] = 0.0f;
  }
  with_type(a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const int64_t groups = (a.columns + kFewRows - 1) / kFewRows;
    parallel(groups, max(kFewGrain / (kFewRows * a.depth * a.rows), 1), [&](int64_t begin, int64_t end) {
      for (int64_t group = begin; group < end; ++group) {
        const int64_t line = group * kFewRows, lines = min(a.columns - line, kFewRows);
        float y[kMostFew][kFewRows];
        few(a.b, line, lines, x, width, a.rows, a.depth, y[0], kFewRows);
        for (int64_t t = 0; t < a.rows; ++t) {
          for (int64_t r = 0; r < lines; ++r) store_one(static_cast<T*>(a.out) + t * a.columns + line + r, y[t][r]);
        }
      }
    });
  });
}

}  // namespace

void linear(const Linear& a) {
  if (a.rows <= kMostFew && !a.a.transposed && !a.b.transposed && !a.add) return few_rows(a);
  with_type(a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    matmul({a.a, a.b, a.rows, a.columns, a.depth}, a.panels,
           [&](int64_t row, int64_t rows, int64_t column, int64_t columns, const float* c) {
             T* out = static_cast<T*>(a.out) + row * a.columns + column;
             for (int64_t i = 0; i < rows; ++i) store_row(c + i * kBlockColumns, columns, a.add, out + i * a.columns);
           });
  });
}

}  // namespace pyalpaca::cpu::PYALPACA_ISA
