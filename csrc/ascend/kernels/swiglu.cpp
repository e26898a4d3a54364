// y = silu(gate) * up, and its gradient: dup = dy s gate, dgate = dy s up (1 + gate (1 - s)), s = 1 / (1 + exp(-gate)).
//
// Tiles of rows by columns are divided over the vector cores, each in one of two buffers. gate and up may be halves of
// one tensor: their rows lie any distance apart. All arithmetic is fp32; results take the place of inputs.
#include "common.h"

namespace pyalpaca_npu {

struct GatedShape {
  int64_t rows, stride[3];  // of gate, up and dy
  int32_t width, tile_rows, tile_columns;
};

// Runs Gate::compute on tiles of `kInputs` tensors; the results are where the last `kOutputs` of them were.
template <typename T, int32_t kInputs, int32_t kOutputs, typename Gate>
class GatedTiles {
 public:
  __aicore__ inline GatedTiles(TPipe& pipe, const GatedShape& shape) : pipe_(pipe), shape_(shape) {}

  __aicore__ inline void reads(int32_t i, GM_ADDR from) { in_[i].SetGlobalBuffer(reinterpret_cast<__gm__ T*>(from)); }
  __aicore__ inline void writes(int32_t i, GM_ADDR to) {
    out_[i].SetGlobalBuffer(reinterpret_cast<__gm__ T*>(to), shape_.rows * shape_.width);
  }
  __aicore__ inline void init() {
    tile_ = shape_.tile_rows * round_up(shape_.tile_columns, 32 / sizeof(T));
    pipe_.InitBuffer(buffer_, 2 * kInputs * tile_ * sizeof(T));
    pipe_.InitBuffer(wide_buffer_, (Wide<T>::needs_cast ? 2 * kInputs - 1 : kInputs - 1) * tile_ * sizeof(float));
  }

  __aicore__ inline void run() {
    events_.open(pipe_);
    const int64_t chunks = (shape_.width + shape_.tile_columns - 1) / shape_.tile_columns;
    const int64_t blocks = (shape_.rows + shape_.tile_rows - 1) / shape_.tile_rows;
    const Range units = part_of_core(blocks * chunks);
    int32_t turn = 0;
    for (int64_t unit = units.begin; unit < units.end; ++unit, turn = 1 - turn) {
      const int64_t row = unit / chunks * shape_.tile_rows, rows_left = shape_.rows - row;
      const int32_t column = static_cast<int32_t>(unit % chunks) * shape_.tile_columns, left = shape_.width - column;
      const int32_t rows = rows_left < shape_.tile_rows ? static_cast<int32_t>(rows_left) : shape_.tile_rows;
      const int32_t columns = left < shape_.tile_columns ? left : shape_.tile_columns;
      const int32_t pitch = round_up(columns, 32 / sizeof(T));
      WaitFlag<HardEvent::MTE3_MTE2>(events_.emptied[turn]);
      for (int32_t i = 0; i < kInputs; ++i) {
        const GlobalTensor<T> from = in_[i];
        const int64_t stride = shape_.stride[i];
        load_rows(input(i, turn), from[row * stride + column], rows, columns, stride, pitch);
      }
      SetFlag<HardEvent::MTE2_V>(events_.filled[turn]);
      WaitFlag<HardEvent::MTE2_V>(events_.filled[turn]);
      compute(turn, rows * pitch);
      SetFlag<HardEvent::V_MTE3>(events_.computed[turn]);
      WaitFlag<HardEvent::V_MTE3>(events_.computed[turn]);
      for (int32_t i = 0; i < kOutputs; ++i) store(i, turn, row, column, rows, columns);
      SetFlag<HardEvent::MTE3_MTE2>(events_.emptied[turn]);
    }
    events_.close(pipe_);
  }

 private:
  __aicore__ inline LocalTensor<T> input(int32_t i, int32_t turn) {
    return buffer_.Get<T>()[(turn * kInputs + i) * tile_];
  }

  __aicore__ inline void compute(int32_t turn, int32_t count) {
    const LocalTensor<float> scratch = wide_buffer_.Get<float>();
    LocalTensor<float> wide[kInputs];
    for (int32_t i = 0; i < kInputs; ++i) {
      if constexpr (Wide<T>::needs_cast) {
        wide[i] = scratch[i * tile_];
        Cast(wide[i], input(i, turn), RoundMode::CAST_NONE, count);
      } else {
        wide[i] = input(i, turn);
      }
    }
    Gate::compute(wide, scratch[Wide<T>::needs_cast ? kInputs * tile_ : 0], tile_, count);
    if constexpr (Wide<T>::needs_cast) {
      for (int32_t i = kInputs - kOutputs; i < kInputs; ++i) {
        Cast(input(i, turn), wide[i], RoundMode::CAST_RINT, count);
      }
    }
  }

  __aicore__ inline void store(int32_t i, int32_t turn, int64_t row, int32_t column, int32_t rows, int32_t columns) {
    const GlobalTensor<T> to = out_[i];
    store_rows_apart(to[row * shape_.width + column], input(kInputs - kOutputs + i, turn), rows, columns, shape_.width,
                     columns);
  }

  TPipe& pipe_;
  GatedShape shape_;
  GlobalTensor<T> in_[kInputs], out_[kOutputs];
  TBuf<TPosition::VECIN> buffer_;
  TBuf<TPosition::VECCALC> wide_buffer_;
  TileEvents events_;
  int32_t tile_;
};

// e = 1 + exp(-gate): infinite where it is past fp32, so that its inverse is 0.
__aicore__ inline void denominator(const LocalTensor<float>& e, const LocalTensor<float>& gate, int32_t count) {
  Muls(e, gate, -1.0f, count);
  Exp(e, e, count);
  Adds(e, e, 1.0f, count);
}

struct SwigluForward {  // gate, up -> y where up was
  __aicore__ static inline void compute(const LocalTensor<float> (&x)[2], const LocalTensor<float>& e, int32_t,
                                        int32_t count) {
    denominator(e, x[0], count);
    Div(e, x[0], e, count);
    Mul(x[1], e, x[1], count);
  }
};

struct SwigluBackward {  // gate, up, dy -> dup where up was, dgate where dy was
  __aicore__ static inline void compute(const LocalTensor<float> (&x)[3], const LocalTensor<float>& scratch,
                                        int32_t tile, int32_t count) {
    const LocalTensor<float> gate = x[0], up = x[1], dy = x[2], s = scratch, part = scratch[tile];
    denominator(s, gate, count);
    Duplicate(part, 1.0f, count);
    Div(s, part, s, count);
    Mul(part, dy, s, count);
    Muls(s, s, -1.0f, count);
    Adds(s, s, 1.0f, count);
    Mul(s, s, gate, count);
    Adds(s, s, 1.0f, count);
    Mul(s, s, part, count);
    Mul(dy, s, up, count);
    Mul(up, part, gate, count);
  }
};

}  // namespace pyalpaca_npu

#define PYALPACA_SWIGLU(name, T)                                                                                     \
  extern "C" __global__ __aicore__ void name(GM_ADDR gate, GM_ADDR up, GM_ADDR y, int64_t rows, int64_t gate_stride, \
                                             int64_t up_stride, int32_t width, int32_t tile_rows,                    \
                                             int32_t tile_columns) {                                                 \
    KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);                                                                  \
    AscendC::TPipe pipe;                                                                                             \
    pyalpaca_npu::GatedTiles<T, 2, 1, pyalpaca_npu::SwigluForward> op(                                               \
        pipe, {rows, {gate_stride, up_stride, 0}, width, tile_rows, tile_columns});                                  \
    op.reads(0, gate);                                                                                               \
    op.reads(1, up);                                                                                                 \
    op.writes(0, y);                                                                                                 \
    op.init();                                                                                                       \
    op.run();                                                                                                        \
  }

#define PYALPACA_SWIGLU_BACKWARD(name, T)                                                                             \
  extern "C" __global__ __aicore__ void name(GM_ADDR dy, GM_ADDR gate, GM_ADDR up, GM_ADDR dgate, GM_ADDR dup,        \
                                             int64_t rows, int64_t dy_stride, int64_t gate_stride, int64_t up_stride, \
                                             int32_t width, int32_t tile_rows, int32_t tile_columns) {                \
    KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);                                                                   \
    AscendC::TPipe pipe;                                                                                              \
    pyalpaca_npu::GatedTiles<T, 3, 2, pyalpaca_npu::SwigluBackward> op(                                               \
        pipe, {rows, {gate_stride, up_stride, dy_stride}, width, tile_rows, tile_columns});                           \
    op.reads(0, gate);                                                                                                \
    op.reads(1, up);                                                                                                  \
    op.reads(2, dy);                                                                                                  \
    op.writes(0, dup);                                                                                                \
    op.writes(1, dgate);                                                                                              \
    op.init();                                                                                                        \
    op.run();                                                                                                         \
  }

PYALPACA_SWIGLU(swiglu_half, half)
PYALPACA_SWIGLU(swiglu_bfloat16, bfloat16_t)
PYALPACA_SWIGLU(swiglu_float, float)
PYALPACA_SWIGLU_BACKWARD(swiglu_backward_half, half)
PYALPACA_SWIGLU_BACKWARD(swiglu_backward_bfloat16, bfloat16_t)
PYALPACA_SWIGLU_BACKWARD(swiglu_backward_float, float)
