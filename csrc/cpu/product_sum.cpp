// A sum of matrix products in fp32 in the memory of a half type and as much beside it: no fp32 copy of the sum exists.
//
// Until the last product is added the upper 16 bits of each sum lie where the result is going to, the lower 16 in a
// second matrix; then the result takes their place, rounded once.
#include "cpu/instruction_set.h"
#include "cpu/kernels.h"
#include "cpu/matmul.h"

namespace pyalpaca::cpu::PYALPACA_ISA {
namespace {

PYALPACA_INLINE Vec join(const uint16_t* upper, const uint16_t* lower, int64_t count) {
  Halves halves[2] = {};
  const size_t bytes = 2 * static_cast<size_t>(min(count, kLanes));
  if (count >= kLanes) {
    std::memcpy(&halves[0], upper, sizeof(Halves));
    std::memcpy(&halves[1], lower, sizeof(Halves));
  } else {
    std::memcpy(&halves[0], upper, bytes);
    std::memcpy(&halves[1], lower, bytes);
  }
  return as<Vec>(__builtin_convertvector(halves[0], Bits) << 16 | __builtin_convertvector(halves[1], Bits));
}

PYALPACA_INLINE void split(Vec x, uint16_t* upper, uint16_t* lower, int64_t count) {
  const Bits bits = as<Bits>(x);
  const Halves halves[2] = {__builtin_convertvector(bits >> 16, Halves),
                            __builtin_convertvector(bits & 0xffff, Halves)};
  if (count >= kLanes) {
    std::memcpy(upper, &halves[0], sizeof(Halves));
    std::memcpy(lower, &halves[1], sizeof(Halves));
  } else {
    std::memcpy(upper, &halves[0], 2 * static_cast<size_t>(count));
    std::memcpy(lower, &halves[1], 2 * static_cast<size_t>(count));
  }
}

}  // namespace

void product_sum(const ProductSum& a) {
  const Linear& p = a.product;
  with_type(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (sizeof(T) == 2) {
      matmul({p.a, p.b, p.rows, p.columns, p.depth}, p.panels,
             [&](int64_t row, int64_t rows, int64_t column, int64_t columns, const float* c) {
               for (int64_t i = 0; i < rows; ++i, c += kBlockColumns) {
                 const int64_t begin = (row + i) * p.columns + column;
                 uint16_t *upper = static_cast<uint16_t*>(p.out) + begin, *lower = a.lower + begin;
                 for (int64_t j = 0; j < columns; j += kLanes) {
                   const int64_t count = columns - j;
                   const Vec x = p.add ? join(upper + j, lower + j, count) + load(c + j) : load(c + j);
                   if (a.last) {
                     store_first(reinterpret_cast<T*>(upper) + j, x, count);
                   } else {
                     split(x, upper + j, lower + j, count);
                   }
                 }
               }
             });
    }
  });
}

}  // namespace pyalpaca::cpu::PYALPACA_ISA
