// Small kernels whose time can be worked out by hand.
#include "emu/host.h"
#include "kernel_operator.h"

using namespace AscendC;

// Tiles of 16 KB in, `passes` additions over each, out; through one buffer or two.
void tiles_through_buffers(GM_ADDR x, GM_ADDR y, int32_t tiles, int32_t buffers, int32_t passes) {
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
  constexpr int32_t tile = 4096;
  GlobalTensor<float> from, to;
  const int64_t first = GetBlockIdx() * int64_t{tiles} * tile;
  from.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(x) + first);
  to.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(y) + first);
  TPipe pipe;
  TBuf<TPosition::VECIN> buffer;
  pipe.InitBuffer(buffer, buffers * tile * sizeof(float));
  for (int32_t i = 0; i < buffers; ++i) SetFlag<HardEvent::MTE3_MTE2>(i);
  for (int32_t i = 0; i < tiles; ++i) {
    const int32_t turn = i % buffers;
    const LocalTensor<float> here = buffer.Get<float>()[turn * tile];
    WaitFlag<HardEvent::MTE3_MTE2>(turn);
    DataCopy(here, from[i * tile], tile);
    SetFlag<HardEvent::MTE2_V>(turn);
    WaitFlag<HardEvent::MTE2_V>(turn);
    for (int32_t pass = 0; pass < passes; ++pass) Add(here, here, here, tile);
    SetFlag<HardEvent::V_MTE3>(turn);
    WaitFlag<HardEvent::V_MTE3>(turn);
    DataCopy(to[i * tile], here, tile);
    SetFlag<HardEvent::MTE3_MTE2>(turn);
  }
  for (int32_t i = 0; i < buffers; ++i) WaitFlag<HardEvent::MTE3_MTE2>(i);
}
EMU_KERNEL(tiles_through_buffers)

// The same 16 KB, `times` over.
void read_again(GM_ADDR x, int32_t times) {
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
  GlobalTensor<float> from;
  from.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(x));
  TPipe pipe;
  TBuf<TPosition::VECIN> buffer;
  pipe.InitBuffer(buffer, 16384);
  for (int32_t i = 0; i < times; ++i) {
    DataCopy(buffer.Get<float>(), from, 4096);
    PipeBarrier<PIPE_ALL>();
  }
}
EMU_KERNEL(read_again)

// Instructions of each rate on 64 repeats; `which` chooses.
void instruction(int32_t which, int32_t times) {
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
  TPipe pipe;
  TBuf<TPosition::VECCALC> buffer;
  pipe.InitBuffer(buffer, 3 * 16384);
  const LocalTensor<float> a = buffer.Get<float>(), b = a[4096], c = a[8192];
  const LocalTensor<half> h = a.ReinterpretCast<half>();
  for (int32_t i = 0; i < times; ++i) {
    if (which == 0) Add(a, b, c, 4096);
    if (which == 1) Exp(a, b, 4096);
    if (which == 2) MulAddDst(a, b, c, 4096);
    if (which == 3) WholeReduceSum<float>(a, b, 64, 64, 1, 1, 8);
    if (which == 4) Cast(h, b, RoundMode::CAST_RINT, 4096);
    if (which == 5) BlockReduceSum<float>(a, b, 64, 64, 1, 1, 8);
  }
}
EMU_KERNEL(instruction)
