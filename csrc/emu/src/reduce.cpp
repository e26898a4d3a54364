// Reductions, and instructions whose result has another shape than their source.
#include <cmath>

#include "convert.h"
#include "lanes.h"

namespace emu {
namespace {

using AscendC::CMPMODE;
using AscendC::ReduceOrder;
using AscendC::SELMODE;

uint8_t* unified() { return current->stores[int(Memory::kUnified)].bytes.data(); }

float read_float(Dtype type, const uint8_t* at) {
  return type == Dtype::kHalf    ? half_value(load<uint16_t>(at))
         : type == Dtype::kFloat ? load<float>(at)
                                 : float(load<int32_t>(at));
}
void write_float(Dtype type, uint8_t* at, float value) {
  if (type == Dtype::kHalf)
    store(at, half_bits(value));
  else
    store(at, value);
}
float rounded(Dtype type, float value) { return type == Dtype::kHalf ? half_value(half_bits(value)) : value; }

struct Element {
  float value;
  int64_t lane;
};

// A sum as a tree over the lanes' places, an extreme from the lowest lane on.
Element reduced(ReduceOp op, Dtype type, std::vector<Element> elements) {
  if (op != ReduceOp::kSum) {
    Element best = elements.front();
    for (const Element& e : elements) {
      if (op == ReduceOp::kMax ? e.value > best.value : e.value < best.value) best = e;
    }
    return best;
  }
  while (elements.size() > 1) {
    size_t to = 0;
    for (size_t i = 0; i < elements.size(); i += 2) {
      const bool pair = i + 1 < elements.size();
      elements[to++] = {pair ? rounded(type, elements[i].value + elements[i + 1].value) : elements[i].value,
                        elements[i].lane};
    }
    elements.resize(to);
  }
  return elements.front();
}

bool compared(CMPMODE mode, float a, float b) {
  switch (mode) {
    case CMPMODE::LT:
      return a < b;
    case CMPMODE::GT:
      return a > b;
    case CMPMODE::EQ:
      return a == b;
    case CMPMODE::LE:
      return a <= b;
    case CMPMODE::GE:
      return a >= b;
    default:
      return a != b;
  }
}

void set_bit(uint8_t* bytes, int64_t bit, bool value) {
  bytes[bit / 8] = uint8_t((bytes[bit / 8] & ~(1 << bit % 8)) | value << bit % 8);
}

}  // namespace

void reduce(Call call, ReduceOp op, ReduceUnit unit, const Local& dst, const Operand& src, const Lanes& lanes,
            int64_t dst_repeat_stride, ReduceOrder order) {
  const int size = size_of(src.type), width = 256 / size;
  const int group = unit == ReduceUnit::kWhole ? width : unit == ReduceUnit::kBlock ? 32 / size : 2;
  const int per_repeat = width / group;
  const bool pair = unit == ReduceUnit::kWhole &&
                    (order == ReduceOrder::ORDER_VALUE_INDEX || order == ReduceOrder::ORDER_INDEX_VALUE);
  const int item = order == ReduceOrder::ORDER_ONLY_INDEX ? 4 : pair ? 2 * size : size;
  check_local(call, PIPE_V, dst, unit == ReduceUnit::kWhole ? item : unit == ReduceUnit::kBlock ? 8 * size : 32);
  check_local(call, PIPE_V, src.tensor, 32);
  const Operand* operands[] = {&src};
  const Walk lanes_of = walk(call, lanes, operands, 1, width);

  // Which elements go into which result.
  struct Result {
    uint64_t at;
    std::vector<std::pair<uint64_t, int64_t>> from;  // bytes from the start of the source, lane in the repeat
  };
  std::vector<Result> results;
  for (const Run& run : lanes_of.runs) {
    for (int64_t i = 0; i < run.count; ++i) {
      const int64_t repeat = run.repeat + (run.lane + i) / width, lane = (run.lane + i) % width;
      const uint64_t at = uint64_t(repeat * dst_repeat_stride * per_repeat + lane / group) * item;
      if (results.empty() || results.back().at != at) results.push_back({at, {}});
      results.back().from.push_back({run.at[0] + uint64_t(i) * size, lane});
    }
  }
  if (results.empty()) return;
  Operation operation;
  operation.call = call;
  operation.cycles = vector_cycles(call.api, lanes_of.repeats, size);
  add_accesses(call, PIPE_V, lanes_of, src, 0, true, operation.reads);
  for (const Result& result : results) operation.writes.push_back(local_access(call, PIPE_V, dst, result.at, item));
  check_disjoint(call, operation.reads, operation.writes);
  operation.run = [=, results = std::move(results)] {
    uint8_t* const memory = unified();
    for (const Result& result : results) {
      std::vector<Element> elements;
      for (const auto& [at, lane] : result.from)
        elements.push_back({read_float(src.type, memory + src.tensor.address + at), lane});
      const Element e = reduced(op, src.type, std::move(elements));
      uint8_t* to = memory + dst.address + result.at;
      if (order == ReduceOrder::ORDER_ONLY_INDEX) {
        store(to, uint32_t(e.lane));
        continue;
      }
      const int value_at = order == ReduceOrder::ORDER_INDEX_VALUE ? size : 0;
      write_float(src.type, to + value_at, e.value);
      if (!pair) continue;
      if (size == 2)
        store(to + size - value_at, uint16_t(e.lane));
      else
        store(to + size - value_at, uint32_t(e.lane));
    }
  };
  issue(PIPE_V, std::move(operation));
}

void reduce_all(Call call, ReduceOp op, const Local& dst, const Operand& src, const Local& work, const Lanes& lanes,
                bool with_index) {
  const int size = size_of(src.type), width = 256 / size;
  check_local(call, PIPE_V, dst, size);
  check_local(call, PIPE_V, src.tensor, 32);
  check_local(call, PIPE_V, work, 32);
  const Operand* operands[] = {&src};
  const Walk lanes_of = walk(call, lanes, operands, 1, width);
  if (lanes_of.runs.empty()) return;
  Operation operation;
  operation.call = call;
  operation.cycles = vector_cycles(call.api, lanes_of.repeats, size);
  add_accesses(call, PIPE_V, lanes_of, src, 0, true, operation.reads);
  operation.writes.push_back(local_access(call, PIPE_V, dst, 0, with_index ? 2 * size : size));
  // One result of each repeat goes through the scratch, two where an index goes with it.
  const uint64_t scratch = uint64_t(lanes_of.repeats) * (op == ReduceOp::kSum ? 1 : 2) * size;
  operation.writes.push_back(local_access(call, PIPE_V, work, 0, (scratch + 31) / 32 * 32));
  check_disjoint(call, operation.reads, operation.writes);
  operation.marks_itself = true;
  operation.run = [=] {
    uint8_t* const memory = unified();
    std::vector<Element> elements;
    for (const Run& run : lanes_of.runs) {
      for (int64_t i = 0; i < run.count; ++i) {
        elements.push_back({read_float(src.type, memory + src.tensor.address + run.at[0] + i * size),
                            run.repeat * width + run.lane + i});
      }
    }
    const Element e = reduced(op, src.type, std::move(elements));
    write_float(src.type, memory + dst.address, e.value);
    if (with_index && size == 2) store(memory + dst.address + 2, uint16_t(e.lane));
    if (with_index && size == 4) store(memory + dst.address + 4, uint32_t(e.lane));
    poison(memory + work.address, (scratch + 31) / 32 * 32);
    mark_known(*current, work, 0, (scratch + 31) / 32 * 32, false);
    mark_known(*current, dst, 0, with_index ? 2 * size : size, true);
  };
  issue(PIPE_V, std::move(operation));
}

void broadcast_blocks(Call call, const Local& dst, const Operand& src, int64_t repeat, int64_t block_stride,
                      int64_t repeat_stride) {
  const int size = size_of(src.type);
  check_local(call, PIPE_V, dst, 32);
  check_local(call, PIPE_V, src.tensor, 32);
  if (repeat == 0) return;
  if (block_stride == 0) block_stride = 1;
  Operation operation;
  operation.call = call;
  operation.cycles = vector_cycles(call.api, repeat, size);
  operation.reads.push_back(local_access(call, PIPE_V, src.tensor, 0, uint64_t(repeat) * 8 * size));
  for (int64_t i = 0; i < repeat * 8; ++i) {
    operation.writes.push_back(
        local_access(call, PIPE_V, dst, uint64_t(i / 8 * repeat_stride + i % 8 * block_stride) * 32, 32));
  }
  check_disjoint(call, operation.reads, operation.writes);
  operation.run = [=] {
    uint8_t* const memory = unified();
    for (int64_t i = 0; i < repeat * 8; ++i) {
      uint8_t* to = memory + dst.address + (i / 8 * repeat_stride + i % 8 * block_stride) * 32;
      for (int byte = 0; byte < 32; byte += size)
        __builtin_memcpy(to + byte, memory + src.tensor.address + i * size, size);
    }
  };
  issue(PIPE_V, std::move(operation));
}

void gather(Call call, const Operand& dst, const Local& src, const Local& offsets, uint64_t base, const Lanes& lanes) {
  const int size = size_of(dst.type), width = 256 / size;
  check_local(call, PIPE_V, dst.tensor, 32);
  check_local(call, PIPE_V, src, 32);
  check_local(call, PIPE_V, offsets, 32);
  if (base % size != 0) fault_argument(call, "base that is no multiple of the element size:", int64_t(base), 0, 0);
  const Operand* operands[] = {&dst};
  const Walk lanes_of = walk(call, lanes, operands, 1, width);
  if (lanes_of.runs.empty()) return;
  Operation operation;
  operation.call = call;
  operation.cycles = vector_cycles(call.api, lanes_of.repeats, size);
  add_accesses(call, PIPE_V, lanes_of, dst, 0, true, operation.writes);
  for (const Run& run : lanes_of.runs) {
    operation.reads.push_back(
        local_access(call, PIPE_V, offsets, uint64_t(run.repeat * width + run.lane) * 4, uint64_t(run.count) * 4));
  }
  operation.reads.push_back(local_access(call, PIPE_V, src, 0, src.bytes, false));  // all of it as to order
  check_disjoint(call, operation.reads, operation.writes);
  operation.run = [=] {
    uint8_t* const memory = unified();
    for (const Run& run : lanes_of.runs) {
      for (int64_t i = 0; i < run.count; ++i) {
        const uint64_t at = base + load<uint32_t>(memory + offsets.address + (run.repeat * width + run.lane + i) * 4);
        if (at % size != 0) fault_argument(call, "offset that is no multiple of the element size:", int64_t(at), 0, 0);
        check_access(*current, call, PIPE_V, local_access(call, PIPE_V, src, at, size), false);
        __builtin_memcpy(memory + dst.tensor.address + run.at[0] + i * size, memory + src.address + at, size);
      }
    }
  };
  issue(PIPE_V, std::move(operation));
}

void compare(Call call, const Local* dst, const Operand& a, const Operand* b, const void* scalar, CMPMODE mode,
             const Lanes& asked) {
  const int size = size_of(a.type), width = 256 / size;
  if (dst != nullptr) check_local(call, PIPE_V, *dst, 32);
  check_local(call, PIPE_V, a.tensor, 32);
  if (b != nullptr) check_local(call, PIPE_V, b->tensor, 32);
  if (a.type == Dtype::kInt32 && mode != CMPMODE::EQ)
    fault_argument(call, "a mode other than EQ with int32, a mode", int(mode), 2, 2);
  if (asked.kind == Lanes::kCount && asked.low * size % 256 != 0) {
    fault_argument(call, "count whose bytes are no multiple of 256:", int64_t(asked.low), 0, INT32_MAX);
  }
  Lanes lanes = asked;
  if (lanes.kind != Lanes::kCount)
    lanes = {Lanes::kFirst, uint64_t(width), 0, asked.repeat};  // the mask is not looked at
  const Operand* operands[] = {&a, b};
  const Walk lanes_of = walk(call, lanes, operands, b ? 2 : 1, width);
  if (lanes_of.runs.empty()) return;
  Operation operation;
  operation.call = call;
  operation.cycles = vector_cycles(call.api, lanes_of.repeats, size);
  add_accesses(call, PIPE_V, lanes_of, a, 0, true, operation.reads);
  if (b != nullptr) add_accesses(call, PIPE_V, lanes_of, *b, 1, true, operation.reads);
  if (dst != nullptr)
    operation.writes.push_back(local_access(call, PIPE_V, *dst, 0, uint64_t(lanes_of.repeats) * width / 8));
  check_disjoint(call, operation.reads, operation.writes);
  const float other = scalar ? read_float(a.type, static_cast<const uint8_t*>(scalar)) : 0;
  const bool to_register = dst == nullptr;
  operation.run = [=, to = dst ? dst->address : 0, second = b ? *b : Operand{}, both = b != nullptr] {
    uint8_t* const memory = unified();
    uint8_t* const bits = to_register ? current->compare.data() : memory + to;
    for (const Run& run : lanes_of.runs) {
      for (int64_t i = 0; i < run.count; ++i) {
        const uint8_t* at_a = memory + a.tensor.address + run.at[0] + i * size;
        const uint8_t* at_b = memory + second.tensor.address + run.at[1] + i * size;
        const bool whole = a.type == Dtype::kInt32 && both;
        const bool value = whole ? load<int32_t>(at_a) == load<int32_t>(at_b)
                                 : compared(mode, read_float(a.type, at_a), both ? read_float(a.type, at_b) : other);
        set_bit(bits, run.repeat * width + run.lane + i, value);
      }
    }
  };
  issue(PIPE_V, std::move(operation));
}

void get_compare_register(Call call, const Local& dst) {
  check_local(call, PIPE_V, dst, 16);
  Operation operation;
  operation.call = call;
  operation.cycles = vector_cycles(call.api, 1, 4);
  operation.writes.push_back(local_access(call, PIPE_V, dst, 0, 16));
  operation.run = [=] { __builtin_memcpy(unified() + dst.address, current->compare.data(), 16); };
  issue(PIPE_V, std::move(operation));
}

void select(Call call, const Operand& dst, const Local& bits, const Operand& a, const Operand* b, const void* scalar,
            SELMODE mode, const Lanes& lanes) {
  const int size = size_of(dst.type), width = 256 / size;
  check_local(call, PIPE_V, dst.tensor, 32);
  check_local(call, PIPE_V, bits, 32);
  check_local(call, PIPE_V, a.tensor, 32);
  if (b != nullptr) check_local(call, PIPE_V, b->tensor, 32);
  if ((mode == SELMODE::VSEL_TENSOR_SCALAR_MODE) != (b == nullptr))
    fault_argument(call, "mode", int(mode), b ? 0 : 1, b ? 2 : 1);
  const Operand* operands[] = {&dst, &a, b};
  const Walk lanes_of = walk(call, lanes, operands, b ? 3 : 2, width);
  if (lanes_of.runs.empty()) return;
  const bool same_bits = mode == SELMODE::VSEL_CMPMASK_SPR;
  Operation operation;
  operation.call = call;
  operation.cycles = vector_cycles(call.api, lanes_of.repeats, size);
  add_accesses(call, PIPE_V, lanes_of, dst, 0, true, operation.writes);
  const Run& last = lanes_of.runs.back();
  const int64_t used =
      same_bits ? std::min<int64_t>(width, last.lane + last.count) : last.repeat * width + last.lane + last.count;
  operation.reads.push_back(local_access(call, PIPE_V, bits, 0, uint64_t(used + 7) / 8));
  check_disjoint(call, operation.reads, operation.writes);
  add_accesses(call, PIPE_V, lanes_of, a, 1, true, operation.reads);
  check_overlap(call, lanes_of, dst, a, 1, false);
  if (b != nullptr) {
    add_accesses(call, PIPE_V, lanes_of, *b, 2, true, operation.reads);
    check_overlap(call, lanes_of, dst, *b, 2, false);
  }
  uint32_t other = 0;
  if (scalar != nullptr) __builtin_memcpy(&other, scalar, size);
  operation.run = [=, second = b ? *b : Operand{}, both = b != nullptr] {
    uint8_t* const memory = unified();
    for (const Run& run : lanes_of.runs) {
      for (int64_t i = 0; i < run.count; ++i) {
        int64_t bit = run.repeat * width + run.lane + i;
        if (same_bits) bit %= width;
        const bool first = memory[bits.address + bit / 8] >> bit % 8 & 1;
        const uint8_t* from = first  ? memory + a.tensor.address + run.at[1] + i * size
                              : both ? memory + second.tensor.address + run.at[2] + i * size
                                     : reinterpret_cast<const uint8_t*>(&other);
        __builtin_memmove(memory + dst.tensor.address + run.at[0] + i * size, from, size);
      }
    }
  };
  issue(PIPE_V, std::move(operation));
}

}  // namespace emu
