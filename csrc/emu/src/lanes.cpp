#include "lanes.h"

#include <algorithm>

namespace emu {
namespace {

bool active(const Lanes& lanes, int64_t lane) {
  return lane < 64 ? lanes.low >> lane & 1 : lanes.high >> (lane - 64) & 1;
}

uint64_t place(const Operand& operand, int64_t repeat, int64_t lane) {
  const int size = size_of(operand.type), in_block = 32 / size;
  return uint64_t((repeat * operand.repeat_stride + lane / in_block * operand.block_stride) * 32 +
                  lane % in_block * size);
}

// Appends lanes [lane, lane + count) of a repeat, cut where an operand jumps.
void append(Walk& walk, const Operand* const* operands, int num_operands, int64_t repeat, int64_t lane, int64_t count) {
  int in_block = 32;
  for (int i = 0; i < num_operands; ++i) in_block = std::min(in_block, 32 / size_of(operands[i]->type));
  while (count > 0) {
    const int64_t now = std::min<int64_t>(count, in_block - lane % in_block);
    Run run{repeat, lane, now, {0, 0, 0}};
    for (int i = 0; i < num_operands; ++i) run.at[i] = place(*operands[i], repeat, lane);
    bool follows = !walk.runs.empty() && walk.runs.back().repeat == repeat &&
                   walk.runs.back().lane + walk.runs.back().count == lane;
    for (int i = 0; follows && i < num_operands; ++i) {
      follows = walk.runs.back().at[i] + walk.runs.back().count * size_of(operands[i]->type) == run.at[i];
    }
    if (follows)
      walk.runs.back().count += now;
    else
      walk.runs.push_back(run);
    lane += now;
    count -= now;
  }
}

}  // namespace

Walk walk(const Call& call, const Lanes& asked, const Operand* const* operands, int num_operands, int width) {
  Core& core = *current;
  Lanes lanes = asked;
  if (lanes.kind == Lanes::kCount && lanes.high) fault_argument(call, "count", int64_t(lanes.low), 0, INT32_MAX);
  if (lanes.kind == Lanes::kFirst && lanes.low > uint64_t(width))
    fault_argument(call, "mask", int64_t(lanes.low), 0, width);
  if (lanes.kind == Lanes::kRegister) {
    lanes.kind = core.count_mode ? Lanes::kCount : Lanes::kBits;
    lanes.low = core.mask_low;
    lanes.high = core.count_mode ? 0 : core.mask_high;
  } else {  // the instruction sets the mask register itself, and the count form puts it back
    const uint64_t ones = ~uint64_t{0};
    const auto first = [&](int64_t n) { return n <= 0 ? 0 : n >= 64 ? ones : (uint64_t{1} << n) - 1; };
    const bool whole = lanes.kind == Lanes::kCount;
    core.mask_low = whole ? ones : lanes.kind == Lanes::kFirst ? first(int64_t(lanes.low)) : lanes.low;
    core.mask_high = whole ? ones : lanes.kind == Lanes::kFirst ? first(int64_t(lanes.low) - 64) : lanes.high;
    if (!whole && core.count_mode)
      fail(core, call, PIPE_V, "argument", "a mask of lanes in counter mode; SetMaskNorm first");
  }
  Walk result;
  if (lanes.kind == Lanes::kCount) {
    const int64_t count = int64_t(lanes.low);
    result.repeats = (count + width - 1) / width;
    bool dense = true;
    for (int i = 0; i < num_operands; ++i) {
      dense &= operands[i]->block_stride == 1 && operands[i]->repeat_stride * 32 == width * size_of(operands[i]->type);
    }
    if (dense && count > 0) result.runs.push_back({0, 0, count, {0, 0, 0}});
    for (int64_t repeat = 0; !dense && repeat < result.repeats; ++repeat) {
      append(result, operands, num_operands, repeat, 0, std::min<int64_t>(width, count - repeat * width));
    }
    return result;
  }
  result.repeats = lanes.repeat;
  for (int64_t repeat = 0; repeat < lanes.repeat; ++repeat) {
    if (lanes.kind == Lanes::kFirst) {
      append(result, operands, num_operands, repeat, 0, int64_t(lanes.low));
      continue;
    }
    for (int64_t lane = 0; lane < width;) {
      if (!active(lanes, lane)) {
        ++lane;
        continue;
      }
      int64_t last = lane;
      while (last < width && active(lanes, last)) ++last;
      append(result, operands, num_operands, repeat, lane, last - lane);
      lane = last;
    }
  }
  return result;
}

void add_accesses(const Call& call, pipe_t pipe, const Walk& walk, const Operand& operand, int index, bool known,
                  std::vector<Access>& accesses) {
  const int size = size_of(operand.type);
  const size_t first = accesses.size();
  for (const Run& run : walk.runs) {
    const Access access = local_access(call, pipe, operand.tensor, run.at[index], uint64_t(run.count) * size, known);
    if (accesses.size() > first) {
      Access& last = accesses.back();
      if (access.begin >= last.begin && access.begin <= last.end) {
        last.end = std::max(last.end, access.end);
        continue;
      }
    }
    accesses.push_back(access);
  }
}

void check_overlap(const Call& call, const Walk& walk, const Operand& dst, const Operand& src, int index,
                   bool accumulates) {
  if (walk.runs.empty()) return;
  const int dst_size = size_of(dst.type), src_size = size_of(src.type);
  const auto hull = [&](const Operand& operand, int which, int size) {
    uint64_t low = ~uint64_t{0}, high = 0;
    for (const Run& run : walk.runs) {
      low = std::min(low, operand.tensor.address + run.at[which]);
      high = std::max(high, operand.tensor.address + run.at[which] + run.count * size);
    }
    return std::pair(low, high);
  };
  const auto [dst_low, dst_high] = hull(dst, 0, dst_size);
  const auto [src_low, src_high] = hull(src, index, src_size);
  if (dst_low >= src_high || src_low >= dst_high) return;
  const bool same = dst.tensor.address == src.tensor.address && dst_size == src_size &&
                    dst.block_stride == src.block_stride && dst.repeat_stride == src.repeat_stride;
  if (same && (walk.runs.size() == 1 || walk.repeats <= 1 || dst.repeat_stride > 7 * dst.block_stride)) return;
  // Byte by byte: which repeat wrote it, and as which element.
  struct Owner {
    int64_t repeat = -1;
    uint64_t element = 0;
  };
  std::vector<Owner> owners(dst_high - dst_low);
  const auto refuse = [&](const char* how) {
    fail(*current, call, PIPE_V, "overlap",
         std::string(how) + ": result " + stretch_text(Memory::kUnified, dst_low, dst_high) + ", source " +
             stretch_text(Memory::kUnified, src_low, src_high));
  };
  for (size_t from = 0; from < walk.runs.size();) {
    size_t to = from;
    while (to < walk.runs.size() && walk.runs[to].repeat == walk.runs[from].repeat) ++to;
    const int64_t width = 256 / std::max(dst_size, src_size);  // a dense count is one run of many repeats
    const auto repeat_of = [&](const Run& run, int64_t i) { return run.repeat + (run.lane + i) / width; };
    const auto look = [&](bool own_repeat) {
      for (size_t r = from; r < to; ++r) {
        const Run& run = walk.runs[r];
        for (int64_t i = 0; i < run.count; ++i) {
          const uint64_t element = src.tensor.address + run.at[index] + i * src_size;
          for (uint64_t byte = element; byte < element + src_size; ++byte) {
            if (byte < dst_low || byte >= dst_high) continue;
            const Owner& owner = owners[byte - dst_low];
            if (owner.repeat < 0) continue;
            const bool own = owner.repeat == repeat_of(run, i);
            const uint64_t mine = dst.tensor.address + run.at[0] + i * dst_size;
            if (own && own_repeat && (owner.element != mine || element != mine || dst_size != src_size)) {
              refuse("the result and a source overlap in part");
            }
            if (!own && owner.repeat < repeat_of(run, i) && !accumulates)
              refuse("a repeat reads what an earlier one wrote");
          }
        }
      }
    };
    look(false);
    for (size_t r = from; r < to; ++r) {
      const Run& run = walk.runs[r];
      for (int64_t i = 0; i < run.count * dst_size; ++i) {
        const int64_t lane = i / dst_size;
        owners[dst.tensor.address + run.at[0] + i - dst_low] = {repeat_of(run, lane),
                                                                dst.tensor.address + run.at[0] + lane * dst_size};
      }
    }
    look(true);
    from = to;
  }
}

void check_disjoint(const Call& call, const std::vector<Access>& reads, const std::vector<Access>& writes) {
  for (const Access& read : reads) {
    for (const Access& write : writes) {
      if (read.memory == write.memory && read.begin < write.end && write.begin < read.end) {
        fail(*current, call, PIPE_V, "overlap",
             "result " + stretch_text(write.memory, write.begin, write.end) + ", source " +
                 stretch_text(read.memory, read.begin, read.end));
      }
    }
  }
}

}  // namespace emu
