// Ascend C on the host: exactly the functions our kernels use, for g++, in place of the toolkit's header of this name.
//
// A kernel compiles unchanged against either. Here each call becomes an entry in the queue of its pipe, with the bytes
// it reads and writes; the machine (src/) runs the queues in any order that the kernel's flags allow and stops at a
// fault.
#pragma once

#include "emu/copy.h"
#include "emu/pipe.h"
#include "emu/sync.h"
#include "emu/tensor.h"
#include "emu/types.h"
#include "emu/vector.h"
#include "emu/vector_more.h"
