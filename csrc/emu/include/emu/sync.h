// Where a kernel runs, and how its pipes and cores wait for each other.
#pragma once

#include "emu/tensor.h"

#define KERNEL_TASK_TYPE_DEFAULT(type) emu::declare_kernel_type(AscendC::type, emu::Where::here())
#define ASCEND_IS_AIV (emu::is_aiv())
#define ASCEND_IS_AIC (!emu::is_aiv())
#define ascendc_assert(condition, ...) ((condition) ? (void)0 : emu::assertion_failed(#condition, emu::Where::here()))
#define ASSERT(condition) ascendc_assert(condition)

namespace AscendC {

inline int64_t GetBlockIdx() { return emu::block_index(); }
inline int64_t GetBlockNum() { return emu::block_count(); }
inline int64_t GetSubBlockIdx() { return emu::sub_block_index(); }
inline int64_t GetSubBlockNum() { return emu::sub_block_count(); }
inline int64_t GetTaskRation() { return emu::sub_block_count(); }

template <HardEvent event>
void SetFlag(int32_t id, Where where = Where::here()) {
  emu::set_flag({"SetFlag", where}, event, id);
}
template <HardEvent event>
void WaitFlag(int32_t id, Where where = Where::here()) {
  emu::wait_flag({"WaitFlag", where}, event, id);
}
template <pipe_t pipe>
void PipeBarrier(Where where = Where::here()) {
  static_assert(pipe != PIPE_S, "PipeBarrier: the scalar pipe needs none and takes none");
  emu::pipe_barrier({"PipeBarrier", where}, pipe);
}
template <uint8_t mode, pipe_t pipe>
void CrossCoreSetFlag(uint16_t id, Where where = Where::here()) {
  static_assert(mode <= 2, "CrossCoreSetFlag: modes 0, 1 and 2");
  static_assert(pipe != PIPE_S && pipe != PIPE_ALL, "CrossCoreSetFlag: not PIPE_S, not PIPE_ALL");
  emu::cross_core_set({"CrossCoreSetFlag", where}, mode, pipe, id);
}
template <uint8_t mode = 0, pipe_t pipe = PIPE_S>
void CrossCoreWaitFlag(uint16_t id, Where where = Where::here()) {
  static_assert(mode <= 2, "CrossCoreWaitFlag: modes 0, 1 and 2");
  emu::cross_core_wait({"CrossCoreWaitFlag", where}, mode, id);
}
template <bool isAIVOnly = true>
void SyncAll(Where where = Where::here()) {
  emu::sync_all({"SyncAll", where}, isAIVOnly);
}

}  // namespace AscendC
