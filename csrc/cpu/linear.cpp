// A linear layer, forward and both gradients: a product of matrices of any type, stored in the type of its result.
#include "cpu/instruction_set.h"
#include "cpu/kernels.h"
#include "cpu/linear_digits.h"
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

// Calls products(line, lines, y) for each `step` lines of the weight, on several threads, and stores y[row][line].
template <int64_t step, class Products>
void store_few(const Linear& a, const Products& products) {
  with_type(a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const int64_t groups = (a.columns + step - 1) / step;
    parallel(groups, max(kFewGrain / (step * a.depth * a.rows), 1), [&](int64_t begin, int64_t end) {
      for (int64_t group = begin; group < end; ++group) {
        const int64_t line = group * step, lines = min(a.columns - line, step);
        float y[kMostFew][step];
        products(line, lines, y[0]);
        for (int64_t t = 0; t < a.rows; ++t) {
          for (int64_t r = 0; r < lines; ++r) store_one(static_cast<T*>(a.out) + t * a.columns + line + r, y[t][r]);
        }
      }
    });
  });
}

#ifdef __AVX512VNNI__
// A weight of integers; a token that is not finite is multiplied as floats are. False if the weight's groups do not
// fit.
template <class D>
bool few_rows_by_digits(const Linear& a, const float* x, int64_t width) {
  if (!by_digits<D>(a.b)) return false;
  const int64_t chunks = (a.depth + D::numbers - 1) / D::numbers;
  constexpr auto floats = static_cast<int64_t>(sizeof(DigitChunk<D>) / sizeof(float));
  auto* const digits = reinterpret_cast<DigitChunk<D>*>(scratch(a.rows * chunks * floats, 1));
  bool finite[kMostFew];
  for (int64_t t = 0; t < a.rows; ++t) finite[t] = to_digits<D>(x + t * width, a.depth, digits + t * chunks);
  const int64_t bytes = D::halves == 2 ? round_up(a.depth, kInt4Block) / 2 : a.depth;
  const auto lines_by_digits = a.b.groups == 1 ? digit_lines<D, true> : digit_lines<D, false>;
  store_few<kDigitRows>(a, [&](int64_t line, int64_t lines, float* y) {
    for (int64_t t = 0; t < a.rows; ++t, y += kDigitRows) {
      if (finite[t]) {
        lines_by_digits(a.b, line, lines, bytes, digits + t * chunks, y);
        continue;
      }
      for (int64_t r = 0; r < lines; r += kFewRows) {
        few(a.b, false, line + r, min(lines - r, kFewRows), x + t * width, width, 1, a.depth, y + r, kDigitRows);
      }
    }
  });
  return true;
}
#endif

void few_rows(const Linear& a) {
  const int64_t width = round_up(a.depth, kInt4Block);
  const bool both = in_pairs({a.a, a.b, a.rows, a.columns, a.depth});
  float* x = scratch(a.rows * width);
  for (int64_t t = 0; t < a.rows; ++t) {
    if (both) {
      std::memset(x + t * width, 0, sizeof(float) * static_cast<size_t>(width));
      fetch(a.a, t, 0, a.depth, both, x + t * width);
      continue;
    }
    widen(a.a, t, 0, a.depth, x + t * width);
    for (int64_t k = a.depth; k < width; ++k) x[t * width + k] = 0.0f;
    if (a.b.storage == Storage::kBFloat16) order<BFloat16>(x + t * width, x + t * width, width);
  }
#ifdef __AVX512VNNI__
  if (a.a.storage == Storage::kFloat) {
    if (few_rows_by_digits<Digital<Storage::kInt8, 3>>(a, x, width)) return;
    if (few_rows_by_digits<Digital<Storage::kInt4, 3>>(a, x, width)) return;
  } else {
    if (few_rows_by_digits<Digital<Storage::kInt8, 2>>(a, x, width)) return;
    if (few_rows_by_digits<Digital<Storage::kInt4, 2>>(a, x, width)) return;
  }
#endif
  store_few<kFewRows>(a, [&](int64_t line, int64_t lines, float* y) {
    few(a.b, both, line, lines, x, width, a.rows, a.depth, y, kFewRows);
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
