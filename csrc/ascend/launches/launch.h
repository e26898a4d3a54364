// The route asc (../CMakeLists.txt): Ascend C as a language of CMake, kernels started with <<<>>>. A launch has the
// name and the arguments of those that the other route generates, so that csrc/ascend/launch knows of neither.
#pragma once

#include "ascend/launch/kernels.h"

// What the compiler's builtin takes: blocks, bytes of unified memory handed out at launch (none), stream. It returns
// nothing: an error shows when the stream is waited for.
#define PYALPACA_LAUNCH(kernel, parameters, arguments)  \
  extern "C" uint32_t aclrtlaunch_##kernel parameters { \
    kernel<<<blocks, 0, stream>>> arguments;            \
    return 0;                                           \
  }

namespace pyalpaca_npu {

// An address as the host hands it to a kernel's GM_ADDR.
static inline uint8_t* bytes(void* address) { return static_cast<uint8_t*>(address); }

}  // namespace pyalpaca_npu
