// dq, dk and dv of attention, from its lse and the sums delta of dout * out: scores are computed again (Dao 2023).
//
// dk and dv are the same in every run; dq is summed in fp32 where all cores add to it, in no fixed order, and rounded
// in a launch of its own (flash_rows.cpp).
#include "flash_backward_cube.h"
#include "flash_backward_vector.h"

#define PYALPACA_FLASH_BACKWARD(name, T)                                                                              \
  extern "C" __global__ __aicore__ void name(                                                                         \
      GM_ADDR dout, GM_ADDR q, GM_ADDR k, GM_ADDR v, GM_ADDR lse, GM_ADDR delta, GM_ADDR q_starts, GM_ADDR kv_starts, \
      GM_ADDR dq, GM_ADDR dk, GM_ADDR dv, GM_ADDR workspace, int64_t batch, int64_t q_len, int64_t kv_len,            \
      int64_t q_batch_stride, int64_t q_stride, int64_t q_head_stride, int64_t k_batch_stride, int64_t k_stride,      \
      int64_t k_head_stride, int64_t v_batch_stride, int64_t v_stride, int64_t v_head_stride,                         \
      int64_t dout_batch_stride, int64_t dout_stride, int64_t dout_head_stride, int64_t lse_batch_stride,             \
      int64_t lse_head_stride, int64_t q_offset, int32_t heads, int32_t kv_heads, int32_t head_dim, int32_t causal,   \
      int32_t side, int32_t q_block, int32_t kv_block, int32_t chunk, float scale) {                                  \
    KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_MIX_AIC_1_2);                                                                \
    AscendC::TPipe pipe;                                                                                              \
    const pyalpaca_npu::FlashGradientShape shape{{batch,                                                              \
                                                  q_len,                                                              \
                                                  kv_len,                                                             \
                                                  q_batch_stride,                                                     \
                                                  q_stride,                                                           \
                                                  q_head_stride,                                                      \
                                                  k_batch_stride,                                                     \
                                                  k_stride,                                                           \
                                                  k_head_stride,                                                      \
                                                  v_batch_stride,                                                     \
                                                  v_stride,                                                           \
                                                  v_head_stride,                                                      \
                                                  lse_batch_stride,                                                   \
                                                  lse_head_stride,                                                    \
                                                  q_offset,                                                           \
                                                  heads,                                                              \
                                                  kv_heads,                                                           \
                                                  head_dim,                                                           \
                                                  causal,                                                             \
                                                  side,                                                               \
                                                  side,                                                               \
                                                  kv_block,                                                           \
                                                  chunk,                                                              \
                                                  1,                                                                  \
                                                  scale,                                                              \
                                                  0,                                                                  \
                                                  0,                                                                  \
                                                  0,                                                                  \
                                                  0,                                                                  \
                                                  0,                                                                  \
                                                  0},                                                                 \
                                                 dout_batch_stride,                                                   \
                                                 dout_stride,                                                         \
                                                 dout_head_stride,                                                    \
                                                 q_block};                                                            \
    if ASCEND_IS_AIC {                                                                                                \
      pyalpaca_npu::FlashBackwardCube<T> op(pipe, shape);                                                             \
      op.init(dout, q, k, v, dq, workspace, q_starts, kv_starts);                                                     \
      op.run();                                                                                                       \
    }                                                                                                                 \
    if ASCEND_IS_AIV {                                                                                                \
      pyalpaca_npu::FlashBackwardVector<T> op(pipe, shape);                                                           \
      op.init(lse, delta, dk, dv, workspace, q_starts, kv_starts);                                                    \
      op.run();                                                                                                       \
    }                                                                                                                 \
  }

PYALPACA_FLASH_BACKWARD(flash_backward_half, half)
PYALPACA_FLASH_BACKWARD(flash_backward_bfloat16, bfloat16_t)
