// The kernels of one instruction set. Included once per set by kernels.cpp and by each kernel file, which is compiled
// with PYALPACA_ISA naming its namespace. Kernel files keep all else in anonymous namespaces and use next to nothing of
// the standard library: an inline function compiled for AVX2 must not be the copy that the linker keeps for everybody.
#include "cpu/kernels.h"

namespace pyalpaca::cpu::PYALPACA_ISA {

void rms_norm(const RmsNorm& a);
void rms_norm_backward(const RmsNormBackward& a);
void rope(const Rope& a);
void swiglu(const Swiglu& a);
void swiglu_backward(const SwigluBackward& a);
void adamw(const Adamw& a);
void sum_of_squares(const SumOfSquares& a);
void flash_attention(const FlashAttention& a);
void flash_attention_backward(const FlashAttentionBackward& a);
void store_cache(const StoreCache& a);
void lora_merge(const LoraMerge& a);
void linear(const Linear& a);
void product_sum(const ProductSum& a);
void logit_sums(const LogitSums& a);
void logit_loss(const LogitLoss& a);

}  // namespace pyalpaca::cpu::PYALPACA_ISA
