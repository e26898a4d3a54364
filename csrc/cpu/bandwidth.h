// Copying and reading memory as fast as it goes: the limits that the benchmark of the kernels holds them against,
// counted as STREAM does (McCalpin 1995).
#pragma once

#include <cstdint>

namespace pyalpaca::cpu {

// Copies on torch's threads, past the caches where the processor can and `to` is aligned to 16 bytes.
void copy_memory(const void* from, void* to, int64_t bytes);

// Reads everything on torch's threads: the exclusive or of its 8-byte words, the last filled up with zeros.
uint64_t read_memory(const void* from, int64_t bytes);

}  // namespace pyalpaca::cpu
