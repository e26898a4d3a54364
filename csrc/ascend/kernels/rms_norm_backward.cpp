// dx = rstd * (g - xhat * mean(g * xhat)) [+ dsum], g = dy * gamma, xhat = x * rstd; dgamma = sum over rows of dy *
// xhat.
//
// Each core leaves its part of dgamma in fp32, rows in their order; a second launch adds the parts, in the order of the
// cores. So dgamma is the same in every run. dx takes the place of dy; dsum, the gradient that came by way of x itself,
// is read into the place of x when that is done with.
#include "rows.h"

namespace pyalpaca_npu {

template <typename T>
class RmsNormBackward {
 public:
  __aicore__ inline RmsNormBackward(TPipe& pipe) : pipe_(pipe) {}

  __aicore__ inline void init(GM_ADDR dy, GM_ADDR x, GM_ADDR gamma, GM_ADDR rstd, GM_ADDR dsum, GM_ADDR dx,
                              GM_ADDR parts, int64_t rows, int64_t dy_stride, int64_t x_stride, int32_t width,
                              int32_t tile_rows, int32_t buffers, float inverse_width) {
    dy_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(dy));
    x_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(x));
    gamma_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(gamma), width);
    rstd_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(rstd), rows);
    dsum_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(dsum));
    dx_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(dx), rows * width);
    parts_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(parts), GetBlockNum() * width);
    has_dsum_ = dsum != nullptr;
    range_ = part_of_core(rows);
    dy_stride_ = dy_stride;
    x_stride_ = x_stride;
    width_ = width;
    pitch_ = round_up(width, 32 / sizeof(T));
    tile_rows_ = tile_rows;
    rows_up_ = round_up(tile_rows, kBlock);
    buffers_ = buffers;
    inverse_width_ = inverse_width;

    const int32_t tile = tile_rows * pitch_;
    pipe_.InitBuffer(x_buffer_, buffers * tile * sizeof(T));
    pipe_.InitBuffer(dy_buffer_, buffers * tile * sizeof(T));
    pipe_.InitBuffer(rstd_buffer_, buffers * rows_up_ * sizeof(float));
    if (Wide<T>::needs_cast) {
      pipe_.InitBuffer(wide_x_buffer_, tile * sizeof(float));
      pipe_.InitBuffer(wide_dy_buffer_, tile * sizeof(float));
    }
    pipe_.InitBuffer(gamma_buffer_, round_up(width, kBlock) * sizeof(float));
    pipe_.InitBuffer(dgamma_buffer_, round_up(width, kBlock) * sizeof(float));
    const int32_t products = pitch_ <= kLongestNarrow ? tile_rows * kLanes : kChunk;
    pipe_.InitBuffer(products_buffer_, products * sizeof(float));
    pipe_.InitBuffer(lanes_buffer_, tile_rows * kLanes * sizeof(float));
    pipe_.InitBuffer(parts_buffer_, rows_up_ * kBlock * sizeof(float));
    pipe_.InitBuffer(numbers_buffer_, rows_up_ * kBlock * sizeof(float));
    pipe_.InitBuffer(sums_buffer_, rows_up_ * sizeof(float));
  }

  __aicore__ inline void run() {
    events_.open(pipe_, buffers_);
    read_x_ = pipe_.AllocEventID<HardEvent::V_MTE2>();
    Duplicate(dgamma_buffer_.Get<float>(), 0.0f, round_up(width_, kBlock));
    load_rows(gamma_buffer_.Get<float>(), gamma_, 1, width_, width_, round_up(width_, kBlock));
    int32_t turn = 0;
    for (int64_t row = range_.begin; row < range_.end; row += tile_rows_, turn = (turn + 1) % buffers_) {
      const int32_t rows = range_.end - row < tile_rows_ ? static_cast<int32_t>(range_.end - row) : tile_rows_;
      const Tile tile{rows, width_, pitch_};
      load(row, tile, turn);
      compute(row, tile, turn);
      WaitFlag<HardEvent::V_MTE3>(events_.computed[turn]);
      store_rows(dx_[row * width_], dy_buffer_.Get<T>()[turn * tile_rows_ * pitch_], rows, width_);
      SetFlag<HardEvent::MTE3_MTE2>(events_.emptied[turn]);
    }
    SetFlag<HardEvent::V_MTE3>(events_.computed[0]);
    WaitFlag<HardEvent::V_MTE3>(events_.computed[0]);
    store_rows(parts_[GetBlockIdx() * width_], dgamma_buffer_.Get<float>(), 1, width_);
    events_.close(pipe_, buffers_);
    pipe_.ReleaseEventID<HardEvent::V_MTE2>(read_x_);
  }

 private:
  __aicore__ inline void load(int64_t row, const Tile& tile, int32_t turn) {
    WaitFlag<HardEvent::MTE3_MTE2>(events_.emptied[turn]);
    const int32_t at = turn * tile_rows_ * pitch_;
    load_rows(x_buffer_.Get<T>()[at], x_[row * x_stride_], tile.rows, width_, x_stride_, pitch_);
    load_rows(dy_buffer_.Get<T>()[at], dy_[row * dy_stride_], tile.rows, width_, dy_stride_, pitch_);
    load_rows(rstd_buffer_.Get<float>()[turn * rows_up_], rstd_[row], 1, tile.rows, tile.rows,
              round_up(tile.rows, kBlock));
    SetFlag<HardEvent::MTE2_V>(events_.filled[turn]);
  }

  __aicore__ inline void compute(int64_t row, const Tile& tile, int32_t turn) {
    WaitFlag<HardEvent::MTE2_V>(events_.filled[turn]);
    const int32_t at = turn * tile_rows_ * pitch_, count = tile.rows * pitch_, rows_up = round_up(tile.rows, kBlock);
    const LocalTensor<T> x_in = x_buffer_.Get<T>()[at], dy_in = dy_buffer_.Get<T>()[at];
    LocalTensor<float> x, dy;  // fp32
    if constexpr (Wide<T>::needs_cast) {
      x = wide_x_buffer_.Get<float>();
      dy = wide_dy_buffer_.Get<float>();
      Cast(x, x_in, RoundMode::CAST_NONE, count);
      Cast(dy, dy_in, RoundMode::CAST_NONE, count);
    } else {
      x = x_in;
      dy = dy_in;
    }
    const LocalTensor<float> sums = sums_buffer_.Get<float>(), parts = parts_buffer_.Get<float>();
    const LocalTensor<float> products = products_buffer_.Get<float>(), rstd = numbers_buffer_.Get<float>();
    Brcb(rstd, rstd_buffer_.Get<float>()[turn * rows_up_], narrow(rows_up / kBlock), BrcbRepeatParams(1, 8));
    multiply_by_number(x, x, rstd, tile);  // xhat
    add_products(dgamma_buffer_.Get<float>(), dy, x, products, tile);
    multiply_by_row(dy, dy, gamma_buffer_.Get<float>(), tile);  // g
    dot_rows(sums, dy, x, lanes_buffer_.Get<float>(), products, parts, tile);
    Muls(sums, sums, inverse_width_, rows_up);
    Brcb(parts, sums, narrow(rows_up / kBlock), BrcbRepeatParams(1, 8));
    multiply_by_number(x, x, parts, tile);
    Sub(dy, dy, x, count);
    multiply_by_number(dy, dy, rstd, tile);
    if (has_dsum_) {
      SetFlag<HardEvent::V_MTE2>(read_x_);
      WaitFlag<HardEvent::V_MTE2>(read_x_);
      load_rows(x_in, dsum_[row * width_], tile.rows, width_, width_, pitch_);
      SetFlag<HardEvent::MTE2_V>(events_.filled[turn]);
      WaitFlag<HardEvent::MTE2_V>(events_.filled[turn]);
      if constexpr (Wide<T>::needs_cast) Cast(x, x_in, RoundMode::CAST_NONE, count);
      Add(dy, dy, x, count);
    }
    if constexpr (Wide<T>::needs_cast) Cast(dy_in, dy, RoundMode::CAST_RINT, count);
    SetFlag<HardEvent::V_MTE3>(events_.computed[turn]);
  }

  TPipe& pipe_;
  GlobalTensor<T> dy_, x_, dsum_, dx_;
  GlobalTensor<float> gamma_, rstd_, parts_;
  TBuf<TPosition::VECIN> x_buffer_, dy_buffer_, rstd_buffer_, gamma_buffer_;
  TBuf<TPosition::VECCALC> wide_x_buffer_, wide_dy_buffer_, products_buffer_, lanes_buffer_, parts_buffer_,
      numbers_buffer_, sums_buffer_;
  TBuf<TPosition::VECOUT> dgamma_buffer_;
  TileEvents events_;
  TEventID read_x_;
  Range range_;
  int64_t dy_stride_, x_stride_;
  int32_t width_, pitch_, tile_rows_, rows_up_, buffers_;
  float inverse_width_;
  bool has_dsum_;
};

// dgamma = the sum of the cores' parts, columns divided over the cores in pieces of 64.
template <typename T>
__aicore__ inline void sum_parts(GM_ADDR parts, GM_ADDR dgamma, int32_t num_parts, int32_t width, int32_t columns) {
  GlobalTensor<float> from;
  GlobalTensor<T> to;
  from.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(parts), static_cast<uint64_t>(num_parts) * width);
  to.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(dgamma), width);
  const int32_t begin = static_cast<int32_t>(GetBlockIdx()) * columns;
  const int32_t count = width - begin < columns ? width - begin : columns;
  if (count <= 0) return;
  const int32_t pitch = round_up(count, kBlock);
  TPipe pipe;
  TBuf<TPosition::VECIN> in;
  TBuf<TPosition::VECOUT> out;
  pipe.InitBuffer(in, num_parts * pitch * sizeof(float));
  pipe.InitBuffer(out, round_up(count, 16) * sizeof(float));
  const LocalTensor<float> rows = in.Get<float>();
  const LocalTensor<T> result = out.Get<T>();
  load_rows(rows, from[begin], num_parts, count, width, pitch);
  const TEventID filled = pipe.AllocEventID<HardEvent::MTE2_V>(), computed = pipe.AllocEventID<HardEvent::V_MTE3>();
  SetFlag<HardEvent::MTE2_V>(filled);
  WaitFlag<HardEvent::MTE2_V>(filled);
  for (int32_t part = 1; part < num_parts; ++part) Add(rows, rows, rows[part * pitch], count);
  if constexpr (Wide<T>::needs_cast) {
    Cast(result, rows, RoundMode::CAST_RINT, count);
  } else {
    Adds(result, rows, 0.0f, count);
  }
  SetFlag<HardEvent::V_MTE3>(computed);
  WaitFlag<HardEvent::V_MTE3>(computed);
  store_rows(to[begin], result, 1, count);
  pipe.ReleaseEventID<HardEvent::MTE2_V>(filled);
  pipe.ReleaseEventID<HardEvent::V_MTE3>(computed);
}

}  // namespace pyalpaca_npu

#define PYALPACA_RMS_NORM_BACKWARD(name, T)                                                                            \
  extern "C" __global__ __aicore__ void name(                                                                          \
      GM_ADDR dy, GM_ADDR x, GM_ADDR gamma, GM_ADDR rstd, GM_ADDR dsum, GM_ADDR dx, GM_ADDR parts, int64_t rows,       \
      int64_t dy_stride, int64_t x_stride, int32_t width, int32_t tile_rows, int32_t buffers, float inverse_width) {   \
    KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);                                                                    \
    AscendC::TPipe pipe;                                                                                               \
    pyalpaca_npu::RmsNormBackward<T> op(pipe);                                                                         \
    op.init(dy, x, gamma, rstd, dsum, dx, parts, rows, dy_stride, x_stride, width, tile_rows, buffers, inverse_width); \
    op.run();                                                                                                          \
  }

#define PYALPACA_RMS_NORM_DGAMMA(name, T)                                                                     \
  extern "C" __global__ __aicore__ void name(GM_ADDR parts, GM_ADDR dgamma, int32_t num_parts, int32_t width, \
                                             int32_t columns) {                                               \
    KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);                                                           \
    pyalpaca_npu::sum_parts<T>(parts, dgamma, num_parts, width, columns);                                     \
  }

PYALPACA_RMS_NORM_BACKWARD(rms_norm_backward_half, half)
PYALPACA_RMS_NORM_BACKWARD(rms_norm_backward_bfloat16, bfloat16_t)
PYALPACA_RMS_NORM_BACKWARD(rms_norm_backward_float, float)
PYALPACA_RMS_NORM_DGAMMA(rms_norm_dgamma_half, half)
PYALPACA_RMS_NORM_DGAMMA(rms_norm_dgamma_bfloat16, bfloat16_t)
PYALPACA_RMS_NORM_DGAMMA(rms_norm_dgamma_float, float)
