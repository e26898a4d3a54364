// What the headers of the emulation ask of its machine: everything that is not a template. Kernels name nothing of
// this.
#pragma once

#include <cstdint>

#include "emu/types.h"

namespace emu {

using AscendC::HardEvent;
using AscendC::TPosition;

struct Where {
  const char* file;
  int line;
  static constexpr Where here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

// The call being made: its name and its place in the kernel.
struct Call {
  const char* api;
  Where where;
};

// An argument that the hardware keeps in a field as wide as T. Any integer is taken, and judged when the call is made.
template <typename T>
struct Field {
  int64_t value;
  constexpr Field(int64_t v = 0) : value(v) {}
  constexpr operator T() const { return static_cast<T>(value); }
};

struct Local {
  TPosition position = TPosition::VECCALC;
  uint32_t address = 0;     // bytes from the start of its memory
  uint32_t bytes = 0;       // from here to the end of the tensor
  int32_t block = -1;       // the buffer it was handed out from, -1 for none
  uint32_t generation = 0;  // of that buffer: an older one was given back
};

struct Global {
  uint8_t* address = nullptr;
  uint64_t bytes = 0;  // as told to SetGlobalBuffer, from here on; ~0 if not told
};

// ---- the core that is running
bool is_aiv();
int64_t block_index();
int64_t block_count();
int64_t sub_block_index();
int64_t sub_block_count();
void declare_kernel_type(AscendC::KernelType type, Where where);
[[noreturn]] void assertion_failed(const char* what, Where where);
[[noreturn]] void fault_argument(Call call, const char* what, int64_t value, int64_t low, int64_t high);

template <typename T>
T checked(Call call, const char* name, const Field<T>& field, int64_t high = T(~T(0))) {
  if (field.value < 0 || field.value > high) fault_argument(call, name, field.value, 0, high);
  return static_cast<T>(field.value);
}

// ---- scalar access
void scalar_read(Call call, const Local& at, void* value, uint32_t bytes);
void scalar_write(Call call, const Local& at, const void* value, uint32_t bytes);
void scalar_read(Call call, const Global& at, void* value, uint32_t bytes);
void scalar_write(Call call, const Global& at, const void* value, uint32_t bytes);
void clean_cache(Call call, const Global& at, bool whole);

// ---- flags
struct EventPipes {
  pipe_t source, target;
};
EventPipes pipes_of(HardEvent event);
void set_flag(Call call, HardEvent event, int32_t id, bool of_queue = false);
void wait_flag(Call call, HardEvent event, int32_t id, bool of_queue = false);
void pipe_barrier(Call call, pipe_t pipe);
int8_t allocate_event(Call call, HardEvent event);
void release_event(Call call, HardEvent event, int32_t id);
int8_t free_event(Call call, HardEvent event);
void cross_core_set(Call call, int mode, pipe_t pipe, int64_t id);
void cross_core_wait(Call call, int mode, int64_t id);
void sync_all(Call call, bool vector_only);

// ---- buffers; a queue is known by a number
void pipe_opened(Call call);
void pipe_closed(Call call);
void pipe_reset(Call call);
int32_t new_queue(Call call, TPosition source, TPosition target, int depth, int64_t blocks, int64_t bytes);
Local queue_allocate(Call call, int32_t queue);
void queue_free(Call call, int32_t queue, const Local& tensor);
void queue_push(Call call, int32_t queue, const Local& tensor);
Local queue_pop(Call call, int32_t queue);
int queue_idle(int32_t queue);
int queue_length(int32_t queue);
int queue_depth(int32_t queue);
Local new_buffer(Call call, TPosition position, int64_t bytes);
// The rest of a tensor from `offset` bytes on; past its end nothing is left, which the next call will find.
inline Local part(const Local& tensor, uint64_t offset) {
  Local rest = tensor;
  rest.address += static_cast<uint32_t>(offset);
  rest.bytes = offset < tensor.bytes ? tensor.bytes - static_cast<uint32_t>(offset) : 0;
  return rest;
}

// ---- vector
struct Operand {
  Local tensor;
  Dtype type;
  int64_t block_stride = 1, repeat_stride = 8;
};
struct Lanes {
  enum Kind { kCount, kFirst, kBits, kRegister } kind;
  uint64_t low = 0, high = 0;  // the count or the number of lanes is in low
  int64_t repeat = 1;
};
enum class VectorOp : uint8_t {
  kAdd,
  kSub,
  kMul,
  kDiv,
  kMax,
  kMin,
  kAdds,
  kMuls,
  kMaxs,
  kMins,
  kExp,
  kLn,
  kAbs,
  kSqrt,
  kRsqrt,
  kReciprocal,
  kRelu,
  kAxpy,
  kFusedMulAdd,
  kMulAddDst,
  kCast,
  kDuplicate,
  kCopy,
  kIndex
};
void vector_op(Call call, VectorOp op, const Operand& dst, const Operand* sources, int num_sources, const Lanes& lanes,
               const void* scalar = nullptr, Dtype scalar_type = Dtype::kFloat, int mode = 0);

enum class ReduceOp : uint8_t { kSum, kMax, kMin };
enum class ReduceUnit : uint8_t { kWhole, kBlock, kPair };
void reduce(Call call, ReduceOp op, ReduceUnit unit, const Local& dst, const Operand& src, const Lanes& lanes,
            int64_t dst_repeat_stride, AscendC::ReduceOrder order);
void reduce_all(Call call, ReduceOp op, const Local& dst, const Operand& src, const Local& work, const Lanes& lanes,
                bool with_index);
void broadcast_blocks(Call call, const Local& dst, const Operand& src, int64_t repeat, int64_t block_stride,
                      int64_t repeat_stride);
void gather(Call call, const Operand& dst, const Local& src, const Local& offsets, uint64_t base, const Lanes& lanes);
// Without dst the bits go to the compare register.
void compare(Call call, const Local* dst, const Operand& a, const Operand* b, const void* scalar, AscendC::CMPMODE mode,
             const Lanes& lanes);
void get_compare_register(Call call, const Local& dst);
void select(Call call, const Operand& dst, const Local& bits, const Operand& a, const Operand* b, const void* scalar,
            AscendC::SELMODE mode, const Lanes& lanes);

void set_mask(bool counter, uint64_t high, uint64_t low);
void set_mask_mode(bool counter);
void reset_mask();
void set_dequantization_scale(float scale);

// ---- copies
struct Blocks {  // count blocks of length bytes, and the gaps from the end of one to the start of the next, in bytes
  uint64_t count, length, source_gap, target_gap;
};
struct Padding {
  bool given;
  int64_t left, right;  // elements
  uint64_t value;
};
void copy_in(Call call, const Local& dst, const Global& src, const Blocks& blocks);
void copy_out(Call call, const Global& dst, const Local& src, const Blocks& blocks, Dtype type);
void copy_local(Call call, const Local& dst, const Local& src, const Blocks& blocks);
void copy_in_padded(Call call, const Local& dst, const Global& src, const Blocks& blocks, const Padding& padding,
                    int size);
void copy_out_padded(Call call, const Global& dst, const Local& src, const Blocks& blocks, Dtype type);
uint64_t whole_blocks(Call call, uint64_t count, int size);
void set_atomic(Call call, bool on, Dtype type);

// ---- cube
struct Nd2Nz {
  int64_t matrices, rows, columns, source_matrix_stride, source_row_stride, column_block_stride, row_stride,
      matrix_stride;
};
void copy_in_fractal(Call call, const Local& dst, const Global& src, const Nd2Nz& shape, int size);
struct FractalLoad {
  int64_t start, repeat, source_stride, target_gap;
  bool transpose, backwards;
};
void load_fractals(Call call, const Local& dst, const Local& src, const FractalLoad& load, int size);
void multiply(Call call, const Local& dst, const Local& a, const Local& b, Dtype type, int64_t m, int64_t n, int64_t k,
              bool from_zero);
struct FixOut {
  int64_t n, m, source_stride, row_stride, matrices, source_matrix_stride, target_matrix_stride;
  AscendC::QuantMode_t quantization;
  bool relu;
};
void fix_out(Call call, const Global& dst, const Local& src, const FixOut& shape, Dtype type);

}  // namespace emu
