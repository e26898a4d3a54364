// Picks the kernels of the best instruction set that this processor has.
#include "cpu/kernels.h"

#include <cstdlib>
#include <cstring>

#define PYALPACA_ISA baseline
#include "cpu/instruction_set.h"
#undef PYALPACA_ISA
#ifdef PYALPACA_AVX2
#define PYALPACA_ISA avx2
#include "cpu/instruction_set.h"
#undef PYALPACA_ISA
#endif

namespace pyalpaca::cpu {
namespace {

constexpr Kernels kBaseline = {
    "baseline",           baseline::rms_norm,        baseline::rms_norm_backward,
    baseline::rope,       baseline::flash_attention, baseline::flash_attention_backward,
    baseline::lora_merge,
};

#ifdef PYALPACA_AVX2
constexpr Kernels kAvx2 = {
    "avx2",           avx2::rms_norm,        avx2::rms_norm_backward,
    avx2::rope,       avx2::flash_attention, avx2::flash_attention_backward,
    avx2::lora_merge,
};
#endif

// PYALPACA_CPU=baseline asks for the kernels that run on any processor, to test them on one that has more.
const Kernels& pick() {
  const char* asked = std::getenv("PYALPACA_CPU");
  if (asked != nullptr && std::strcmp(asked, "baseline") == 0) return kBaseline;
#ifdef PYALPACA_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return kAvx2;
#endif
  return kBaseline;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& picked = pick();
  return picked;
}

}  // namespace pyalpaca::cpu
