// Which elements a vector instruction touches: repeats, blocks, masks, and the rules for operands that overlap.
#pragma once

#include "machine.h"

namespace emu {

// Lanes that follow each other: in the instruction and, for each operand, in memory.
struct Run {
  int64_t repeat, lane, count;
  uint64_t at[3];  // bytes from the start of each operand
};

struct Walk {
  std::vector<Run> runs;
  int64_t repeats = 0;
};

// The lanes of an instruction on these operands, `width` in a repeat; faults on masks that are too large.
Walk walk(const Call& call, const Lanes& lanes, const Operand* const* operands, int num_operands, int width);

// Adds what operand `index` touches to `accesses`.
void add_accesses(const Call& call, pipe_t pipe, const Walk& walk, const Operand& operand, int index, bool known,
                  std::vector<Access>& accesses);

// Faults where a source overlaps the result in a way that leaves it undefined; `accumulates` for the form that may.
void check_overlap(const Call& call, const Walk& walk, const Operand& dst, const Operand& src, int index,
                   bool accumulates);

// For instructions with results of another shape than their sources.
void check_disjoint(const Call& call, const std::vector<Access>& reads, const std::vector<Access>& writes);

}  // namespace emu
