// A matrix as it is stored, and how it becomes fp32: line by line, whatever the type.
#pragma once

#include "cpu/kernels.h"
#include "cpu/vec.h"

namespace pyalpaca::cpu::PYALPACA_ISA {
namespace {

template <class T>
PYALPACA_INLINE void widen_floats(const T* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
  for (; i < count; ++i) to[i] = load_one(from + i);
}

// to[0..count) = elements [from, from + count) of a line; `from` is a multiple of kInt4Block.
inline void widen(const Matrix& m, int64_t line, int64_t from, int64_t count, float* to) {
  const char* data = static_cast<const char*>(m.data);
  switch (m.storage) {
    case Storage::kFloat:
      return widen_floats(reinterpret_cast<const float*>(data) + line * m.stride + from, count, to);
    case Storage::kBFloat16:
      return widen_floats(reinterpret_cast<const BFloat16*>(data) + line * m.stride + from, count, to);
    case Storage::kHalf:
      return widen_floats(reinterpret_cast<const Half*>(data) + line * m.stride + from, count, to);
    case Storage::kInt8: {
      const int8_t* values = reinterpret_cast<const int8_t*>(data) + line * m.stride + from;
      const float* scales = m.scales + line * m.groups;
      for (int64_t i = 0; i < count;) {
        const int64_t group = (from + i) / m.group, end = min(count, (group + 1) * m.group - from);
        for (const float scale = scales[group]; i < end; ++i) to[i] = static_cast<float>(values[i]) * scale;
      }
      return;
    }
    case Storage::kInt4: {
      const uint8_t* bytes = reinterpret_cast<const uint8_t*>(data) + line * m.stride + from / 2;
      const float* scales = m.scales + line * m.groups;
      for (int64_t i = 0; i < count; i += kInt4Block, bytes += kInt4Block / 2) {
        const float scale = scales[(from + i) / m.group];
        float block[kInt4Block];
        for (int64_t j = 0; j < kInt4Block / 2; ++j) {
          block[j] = static_cast<float>((bytes[j] & 15) - 8) * scale;
          block[j + kInt4Block / 2] = static_cast<float>((bytes[j] >> 4) - 8) * scale;
        }
        std::memcpy(to + i, block, sizeof(float) * static_cast<size_t>(min(count - i, kInt4Block)));
      }
      return;
    }
  }
}

}  // namespace
}  // namespace pyalpaca::cpu::PYALPACA_ISA
