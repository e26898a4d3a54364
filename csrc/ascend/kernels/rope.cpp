// q and k turned by the angles of their positions: pairs (x[i], x[i + d/2]), in fp32; the gradient is the turn back.
//
// Heads of q and k, in this order, are one list. A unit of work is some tokens by some of these heads, in one of two
// buffers; units are divided over the vector cores. Tokens may lie any distance apart, as in a fused projection; heads
// of a token lie side by side. Where caches are given, k as turned and v as it is go to row slots[token] of them too; a
// negative slot stores nothing.
#include "common.h"

namespace pyalpaca_npu {

struct RopeShape {
  int64_t tokens, q_stride, k_stride, v_stride, q_out_stride, k_out_stride, cache_stride, period;
  int32_t q_heads, k_heads, head_dim, tile_tokens, tile_heads, inverse;
};

template <typename T>
class Rope {
 public:
  __aicore__ inline Rope(TPipe& pipe, const RopeShape& shape) : pipe_(pipe), shape_(shape) {}

  __aicore__ inline void init(GM_ADDR q, GM_ADDR k, GM_ADDR v, GM_ADDR cos, GM_ADDR sin, GM_ADDR positions,
                              GM_ADDR slots, GM_ADDR q_out, GM_ADDR k_out, GM_ADDR k_cache, GM_ADDR v_cache) {
    q_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(q));
    k_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(k));
    v_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(v));
    cos_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(cos));
    sin_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(sin));
    positions_.SetGlobalBuffer(reinterpret_cast<__gm__ int64_t*>(positions), shape_.tokens);
    slots_.SetGlobalBuffer(reinterpret_cast<__gm__ int64_t*>(slots), shape_.tokens);
    q_out_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(q_out));
    k_out_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(k_out));
    k_cache_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(k_cache));
    v_cache_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(v_cache));
    has_positions_ = positions != nullptr;
    has_k_out_ = k_out != nullptr;
    has_cache_ = k_cache != nullptr;
    half_ = shape_.head_dim / 2;
    heads_ = shape_.q_heads + shape_.k_heads;
    groups_ = (heads_ + shape_.tile_heads - 1) / shape_.tile_heads;
    tile_ = shape_.tile_tokens * shape_.tile_heads * shape_.head_dim;
    v_width_ = shape_.k_heads * shape_.head_dim;
    pipe_.InitBuffer(x_buffer_, 2 * tile_ * sizeof(T));
    pipe_.InitBuffer(angle_buffer_, 4 * shape_.tile_tokens * half_ * sizeof(float));
    if (has_cache_) pipe_.InitBuffer(v_buffer_, 2 * shape_.tile_tokens * v_width_ * sizeof(T));
    if (Wide<T>::needs_cast) pipe_.InitBuffer(wide_buffer_, shape_.tile_heads * shape_.head_dim * sizeof(float));
    pipe_.InitBuffer(products_buffer_, shape_.tile_heads * shape_.head_dim * sizeof(float));
  }

  __aicore__ inline void run() {
    events_.open(pipe_);
    for (int32_t i = 0; i < 2; ++i) v_filled_[i] = pipe_.AllocEventID<HardEvent::MTE2_MTE3>();
    const int64_t blocks = (shape_.tokens + shape_.tile_tokens - 1) / shape_.tile_tokens;
    const Range units = part_of_core(blocks * groups_);
    for (int64_t unit = units.begin; unit < units.end; ++unit) {
      const int32_t turn = static_cast<int32_t>((unit - units.begin) % 2);
      token_ = unit / groups_ * shape_.tile_tokens;
      tokens_ = shape_.tokens - token_ < shape_.tile_tokens ? static_cast<int32_t>(shape_.tokens - token_)
                                                            : shape_.tile_tokens;
      first_ = static_cast<int32_t>(unit % groups_) * shape_.tile_heads;
      const int32_t last = heads_ - first_ < shape_.tile_heads ? heads_ : first_ + shape_.tile_heads;
      q_count_ = first_ < shape_.q_heads ? (last < shape_.q_heads ? last : shape_.q_heads) - first_ : 0;
      k_first_ = first_ < shape_.q_heads ? 0 : first_ - shape_.q_heads;
      k_count_ = last - first_ - q_count_;
      load(turn);
      compute(turn);
      store(turn);
    }
    events_.close(pipe_);
    for (int32_t i = 0; i < 2; ++i) pipe_.ReleaseEventID<HardEvent::MTE2_MTE3>(v_filled_[i]);
  }

 private:
  __aicore__ inline int32_t row_elements() const { return (q_count_ + k_count_) * shape_.head_dim; }
  __aicore__ inline bool stores_v() const { return has_cache_ && first_ == 0; }

  // `heads` heads of each token of the unit, which in the buffer has room for all of the unit's heads.
  __aicore__ inline void load_heads(const LocalTensor<T>& to, const GlobalTensor<T>& from, int64_t stride,
                                    int32_t heads) {
    load_rows_apart(to, from, tokens_, heads * shape_.head_dim, stride, row_elements());
  }
  __aicore__ inline void store_heads(const GlobalTensor<T>& to, const LocalTensor<T>& from, int64_t stride,
                                     int32_t heads) {
    store_rows_apart(to, from, tokens_, heads * shape_.head_dim, stride, row_elements());
  }

  __aicore__ inline void load(int32_t turn) {
    WaitFlag<HardEvent::MTE3_MTE2>(events_.emptied[turn]);
    const LocalTensor<T> x = x_buffer_.Get<T>()[turn * tile_];
    if (q_count_ > 0) {
      load_heads(x, q_[token_ * shape_.q_stride + first_ * shape_.head_dim], shape_.q_stride, q_count_);
    }
    if (k_count_ > 0) {
      load_heads(x[q_count_ * shape_.head_dim], k_[token_ * shape_.k_stride + k_first_ * shape_.head_dim],
                 shape_.k_stride, k_count_);
    }
    const LocalTensor<float> cos = angles(turn, 0), sin = angles(turn, 1);
    if (!has_positions_ && token_ % shape_.period + tokens_ <= shape_.period) {  // the rows lie side by side
      load_rows(cos, cos_[token_ % shape_.period * half_], 1, tokens_ * half_, tokens_ * half_, tokens_ * half_);
      load_rows(sin, sin_[token_ % shape_.period * half_], 1, tokens_ * half_, tokens_ * half_, tokens_ * half_);
    } else {
      for (int32_t i = 0; i < tokens_; ++i) {
        const int64_t row = has_positions_ ? positions_.GetValue(token_ + i) : (token_ + i) % shape_.period;
        load_rows(cos[i * half_], cos_[row * half_], 1, half_, half_, half_);
        load_rows(sin[i * half_], sin_[row * half_], 1, half_, half_, half_);
      }
    }
    SetFlag<HardEvent::MTE2_V>(events_.filled[turn]);
    if (stores_v()) {
      load_rows(v_buffer_.Get<T>()[turn * shape_.tile_tokens * v_width_], v_[token_ * shape_.v_stride], tokens_,
                v_width_, shape_.v_stride, v_width_);
      SetFlag<HardEvent::MTE2_MTE3>(v_filled_[turn]);
    }
  }

  __aicore__ inline LocalTensor<float> angles(int32_t turn, int32_t which) {
    return angle_buffer_.Get<float>()[(2 * turn + which) * shape_.tile_tokens * half_];
  }

  __aicore__ inline void compute(int32_t turn) {
    WaitFlag<HardEvent::MTE2_V>(events_.filled[turn]);
    const LocalTensor<T> x = x_buffer_.Get<T>()[turn * tile_];
    const int32_t count = row_elements();
    for (int32_t i = 0; i < tokens_; ++i) {
      const LocalTensor<T> row = x[i * count];
      if constexpr (Wide<T>::needs_cast) {
        const LocalTensor<float> wide = wide_buffer_.Get<float>();
        Cast(wide, row, RoundMode::CAST_NONE, count);
        turn_heads(wide, angles(turn, 0)[i * half_], angles(turn, 1)[i * half_], q_count_ + k_count_);
        Cast(row, wide, RoundMode::CAST_RINT, count);
      } else {
        turn_heads(row, angles(turn, 0)[i * half_], angles(turn, 1)[i * half_], q_count_ + k_count_);
      }
    }
    SetFlag<HardEvent::V_MTE3>(events_.computed[turn]);
  }

  // A repeat is half a head: the same cos and sin for every head of the token.
  __aicore__ inline void turn_heads(const LocalTensor<float>& x, const LocalTensor<float>& cos,
                                    const LocalTensor<float>& sin, int32_t heads) {
    const LocalTensor<float> left = x, right = x[half_];
    const LocalTensor<float> left_sin = products_buffer_.Get<float>(), right_sin = left_sin[heads * half_];
    const uint64_t mask = half_;
    const uint8_t repeat = narrow(heads), head = narrow(shape_.head_dim / kBlock), left_step = narrow(half_ / kBlock);
    const BinaryRepeatParams product(1, 1, 1, left_step, head, 0), in_place(1, 1, 1, head, head, 0),
        sum(1, 1, 1, head, head, left_step);
    Mul(left_sin, left, sin, mask, repeat, product);
    Mul(right_sin, right, sin, mask, repeat, product);
    Mul(left, left, cos, mask, repeat, in_place);
    Mul(right, right, cos, mask, repeat, in_place);
    if (shape_.inverse) {
      Add(left, left, right_sin, mask, repeat, sum);
      Sub(right, right, left_sin, mask, repeat, sum);
    } else {
      Sub(left, left, right_sin, mask, repeat, sum);
      Add(right, right, left_sin, mask, repeat, sum);
    }
  }

  __aicore__ inline void store(int32_t turn) {
    WaitFlag<HardEvent::V_MTE3>(events_.computed[turn]);
    const LocalTensor<T> x = x_buffer_.Get<T>()[turn * tile_], k = x[q_count_ * shape_.head_dim];
    if (q_count_ > 0) {
      store_heads(q_out_[token_ * shape_.q_out_stride + first_ * shape_.head_dim], x, shape_.q_out_stride, q_count_);
    }
    if (k_count_ > 0 && has_k_out_) {
      store_heads(k_out_[token_ * shape_.k_out_stride + k_first_ * shape_.head_dim], k, shape_.k_out_stride, k_count_);
    }
    if (stores_v()) WaitFlag<HardEvent::MTE2_MTE3>(v_filled_[turn]);
    for (int32_t i = 0; has_cache_ && i < tokens_; ++i) {
      const int64_t slot = slots_.GetValue(token_ + i);
      if (slot < 0) continue;
      if (k_count_ > 0) {
        store_rows(k_cache_[slot * shape_.cache_stride + k_first_ * shape_.head_dim], k[i * row_elements()], 1,
                   k_count_ * shape_.head_dim);
      }
      if (stores_v()) {
        store_rows(v_cache_[slot * shape_.cache_stride], v_buffer_.Get<T>()[(turn * shape_.tile_tokens + i) * v_width_],
                   1, v_width_);
      }
    }
    SetFlag<HardEvent::MTE3_MTE2>(events_.emptied[turn]);
  }

  TPipe& pipe_;
  RopeShape shape_;
  GlobalTensor<T> q_, k_, v_, q_out_, k_out_, k_cache_, v_cache_;
  GlobalTensor<float> cos_, sin_;
  GlobalTensor<int64_t> positions_, slots_;
  TBuf<TPosition::VECIN> x_buffer_, angle_buffer_, v_buffer_;
  TBuf<TPosition::VECCALC> wide_buffer_, products_buffer_;
  TileEvents events_;
  TEventID v_filled_[2];
  int64_t token_;
  int32_t half_, heads_, groups_, tile_, v_width_;
  int32_t tokens_, first_, q_count_, k_first_, k_count_;  // of the unit: tokens, its first head, heads of q and of k
  bool has_positions_, has_k_out_, has_cache_;
};

}  // namespace pyalpaca_npu

#define PYALPACA_ROPE(name, T)                                                                                        \
  extern "C" __global__ __aicore__ void name(                                                                         \
      GM_ADDR q, GM_ADDR k, GM_ADDR v, GM_ADDR cos, GM_ADDR sin, GM_ADDR positions, GM_ADDR slots, GM_ADDR q_out,     \
      GM_ADDR k_out, GM_ADDR k_cache, GM_ADDR v_cache, int64_t tokens, int64_t q_stride, int64_t k_stride,            \
      int64_t v_stride, int64_t q_out_stride, int64_t k_out_stride, int64_t cache_stride, int64_t period,             \
      int32_t q_heads, int32_t k_heads, int32_t head_dim, int32_t tile_tokens, int32_t tile_heads, int32_t inverse) { \
    KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);                                                                   \
    AscendC::TPipe pipe;                                                                                              \
    pyalpaca_npu::Rope<T> op(pipe, {tokens, q_stride, k_stride, v_stride, q_out_stride, k_out_stride, cache_stride,   \
                                    period, q_heads, k_heads, head_dim, tile_tokens, tile_heads, inverse});           \
    op.init(q, k, v, cos, sin, positions, slots, q_out, k_out, k_cache, v_cache);                                     \
    op.run();                                                                                                         \
  }

PYALPACA_ROPE(rope_half, half)
PYALPACA_ROPE(rope_bfloat16, bfloat16_t)
PYALPACA_ROPE(rope_float, float)
