// How rms_norm and its gradient are cut: cores, rows a tile, one buffer or two.
#pragma once

#include "budget.h"

namespace pyalpaca_npu {

constexpr int64_t kLongestNarrowRow = 2040, kLongRowProducts = 2048;  // kernels/rows.h
constexpr int64_t kMostTileRows = 128, kTileBytes = 16 * 1024;        // a copy of 16 KB has the whole bandwidth
constexpr int64_t kNarrowestRow = 1, kWidestRow = 8192;

struct RmsNormTiling {
  int32_t cores = 0;  // 0: these shapes can't be served
  int32_t tile_rows = 0;
  int32_t buffers = 2;
};

inline int64_t rms_norm_bytes(int64_t width, int64_t size, bool residual, int64_t rows) {
  const int64_t pitch = round_up_to(width, 32 / size), rows_up = round_up_to(rows, 8), tile = rows * pitch;
  return handed_out({2 * tile * size, residual ? 2 * tile * size : 0, size < 4 ? tile * 4 : 0,
                     round_up_to(width, 8) * 4, (pitch <= kLongestNarrowRow ? rows * 64 : kLongRowProducts) * 4,
                     rows * 64 * 4, rows_up * 8 * 4, 2 * rows_up * 4, 2 * rows_up * 4});
}

inline int64_t rms_norm_backward_bytes(int64_t width, int64_t size, int64_t rows, int64_t buffers) {
  const int64_t pitch = round_up_to(width, 32 / size), rows_up = round_up_to(rows, 8), tile = rows * pitch;
  return handed_out({buffers * tile * size, buffers * tile * size, buffers * rows_up * 4, size < 4 ? tile * 4 : 0,
                     size < 4 ? tile * 4 : 0, round_up_to(width, 8) * 4, round_up_to(width, 8) * 4,
                     (pitch <= kLongestNarrowRow ? rows * 64 : kLongRowProducts) * 4, rows * 64 * 4, rows_up * 8 * 4,
                     rows_up * 8 * 4, rows_up * 4});
}

// The most rows that fit, but no more than a core has, nor than a copy of full bandwidth needs twice over.
template <typename Bytes>
int64_t most_rows(int64_t rows_of_core, int64_t width, int64_t size, const Bytes& bytes) {
  const int64_t enough = std::max<int64_t>(1, 2 * kTileBytes / (width * size));
  int64_t rows = std::min({rows_of_core, enough, kMostTileRows});
  while (rows > 0 && bytes(rows) > kUnifiedMemory) --rows;
  return rows;
}

// `cores` vector cores; `size` bytes an element of x.
inline RmsNormTiling rms_norm_tiling(int64_t rows, int64_t width, int64_t size, bool residual, int64_t cores) {
  RmsNormTiling tiling;
  if (width < kNarrowestRow || width > kWidestRow || rows < 1) return tiling;
  const int64_t used = std::min(rows, cores);
  const int64_t tile = most_rows(divide_up(rows, used), width, size,
                                 [&](int64_t n) { return rms_norm_bytes(width, size, residual, n); });
  if (tile < 1) return tiling;
  tiling.cores = static_cast<int32_t>(used);
  tiling.tile_rows = static_cast<int32_t>(tile);
  return tiling;
}

// Two buffers where a row fits twice, else one.
inline RmsNormTiling rms_norm_backward_tiling(int64_t rows, int64_t width, int64_t size, int64_t cores) {
  RmsNormTiling tiling;
  if (width < kNarrowestRow || width > kWidestRow || rows < 1) return tiling;
  const int64_t used = std::min(rows, cores);
  for (const int32_t buffers : {2, 1}) {
    const int64_t tile = most_rows(divide_up(rows, used), width, size,
                                   [&](int64_t n) { return rms_norm_backward_bytes(width, size, n, buffers); });
    if (tile < 1) continue;
    tiling.cores = static_cast<int32_t>(used);
    tiling.tile_rows = static_cast<int32_t>(tile);
    tiling.buffers = buffers;
    return tiling;
  }
  return tiling;
}

struct DgammaTiling {
  int32_t cores, columns;
};
// Columns a core of the launch that adds the parts: a multiple of 64, and few enough to hold all parts of them at once.
inline DgammaTiling dgamma_tiling(int64_t parts, int64_t width, int64_t cores) {
  const int64_t fit = std::max<int64_t>(64, (kUnifiedMemory - 4096) / (4 * parts + 4) / 64 * 64);
  const int64_t columns = std::min(round_up_to(divide_up(width, cores), 64), fit);
  return {static_cast<int32_t>(divide_up(width, columns)), static_cast<int32_t>(columns)};
}

}  // namespace pyalpaca_npu
