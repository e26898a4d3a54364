// GlobalTensor and LocalTensor: typed views; every access goes to the machine, which judges it.
#pragma once

#include "emu/core.h"

namespace AscendC {

using emu::Where;

template <typename T>
class GlobalTensor {
 public:
  using PrimType = T;
  void SetGlobalBuffer(__gm__ T* buffer, uint64_t size) {
    at_ = {reinterpret_cast<uint8_t*>(buffer), size * sizeof(T)};
  }
  void SetGlobalBuffer(__gm__ T* buffer) { at_ = {reinterpret_cast<uint8_t*>(buffer), ~uint64_t{0}}; }
  const __gm__ T* GetPhyAddr() const { return reinterpret_cast<T*>(at_.address); }
  __gm__ T* GetPhyAddr(uint64_t offset) const { return reinterpret_cast<T*>(at_.address) + offset; }
  GlobalTensor operator[](uint64_t offset) const {
    GlobalTensor moved;
    const uint64_t bytes = offset * sizeof(T);
    moved.at_.address = at_.address + bytes;
    moved.at_.bytes = at_.bytes == ~uint64_t{0} ? at_.bytes : (bytes < at_.bytes ? at_.bytes - bytes : 0);
    return moved;
  }
  T GetValue(uint64_t offset, Where where = Where::here()) const {
    T value;
    emu::scalar_read({"GlobalTensor.GetValue", where}, (*this)[offset].at_, &value, sizeof(T));
    return value;
  }
  void SetValue(uint64_t offset, T value, Where where = Where::here()) {
    emu::scalar_write({"GlobalTensor.SetValue", where}, (*this)[offset].at_, &value, sizeof(T));
  }
  uint64_t GetSize() const { return at_.bytes / sizeof(T); }
  const emu::Global& at() const { return at_; }

 private:
  emu::Global at_;
};

template <typename T>
class LocalTensor {
 public:
  using PrimType = T;
  LocalTensor() = default;
  explicit LocalTensor(const emu::Local& at) : at_(at) {}
  LocalTensor operator[](uint32_t offset) const { return LocalTensor(emu::part(at_, uint64_t{offset} * sizeof(T))); }
  T GetValue(uint32_t offset, Where where = Where::here()) const {
    T value;
    emu::scalar_read({"LocalTensor.GetValue", where}, (*this)[offset].at_, &value, sizeof(T));
    return value;
  }
  template <typename T1>
  void SetValue(uint32_t offset, T1 value, Where where = Where::here()) const {
    const T narrow = static_cast<T>(value);
    emu::scalar_write({"LocalTensor.SetValue", where}, (*this)[offset].at_, &narrow, sizeof(T));
  }
  template <typename U>
  LocalTensor<U> ReinterpretCast() const {
    return LocalTensor<U>(at_);
  }
  uint32_t GetSize() const { return at_.bytes / sizeof(T); }
  void SetSize(uint32_t size) { at_.bytes = size * sizeof(T); }
  uint64_t GetPhyAddr() const { return at_.address; }
  int32_t GetPosition() const { return static_cast<int32_t>(at_.position); }
  const emu::Local& at() const { return at_; }

 private:
  emu::Local at_;
};

template <typename T, CacheLine line, DcciDst dst>
void DataCacheCleanAndInvalid(const GlobalTensor<T>& tensor, Where where = Where::here()) {
  emu::clean_cache({"DataCacheCleanAndInvalid", where}, tensor.at(), line == CacheLine::ENTIRE_DATA_CACHE);
}

}  // namespace AscendC
