// A core's program as recorded for the timeline: what each pipe is told to do, in the order of the kernel.
#pragma once

#include <cstdint>
#include <vector>

#include "emu/core.h"

namespace emu {

// Rows in global memory that a copy reads or writes: `count` of `bytes` each, `pitch` apart.
struct Span {
  uint64_t begin;
  uint32_t bytes, count;
  int64_t pitch;
};

struct Step {
  enum Kind : uint8_t { kWork, kSet, kWait, kBarrier, kCrossSet, kCrossWait, kScalar } kind;
  uint8_t pipe, mode = 0, mte1_rate = 0;
  int16_t id = 0;  // of a flag: event * 8 + id, or a cross-core flag's
  uint32_t first_span = 0, num_spans = 0;
  float cycles = 0;  // of the vector and the cube pipe, of MTE1 and the scalar pipe
  uint32_t bytes = 0;
  Call call{};
};

struct Program {
  std::vector<Step> steps;
  std::vector<Span> spans;
  std::vector<uint64_t> lines;  // that the scalar pipe has read, a cache of the last ones
  double products = 0;          // 16 x 16 x 16 each
};

}  // namespace emu
