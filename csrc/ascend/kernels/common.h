// What the kernels share: rows divided over cores, and copies of rows whose length need not be a multiple of 32 bytes.
#pragma once

#include "kernel_operator.h"

namespace pyalpaca_npu {

using namespace AscendC;

constexpr int32_t kLanes = 64;  // fp32 in one repeat
constexpr int32_t kBlock = 8;   // fp32 in 32 bytes

template <typename T>
struct Wide {
  static constexpr bool needs_cast = true;
};
template <>
struct Wide<float> {
  static constexpr bool needs_cast = false;
};

// An instruction's fields have 8 bits; the emulation sees to it that no value was cut.
__aicore__ inline uint8_t narrow(int32_t value) {
#ifdef ASCENDC_CPU_DEBUG
  ASSERT(value >= 0 && value <= 255);
#endif
  return static_cast<uint8_t>(value);
}

__aicore__ inline int32_t round_up(int32_t value, int32_t step) { return (value + step - 1) / step * step; }

struct Range {
  int64_t begin, end;
};
// This core's part of `total` things: parts differ by one at most.
__aicore__ inline Range part_of_core(int64_t total) {
  const int64_t cores = GetBlockNum(), core = GetBlockIdx();
  const int64_t each = total / cores, more = total % cores;
  const int64_t begin = core * each + (core < more ? core : more);
  return {begin, begin + each + (core < more ? 1 : 0)};
}

// Blocks of 32 bytes from the end of a row's last one to the start of the next row, `pitch` elements after the first.
template <typename T>
__aicore__ inline uint32_t blocks_between(int32_t width, int32_t pitch) {
  const int32_t block = 32 / sizeof(T), rest = pitch - round_up(width, block);
  return rest > 0 ? static_cast<uint32_t>(rest / block) : 0;
}

// Rows of `width` elements, in global memory `stride` apart, in unified memory `pitch` apart: a row and zeros after it.
template <typename T>
__aicore__ inline void load_rows(const LocalTensor<T>& to, const GlobalTensor<T>& from, int32_t rows, int32_t width,
                                 int64_t stride, int32_t pitch) {
  const DataCopyExtParams shape(static_cast<uint16_t>(rows), static_cast<uint32_t>(width * sizeof(T)),
                                static_cast<uint32_t>((stride - width) * sizeof(T)), 0, 0);
  const DataCopyPadExtParams<T> zeros(true, 0, narrow(pitch - width), T(0));
  DataCopyPad(to, from, shape, zeros);
}

// The same with any pitch; what lies between two rows there stays as it is, but for the rest of a row's last block.
template <typename T>
__aicore__ inline void load_rows_apart(const LocalTensor<T>& to, const GlobalTensor<T>& from, int32_t rows,
                                       int32_t width, int64_t stride, int32_t pitch) {
  const DataCopyExtParams shape(static_cast<uint16_t>(rows), static_cast<uint32_t>(width * sizeof(T)),
                                static_cast<uint32_t>((stride - width) * sizeof(T)), blocks_between<T>(width, pitch),
                                0);
  DataCopyPad(to, from, shape, DataCopyPadExtParams<T>(false, 0, 0, T(0)));
}

template <typename T>
__aicore__ inline void store_rows_apart(const GlobalTensor<T>& to, const LocalTensor<T>& from, int32_t rows,
                                        int32_t width, int64_t stride, int32_t pitch) {
  const DataCopyExtParams shape(static_cast<uint16_t>(rows), static_cast<uint32_t>(width * sizeof(T)),
                                blocks_between<T>(width, pitch), static_cast<uint32_t>((stride - width) * sizeof(T)),
                                0);
  DataCopyPad(to, from, shape);
}

// Rows side by side in global memory, and in unified memory as near as their blocks allow.
template <typename T>
__aicore__ inline void store_rows(const GlobalTensor<T>& to, const LocalTensor<T>& from, int32_t rows, int32_t width) {
  store_rows_apart(to, from, rows, width, width, width);
}

// The events of a tile in one of two places (or in one of one): filled, computed where it lies, emptied.
struct TileEvents {
  TEventID filled[2], computed[2], emptied[2];

  __aicore__ inline void open(TPipe& pipe, int32_t places = 2) {
    for (int32_t i = 0; i < places; ++i) {
      filled[i] = pipe.AllocEventID<HardEvent::MTE2_V>();
      computed[i] = pipe.AllocEventID<HardEvent::V_MTE3>();
      emptied[i] = pipe.AllocEventID<HardEvent::MTE3_MTE2>();
      SetFlag<HardEvent::MTE3_MTE2>(emptied[i]);
    }
  }
  __aicore__ inline void close(TPipe& pipe, int32_t places = 2) {
    for (int32_t i = 0; i < places; ++i) {
      WaitFlag<HardEvent::MTE3_MTE2>(emptied[i]);
      pipe.ReleaseEventID<HardEvent::MTE2_V>(filled[i]);
      pipe.ReleaseEventID<HardEvent::V_MTE3>(computed[i]);
      pipe.ReleaseEventID<HardEvent::MTE3_MTE2>(emptied[i]);
    }
  }
};

}  // namespace pyalpaca_npu
