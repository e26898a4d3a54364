// The softmax of a row of logits and its gradient, each in one pass over memory: a block of a row stays in the nearest
// cache while its largest value and its exponentials are taken (Milakov and Gimelshein 2018).
#include <cmath>

#include "cpu/instruction_set.h"
#include "cpu/kernels.h"
#include "cpu/stream.h"
#include "cpu/threads.h"

namespace pyalpaca::cpu::PYALPACA_ISA {
namespace {

constexpr int64_t kBlock = 2048;              // logits; a multiple of kStep
constexpr int64_t kGrain = int64_t{1} << 15;  // logits that are worth a thread
constexpr float kInfinity = __builtin_huge_valf();

struct Sum {
  float top = -kInfinity, total = 0.0f;  // the largest value, and the sum of exp(value - top)
};

// A block, `count` of whose values count, padded to whole vectors: NaN is passed over for the largest value, not in the
// sum.
PYALPACA_INLINE void add_block(const float* values, int64_t count, Sum& sum_of_row) {
  Vec tops = splat(sum_of_row.top);
  for (int64_t j = 0; j < count; j += kLanes) tops = larger(load(values + j), tops);
  const float top = max(tops), zero = top == -kInfinity ? 0.0f : top;
  Vec total = {};
  for (int64_t j = 0; j < count; j += kLanes) total += exp(load(values + j) - zero);
  sum_of_row.total = sum_of_row.total * exp(splat(sum_of_row.top - zero))[0] + sum(total);
  sum_of_row.top = top;
}

template <class T>
PYALPACA_INLINE void widen_block(const T* from, int64_t count, float* to) {
  int64_t j = 0;
  for (; j + kStep <= count; j += kStep) {
    const Two two = load_two(from + j);
    store(to + j, two.a), store(to + j + kLanes, two.b);
  }
  for (; j < count; j += kLanes) {
    store(to + j, load_first(from + j, count - j));
    for (int64_t i = count - j; i < kLanes; ++i) to[j + i] = -kInfinity;
  }
}

template <class T>
void softmax_row(const T* row, int64_t columns, float* top, float* total) {
  alignas(64) float block[kBlock];
  Sum found;
  for (int64_t c = 0; c < columns; c += kBlock) {
    const int64_t count = min(columns - c, kBlock);
    widen_block(row + c, count, block);
    add_block(block, count, found);
  }
  *top = found.top, *total = found.total;
}

template <class T>
void gradient_row(T* row, int64_t columns, float top, float total, float scale, int64_t label) {
  const float factor = scale / total;
  const float probability = label < 0 ? 0.0f : exp(splat(load_one(row + label) - top))[0] * factor;
  int64_t c = 0;
  for (; c + kStep <= columns; c += kStep) {
    const Two two = load_two(row + c);
    put_two<false>(row + c, {exp(two.a - top) * factor, exp(two.b - top) * factor});
  }
  for (; c < columns; c += kLanes) {
    store_first(row + c, exp(load_first(row + c, columns - c) - top) * factor, columns - c);
  }
  if (label >= 0) store_one(row + label, probability - scale);
}

template <class F>
PYALPACA_INLINE void each_row(const LogitRows& a, const F& f) {
  with_type(a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    parallel(a.rows, max(kGrain / max(a.columns, 1), 1), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t label = a.labels[i] - a.start;
        f(i, static_cast<T*>(a.logits) + i * a.columns, label >= 0 && label < a.columns ? label : -1);
      }
    });
  });
}

}  // namespace

void logit_sums(const LogitSums& a) {
  each_row(a.rows, [&](int64_t i, auto* row, int64_t label) {
    softmax_row(row, a.rows.columns, a.top + i, a.total + i);
    a.target[i] = label < 0 ? 0.0f : load_one(row + label);
  });
}

void logit_loss(const LogitLoss& a) {
  each_row(a.rows, [&](int64_t i, auto* row, int64_t label) {
    const bool ignored = a.rows.labels[i] == kIgnored;
    a.losses[i] = ignored ? 0.0f : std::log(a.total[i]) + a.top[i] - a.target[i];
    if (!a.gradient) return;
    if (ignored) {  // whatever its logits are
      std::memset(row, 0, static_cast<size_t>(a.rows.columns) * sizeof(*row));
    } else {
      gradient_row(row, a.rows.columns, a.top[i], a.total[i], a.scale, label);
    }
  });
}

}  // namespace pyalpaca::cpu::PYALPACA_ISA
