// How swiglu and its gradient are cut: cores, and rows by columns of a tile.
#pragma once

#include "budget.h"

namespace pyalpaca_npu {

constexpr int64_t kMostGatedRows = 128, kFewestGatedColumns = 256;

struct SwigluTiling {
  int32_t cores = 0;  // 0: these shapes can't be served
  int32_t tile_rows = 0, tile_columns = 0;
};

// Two buffers of each of `inputs`, and fp32 copies where they are not fp32; two more of fp32 (one, forward).
inline int64_t swiglu_bytes(int64_t rows, int64_t columns, int64_t size, int64_t inputs) {
  const int64_t tile = rows * round_up_to(columns, 32 / size);
  return handed_out({2 * inputs * tile * size, ((size < 4 ? inputs : 0) + inputs - 1) * tile * 4});
}

// As many elements as a copy of full bandwidth needs, whole rows if they are that short; every core has some if it can.
inline SwigluTiling swiglu_tiling(int64_t rows, int64_t width, int64_t size, bool backward, int64_t cores) {
  SwigluTiling tiling;
  if (rows < 1 || width < 1 || width > INT32_MAX / 2) return tiling;
  const int64_t inputs = backward ? 3 : 2;
  int64_t most = 16 * 1024 / size;
  while (swiglu_bytes(1, most, size, inputs) > kUnifiedMemory) most -= 64;
  int64_t chunks = divide_up(width, most);
  if (rows < cores) chunks = std::max(chunks, std::min(divide_up(cores, rows), divide_up(width, kFewestGatedColumns)));
  const int64_t columns = chunks == 1 ? width : round_up_to(divide_up(width, chunks), 64);
  chunks = divide_up(width, columns);
  const int64_t fit = most / round_up_to(columns, 32 / size);
  const int64_t tile_rows = std::max<int64_t>(1, std::min({fit, kMostGatedRows, divide_up(rows * chunks, cores)}));
  tiling.cores = static_cast<int32_t>(std::min(cores, divide_up(rows, tile_rows) * chunks));
  tiling.tile_rows = static_cast<int32_t>(tile_rows);
  tiling.tile_columns = static_cast<int32_t>(columns);
  return tiling;
}

}  // namespace pyalpaca_npu
