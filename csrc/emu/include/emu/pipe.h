// TPipe, TQue, TQueBind, TBuf: who holds which piece of a core's memory, and the events that go with handing it on.
#pragma once

#include "emu/sync.h"

namespace AscendC {

template <TPosition src, TPosition dst, int32_t depth, auto mask = 0>
class TQueBind {
 public:
  static constexpr bool is_queue = true;
  static constexpr TPosition source = src, target = dst;
  static constexpr int32_t places = depth;

  template <typename T>
  LocalTensor<T> AllocTensor(Where where = Where::here()) {
    return LocalTensor<T>(emu::queue_allocate({"AllocTensor", where}, number_));
  }
  template <typename T>
  void FreeTensor(LocalTensor<T>& tensor, Where where = Where::here()) {
    emu::queue_free({"FreeTensor", where}, number_, tensor.at());
  }
  template <typename T>
  bool EnQue(const LocalTensor<T>& tensor, Where where = Where::here()) {
    emu::queue_push({"EnQue", where}, number_, tensor.at());
    return true;
  }
  template <typename T>
  LocalTensor<T> DeQue(Where where = Where::here()) {
    return LocalTensor<T>(emu::queue_pop({"DeQue", where}, number_));
  }
  bool HasIdleBuffer() const { return emu::queue_idle(number_) > 0; }
  bool HasTensorInQue() const { return emu::queue_length(number_) > 0; }
  int32_t GetTensorCountInQue() const { return emu::queue_length(number_); }
  bool VacantInQue() const { return emu::queue_length(number_) < emu::queue_depth(number_); }

 private:
  friend class TPipe;
  int32_t number_ = -1;
};

// A queue by its one position: VECIN, A1 and B1 are filled from global memory, VECOUT and CO1 are emptied to it.
template <TPosition position, int32_t depth, auto mask = 0>
using TQue =
    TQueBind<position == TPosition::VECIN || position == TPosition::A1 || position == TPosition::B1 ? TPosition::GM
             : position == TPosition::VECOUT                                                        ? TPosition::VECOUT
                                                                                                    : position,
             position == TPosition::VECOUT ? TPosition::GM : position, depth, mask>;

template <TPosition position = TPosition::LCM>
class TBuf {
 public:
  static constexpr bool is_queue = false;
  template <typename T>
  LocalTensor<T> Get() {
    return LocalTensor<T>(at_);
  }
  template <typename T>
  LocalTensor<T> Get(uint32_t size, Where where = Where::here()) {
    return GetWithOffset<T>(size, 0, where);
  }
  template <typename T>
  LocalTensor<T> GetWithOffset(uint32_t size, uint32_t offset, Where where = Where::here()) {
    emu::Local at = emu::part(at_, offset);
    const uint64_t bytes = uint64_t{size} * sizeof(T);
    if (bytes > at.bytes) emu::fault_argument({"TBuf.Get", where}, "bytes", static_cast<int64_t>(bytes), 0, at.bytes);
    at.bytes = static_cast<uint32_t>(bytes);
    return LocalTensor<T>(at);
  }

 private:
  friend class TPipe;
  emu::Local at_;
};

class TPipe {
 public:
  explicit TPipe(Where where = Where::here()) : where_(where) { emu::pipe_opened({"TPipe", where}); }
  ~TPipe() noexcept(false) {
    if (open_) Destroy();
  }
  TPipe(const TPipe&) = delete;
  TPipe& operator=(const TPipe&) = delete;
  void Init() {}
  void Destroy() {
    open_ = false;
    emu::pipe_closed({"TPipe", where_});
  }
  void Reset(Where where = Where::here()) { emu::pipe_reset({"TPipe.Reset", where}); }
  template <typename Queue>
  bool InitBuffer(Queue& queue, emu::Field<uint8_t> num, emu::Field<uint32_t> bytes, Where where = Where::here()) {
    static_assert(Queue::is_queue, "InitBuffer with a number of blocks is for queues");
    const emu::Call call{"InitBuffer", where};
    queue.number_ = emu::new_queue(call, Queue::source, Queue::target, Queue::places, emu::checked(call, "num", num),
                                   emu::checked(call, "len", bytes));
    return true;
  }
  template <TPosition position>
  bool InitBuffer(TBuf<position>& buffer, emu::Field<uint32_t> bytes, Where where = Where::here()) {
    const emu::Call call{"InitBuffer", where};
    buffer.at_ = emu::new_buffer(call, position, emu::checked(call, "len", bytes));
    return true;
  }
  TEventID FetchEventID(HardEvent event, Where where = Where::here()) {
    return emu::free_event({"FetchEventID", where}, event);
  }
  template <HardEvent event>
  TEventID FetchEventID(Where where = Where::here()) {
    return emu::free_event({"FetchEventID", where}, event);
  }
  template <HardEvent event>
  TEventID AllocEventID(Where where = Where::here()) {
    return emu::allocate_event({"AllocEventID", where}, event);
  }
  template <HardEvent event>
  void ReleaseEventID(TEventID id, Where where = Where::here()) {
    emu::release_event({"ReleaseEventID", where}, event, id);
  }

 private:
  Where where_;
  bool open_ = true;
};

}  // namespace AscendC
