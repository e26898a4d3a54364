// Copies: MTE2 in, MTE3 out, the vector pipe within unified memory.
#include <cstring>

#include "convert.h"
#include "machine.h"

namespace emu {
namespace {

uint64_t rounded_up(uint64_t bytes) { return (bytes + 31) / 32 * 32; }

// Adds to what is there, element by element.
void add_bytes(uint8_t* to, const uint8_t* from, uint64_t bytes, Dtype type) {
  const int size = size_of(type);
  for (uint64_t i = 0; i + size <= bytes; i += size) {
    switch (type) {
      case Dtype::kFloat:
        store(to + i, load<float>(to + i) + load<float>(from + i));
        break;
      case Dtype::kHalf:
        store(to + i, half_bits(half_value(load<uint16_t>(to + i)) + half_value(load<uint16_t>(from + i))));
        break;
      case Dtype::kBFloat16:
        store(to + i, bfloat16_bits(bfloat16_value(load<uint16_t>(to + i)) + bfloat16_value(load<uint16_t>(from + i))));
        break;
      case Dtype::kInt32:
        store(to + i, load<uint32_t>(to + i) + load<uint32_t>(from + i));
        break;
      case Dtype::kInt16:
        store(to + i, uint16_t(load<uint16_t>(to + i) + load<uint16_t>(from + i)));
        break;
      default:
        store(to + i, uint8_t(load<uint8_t>(to + i) + load<uint8_t>(from + i)));
    }
  }
}

}  // namespace

uint64_t whole_blocks(Call call, uint64_t count, int size) {
  if (count * size % 32 != 0) {
    fail(*current, call, PIPE_S, "partial-block",
         std::to_string(count) + " elements are " + std::to_string(count * size) +
             " bytes, no multiple of 32: a device rounds down; use DataCopyPad");
  }
  return count * size;
}

void set_atomic(Call call, bool on, Dtype type) {
  const bool known = type == Dtype::kFloat || type == Dtype::kHalf || type == Dtype::kBFloat16 ||
                     type == Dtype::kInt32 || type == Dtype::kInt16 || type == Dtype::kInt8;
  if (!known) fail(*current, call, PIPE_S, "argument", "no atomic addition of this type");
  current->atomic = on;
  current->atomic_type = type;
}

void copy_in(Call call, const Local& dst, const Global& src, const Blocks& blocks) {
  const Memory memory = check_local(call, PIPE_MTE2, dst, 32);
  if (memory != Memory::kUnified && memory != Memory::kL1)
    fail(*current, call, PIPE_MTE2, "position",
         "no path from global memory to " + std::string(kMemoryNames[int(memory)]));
  if (blocks.count * blocks.length == 0) return;
  Operation operation;
  operation.call = call;
  const uint64_t source_step = blocks.length + blocks.source_gap, target_step = blocks.length + blocks.target_gap;
  for (uint64_t i = 0; i < blocks.count; ++i) {
    operation.reads.push_back(global_access(call, PIPE_MTE2, src, i * source_step, blocks.length));
    operation.writes.push_back(local_access(call, PIPE_MTE2, dst, i * target_step, blocks.length));
  }
  operation.run = [=] {
    for (uint64_t i = 0; i < blocks.count; ++i) {
      std::memcpy(bytes_of(*current, memory, dst.address + i * target_step), src.address + i * source_step,
                  blocks.length);
    }
  };
  issue(PIPE_MTE2, std::move(operation));
}

void copy_in_padded(Call call, const Local& dst, const Global& src, const Blocks& blocks, const Padding& padding,
                    int size) {
  check_local(call, PIPE_MTE2, dst, 32);
  if (memory_of(dst.position) != Memory::kUnified)
    fail(*current, call, PIPE_MTE2, "position", "DataCopyPad fills unified memory");
  if (blocks.count * blocks.length == 0) return;
  const uint64_t left = padding.left * size, right = padding.right * size, filled = left + blocks.length + right;
  const uint64_t source_step = blocks.length + blocks.source_gap, target_step = rounded_up(filled) + blocks.target_gap;
  Operation operation;
  operation.call = call;
  operation.marks_itself = true;
  for (uint64_t i = 0; i < blocks.count; ++i) {
    operation.reads.push_back(global_access(call, PIPE_MTE2, src, i * source_step, blocks.length));
    operation.writes.push_back(local_access(call, PIPE_MTE2, dst, i * target_step, rounded_up(filled)));
  }
  operation.run = [=] {
    for (uint64_t i = 0; i < blocks.count; ++i) {
      uint8_t* to = bytes_of(*current, Memory::kUnified, dst.address + i * target_step);
      poison(to, rounded_up(filled));
      for (uint64_t at = 0; padding.given && at < filled; at += size) std::memcpy(to + at, &padding.value, size);
      std::memcpy(to + left, src.address + i * source_step, blocks.length);
      mark_known(*current, dst, i * target_step, rounded_up(filled), false);
      if (padding.given)
        mark_known(*current, dst, i * target_step, filled, true);
      else
        mark_known(*current, dst, i * target_step + left, blocks.length, true);
    }
  };
  issue(PIPE_MTE2, std::move(operation));
}

// Both ways out: the blocks in the core's memory start at multiples of 32 bytes, those in global memory anywhere.
void copy_out_padded(Call call, const Global& dst, const Local& src, const Blocks& blocks, Dtype type) {
  Core& core = *current;
  const Memory memory = check_local(call, PIPE_MTE3, src, 32);
  if (memory != Memory::kUnified && memory != Memory::kL1)
    fail(core, call, PIPE_MTE3, "position", "no path to global memory from " + std::string(kMemoryNames[int(memory)]));
  if (blocks.count * blocks.length == 0) return;
  if (core.atomic && core.atomic_type != type)
    fail(core, call, PIPE_MTE3, "argument", "the atomic addition was set for another type");
  Operation operation;
  operation.call = call;
  const uint64_t source_step = rounded_up(blocks.length) + blocks.source_gap,
                 target_step = blocks.length + blocks.target_gap;
  for (uint64_t i = 0; i < blocks.count; ++i) {
    operation.reads.push_back(local_access(call, PIPE_MTE3, src, i * source_step, blocks.length));
    Access write = global_access(call, PIPE_MTE3, dst, i * target_step, blocks.length);
    write.atomic = core.atomic;
    operation.writes.push_back(write);
  }
  operation.run = [=, atomic = core.atomic] {
    for (uint64_t i = 0; i < blocks.count; ++i) {
      const uint8_t* from = bytes_of(*current, memory, src.address + i * source_step);
      if (atomic)
        add_bytes(dst.address + i * target_step, from, blocks.length, type);
      else
        std::memcpy(dst.address + i * target_step, from, blocks.length);
    }
  };
  issue(PIPE_MTE3, std::move(operation));
}

void copy_out(Call call, const Global& dst, const Local& src, const Blocks& blocks, Dtype type) {
  copy_out_padded(call, dst, src, blocks, type);
}

void copy_local(Call call, const Local& dst, const Local& src, const Blocks& blocks) {
  const Memory from = memory_of(src.position), to = memory_of(dst.position);
  if (from != Memory::kUnified || to != Memory::kUnified)
    fail(*current, call, PIPE_V, "position", "no such path between memories");
  check_local(call, PIPE_V, dst, 32);
  check_local(call, PIPE_V, src, 32);
  if (blocks.count * blocks.length == 0) return;
  Operation operation;
  operation.call = call;
  operation.cycles = double(blocks.count * ((blocks.length + 255) / 256));
  const uint64_t source_step = blocks.length + blocks.source_gap, target_step = blocks.length + blocks.target_gap;
  for (uint64_t i = 0; i < blocks.count; ++i) {
    operation.reads.push_back(local_access(call, PIPE_V, src, i * source_step, blocks.length));
    operation.writes.push_back(local_access(call, PIPE_V, dst, i * target_step, blocks.length));
  }
  for (const Access& read : operation.reads) {
    for (const Access& write : operation.writes) {
      if (read.begin < write.end && write.begin < read.end)
        fail(*current, call, PIPE_V, "overlap", "source and target of a copy overlap");
    }
  }
  operation.run = [=] {
    uint8_t* memory = bytes_of(*current, Memory::kUnified, 0);
    for (uint64_t i = 0; i < blocks.count; ++i) {
      std::memcpy(memory + dst.address + i * target_step, memory + src.address + i * source_step, blocks.length);
    }
  };
  issue(PIPE_V, std::move(operation));
}

}  // namespace emu
