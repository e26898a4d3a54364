// out = softmax(scale q k^T) v and lse, the logsumexp of each row of scores; causal or not, heads of k and v shared by
// groups of heads of q, sequences of one length or packed side by side.
//
// Dao 2023, cut for cube and vector cores that meet only in global memory (which here stays in L2): one cube core and
// two vector cores walk through the same list of stacks of keys, the cube core two stacks ahead with the scores.
#include "flash_forward_cores.h"

#define PYALPACA_FLASH_FORWARD(name, T)                                                                               \
  extern "C" __global__ __aicore__ void name(                                                                         \
      GM_ADDR q, GM_ADDR k, GM_ADDR v, GM_ADDR q_starts, GM_ADDR kv_starts, GM_ADDR out, GM_ADDR lse,                 \
      GM_ADDR workspace, int64_t batch, int64_t q_len, int64_t kv_len, int64_t q_batch_stride, int64_t q_stride,      \
      int64_t q_head_stride, int64_t k_batch_stride, int64_t k_stride, int64_t k_head_stride, int64_t v_batch_stride, \
      int64_t v_stride, int64_t v_head_stride, int64_t lse_batch_stride, int64_t lse_head_stride, int64_t q_offset,   \
      int32_t heads, int32_t kv_heads, int32_t head_dim, int32_t causal, int32_t q_tile, int32_t kv_tile,             \
      int32_t stack, int32_t chunk, int32_t share, float scale) {                                                     \
    KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_MIX_AIC_1_2);                                                                \
    const int64_t width = int64_t{heads} * head_dim;                                                                  \
    const pyalpaca_npu::FlashShape shape{batch,                                                                       \
                                         q_len,                                                                       \
                                         kv_len,                                                                      \
                                         q_batch_stride,                                                              \
                                         q_stride,                                                                    \
                                         q_head_stride,                                                               \
                                         k_batch_stride,                                                              \
                                         k_stride,                                                                    \
                                         k_head_stride,                                                               \
                                         v_batch_stride,                                                              \
                                         v_stride,                                                                    \
                                         v_head_stride,                                                               \
                                         lse_batch_stride,                                                            \
                                         lse_head_stride,                                                             \
                                         q_offset,                                                                    \
                                         heads,                                                                       \
                                         kv_heads,                                                                    \
                                         head_dim,                                                                    \
                                         causal,                                                                      \
                                         q_tile,                                                                      \
                                         kv_tile,                                                                     \
                                         stack,                                                                       \
                                         chunk,                                                                       \
                                         share,                                                                       \
                                         scale,                                                                       \
                                         q_len * width,                                                               \
                                         width,                                                                       \
                                         head_dim,                                                                    \
                                         0,                                                                           \
                                         0,                                                                           \
                                         0};                                                                          \
    pyalpaca_npu::flash_forward_cores<T, T>(shape, q, k, v, q_starts, kv_starts, out, lse, workspace);                \
  }

PYALPACA_FLASH_FORWARD(flash_forward_half, half)
PYALPACA_FLASH_FORWARD(flash_forward_bfloat16, bfloat16_t)
