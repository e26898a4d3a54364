// AdamW over a list of tensors in one pass, and the sum of their gradients' squares.
#include <cmath>

#include "cpu/instruction_set.h"
#include "cpu/kernels.h"
#include "cpu/stream.h"
#include "cpu/threads.h"
#include "cpu/vec.h"

namespace pyalpaca::cpu::PYALPACA_ISA {
namespace {

typedef double Doubles __attribute__((vector_size(8 * PYALPACA_LANES)));

PYALPACA_INLINE Vec square_root(Vec x) {
#if defined(__AVX512F__)
  return as<Vec>(_mm512_sqrt_ps(as<__m512>(x)));
#elif defined(__AVX__)
  return as<Vec>(_mm256_sqrt_ps(as<__m256>(x)));
#else
  for (int i = 0; i < kLanes; ++i) x[i] = std::sqrt(x[i]);
  return x;
#endif
}

// Calls body(tensor, first element, elements, piece) for pieces of all tensors, on all threads. They take the next
// piece each: half a list apart, they would come to the same bank of the memory at once wherever sizes are powers of
// two.
template <class Count, class Body>
void for_pieces(int64_t tensors, const Count& count, const Body& body) {
  int64_t pieces = 0;
  for (int64_t i = 0; i < tensors; ++i) pieces += pieces_of(count(i));
  Queue queue;
  parallel(min(pieces, num_threads()), 1, [&](int64_t, int64_t) {
    int64_t tensor = 0, first = 0;  // of the tensor's pieces
    for (int64_t piece = queue.take(); piece < pieces; piece = queue.take()) {
      while (piece >= first + pieces_of(count(tensor))) {
        first += pieces_of(count(tensor++));
      }
      const int64_t at = (piece - first) * kPiece;
      body(tensor, at, min(count(tensor) - at, kPiece), piece);
    }
  });
}

// The arithmetic of torch's fused AdamW, step by step in its order.
struct Step {
  float gradient_scale, kept, beta1, rest1, beta2, rest2, step_size, root_correction, eps;
};

PYALPACA_INLINE void step_once(const Step& s, Vec& weight, Vec gradient, Vec& mean, Vec& square) {
  gradient = gradient * s.gradient_scale;
  weight = weight * s.kept;
  mean = mean + s.rest1 * (gradient - mean);
  square = s.beta2 * square + s.rest2 * gradient * gradient;
  weight = weight - s.step_size * mean / (square_root(square) / s.root_correction + s.eps);
}

template <class Gradient, class Copy>
void update(const AdamwTensor& a, const Step& s, int64_t begin, int64_t count) {
  float *weight = a.weight + begin, *mean = a.mean + begin, *square = a.square + begin;
  const Gradient* gradient = static_cast<const Gradient*>(a.gradient) + begin;
  Copy* copy = a.copy == nullptr ? nullptr : static_cast<Copy*>(a.copy) + begin;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    Vec w = load(weight + i), m = load(mean + i), v = load(square + i);
    step_once(s, w, load(gradient + i), m, v);
    store(weight + i, w);
    store(mean + i, m);
    store(square + i, v);
    if (copy != nullptr) store(copy + i, w);
  }
  if (i == count) return;
  // A vector too: the result must not depend on where in a tensor, or a rank's share of it, an element stands.
  const int64_t rest = count - i;
  Vec w = load_some(weight + i, rest), m = load_some(mean + i, rest), v = load_some(square + i, rest);
  step_once(s, w, load_some(gradient + i, rest), m, v);
  store_some(weight + i, w, rest);
  store_some(mean + i, m, rest);
  store_some(square + i, v, rest);
  if (copy != nullptr) store_some(copy + i, w, rest);
}

template <class T>
double sum_of_squares(const T* x, int64_t count) {
  Doubles sums[2] = {};
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    for (int u = 0; u < 2; ++u) {
      const Doubles wide = __builtin_convertvector(load(x + i + u * kLanes), Doubles);
      sums[u] += wide * wide;
    }
  }
  sums[0] += sums[1];
  double total = 0.0;
  for (int u = 0; u < kLanes; ++u) total += sums[0][u];
  for (; i < count; ++i) total += static_cast<double>(load_one(x + i)) * static_cast<double>(load_one(x + i));
  return total;
}

}  // namespace

void adamw(const Adamw& a) {
  for_pieces(
      a.count, [&](int64_t i) { return a.tensors[i].count; },
      [&](int64_t i, int64_t begin, int64_t count, int64_t) {
        const AdamwTensor& tensor = a.tensors[i];
        const Step step = {a.gradient_scale,
                           static_cast<float>(1.0 - a.rate * tensor.decay),
                           static_cast<float>(a.beta1),
                           static_cast<float>(1.0 - a.beta1),
                           static_cast<float>(a.beta2),
                           static_cast<float>(1.0 - a.beta2),
                           static_cast<float>(a.rate / (1.0 - std::pow(a.beta1, a.step))),
                           static_cast<float>(std::sqrt(1.0 - std::pow(a.beta2, a.step))),
                           static_cast<float>(a.eps)};
        with_type(tensor.gradient_type, [&](auto gradient) {
          with_type(tensor.copy_type, [&](auto copy) {
            update<typename decltype(gradient)::type, typename decltype(copy)::type>(tensor, step, begin, count);
          });
        });
      });
}

// Each piece sums on its own, and the pieces are summed in their order: the same result for any number of threads.
void sum_of_squares(const SumOfSquares& a) {
  for_pieces(
      a.count, [&](int64_t i) { return a.tensors[i].count; },
      [&](int64_t i, int64_t begin, int64_t count, int64_t piece) {
        with_type(a.tensors[i].dtype, [&](auto type) {
          using T = typename decltype(type)::type;
          a.parts[piece] = sum_of_squares(static_cast<const T*>(a.tensors[i].data) + begin, count);
        });
      });
  int64_t pieces = 0;
  for (int64_t i = 0; i < a.count; ++i) pieces += pieces_of(a.tensors[i].count);
  *a.total = 0.0;
  for (int64_t i = 0; i < pieces; ++i) *a.total += a.parts[i];
}

}  // namespace pyalpaca::cpu::PYALPACA_ISA
