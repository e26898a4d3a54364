// Enough of the runtime's header to read the declarations of our launches without torch_npu.
#pragma once

typedef void* aclrtStream;
