// The kernels as they are, known to the emulation by name, and their tiling for Python.
#include "ascend/kernels/flash_backward.cpp"
#include "ascend/kernels/flash_decode.cpp"
#include "ascend/kernels/flash_forward.cpp"
#include "ascend/kernels/flash_merge.cpp"
#include "ascend/kernels/flash_rows.cpp"
#include "ascend/kernels/rms_norm.cpp"
#include "ascend/kernels/rms_norm_backward.cpp"
#include "ascend/kernels/rope.cpp"
#include "ascend/kernels/swiglu.cpp"
#include "ascend/launch/kernels.h"
#include "ascend/tiling/flash_backward.h"
#include "ascend/tiling/flash_decode.h"
#include "ascend/tiling/flash_forward.h"
#include "ascend/tiling/rms_norm.h"
#include "ascend/tiling/rope.h"
#include "ascend/tiling/swiglu.h"
#include "emu/host.h"

#define KERNELS_OF(type)               \
  EMU_KERNEL(rms_norm_##type)          \
  EMU_KERNEL(rms_norm_backward_##type) \
  EMU_KERNEL(rms_norm_dgamma_##type)   \
  EMU_KERNEL(rope_##type)              \
  EMU_KERNEL(swiglu_##type)            \
  EMU_KERNEL(swiglu_backward_##type)
// A launch takes what its kernel takes; a pointer as void*.
template <typename... Args, typename... Given>
constexpr bool matches(void (*)(Args...), uint32_t (*)(uint32_t, aclrtStream, Given...)) {
  return sizeof...(Args) == sizeof...(Given) &&
         (((__is_same(Args, GM_ADDR) && __is_same(Given, void*)) || __is_same(Args, Given)) && ...);
}
#define SAME_ARGUMENTS(kernel) static_assert(matches(kernel, aclrtlaunch_##kernel), #kernel);
#define LAUNCHES_OF(type)                  \
  SAME_ARGUMENTS(rms_norm_##type)          \
  SAME_ARGUMENTS(rms_norm_backward_##type) \
  SAME_ARGUMENTS(rms_norm_dgamma_##type)   \
  SAME_ARGUMENTS(rope_##type)              \
  SAME_ARGUMENTS(swiglu_##type)            \
  SAME_ARGUMENTS(swiglu_backward_##type)
LAUNCHES_OF(half)
LAUNCHES_OF(bfloat16)
LAUNCHES_OF(float)
#define FLASH_LAUNCHES_OF(type)         \
  SAME_ARGUMENTS(flash_forward_##type)  \
  SAME_ARGUMENTS(flash_delta_##type)    \
  SAME_ARGUMENTS(flash_backward_##type) \
  SAME_ARGUMENTS(flash_round_##type)    \
  SAME_ARGUMENTS(flash_decode_##type)   \
  SAME_ARGUMENTS(flash_merge_##type)
FLASH_LAUNCHES_OF(half)
FLASH_LAUNCHES_OF(bfloat16)

KERNELS_OF(half)
KERNELS_OF(bfloat16)
KERNELS_OF(float)
#define FLASH_KERNELS_OF(type)      \
  EMU_KERNEL(flash_forward_##type)  \
  EMU_KERNEL(flash_backward_##type) \
  EMU_KERNEL(flash_delta_##type)    \
  EMU_KERNEL(flash_round_##type)    \
  EMU_KERNEL(flash_decode_##type)   \
  EMU_KERNEL(flash_merge_##type)
FLASH_KERNELS_OF(half)
FLASH_KERNELS_OF(bfloat16)

extern "C" {

using namespace pyalpaca_npu;

void tiling_rms_norm(int64_t rows, int64_t width, int64_t size, int64_t residual, int64_t cores, int64_t* out) {
  const RmsNormTiling t = rms_norm_tiling(rows, width, size, residual != 0, cores);
  out[0] = t.cores, out[1] = t.tile_rows,
  out[2] = t.cores ? rms_norm_bytes(width, size, residual != 0, t.tile_rows) : 0;
}
void tiling_rms_norm_backward(int64_t rows, int64_t width, int64_t size, int64_t, int64_t cores, int64_t* out) {
  const RmsNormTiling t = rms_norm_backward_tiling(rows, width, size, cores);
  out[0] = t.cores, out[1] = t.tile_rows, out[2] = t.buffers;
  out[3] = t.cores ? rms_norm_backward_bytes(width, size, t.tile_rows, t.buffers) : 0;
}
void tiling_dgamma(int64_t parts, int64_t width, int64_t, int64_t, int64_t cores, int64_t* out) {
  const DgammaTiling t = dgamma_tiling(parts, width, cores);
  out[0] = t.cores, out[1] = t.columns;
}
void tiling_swiglu(int64_t rows, int64_t width, int64_t size, int64_t backward, int64_t cores, int64_t* out) {
  const SwigluTiling t = swiglu_tiling(rows, width, size, backward != 0, cores);
  out[0] = t.cores, out[1] = t.tile_rows, out[2] = t.tile_columns;
  out[3] = t.cores ? swiglu_bytes(t.tile_rows, t.tile_columns, size, backward ? 3 : 2) : 0;
}
void tiling_rope(int64_t tokens, int64_t q_heads, int64_t k_heads, int64_t head_dim, int64_t size, int64_t cache,
                 int64_t cores, int64_t* out) {
  const RopeTiling t = rope_tiling(tokens, q_heads, k_heads, head_dim, size, cache != 0, cores);
  out[0] = t.cores, out[1] = t.tile_tokens, out[2] = t.tile_heads;
  out[3] = t.cores ? rope_bytes(t.tile_tokens, t.tile_heads, k_heads, head_dim, size, cache != 0) : 0;
}

void tiling_flash_forward(int64_t batch, int64_t q_len, int64_t kv_len, int64_t heads, int64_t kv_heads,
                          int64_t head_dim, int64_t cores, int64_t* out) {
  const FlashTiling t = flash_forward_tiling(batch, q_len, kv_len, heads, kv_heads, head_dim, cores);
  const FlashBytes b = flash_forward_bytes(t, head_dim);
  out[0] = t.cores, out[1] = t.q_tile, out[2] = t.kv_tile, out[3] = t.stack, out[4] = t.chunk, out[5] = t.share;
  out[6] = t.workspace, out[7] = b.unified, out[8] = b.l1, out[9] = b.l0a, out[10] = b.l0b, out[11] = b.l0c;
}

void tiling_flash_backward(int64_t batch, int64_t q_len, int64_t kv_len, int64_t heads, int64_t kv_heads,
                           int64_t head_dim, int64_t cores, int64_t* out) {
  const FlashGradientTiling t = flash_backward_tiling(batch, q_len, kv_len, heads, kv_heads, head_dim, cores);
  const FlashBytes b = flash_backward_bytes(t, head_dim);
  out[0] = t.cores, out[1] = t.side, out[2] = t.q_block, out[3] = t.kv_block, out[4] = t.chunk, out[5] = t.workspace;
  out[6] = b.unified, out[7] = b.l1, out[8] = b.l0a, out[9] = b.l0b, out[10] = b.l0c;
}
void tiling_flash_decode(int64_t batch, int64_t kv_len, int64_t heads, int64_t kv_heads, int64_t head_dim,
                         int64_t cores, int64_t* out) {
  const FlashDecodeTiling d = flash_decode_tiling(batch, kv_len, heads, kv_heads, head_dim, cores);
  const FlashTiling& t = d.of;
  const FlashBytes b = flash_decode_bytes(d, head_dim);
  out[0] = t.cores, out[1] = t.q_tile, out[2] = t.kv_tile, out[3] = t.stack, out[4] = t.chunk, out[5] = t.workspace;
  out[6] = d.split, out[7] = d.splits, out[8] = flash_merge_bytes(d.splits, head_dim);
  out[9] = b.unified, out[10] = b.l1, out[11] = b.l0a, out[12] = b.l0b, out[13] = b.l0c;
}
// Rows times keys that each core has to do, causal.
void work_of_cores(int64_t batch, int64_t q_len, int64_t kv_len, int64_t heads, int64_t tile, int64_t share,
                   int64_t cores, int64_t* out) {
  FlashShape shape{};
  shape.batch = batch, shape.q_len = q_len, shape.kv_len = kv_len, shape.causal = 1;
  shape.heads = shape.kv_heads = static_cast<int32_t>(heads);
  shape.q_tile = static_cast<int32_t>(tile), shape.kv_tile = 128, shape.stack = 512;
  shape.share = static_cast<int32_t>(share);
  for (int64_t core = 0; core < cores; ++core) {
    FlashWalk walk(shape, nullptr, nullptr, core, cores);
    out[core] = 0;
    while (walk.next()) out[core] += walk.tile().rows * walk.columns();
  }
}

void gradient_work_of_cores(int64_t batch, int64_t q_len, int64_t kv_len, int64_t heads, int64_t block, int64_t cores,
                            int64_t* out) {
  FlashGradientShape shape{};
  shape.of.batch = batch, shape.of.q_len = q_len, shape.of.kv_len = kv_len, shape.of.causal = 1;
  shape.of.heads = shape.of.kv_heads = static_cast<int32_t>(heads);
  shape.of.stack = shape.q_block = static_cast<int32_t>(block);
  for (int64_t core = 0; core < cores; ++core) {
    FlashGradientWalk walk(shape, nullptr, nullptr, core, cores);
    out[core] = 0;
    while (walk.next()) out[core] += walk.rows().rows * walk.keys().keys;
  }
}

}  // extern "C"
