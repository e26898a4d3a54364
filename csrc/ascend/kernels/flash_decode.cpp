// Attention of one new token over a long cache, bound by reading that cache once: the heads that share a head of keys
// are the rows of one tile, and keys are split so that all cores read. Each split leaves its result and lse in fp32;
// flash_merge.cpp weighs them by their lse.
#include "flash_forward_cores.h"

// q, parts (splits, B, H, d) and part_lse (splits, B, H) have the heads that share keys side by side; lengths, if
// given, says how many keys each sequence has.
#define PYALPACA_FLASH_DECODE(name, T)                                                                          \
  extern "C" __global__ __aicore__ void name(                                                                   \
      GM_ADDR q, GM_ADDR k, GM_ADDR v, GM_ADDR lengths, GM_ADDR parts, GM_ADDR part_lse, GM_ADDR workspace,     \
      int64_t batch, int64_t kv_len, int64_t q_batch_stride, int64_t q_head_stride, int64_t k_batch_stride,     \
      int64_t k_stride, int64_t k_head_stride, int64_t v_batch_stride, int64_t v_stride, int64_t v_head_stride, \
      int64_t split, int32_t heads, int32_t kv_heads, int32_t head_dim, int32_t q_tile, int32_t kv_tile,        \
      int32_t stack, int32_t chunk, float scale) {                                                              \
    KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_MIX_AIC_1_2);                                                          \
    const int64_t group = heads / kv_heads, width = int64_t{heads} * head_dim;                                  \
    const pyalpaca_npu::FlashShape shape{batch,                                                                 \
                                         group,                                                                 \
                                         kv_len,                                                                \
                                         q_batch_stride,                                                        \
                                         q_head_stride,                                                         \
                                         group * q_head_stride,                                                 \
                                         k_batch_stride,                                                        \
                                         k_stride,                                                              \
                                         k_head_stride,                                                         \
                                         v_batch_stride,                                                        \
                                         v_stride,                                                              \
                                         v_head_stride,                                                         \
                                         heads,                                                                 \
                                         group,                                                                 \
                                         0,                                                                     \
                                         kv_heads,                                                              \
                                         kv_heads,                                                              \
                                         head_dim,                                                              \
                                         0,                                                                     \
                                         q_tile,                                                                \
                                         kv_tile,                                                               \
                                         stack,                                                                 \
                                         chunk,                                                                 \
                                         1,                                                                     \
                                         scale,                                                                 \
                                         width,                                                                 \
                                         head_dim,                                                              \
                                         group * head_dim,                                                      \
                                         split,                                                                 \
                                         batch * width,                                                         \
                                         batch * heads};                                                        \
    pyalpaca_npu::flash_forward_cores<T, float>(shape, q, k, v, nullptr, lengths, parts, part_lse, workspace);  \
  }

PYALPACA_FLASH_DECODE(flash_decode_half, half)
PYALPACA_FLASH_DECODE(flash_decode_bfloat16, bfloat16_t)
