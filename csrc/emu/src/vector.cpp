// Element by element: arithmetic of the vector pipe. Half types are computed in fp32 and rounded once.
#include <cmath>

#include "convert.h"
#include "lanes.h"

namespace emu {
namespace {

struct Work {
  VectorOp op;
  Walk lanes;
  int num_sources;
  Operand dst, sources[2];
  uint64_t scalar = 0;
  Dtype scalar_type;
  int mode;
};

template <typename T>
T operate(VectorOp op, T a, T b, T d, T s) {
  constexpr bool whole = !(__is_same(T, float));
  switch (op) {
    case VectorOp::kAdd:
      return a + b;
    case VectorOp::kSub:
      return a - b;
    case VectorOp::kMul:
      return a * b;
    case VectorOp::kMax:
      return a != a || b != b ? a + b : a > b ? a : b;
    case VectorOp::kMin:
      return a != a || b != b ? a + b : a < b ? a : b;
    case VectorOp::kAdds:
      return a + s;
    case VectorOp::kMuls:
      return a * s;
    case VectorOp::kMaxs:
      return a != a || s != s ? a + s : a > s ? a : s;
    case VectorOp::kMins:
      return a != a || s != s ? a + s : a < s ? a : s;
    case VectorOp::kRelu:
      return a != a ? a : a > T(0) ? a : T(0);
    case VectorOp::kAxpy:
      return a * s + d;
    case VectorOp::kMulAddDst:
      return a * b + d;
    case VectorOp::kFusedMulAdd:
      return a * d + b;
    default:
      break;
  }
  if constexpr (!whole) {
    switch (op) {
      case VectorOp::kDiv:
        return a / b;
      case VectorOp::kExp:
        return std::exp(a);
      case VectorOp::kLn:
        return std::log(a);
      case VectorOp::kAbs:
        return std::fabs(a);
      case VectorOp::kSqrt:
        return std::sqrt(a);
      case VectorOp::kRsqrt:
        return 1.0f / std::sqrt(a);
      case VectorOp::kReciprocal:
        return 1.0f / a;
      default:
        break;
    }
  }
  return T(0);
}

// How elements of a type are read and written while T is computed with.
template <typename T>
T read_as(Dtype type, const uint8_t* at) {
  switch (type) {
    case Dtype::kHalf:
      return T(half_value(load<uint16_t>(at)));
    case Dtype::kBFloat16:
      return T(bfloat16_value(load<uint16_t>(at)));
    case Dtype::kFloat:
      return T(load<float>(at));
    case Dtype::kInt16:
      return T(load<int16_t>(at));
    default:
      return T(load<int32_t>(at));
  }
}
template <typename T>
void write_as(Dtype type, uint8_t* at, T value) {
  switch (type) {
    case Dtype::kHalf:
      return store(at, half_bits(float(value)));
    case Dtype::kBFloat16:
      return store(at, bfloat16_bits(float(value)));
    case Dtype::kFloat:
      return store(at, float(value));
    case Dtype::kInt16:
      return store(at, int16_t(value));
    default:
      return store(at, int32_t(value));
  }
}

template <typename T>
void compute(Core& core, const Work& work) {
  uint8_t* const memory = core.stores[int(Memory::kUnified)].bytes.data();
  const T scalar = read_as<T>(work.scalar_type, reinterpret_cast<const uint8_t*>(&work.scalar));
  const Dtype out = work.dst.type;
  const int out_size = size_of(out);
  const int width = 256 / out_size;
  for (const Run& run : work.lanes.runs) {
    uint8_t* dst = memory + work.dst.tensor.address + run.at[0];
    const uint8_t* a = memory + work.sources[0].tensor.address + run.at[1];
    const uint8_t* b = memory + work.sources[1].tensor.address + run.at[2];
    const int a_size = size_of(work.sources[0].type), b_size = size_of(work.sources[1].type);
    for (int64_t i = 0; i < run.count; ++i) {
      if (work.op == VectorOp::kIndex) {
        write_as<T>(out, dst + i * out_size, T(scalar + T(run.repeat * width + run.lane + i)));
        continue;
      }
      const T x = read_as<T>(work.sources[0].type, a + i * a_size);
      const T y = work.num_sources > 1 ? read_as<T>(work.sources[1].type, b + i * b_size) : T(0);
      const T d =
          work.op >= VectorOp::kAxpy && work.op <= VectorOp::kMulAddDst ? read_as<T>(out, dst + i * out_size) : T(0);
      write_as<T>(out, dst + i * out_size, operate<T>(work.op, x, y, d, scalar));
    }
  }
}

bool compares(VectorOp op) {
  return op == VectorOp::kIndex || op == VectorOp::kMax || op == VectorOp::kMin || op == VectorOp::kMaxs ||
         op == VectorOp::kMins || op == VectorOp::kRelu;
}

void run_work(Core& core, const Work& work, float dequantization) {
  uint8_t* const memory = core.stores[int(Memory::kUnified)].bytes.data();
  const int size = size_of(work.dst.type);
  switch (work.op) {
    case VectorOp::kCast:
      for (const Run& run : work.lanes.runs) {
        uint8_t* dst = memory + work.dst.tensor.address + run.at[0];
        const uint8_t* src = memory + work.sources[0].tensor.address + run.at[1];
        if (work.dst.type == Dtype::kHalf && work.sources[0].type == Dtype::kInt32) {
          for (int64_t i = 0; i < run.count; ++i)
            store(dst + 2 * i, half_bits(float(load<int32_t>(src + 4 * i)) * dequantization));
        } else {
          convert(work.dst.type, dst, work.sources[0].type, src, run.count, work.mode);
        }
      }
      return;
    case VectorOp::kDuplicate:
      for (const Run& run : work.lanes.runs) {
        for (int64_t i = 0; i < run.count; ++i) {
          __builtin_memcpy(memory + work.dst.tensor.address + run.at[0] + i * size, &work.scalar, size);
        }
      }
      return;
    case VectorOp::kCopy:
      for (const Run& run : work.lanes.runs) {
        __builtin_memmove(memory + work.dst.tensor.address + run.at[0],
                          memory + work.sources[0].tensor.address + run.at[1], run.count * size);
      }
      return;
    default:
      if (work.dst.type != Dtype::kInt16 && work.dst.type != Dtype::kInt32) return compute<float>(core, work);
      return compares(work.op) ? compute<int64_t>(core, work) : compute<uint32_t>(core, work);  // unsigned: sums wrap
  }
}

}  // namespace

void vector_op(Call call, VectorOp op, const Operand& dst, const Operand* sources, int num_sources, const Lanes& lanes,
               const void* scalar, Dtype scalar_type, int mode) {
  check_local(call, PIPE_V, dst.tensor, 32);
  for (int i = 0; i < num_sources; ++i) check_local(call, PIPE_V, sources[i].tensor, 32);
  int widest = size_of(dst.type);
  const Operand* operands[3] = {&dst, nullptr, nullptr};
  for (int i = 0; i < num_sources; ++i) {
    operands[i + 1] = &sources[i];
    widest = std::max(widest, size_of(sources[i].type));
  }
  Work work{op, walk(call, lanes, operands, num_sources + 1, 256 / widest), num_sources, dst, {}, 0, scalar_type, mode};
  for (int i = 0; i < num_sources; ++i) work.sources[i] = sources[i];
  if (scalar != nullptr) __builtin_memcpy(&work.scalar, scalar, size_of(scalar_type));
  if (work.lanes.runs.empty()) return;  // no lane: nothing is done

  Operation operation;
  operation.call = call;
  operation.cycles = vector_cycles(call.api, work.lanes.repeats, widest);
  add_accesses(call, PIPE_V, work.lanes, dst, 0, true, operation.writes);
  for (int i = 0; i < num_sources; ++i) {
    add_accesses(call, PIPE_V, work.lanes, sources[i], i + 1, true, operation.reads);
    const bool takes_turns = (op == VectorOp::kAdd || op == VectorOp::kSub || op == VectorOp::kMul ||
                              op == VectorOp::kMax || op == VectorOp::kMin) &&
                             (dst.type == Dtype::kHalf || dst.type == Dtype::kFloat || dst.type == Dtype::kInt32);
    const bool accumulates = takes_turns && i == 1 && (dst.repeat_stride == 0 || sources[1].repeat_stride == 0);
    check_overlap(call, work.lanes, dst, sources[i], i + 1, accumulates);
  }
  if (op >= VectorOp::kAxpy && op <= VectorOp::kMulAddDst)
    add_accesses(call, PIPE_V, work.lanes, dst, 0, true, operation.reads);
  operation.run = [work = std::move(work), scale = current->dequantization] { run_work(*current, work, scale); };
  issue(PIPE_V, std::move(operation));
}

void set_mask(bool counter, uint64_t high, uint64_t low) {
  Core& core = *current;
  if (counter != core.count_mode) {
    fail(core, {"SetVectorMask", {machine.kernel.c_str(), 0}}, PIPE_S, "argument",
         "the mask's mode is not the one that was set");
  }
  core.mask_low = low;
  core.mask_high = high;
}
void set_mask_mode(bool counter) { current->count_mode = counter; }
void reset_mask() { current->mask_low = current->mask_high = ~uint64_t{0}; }
void set_dequantization_scale(float scale) { current->dequantization = scale; }

}  // namespace emu
