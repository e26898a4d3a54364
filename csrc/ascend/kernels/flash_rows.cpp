// What attention's gradient needs of rows before and after: delta, the sum of dout * out of each, with zeros where dq
// will be summed; and dq rounded to its type.
#include "flash_places.h"
#include "rows.h"

namespace pyalpaca_npu {

// Rows of a head, 32 at a time, in one of two buffers; divided over the vector cores.
template <typename T>
class FlashDelta {
 public:
  __aicore__ inline FlashDelta(TPipe& pipe) : pipe_(pipe) {}

  __aicore__ inline void init(GM_ADDR out, GM_ADDR dout, GM_ADDR delta, GM_ADDR dq, int64_t batch, int64_t length,
                              int32_t heads, int32_t head_dim, int64_t batch_stride, int64_t stride,
                              int64_t head_stride) {
    out_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(out));
    dout_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(dout));
    delta_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(delta), batch * heads * length);
    dq_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(dq), batch * length * heads * head_dim);
    length_ = length;
    heads_ = heads;
    width_ = head_dim;
    batch_stride_ = batch_stride;
    stride_ = stride;
    head_stride_ = head_stride;
    tiles_ = (length + kRows - 1) / kRows;
    range_ = part_of_core(batch * heads * tiles_);
    const int32_t tile = kRows * width_;
    pipe_.InitBuffer(in_buffer_, 4 * tile * sizeof(T));
    pipe_.InitBuffer(wide_buffer_, 2 * tile * sizeof(float));
    pipe_.InitBuffer(zero_buffer_, tile * sizeof(float));
    pipe_.InitBuffer(lanes_buffer_, 2 * kRows * kLanes * sizeof(float));
    pipe_.InitBuffer(parts_buffer_, kRows * kBlock * sizeof(float));
    pipe_.InitBuffer(sums_buffer_, 2 * kRows * sizeof(float));
  }

  __aicore__ inline void run() {
    incoming_.open(pipe_);
    outgoing_.open(pipe_);
    const LocalTensor<float> zeros = zero_buffer_.Get<float>();
    Duplicate(zeros, 0.0f, kRows * width_);
    int32_t turn = 0;
    for (int64_t unit = range_.begin; unit < range_.end; ++unit, turn = 1 - turn) {
      const int64_t head = unit / tiles_ % heads_, batch = unit / tiles_ / heads_, row = unit % tiles_ * kRows;
      const int32_t rows = length_ - row < kRows ? static_cast<int32_t>(length_ - row) : kRows;
      const int64_t at = ((batch * length_ + row) * heads_ + head) * width_;
      const LocalTensor<T> x = in_buffer_.Get<T>()[turn * 2 * kRows * width_], y = x[kRows * width_];
      WaitFlag<HardEvent::V_MTE2>(incoming_.emptied[turn]);
      load_rows(x, out_[at], rows, width_, heads_ * width_, width_);
      load_rows(y, dout_[batch * batch_stride_ + row * stride_ + head * head_stride_], rows, width_, stride_, width_);
      SetFlag<HardEvent::MTE2_V>(incoming_.filled[turn]);
      WaitFlag<HardEvent::MTE2_V>(incoming_.filled[turn]);
      const LocalTensor<float> a = wide_buffer_.Get<float>(), b = a[kRows * width_];
      Cast(a, x, RoundMode::CAST_NONE, rows * width_);
      Cast(b, y, RoundMode::CAST_NONE, rows * width_);
      SetFlag<HardEvent::V_MTE2>(incoming_.emptied[turn]);
      const LocalTensor<float> sums = sums_buffer_.Get<float>()[turn * kRows], lanes = lanes_buffer_.Get<float>();
      WaitFlag<HardEvent::MTE3_V>(outgoing_.emptied[turn]);
      dot_rows(sums, a, b, lanes, lanes[kRows * kLanes], parts_buffer_.Get<float>(), {rows, width_, width_});
      SetFlag<HardEvent::V_MTE3>(outgoing_.filled[turn]);
      WaitFlag<HardEvent::V_MTE3>(outgoing_.filled[turn]);
      store_rows(delta_[(batch * heads_ + head) * length_ + row], sums, 1, rows);
      store_rows_apart(dq_[at], zeros, rows, width_, heads_ * width_, width_);
      SetFlag<HardEvent::MTE3_V>(outgoing_.emptied[turn]);
    }
    incoming_.close(pipe_);
    outgoing_.close(pipe_);
  }

 private:
  static constexpr int32_t kRows = 32;
  TPipe& pipe_;
  GlobalTensor<T> out_, dout_;
  GlobalTensor<float> delta_, dq_;
  TBuf<TPosition::VECIN> in_buffer_;
  TBuf<TPosition::VECCALC> wide_buffer_, lanes_buffer_, parts_buffer_;
  TBuf<TPosition::VECOUT> zero_buffer_, sums_buffer_;
  PlacesIn incoming_;
  PlacesOut outgoing_;
  Range range_;
  int64_t length_, batch_stride_, stride_, head_stride_, tiles_;
  int32_t heads_, width_;
};

// y = scale * x, rounded; `count` is a multiple of 16.
template <typename T>
class FlashRound {
 public:
  __aicore__ inline FlashRound(TPipe& pipe) : pipe_(pipe) {}

  __aicore__ inline void init(GM_ADDR x, GM_ADDR y, int64_t count, float scale) {
    x_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(x), count);
    y_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(y), count);
    count_ = count;
    scale_ = scale;
    range_ = part_of_core((count + kTile - 1) / kTile);
    pipe_.InitBuffer(in_buffer_, 2 * kTile * sizeof(float));
    pipe_.InitBuffer(out_buffer_, 2 * kTile * sizeof(T));
  }

  __aicore__ inline void run() {
    incoming_.open(pipe_);
    outgoing_.open(pipe_);
    int32_t turn = 0;
    for (int64_t tile = range_.begin; tile < range_.end; ++tile, turn = 1 - turn) {
      const int64_t at = tile * kTile;
      const int32_t count = count_ - at < kTile ? static_cast<int32_t>(count_ - at) : kTile;
      const LocalTensor<float> x = in_buffer_.Get<float>()[turn * kTile];
      const LocalTensor<T> y = out_buffer_.Get<T>()[turn * kTile];
      WaitFlag<HardEvent::V_MTE2>(incoming_.emptied[turn]);
      DataCopy(x, x_[at], static_cast<uint32_t>(count));
      SetFlag<HardEvent::MTE2_V>(incoming_.filled[turn]);
      WaitFlag<HardEvent::MTE2_V>(incoming_.filled[turn]);
      Muls(x, x, scale_, count);
      WaitFlag<HardEvent::MTE3_V>(outgoing_.emptied[turn]);
      Cast(y, x, RoundMode::CAST_RINT, static_cast<uint32_t>(count));
      SetFlag<HardEvent::V_MTE2>(incoming_.emptied[turn]);
      SetFlag<HardEvent::V_MTE3>(outgoing_.filled[turn]);
      WaitFlag<HardEvent::V_MTE3>(outgoing_.filled[turn]);
      DataCopy(y_[at], y, static_cast<uint32_t>(count));
      SetFlag<HardEvent::MTE3_V>(outgoing_.emptied[turn]);
    }
    incoming_.close(pipe_);
    outgoing_.close(pipe_);
  }

 private:
  static constexpr int32_t kTile = 8192;
  TPipe& pipe_;
  GlobalTensor<float> x_;
  GlobalTensor<T> y_;
  TBuf<TPosition::VECIN> in_buffer_;
  TBuf<TPosition::VECOUT> out_buffer_;
  PlacesIn incoming_;
  PlacesOut outgoing_;
  Range range_;
  int64_t count_;
  float scale_;
};

}  // namespace pyalpaca_npu

#define PYALPACA_FLASH_ROWS(name, T)                                                                             \
  extern "C" __global__ __aicore__ void flash_delta_##name(                                                      \
      GM_ADDR out, GM_ADDR dout, GM_ADDR delta, GM_ADDR dq, int64_t batch, int64_t length, int64_t batch_stride, \
      int64_t stride, int64_t head_stride, int32_t heads, int32_t head_dim) {                                    \
    KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);                                                              \
    AscendC::TPipe pipe;                                                                                         \
    pyalpaca_npu::FlashDelta<T> op(pipe);                                                                        \
    op.init(out, dout, delta, dq, batch, length, heads, head_dim, batch_stride, stride, head_stride);            \
    op.run();                                                                                                    \
  }                                                                                                              \
  extern "C" __global__ __aicore__ void flash_round_##name(GM_ADDR x, GM_ADDR y, int64_t count, float scale) {   \
    KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);                                                              \
    AscendC::TPipe pipe;                                                                                         \
    pyalpaca_npu::FlashRound<T> op(pipe);                                                                        \
    op.init(x, y, count, scale);                                                                                 \
    op.run();                                                                                                    \
  }

PYALPACA_FLASH_ROWS(half, half)
PYALPACA_FLASH_ROWS(bfloat16, bfloat16_t)
