// y = gamma * h / sqrt(mean(h^2) + eps), h = x, or x + residual rounded to their type; rstd = 1 / sqrt(...) is kept,
// and h.
//
// Rows are divided over the vector cores. A tile of rows is in one of two buffers: while one is computed, the other is
// filled or emptied. y takes the place of x, h that of the residual. Statistics and products are fp32.
#include "rows.h"

namespace pyalpaca_npu {

template <typename T>
class RmsNorm {
 public:
  __aicore__ inline RmsNorm(TPipe& pipe) : pipe_(pipe) {}

  __aicore__ inline void init(GM_ADDR x, GM_ADDR residual, GM_ADDR gamma, GM_ADDR y, GM_ADDR sum, GM_ADDR rstd,
                              int64_t rows, int64_t stride, int32_t width, int32_t tile_rows, float eps,
                              float inverse_width) {
    x_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(x));
    residual_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(residual));
    gamma_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(gamma), width);
    y_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(y), rows * width);
    sum_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(sum), rows * width);
    rstd_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(rstd), rows);
    has_residual_ = residual != nullptr;
    range_ = part_of_core(rows);
    stride_ = stride;
    width_ = width;
    pitch_ = round_up(width, 32 / sizeof(T));
    tile_rows_ = tile_rows;
    rows_up_ = round_up(tile_rows, kBlock);
    eps_ = eps;
    inverse_width_ = inverse_width;

    const int32_t tile = tile_rows * pitch_;
    pipe_.InitBuffer(x_buffer_, 2 * tile * sizeof(T));
    if (has_residual_) pipe_.InitBuffer(residual_buffer_, 2 * tile * sizeof(T));
    if (Wide<T>::needs_cast) pipe_.InitBuffer(wide_buffer_, tile * sizeof(float));
    pipe_.InitBuffer(gamma_buffer_, round_up(width, kBlock) * sizeof(float));
    const int32_t products = pitch_ <= kLongestNarrow ? tile_rows * kLanes : kChunk;
    pipe_.InitBuffer(products_buffer_, products * sizeof(float));
    pipe_.InitBuffer(lanes_buffer_, tile_rows * kLanes * sizeof(float));
    pipe_.InitBuffer(parts_buffer_, rows_up_ * kBlock * sizeof(float));
    pipe_.InitBuffer(sums_buffer_, 2 * rows_up_ * sizeof(float));
    pipe_.InitBuffer(rstd_buffer_, 2 * rows_up_ * sizeof(float));
  }

  __aicore__ inline void run() {
    LocalTensor<float> ones = sums_buffer_.Get<float>()[rows_up_];
    Duplicate(ones, 1.0f, rows_up_);
    events_.open(pipe_);
    load_rows(gamma_buffer_.Get<float>(), gamma_, 1, width_, width_, round_up(width_, kBlock));
    int32_t turn = 0;
    for (int64_t row = range_.begin; row < range_.end; row += tile_rows_, turn = 1 - turn) {
      const int32_t rows = range_.end - row < tile_rows_ ? static_cast<int32_t>(range_.end - row) : tile_rows_;
      const Tile tile{rows, width_, pitch_};
      load(row, tile, turn);
      compute(tile, turn);
      store(row, tile, turn);
    }
    events_.close(pipe_);
  }

 private:
  __aicore__ inline void load(int64_t row, const Tile& tile, int32_t turn) {
    WaitFlag<HardEvent::MTE3_MTE2>(events_.emptied[turn]);
    const int32_t at = turn * tile_rows_ * pitch_;
    load_rows(x_buffer_.Get<T>()[at], x_[row * stride_], tile.rows, width_, stride_, pitch_);
    if (has_residual_) {
      load_rows(residual_buffer_.Get<T>()[at], residual_[row * width_], tile.rows, width_, width_, pitch_);
    }
    SetFlag<HardEvent::MTE2_V>(events_.filled[turn]);
  }

  __aicore__ inline void compute(const Tile& tile, int32_t turn) {
    WaitFlag<HardEvent::MTE2_V>(events_.filled[turn]);
    const int32_t at = turn * tile_rows_ * pitch_, count = tile.rows * pitch_, rows_up = round_up(tile.rows, kBlock);
    const LocalTensor<T> x = x_buffer_.Get<T>()[at];
    LocalTensor<float> h, y;  // fp32; the same place unless h has to stay
    if constexpr (Wide<T>::needs_cast) {
      h = y = wide_buffer_.Get<float>();
      Cast(h, x, RoundMode::CAST_NONE, count);
      if (has_residual_) add_residual(residual_buffer_.Get<T>()[at], h, tile);
    } else {
      h = y = x;
      if (has_residual_) {
        h = residual_buffer_.Get<T>()[at];
        Add(h, x, h, count);
      }
    }
    const LocalTensor<float> sums = sums_buffer_.Get<float>(), ones = sums[rows_up_],
                             parts = parts_buffer_.Get<float>();
    const LocalTensor<float> rstd = rstd_buffer_.Get<float>()[turn * rows_up_];
    dot_rows(sums, h, h, lanes_buffer_.Get<float>(), products_buffer_.Get<float>(), parts, tile);
    Muls(sums, sums, inverse_width_, rows_up);
    Adds(sums, sums, eps_, rows_up);
    Sqrt(sums, sums, rows_up);
    Div(rstd, ones, sums, rows_up);
    Brcb(parts, rstd, narrow(rows_up / kBlock), BrcbRepeatParams(1, 8));
    multiply_by_number(y, h, parts, tile);
    multiply_by_row(y, y, gamma_buffer_.Get<float>(), tile);
    if constexpr (Wide<T>::needs_cast) Cast(x, y, RoundMode::CAST_RINT, count);
    SetFlag<HardEvent::V_MTE3>(events_.computed[turn]);
  }

  // h += residual, rounded to T as it will be read by others; residual becomes h. Row by row through the products'
  // place.
  __aicore__ inline void add_residual(const LocalTensor<T>& residual, const LocalTensor<float>& h, const Tile& tile) {
    const int32_t chunk = pitch_ <= kLongestNarrow ? tile.rows * kLanes : kChunk, count = tile.rows * pitch_;
    const LocalTensor<float> wide = products_buffer_.Get<float>();
    for (int32_t at = 0; at < count; at += chunk) {
      const int32_t now = count - at < chunk ? count - at : chunk;
      Cast(wide, residual[at], RoundMode::CAST_NONE, now);
      Add(h[at], h[at], wide, now);
    }
    Cast(residual, h, RoundMode::CAST_RINT, count);
    Cast(h, residual, RoundMode::CAST_NONE, count);
  }

  __aicore__ inline void store(int64_t row, const Tile& tile, int32_t turn) {
    WaitFlag<HardEvent::V_MTE3>(events_.computed[turn]);
    const int32_t at = turn * tile_rows_ * pitch_;
    store_rows(y_[row * width_], x_buffer_.Get<T>()[at], tile.rows, width_);
    if (has_residual_) store_rows(sum_[row * width_], residual_buffer_.Get<T>()[at], tile.rows, width_);
    store_rows(rstd_[row], rstd_buffer_.Get<float>()[turn * rows_up_], 1, tile.rows);
    SetFlag<HardEvent::MTE3_MTE2>(events_.emptied[turn]);
  }

  TPipe& pipe_;
  GlobalTensor<T> x_, residual_, y_, sum_;
  GlobalTensor<float> gamma_, rstd_;
  TBuf<TPosition::VECIN> x_buffer_, residual_buffer_, gamma_buffer_;
  TBuf<TPosition::VECCALC> wide_buffer_, products_buffer_, lanes_buffer_, parts_buffer_, sums_buffer_;
  TBuf<TPosition::VECOUT> rstd_buffer_;
  TileEvents events_;
  Range range_;
  int64_t stride_;
  int32_t width_, pitch_, tile_rows_, rows_up_;
  float eps_, inverse_width_;
  bool has_residual_;
};

}  // namespace pyalpaca_npu

#define PYALPACA_RMS_NORM(name, T)                                                                               \
  extern "C" __global__ __aicore__ void name(GM_ADDR x, GM_ADDR residual, GM_ADDR gamma, GM_ADDR y, GM_ADDR sum, \
                                             GM_ADDR rstd, int64_t rows, int64_t stride, int32_t width,          \
                                             int32_t tile_rows, float eps, float inverse_width) {                \
    KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);                                                              \
    AscendC::TPipe pipe;                                                                                         \
    pyalpaca_npu::RmsNorm<T> op(pipe);                                                                           \
    op.init(x, residual, gamma, y, sum, rstd, rows, stride, width, tile_rows, eps, inverse_width);               \
    op.run();                                                                                                    \
  }

PYALPACA_RMS_NORM(rms_norm_half, half)
PYALPACA_RMS_NORM(rms_norm_bfloat16, bfloat16_t)
PYALPACA_RMS_NORM(rms_norm_float, float)
