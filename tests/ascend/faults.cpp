// A small kernel for each fault: with `mended` 0 it has the fault, with 1 it has not. x and y are 4096 bytes of fp32.
#include "emu/host.h"
#include "kernel_operator.h"

using namespace AscendC;

namespace {

constexpr int kCount = 256;

struct Floats {
  GlobalTensor<float> x, y;
  Floats(GM_ADDR a, GM_ADDR b) {
    x.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(a), 1024);
    y.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(b), 1024);
  }
};

// x -> V -> y with flags, each of which a fault may leave out.
template <typename Compute>
void through(GM_ADDR a, GM_ADDR b, bool in, bool out, Compute compute) {
  Floats gm(a, b);
  TPipe pipe;
  TBuf<TPosition::VECIN> buffer;
  pipe.InitBuffer(buffer, 2 * kCount * sizeof(float));
  LocalTensor<float> t = buffer.Get<float>();
  DataCopy(t, gm.x, kCount);
  if (in) {
    SetFlag<HardEvent::MTE2_V>(EVENT_ID0);
    WaitFlag<HardEvent::MTE2_V>(EVENT_ID0);
  }
  compute(t);
  if (out) {
    SetFlag<HardEvent::V_MTE3>(EVENT_ID0);
    WaitFlag<HardEvent::V_MTE3>(EVENT_ID0);
  }
  DataCopy(gm.y, t, kCount);
}

}  // namespace

#define FAULT(name)                                                                                  \
  extern "C" __global__ __aicore__ void name(GM_ADDR a, GM_ADDR b, int mended);                      \
  EMU_KERNEL(name)                                                                                   \
  extern "C" __global__ __aicore__ void name([[maybe_unused]] GM_ADDR a, [[maybe_unused]] GM_ADDR b, \
                                             [[maybe_unused]] int mended)

FAULT(too_much_unified_memory) {
  TPipe pipe;
  TBuf<> big;
  pipe.InitBuffer(big, mended ? 184 * 1024 : 184 * 1024 + 1);
}
FAULT(too_much_l0a) {
  TPipe pipe;
  TQue<TPosition::A2, 1> queue;
  pipe.InitBuffer(queue, 2, mended ? 32 * 1024 : 33 * 1024);
}
FAULT(too_much_l1) {
  TPipe pipe;
  TQue<TPosition::A1, 1> queue;
  pipe.InitBuffer(queue, 2, mended ? 255 * 1024 : 256 * 1024);
}
FAULT(misaligned_vector) {
  through(a, b, true, true, [&](LocalTensor<float> t) { Adds(t[mended ? 8 : 4], t[mended ? 8 : 4], 1.0f, 64); });
}
FAULT(misaligned_copy) {
  Floats gm(a, b);
  TPipe pipe;
  TBuf<TPosition::VECIN> buffer;
  pipe.InitBuffer(buffer, 1024);
  DataCopy(buffer.Get<float>()[mended ? 8 : 1], gm.x, 64);
}
FAULT(count_of_part_of_a_block) {
  Floats gm(a, b);
  TPipe pipe;
  TBuf<TPosition::VECIN> buffer;
  pipe.InitBuffer(buffer, 1024);
  DataCopy(buffer.Get<float>(), gm.x, mended ? 16 : 13);
}
FAULT(mask_too_large) {
  through(a, b, true, true, [&](LocalTensor<float> t) { Adds(t, t, 1.0f, mended ? 64 : 65, 1, {1, 1, 8, 8}); });
}
FAULT(repeat_too_large) {
  through(a, b, true, true, [&](LocalTensor<float> t) { Adds(t, t, 1.0f, 8, mended ? 32 : 256, {1, 1, 1, 1}); });
}
FAULT(stride_too_large) {
  through(a, b, true, true, [&](LocalTensor<float> t) { Adds(t, t, 1.0f, 8, 1, {1, 1, mended ? 255 : 256, 8}); });
}
FAULT(overlap_in_part) {
  through(a, b, true, true, [&](LocalTensor<float> t) { Adds(t[mended ? 0 : 8], t, 1.0f, 64); });
}
FAULT(overlap_between_repeats) {  // each repeat reads what the one before wrote; Add may, in its accumulating form
  through(a, b, true, true, [&](LocalTensor<float> t) {
    if (mended)
      Add(t, t[64], t, 64, 3, {1, 1, 1, 0, 8, 0});
    else
      Div(t, t[64], t, 64, 3, {1, 1, 1, 0, 8, 0});
  });
}
FAULT(never_written) {
  through(a, b, true, true, [&](LocalTensor<float> t) {
    if (mended) Duplicate(t[kCount], 0.0f, 64);
    Add(t, t, t[kCount], 64);
  });
}
FAULT(padding_is_not_data) {
  Floats gm(a, b);
  TPipe pipe;
  TQue<TPosition::VECIN, 1> queue;
  pipe.InitBuffer(queue, 1, 1024);
  LocalTensor<float> t = queue.AllocTensor<float>();
  DataCopyPad(t, gm.x, {1, 5 * 4, 0, 0, 0}, {mended != 0, 0, 3, 0.0f});
  queue.EnQue(t);
  t = queue.DeQue<float>();
  Adds(t, t, 1.0f, 8);
  queue.FreeTensor(t);
}
FAULT(scratch_is_not_a_result) {
  through(a, b, true, true, [&](LocalTensor<float> t) {
    ReduceSum<float>(t[kCount], t, t[kCount + 64], 128);
    if (mended) Duplicate(t[kCount + 64], 1.0f, 8);
    Adds(t, t[kCount + 64], 1.0f, 8);
  });
}
FAULT(used_after_it_was_freed) {
  Floats gm(a, b);
  TPipe pipe;
  TQue<TPosition::VECIN, 1> queue;
  pipe.InitBuffer(queue, 1, 1024);
  LocalTensor<float> t = queue.AllocTensor<float>();
  DataCopy(t, gm.x, 64);
  queue.EnQue(t);
  t = queue.DeQue<float>();
  if (!mended) queue.FreeTensor(t);
  Adds(t, t, 1.0f, 64);
  if (mended) queue.FreeTensor(t);
}
FAULT(freed_twice) {
  TPipe pipe;
  TQue<TPosition::VECIN, 1> queue;
  pipe.InitBuffer(queue, 2, 1024);
  LocalTensor<float> t = queue.AllocTensor<float>();
  queue.FreeTensor(t);
  if (!mended) queue.FreeTensor(t);
}
FAULT(taken_from_an_empty_queue) {
  TPipe pipe;
  TQue<TPosition::VECIN, 1> queue;
  pipe.InitBuffer(queue, 1, 1024);
  LocalTensor<float> t = queue.AllocTensor<float>();
  if (mended) queue.EnQue(t);
  t = queue.DeQue<float>();
  queue.FreeTensor(t);
}
FAULT(more_taken_than_there_are) {
  TPipe pipe;
  TQue<TPosition::VECIN, 2> queue;
  pipe.InitBuffer(queue, mended ? 2 : 1, 1024);
  LocalTensor<float> t = queue.AllocTensor<float>(), u = queue.AllocTensor<float>();
  queue.FreeTensor(t);
  queue.FreeTensor(u);
}
FAULT(queue_too_short) {
  TPipe pipe;
  TQue<TPosition::VECIN, 1> queue;
  pipe.InitBuffer(queue, 2, 1024);
  for (int i = 0; i < 2; ++i) {
    LocalTensor<float> t = queue.AllocTensor<float>();
    queue.EnQue(t);
    if (!mended && i == 0) continue;
    t = queue.DeQue<float>();
    queue.FreeTensor(t);
  }
}
FAULT(never_freed) {
  TPipe pipe;
  TQue<TPosition::VECIN, 1> queue;
  pipe.InitBuffer(queue, 1, 1024);
  LocalTensor<float> t = queue.AllocTensor<float>();
  if (mended) queue.FreeTensor(t);
}
FAULT(left_in_the_queue) {
  TPipe pipe;
  TQue<TPosition::VECIN, 1> queue;
  pipe.InitBuffer(queue, 1, 1024);
  LocalTensor<float> t = queue.AllocTensor<float>();
  queue.EnQue(t);
  if (!mended) return;
  t = queue.DeQue<float>();
  queue.FreeTensor(t);
}
template <TPosition position>
void fill_queue(GM_ADDR a, GM_ADDR b) {
  Floats gm(a, b);
  TPipe pipe;
  TQue<position, 1> queue;
  pipe.InitBuffer(queue, 1, 1024);
  LocalTensor<float> t = queue.template AllocTensor<float>();
  DataCopy(t, gm.x, 64);
  queue.EnQue(t);
  t = queue.template DeQue<float>();
  queue.FreeTensor(t);
}
FAULT(filled_an_output_queue) {
  if (mended)
    fill_queue<TPosition::VECIN>(a, b);
  else
    fill_queue<TPosition::VECOUT>(a, b);
}
FAULT(memory_of_the_other_kind_of_core) {
  TPipe pipe;
  TBuf<> vector;
  TBuf<TPosition::A1> cube;
  if (mended)
    pipe.InitBuffer(vector, 64);
  else
    pipe.InitBuffer(cube, 64);
}
FAULT(read_past_global_memory) {
  Floats gm(a, b);
  gm.x.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(a));
  TPipe pipe;
  TBuf<TPosition::VECIN> buffer;
  pipe.InitBuffer(buffer, 1024);
  DataCopy(buffer.Get<float>(), gm.x[1024 - (mended ? 64 : 56)], 64);
}
FAULT(read_past_the_declared_size) {
  Floats gm(a, b);
  gm.x.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(a), 100);
  TPipe pipe;
  TBuf<TPosition::VECIN> buffer;
  pipe.InitBuffer(buffer, 1024);
  DataCopy(buffer.Get<float>(), gm.x, mended ? 96 : 104);
}
FAULT(past_the_local_tensor) {
  through(a, b, true, true, [&](LocalTensor<float> t) { Adds(t[kCount], t, 1.0f, mended ? kCount : kCount + 8); });
}
FAULT(wrote_an_input) {
  Floats gm(a, b);
  through(a, b, true, true, [](LocalTensor<float>) {});
  TPipe pipe;
  TBuf<TPosition::VECIN> buffer;
  pipe.InitBuffer(buffer, 1024);
  LocalTensor<float> t = buffer.Get<float>();
  PipeBarrier<PIPE_ALL>();
  Duplicate(t, 0.0f, 8);
  PipeBarrier<PIPE_ALL>();
  DataCopy(mended ? gm.y : gm.x, t, 8);
}
FAULT(two_cores_write_the_same) {  // 2 cores
  Floats gm(a, b);
  TPipe pipe;
  TBuf<TPosition::VECOUT> buffer;
  pipe.InitBuffer(buffer, 1024);
  LocalTensor<float> t = buffer.Get<float>();
  Duplicate(t, 1.0f, 64);
  SetFlag<HardEvent::V_MTE3>(EVENT_ID0);
  WaitFlag<HardEvent::V_MTE3>(EVENT_ID0);
  DataCopyPad(gm.y[GetBlockIdx() * 9], t, {1, (mended ? 9u : 10u) * 4, 0, 0, 0});
}
FAULT(two_cores_add_without_atomics) {  // 2 cores
  Floats gm(a, b);
  gm.y.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(a));
  TPipe pipe;
  TBuf<TPosition::VECOUT> buffer;
  pipe.InitBuffer(buffer, 1024);
  LocalTensor<float> t = buffer.Get<float>();
  Duplicate(t, 1.0f, 64);
  SetFlag<HardEvent::V_MTE3>(EVENT_ID0);
  WaitFlag<HardEvent::V_MTE3>(EVENT_ID0);
  if (mended) SetAtomicAdd<float>();
  DataCopy(gm.y, t, 64);
  SetAtomicNone();
}
FAULT(one_core_reads_what_another_writes) {  // 2 cores of a kernel that may synchronise
  Floats gm(a, b);
  TPipe pipe;
  TBuf<TPosition::VECIN> buffer;
  pipe.InitBuffer(buffer, 1024);
  LocalTensor<float> t = buffer.Get<float>();
  if (GetBlockIdx() == 0) {
    Duplicate(t, 1.0f, 64);
    SetFlag<HardEvent::V_MTE3>(EVENT_ID0);
    WaitFlag<HardEvent::V_MTE3>(EVENT_ID0);
    DataCopy(gm.y, t, 64);
  }
  if (mended) SyncAll();
  if (GetBlockIdx() == 1) DataCopy(t, gm.y, 64);
}
FAULT(waited_for_what_was_not_set) {
  if (mended) SetFlag<HardEvent::V_MTE3>(EVENT_ID1);
  WaitFlag<HardEvent::V_MTE3>(EVENT_ID1);
}
FAULT(set_twice) {
  SetFlag<HardEvent::V_MTE3>(EVENT_ID1);
  if (mended) WaitFlag<HardEvent::V_MTE3>(EVENT_ID1);
  SetFlag<HardEvent::V_MTE3>(EVENT_ID1);
  WaitFlag<HardEvent::V_MTE3>(EVENT_ID1);
}
FAULT(left_set) {
  SetFlag<HardEvent::V_MTE3>(EVENT_ID1);
  if (mended) WaitFlag<HardEvent::V_MTE3>(EVENT_ID1);
}
FAULT(a_reserved_event) {
  SetFlag<HardEvent::V_MTE3>(mended ? EVENT_ID5 : EVENT_ID6);
  WaitFlag<HardEvent::V_MTE3>(mended ? EVENT_ID5 : EVENT_ID6);
}
FAULT(an_event_released_twice) {
  TPipe pipe;
  const TEventID id = pipe.AllocEventID<HardEvent::V_MTE3>();
  pipe.ReleaseEventID<HardEvent::V_MTE3>(id);
  if (!mended) pipe.ReleaseEventID<HardEvent::V_MTE3>(id);
}
FAULT(one_core_does_not_arrive) {  // 2 cores
  if (GetBlockIdx() == 0 || mended) CrossCoreSetFlag<0, PIPE_MTE3>(3);
  CrossCoreWaitFlag<0>(3);
}
FAULT(counted_past_15) {  // 2 cores
  for (int i = 0; i < (mended ? 15 : 16); ++i) CrossCoreSetFlag<0, PIPE_MTE3>(3);
  for (int i = 0; i < (mended ? 15 : 16); ++i) CrossCoreWaitFlag<0>(3);
}
FAULT(cross_flag_left_set) {  // 2 cores
  CrossCoreSetFlag<0, PIPE_MTE3>(3);
  if (mended) CrossCoreWaitFlag<0>(3);
}
FAULT(a_reserved_cross_flag) {  // 2 cores
  CrossCoreSetFlag<0, PIPE_MTE3>(mended ? 10 : 12);
  CrossCoreWaitFlag<0>(mended ? 10 : 12);
}
FAULT(another_kernel_type) {
  if (mended)
    KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
  else
    KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_MIX_AIV_1_0);
}
FAULT(no_flag_before_computing) {
  through(a, b, mended, true, [](LocalTensor<float> t) { Adds(t, t, 1.0f, kCount); });
}
FAULT(no_flag_before_copying_out) {
  through(a, b, true, mended, [](LocalTensor<float> t) { Adds(t, t, 1.0f, kCount); });
}
FAULT(no_flag_before_the_scalar_reads) {
  through(a, b, true, true, [&](LocalTensor<float> t) {
    Adds(t, t, 1.0f, kCount);
    if (mended) {
      SetFlag<HardEvent::V_S>(EVENT_ID0);
      WaitFlag<HardEvent::V_S>(EVENT_ID0);
    }
    t.GetValue(3);
  });
}
FAULT(buffer_filled_again_too_early) {  // two halves of a buffer, four tiles
  Floats gm(a, b);
  TPipe pipe;
  TBuf<TPosition::VECIN> buffer;
  pipe.InitBuffer(buffer, 2 * 1024);
  for (int tile = 0; tile < 4; ++tile) {
    const int id = tile % 2;
    LocalTensor<float> t = buffer.Get<float>()[id * 256];
    if (mended && tile >= 2) WaitFlag<HardEvent::MTE3_MTE2>(id);
    DataCopy(t, gm.x[tile * 256], 256);
    SetFlag<HardEvent::MTE2_V>(id);
    WaitFlag<HardEvent::MTE2_V>(id);
    Adds(t, t, 1.0f, 256);
    SetFlag<HardEvent::V_MTE3>(id);
    WaitFlag<HardEvent::V_MTE3>(id);
    DataCopy(gm.y[tile * 256], t, 256);
    if (mended && tile < 2) SetFlag<HardEvent::MTE3_MTE2>(id);
  }
}
FAULT(two_copies_to_one_place) {
  through(a, b, true, true, [](LocalTensor<float> t) { Adds(t, t, 1.0f, kCount); });
  Floats gm(a, b);
  TPipe pipe;
  TBuf<TPosition::VECOUT> buffer;
  pipe.InitBuffer(buffer, 4096);
  LocalTensor<float> t = buffer.Get<float>()[512];
  Duplicate(t, 1.0f, 64);
  SetFlag<HardEvent::V_MTE3>(EVENT_ID0);
  WaitFlag<HardEvent::V_MTE3>(EVENT_ID0);
  if (mended) PipeBarrier<PIPE_MTE3>();
  DataCopy(gm.y, t, 64);
}
FAULT(scalar_write_not_cleaned) {
  Floats gm(a, b);
  gm.y.SetValue(0, 1.0f);
  if (mended) DataCacheCleanAndInvalid<float, CacheLine::SINGLE_CACHE_LINE, DcciDst::CACHELINE_OUT>(gm.y);
}
FAULT(scalar_read_of_an_old_line) {
  through(a, b, true, true, [](LocalTensor<float> t) { Adds(t, t, 1.0f, kCount); });
  Floats gm(a, b);
  PipeBarrier<PIPE_ALL>();
  if (mended) DataCacheCleanAndInvalid<float, CacheLine::SINGLE_CACHE_LINE, DcciDst::CACHELINE_OUT>(gm.y);
  gm.y.GetValue(0);
}
FAULT(an_assertion) { ASSERT(mended == 1); }

// ---- the cube core

namespace {

// x as halves (16, 16) times itself, over L1 and L0, and out to y as fp32 rows; `multiply` makes the product.
template <typename Multiply>
void squared(GM_ADDR a, GM_ADDR b, bool loaded, bool fixed, Multiply multiply) {
  GlobalTensor<half> x;
  GlobalTensor<float> y;
  x.SetGlobalBuffer(reinterpret_cast<__gm__ half*>(a), 2048);
  y.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(b), 1024);
  TPipe pipe;
  TBuf<TPosition::A1> l1;
  TBuf<TPosition::A2> l0a;
  TBuf<TPosition::B2> l0b;
  TBuf<TPosition::CO1> l0c;
  pipe.InitBuffer(l1, 512);
  pipe.InitBuffer(l0a, 512);
  pipe.InitBuffer(l0b, 512);
  pipe.InitBuffer(l0c, 4096);
  DataCopy(l1.Get<half>(), x, Nd2NzParams(1, 16, 16, 0, 16, 16, 1, 0));
  SetFlag<HardEvent::MTE2_MTE1>(EVENT_ID0);
  WaitFlag<HardEvent::MTE2_MTE1>(EVENT_ID0);
  const LoadData2DParams whole(0, 1, 1, 0, 0, false, 0);
  LoadData(l0a.Get<half>(), l1.Get<half>(), whole);
  LoadData(l0b.Get<half>(), l1.Get<half>(), whole);
  if (loaded) {
    SetFlag<HardEvent::MTE1_M>(EVENT_ID0);
    WaitFlag<HardEvent::MTE1_M>(EVENT_ID0);
  }
  multiply(l0c.Get<float>(), l0a.Get<half>(), l0b.Get<half>());
  if (fixed) {
    SetFlag<HardEvent::M_FIX>(EVENT_ID0);
    WaitFlag<HardEvent::M_FIX>(EVENT_ID0);
  }
  Fixpipe<float, float, CFG_ROW_MAJOR>(y, l0c.Get<float>(), FixpipeParamsV220(16, 16, 16, 16, false));
}

using Product = LocalTensor<float>;
using Factor = LocalTensor<half>;

}  // namespace

FAULT(factors_not_waited_for) {
  squared(a, b, mended, true,
          [](Product c, Factor x, Factor y) { Mmad(c, x, y, MmadParams(16, 16, 16, 0, false, true)); });
}
FAULT(product_not_waited_for) {
  squared(a, b, true, mended,
          [](Product c, Factor x, Factor y) { Mmad(c, x, y, MmadParams(16, 16, 16, 0, false, true)); });
}
FAULT(short_products_without_a_barrier) {  // the second may read what the first has not written yet
  squared(a, b, true, true, [&](Product c, Factor x, Factor y) {
    Mmad(c, x, y, MmadParams(16, 16, 16, 0, false, true));
    if (mended) PipeBarrier<PIPE_M>();
    Mmad(c, x, y, MmadParams(16, 16, 16, 0, false, false));
  });
}
FAULT(product_between_its_places) {
  squared(a, b, true, true, [&](Product c, Factor x, Factor y) {
    Mmad(c, x, y, MmadParams(16, 16, 16, 0, false, true));
    Mmad(c[mended ? 256 : 16], x, y, MmadParams(16, 16, 16, 0, false, true));
  });
}
FAULT(a_single_row) {
  squared(a, b, true, true, [&](Product c, Factor x, Factor y) {
    Mmad(c, x, y, MmadParams(16, 16, 16, 0, false, true));
    Mmad(c[256], x, y, MmadParams(mended ? 2 : 1, 16, 16, 0, false, true));
  });
}
FAULT(an_event_of_the_pipe) {  // which has taken the first three of M_MTE1, and set them
  squared(a, b, true, true, [&](Product c, Factor x, Factor y) {
    const event_t id = mended ? EVENT_ID3 : EVENT_ID0;
    Mmad(c, x, y, MmadParams(16, 16, 16, 0, false, true));
    SetFlag<HardEvent::M_MTE1>(id);
    WaitFlag<HardEvent::M_MTE1>(id);
  });
}

// Both kinds of core: the cube core's product, 10 of its 16 columns computed, is read by the vector cores.
namespace {
void handed_over(GM_ADDR a, GM_ADDR b, bool waited, uint32_t columns) {
  if ASCEND_IS_AIC {
    squared(a, b, true, true,
            [](Product c, Factor x, Factor y) { Mmad(c, x, y, MmadParams(16, 10, 16, 0, false, true)); });
    CrossCoreSetFlag<2, PIPE_FIX>(0);
  }
  if ASCEND_IS_AIV {
    Floats gm(a, b);
    TPipe pipe;
    TBuf<TPosition::VECIN> buffer;
    pipe.InitBuffer(buffer, 16 * 64);
    LocalTensor<float> t = buffer.Get<float>();
    if (waited) CrossCoreWaitFlag(0);
    DataCopyPad(t, gm.y, DataCopyExtParams(16, columns * 4, (16 - columns) * 4, 0, 0),
                DataCopyPadExtParams<float>(true, 0, static_cast<uint8_t>((16 - columns) % 8), 0.0f));
    if (!waited) CrossCoreWaitFlag(0);
  }
}
}  // namespace
FAULT(read_before_the_cube_core_wrote) { handed_over(a, b, mended, 10); }
FAULT(columns_that_were_never_computed) { handed_over(a, b, true, mended ? 10 : 12); }

// y = 2 x in one tile after the other through queues: what a sound kernel looks like.
FAULT(sound) {
  Floats gm(a, b);
  TPipe pipe;
  TQue<TPosition::VECIN, 1> in;
  TQue<TPosition::VECOUT, 1> out;
  pipe.InitBuffer(in, 2, 256);
  pipe.InitBuffer(out, 2, 256);
  for (int tile = 0; tile < 16; ++tile) {
    LocalTensor<float> t = in.AllocTensor<float>();
    DataCopy(t, gm.x[tile * 64], 64);
    in.EnQue(t);
    t = in.DeQue<float>();
    LocalTensor<float> u = out.AllocTensor<float>();
    Adds(u, t, 0.0f, 64);
    Add(u, u, t, 64);
    out.EnQue(u);
    in.FreeTensor(t);
    u = out.DeQue<float>();
    DataCopy(gm.y[tile * 64], u, 64);
    out.FreeTensor(u);
  }
}
