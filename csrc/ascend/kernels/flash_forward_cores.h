// Attention by the two kinds of core of a group, each its part; `Out` is the type of the results.
#pragma once

#include "flash_forward_cube.h"
#include "flash_forward_vector.h"

namespace pyalpaca_npu {

template <typename T, typename Out>
__aicore__ inline void flash_forward_cores(const FlashShape& shape, GM_ADDR q, GM_ADDR k, GM_ADDR v, GM_ADDR q_starts,
                                           GM_ADDR kv_starts, GM_ADDR out, GM_ADDR lse, GM_ADDR workspace) {
  TPipe pipe;
  if ASCEND_IS_AIC {
    FlashForwardCube<T> op(pipe, shape);
    op.init(q, k, v, workspace, q_starts, kv_starts);
    op.run();
  }
  if ASCEND_IS_AIV {
    FlashForwardVector<T, Out> op(pipe, shape);
    op.init(out, lse, workspace, q_starts, kv_starts);
    op.run();
  }
}

}  // namespace pyalpaca_npu
