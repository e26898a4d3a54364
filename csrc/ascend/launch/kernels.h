// The launches of our kernels, as the toolkit generates them: blocks, stream, the kernel's arguments.
#pragma once

#include <cstdint>

typedef void* aclrtStream;  // as acl_base_rt.h has it, which not every toolkit brings

extern "C" {
#define PYALPACA_DECLARE(type)                                                                                         \
  uint32_t aclrtlaunch_rms_norm_##type(uint32_t, aclrtStream, void*, void*, void*, void*, void*, void*, int64_t,       \
                                       int64_t, int32_t, int32_t, float, float);                                       \
  uint32_t aclrtlaunch_rms_norm_backward_##type(uint32_t, aclrtStream, void*, void*, void*, void*, void*, void*,       \
                                                void*, int64_t, int64_t, int64_t, int32_t, int32_t, int32_t, float);   \
  uint32_t aclrtlaunch_rms_norm_dgamma_##type(uint32_t, aclrtStream, void*, void*, int32_t, int32_t, int32_t);         \
  uint32_t aclrtlaunch_rope_##type(uint32_t, aclrtStream, void*, void*, void*, void*, void*, void*, void*, void*,      \
                                   void*, void*, void*, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, \
                                   int64_t, int32_t, int32_t, int32_t, int32_t, int32_t, int32_t);                     \
  uint32_t aclrtlaunch_swiglu_##type(uint32_t, aclrtStream, void*, void*, void*, int64_t, int64_t, int64_t, int32_t,   \
                                     int32_t, int32_t);                                                                \
  uint32_t aclrtlaunch_swiglu_backward_##type(uint32_t, aclrtStream, void*, void*, void*, void*, void*, int64_t,       \
                                              int64_t, int64_t, int64_t, int32_t, int32_t, int32_t);
PYALPACA_DECLARE(half)
PYALPACA_DECLARE(bfloat16)
PYALPACA_DECLARE(float)
#undef PYALPACA_DECLARE
#define PYALPACA_DECLARE(type)                                                                                       \
  uint32_t aclrtlaunch_flash_forward_##type(                                                                         \
      uint32_t, aclrtStream, void*, void*, void*, void*, void*, void*, void*, void*, int64_t, int64_t, int64_t,      \
      int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,    \
      int32_t, int32_t, int32_t, int32_t, int32_t, int32_t, int32_t, int32_t, int32_t, float);                       \
  uint32_t aclrtlaunch_flash_delta_##type(uint32_t, aclrtStream, void*, void*, void*, void*, int64_t, int64_t,       \
                                          int64_t, int64_t, int64_t, int32_t, int32_t);                              \
  uint32_t aclrtlaunch_flash_backward_##type(uint32_t, aclrtStream, void*, void*, void*, void*, void*, void*, void*, \
                                             void*, void*, void*, void*, void*, int64_t, int64_t, int64_t, int64_t,  \
                                             int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, \
                                             int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int32_t, int32_t, \
                                             int32_t, int32_t, int32_t, int32_t, int32_t, int32_t, float);           \
  uint32_t aclrtlaunch_flash_round_##type(uint32_t, aclrtStream, void*, void*, int64_t, float);                      \
  uint32_t aclrtlaunch_flash_decode_##type(uint32_t, aclrtStream, void*, void*, void*, void*, void*, void*, void*,   \
                                           int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,   \
                                           int64_t, int64_t, int64_t, int32_t, int32_t, int32_t, int32_t, int32_t,   \
                                           int32_t, int32_t, float);                                                 \
  uint32_t aclrtlaunch_flash_merge_##type(uint32_t, aclrtStream, void*, void*, void*, void*, int64_t, int32_t, int32_t);
PYALPACA_DECLARE(half)
PYALPACA_DECLARE(bfloat16)
#undef PYALPACA_DECLARE
}
