// Picks the kernels of the best instruction set that this processor has.
#include "cpu/kernels.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#define PYALPACA_ISA baseline
#include "cpu/instruction_set.h"
#undef PYALPACA_ISA
#ifdef PYALPACA_X86
#define PYALPACA_ISA avx2
#include "cpu/instruction_set.h"
#undef PYALPACA_ISA
#define PYALPACA_ISA avx512
#include "cpu/instruction_set.h"
#undef PYALPACA_ISA
#endif
#ifdef PYALPACA_AVX512_BF16
#define PYALPACA_ISA avx512_bf16
#include "cpu/instruction_set.h"
#undef PYALPACA_ISA
#endif

namespace pyalpaca::cpu {
namespace {

// One line an operator: a set whose kernel is absent does not compile.
#define PYALPACA_KERNELS(isa)        \
  {                                  \
      #isa,                          \
      isa::rms_norm,                 \
      isa::rms_norm_backward,        \
      isa::rope,                     \
      isa::swiglu,                   \
      isa::swiglu_backward,          \
      isa::adamw,                    \
      isa::sum_of_squares,           \
      isa::flash_attention,          \
      isa::flash_attention_backward, \
      isa::store_cache,              \
      isa::lora_merge,               \
      isa::linear,                   \
      isa::product_sum,              \
      isa::logit_sums,               \
      isa::logit_loss,               \
  }

struct InstructionSet {
  Kernels kernels;
  bool (*present)();
};

#ifdef PYALPACA_X86
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

// From the best to the one that runs on any processor.
constexpr InstructionSet kSets[] = {
#ifdef PYALPACA_AVX512_BF16
    {PYALPACA_KERNELS(avx512_bf16),
     [] { return has_avx512() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni"); }},
#endif
#ifdef PYALPACA_X86
    {PYALPACA_KERNELS(avx512), has_avx512},
    {PYALPACA_KERNELS(avx2), has_avx2},
#endif
    {PYALPACA_KERNELS(baseline), [] { return true; }},
};

// PYALPACA_CPU=baseline (or avx2, avx512, avx512_bf16) asks for a lesser set's kernels, to test them on a processor
// that has more.
const Kernels& pick() {
  const char* asked = std::getenv("PYALPACA_CPU");
  std::string names;
  for (const InstructionSet& set : kSets) {
    if (!set.present()) continue;
    if (asked == nullptr || *asked == 0 || std::strcmp(asked, set.kernels.name) == 0) return set.kernels;
    names += (names.empty() ? "" : ", ") + std::string(set.kernels.name);
  }
  throw std::runtime_error("PYALPACA_CPU is " + std::string(asked) +
                           ", expected one of what this processor has: " + names + "; unset it to have the first");
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& picked = pick();
  return picked;
}

}  // namespace pyalpaca::cpu
