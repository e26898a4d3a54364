// How long a kernel would take: each core's program, recorded, and then played against published rates.
//
// Recording runs the kernels' scalar code only; values are neither moved nor computed, so shapes may be large. Playing
// is a discrete-event simulation: pipes work through their queues in order, flags hold them up, and all cores share the
// bandwidth of L2 and of HBM.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "machine.h"

namespace emu {

// Cycles are the cores'; bytes are per cycle. What is published and what is assumed:
// pyalpaca/bench/ascend/processors.py
struct Rates {
  double hbm, l2;                   // of all cores together
  double vector_path, cube_path;    // of one core: global memory to unified memory, and to L1 or out of L0C
  double l2_capacity;               // bytes
  double issue;                     // of the scalar pipe, for each instruction
  double vector_start, cube_start;  // of an instruction before its first result
  double copy_start,
      copy_latency;    // of a copy: before its first byte moves, and after its last until a flag may be set
  double scalar_miss;  // of the scalar pipe, for a cache line of global memory
};

struct Played {
  struct Entry {
    double start, end;
    int32_t core, pipe;
    Call call;
  };
  double makespan = 0, hbm_bytes = 0, l2_bytes = 0;
  std::vector<std::array<double, kPipes>> busy;  // of each core
  std::vector<double> ends;
  std::vector<Entry> log;
};

Played play(const Rates& rates);

}  // namespace emu
