// Numbers of one type as numbers of another, by any of the seven rounding modes.
#pragma once

#include "machine.h"

namespace emu {

// Converts `count` elements; `mode` is a RoundMode. What is too large becomes infinite, or the nearest integer there
// is.
void convert(Dtype to, uint8_t* target, Dtype from, const uint8_t* source, uint64_t count, int mode);

template <typename T>
T load(const uint8_t* at) {
  T value;
  __builtin_memcpy(&value, at, sizeof(T));
  return value;
}
template <typename T>
void store(uint8_t* at, T value) {
  __builtin_memcpy(at, &value, sizeof(T));
}

}  // namespace emu
