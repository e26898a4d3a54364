// The splits of flash_decode.cpp made one. A file of its own: the toolkit compiles all kernels of a file for the cores
// that the first one names, and these need vector cores only.
#include "flash_softmax.h"

namespace pyalpaca_npu {

// out = sum of exp(lse_s - lse) out_s over splits s; rows divided over the vector cores, kRows at a time.
template <typename T>
class FlashMerge {
 public:
  __aicore__ inline FlashMerge(TPipe& pipe) : pipe_(pipe) {}

  __aicore__ inline void init(GM_ADDR parts, GM_ADDR part_lse, GM_ADDR out, GM_ADDR lse, int64_t rows, int32_t splits,
                              int32_t head_dim) {
    parts_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(parts), splits * rows * head_dim);
    part_lse_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(part_lse), splits * rows);
    out_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(out), rows * head_dim);
    lse_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(lse), rows);
    rows_ = rows;
    splits_ = splits;
    width_ = head_dim;
    range_ = part_of_core((rows + kRows - 1) / kRows);
    pipe_.InitBuffer(in_buffer_, 2 * kRows * width_ * sizeof(float));
    pipe_.InitBuffer(lse_buffer_, splits * kRows * sizeof(float));
    pipe_.InitBuffer(sum_buffer_, kRows * width_ * sizeof(float));
    pipe_.InitBuffer(out_buffer_, kRows * width_ * sizeof(T));
    pipe_.InitBuffer(numbers_buffer_, 5 * kRows * sizeof(float));
    pipe_.InitBuffer(result_buffer_, kRows * sizeof(float));
    pipe_.InitBuffer(blocks_buffer_, kRows * kBlock * sizeof(float));
    pipe_.InitBuffer(bits_buffer_, 32);
  }

  __aicore__ inline void run() {
    incoming_.open(pipe_);
    lse_place_.open(pipe_);
    out_place_.open(pipe_);
    Duplicate(numbers(0), 1.0f, 5 * kRows);
    for (int64_t tile = range_.begin; tile < range_.end; ++tile) {
      const int64_t row = tile * kRows;
      merge(row, rows_ - row < kRows ? static_cast<int32_t>(rows_ - row) : kRows);
    }
    incoming_.close(pipe_);
    lse_place_.close(pipe_);
    out_place_.close(pipe_);
  }

 private:
  enum : int32_t { kMax = 0, kSafe, kSum, kWeight, kOnes };
  __aicore__ inline LocalTensor<float> numbers(int32_t which) { return numbers_buffer_.Get<float>()[which * kRows]; }

  __aicore__ inline void merge(int64_t row, int32_t rows) {
    const LocalTensor<float> lse = lse_buffer_.Get<float>(), max = numbers(kMax), safe = numbers(kSafe);
    const LocalTensor<float> total = numbers(kSum), weight = numbers(kWeight), sum = sum_buffer_.Get<float>();
    const LocalTensor<float> blocks = blocks_buffer_.Get<float>();
    const int32_t up = round_up(rows, kBlock);
    const Rows shape{rows, width_};
    WaitFlag<HardEvent::V_MTE2>(lse_place_.emptied[0]);
    for (int32_t split = 0; split < splits_; ++split) {
      load_rows(lse[split * kRows], part_lse_[split * rows_ + row], 1, rows, rows, up);
    }
    SetFlag<HardEvent::MTE2_V>(lse_place_.filled[0]);
    WaitFlag<HardEvent::MTE2_V>(lse_place_.filled[0]);
    Duplicate(max, minus_infinity(), up);
    for (int32_t split = 0; split < splits_; ++split) Max(max, lse[split * kRows], max, up);
    Maxs(safe, max, kLowest, up);
    Duplicate(total, 0.0f, up);
    Duplicate(sum, 0.0f, rows * width_);
    for (int32_t split = 0; split < splits_; ++split) {
      const LocalTensor<float> part = in_buffer_.Get<float>()[turn_ * kRows * width_];
      WaitFlag<HardEvent::V_MTE2>(incoming_.emptied[turn_]);
      load_rows(part, parts_[(split * rows_ + row) * width_], 1, rows * width_, rows * width_, rows * width_);
      SetFlag<HardEvent::MTE2_V>(incoming_.filled[turn_]);
      Sub(weight, lse[split * kRows], safe, up);
      Exp(weight, weight, up);
      Add(total, total, weight, up);
      as_blocks(blocks, weight, rows);
      WaitFlag<HardEvent::MTE2_V>(incoming_.filled[turn_]);
      multiply_blocks(part, blocks, width_, shape);
      Add(sum, sum, part, rows * width_);
      SetFlag<HardEvent::V_MTE2>(incoming_.emptied[turn_]);
      turn_ = 1 - turn_;
    }
    SetFlag<HardEvent::V_MTE2>(lse_place_.emptied[0]);
    const LocalTensor<T> y = out_buffer_.Get<T>();
    const LocalTensor<float> result = result_buffer_.Get<float>();
    const LocalTensor<uint8_t> bits = bits_buffer_.Get<uint8_t>();
    WaitFlag<HardEvent::MTE3_V>(out_place_.emptied[0]);
    Maxs(safe, total, kSmallestSum, up);
    Div(safe, numbers(kOnes), safe, up);
    as_blocks(blocks, safe, rows);
    multiply_blocks(sum, blocks, width_, shape);
    Cast(y, sum, RoundMode::CAST_RINT, rows * width_);
    Ln(result, total, up);
    Add(result, result, max, up);
    CompareScalar(bits, max, kHighest, CMPMODE::GT, static_cast<uint32_t>(kRows));
    Select(result, bits, max, result, SELMODE::VSEL_TENSOR_TENSOR_MODE, static_cast<uint32_t>(up));
    SetFlag<HardEvent::V_MTE3>(out_place_.filled[0]);
    WaitFlag<HardEvent::V_MTE3>(out_place_.filled[0]);
    store_rows(out_[row * width_], y, 1, rows * width_);
    store_rows(lse_[row], result, 1, rows);
    SetFlag<HardEvent::MTE3_V>(out_place_.emptied[0]);
  }

  static constexpr int32_t kRows = 64;
  TPipe& pipe_;
  GlobalTensor<float> parts_, part_lse_, lse_;
  GlobalTensor<T> out_;
  TBuf<TPosition::VECIN> in_buffer_, lse_buffer_;
  TBuf<TPosition::VECCALC> sum_buffer_, numbers_buffer_, blocks_buffer_, bits_buffer_;
  TBuf<TPosition::VECOUT> out_buffer_, result_buffer_;
  PlacesIn incoming_;
  Places<HardEvent::MTE2_V, HardEvent::V_MTE2, 1> lse_place_;
  Places<HardEvent::V_MTE3, HardEvent::MTE3_V, 1> out_place_;
  Range range_;
  int64_t rows_;
  int32_t splits_, width_, turn_ = 0;
};

}  // namespace pyalpaca_npu

#define PYALPACA_FLASH_MERGE(name, T)                                                                                 \
  extern "C" __global__ __aicore__ void name(GM_ADDR parts, GM_ADDR part_lse, GM_ADDR out, GM_ADDR lse, int64_t rows, \
                                             int32_t splits, int32_t head_dim) {                                      \
    KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);                                                                   \
    AscendC::TPipe pipe;                                                                                              \
    pyalpaca_npu::FlashMerge<T> op(pipe);                                                                             \
    op.init(parts, part_lse, out, lse, rows, splits, head_dim);                                                       \
    op.run();                                                                                                         \
  }

PYALPACA_FLASH_MERGE(flash_merge_half, half)
PYALPACA_FLASH_MERGE(flash_merge_bfloat16, bfloat16_t)
