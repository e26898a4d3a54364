// Copies between memories, and what the cube core does: typed fronts.
#pragma once

#include "emu/tensor.h"

namespace AscendC {

struct DataCopyParams {
  DataCopyParams() = default;
  DataCopyParams(emu::Field<uint16_t> count, emu::Field<uint16_t> length, emu::Field<uint16_t> src,
                 emu::Field<uint16_t> dst)
      : blockCount(count), blockLen(length), srcStride(src), dstStride(dst) {}
  emu::Field<uint16_t> blockCount = 1, blockLen = 0, srcStride = 0, dstStride = 0;
};
struct DataCopyExtParams {
  DataCopyExtParams() = default;
  DataCopyExtParams(emu::Field<uint16_t> count, emu::Field<uint32_t> length, emu::Field<uint32_t> src,
                    emu::Field<uint32_t> dst, emu::Field<uint32_t> reserved)
      : blockCount(count), blockLen(length), srcStride(src), dstStride(dst), rsv(reserved) {}
  emu::Field<uint16_t> blockCount = 1;
  emu::Field<uint32_t> blockLen = 0, srcStride = 0, dstStride = 0, rsv = 0;
};
template <typename T>
struct DataCopyPadExtParams {
  DataCopyPadExtParams() = default;
  DataCopyPadExtParams(bool pad, emu::Field<uint8_t> left, emu::Field<uint8_t> right, T value)
      : isPad(pad), leftPadding(left), rightPadding(right), paddingValue(value) {}
  bool isPad = false;
  emu::Field<uint8_t> leftPadding = 0, rightPadding = 0;
  T paddingValue = T(0);
};
struct DataCopyPadParams {
  DataCopyPadParams() = default;
  DataCopyPadParams(bool pad, emu::Field<uint8_t> left, emu::Field<uint8_t> right, uint64_t value)
      : isPad(pad), leftPadding(left), rightPadding(right), paddingValue(value) {}
  bool isPad = false;
  emu::Field<uint8_t> leftPadding = 0, rightPadding = 0;
  uint64_t paddingValue = 0;
};
struct Nd2NzParams {
  emu::Field<uint16_t> ndNum = 0, nValue = 0, dValue = 0, srcNdMatrixStride = 0, srcDValue = 0, dstNzC0Stride = 0,
                       dstNzNStride = 0, dstNzMatrixStride = 0;
  Nd2NzParams() = default;
  Nd2NzParams(emu::Field<uint16_t> num, emu::Field<uint16_t> n, emu::Field<uint16_t> d, emu::Field<uint16_t> src_matrix,
              emu::Field<uint16_t> src_d, emu::Field<uint16_t> c0, emu::Field<uint16_t> dst_n,
              emu::Field<uint16_t> dst_matrix)
      : ndNum(num),
        nValue(n),
        dValue(d),
        srcNdMatrixStride(src_matrix),
        srcDValue(src_d),
        dstNzC0Stride(c0),
        dstNzNStride(dst_n),
        dstNzMatrixStride(dst_matrix) {}
};

}  // namespace AscendC

namespace emu {

using AscendC::GlobalTensor;
using AscendC::LocalTensor;

inline Blocks blocks_of(Call call, const AscendC::DataCopyParams& p) {
  return {checked(call, "blockCount", p.blockCount, 4095), checked(call, "blockLen", p.blockLen) * uint64_t{32},
          checked(call, "srcStride", p.srcStride) * uint64_t{32},
          checked(call, "dstStride", p.dstStride) * uint64_t{32}};
}
// blockLen in bytes; the gap on the side of the core's memory is in blocks of 32 bytes.
template <typename Params>
Blocks byte_blocks(Call call, const Params& p, bool in, int size) {
  const uint64_t length = checked(call, "blockLen", p.blockLen, 2097151);
  if (length % size != 0)
    fault_argument(call, "blockLen that is no multiple of the element size:", int64_t(length), 0, 0);
  return {checked(call, "blockCount", p.blockCount, 4095), length,
          checked(call, "srcStride", p.srcStride) * uint64_t(in ? 1 : 32),
          checked(call, "dstStride", p.dstStride) * uint64_t(in ? 32 : 1)};
}
template <typename T>
uint64_t bits_of(T value) {
  uint64_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof(T));
  return bits;
}

}  // namespace emu

namespace AscendC {

template <typename T>
void DataCopy(const LocalTensor<T>& dst, const GlobalTensor<T>& src, const uint32_t count,
              Where where = Where::here()) {
  const emu::Call call{"DataCopy", where};
  emu::copy_in(call, dst.at(), src.at(), {1, emu::whole_blocks(call, count, sizeof(T)), 0, 0});
}
template <typename T>
void DataCopy(const GlobalTensor<T>& dst, const LocalTensor<T>& src, const uint32_t count,
              Where where = Where::here()) {
  const emu::Call call{"DataCopy", where};
  emu::copy_out(call, dst.at(), src.at(), {1, emu::whole_blocks(call, count, sizeof(T)), 0, 0}, emu::dtype_of<T>);
}
template <typename T>
void DataCopy(const LocalTensor<T>& dst, const LocalTensor<T>& src, const uint32_t count, Where where = Where::here()) {
  const emu::Call call{"DataCopy", where};
  emu::copy_local(call, dst.at(), src.at(), {1, emu::whole_blocks(call, count, sizeof(T)), 0, 0});
}
template <typename T>
void DataCopy(const LocalTensor<T>& dst, const GlobalTensor<T>& src, const DataCopyParams& p,
              Where where = Where::here()) {
  const emu::Call call{"DataCopy", where};
  emu::copy_in(call, dst.at(), src.at(), emu::blocks_of(call, p));
}
template <typename T>
void DataCopy(const GlobalTensor<T>& dst, const LocalTensor<T>& src, const DataCopyParams& p,
              Where where = Where::here()) {
  const emu::Call call{"DataCopy", where};
  emu::copy_out(call, dst.at(), src.at(), emu::blocks_of(call, p), emu::dtype_of<T>);
}
template <typename T>
void DataCopy(const LocalTensor<T>& dst, const LocalTensor<T>& src, const DataCopyParams& p,
              Where where = Where::here()) {
  const emu::Call call{"DataCopy", where};
  emu::copy_local(call, dst.at(), src.at(), emu::blocks_of(call, p));
}
template <typename T>
void DataCopyPad(const LocalTensor<T>& dst, const GlobalTensor<T>& src, const DataCopyExtParams& p,
                 const DataCopyPadExtParams<T>& pad, Where where = Where::here()) {
  const emu::Call call{"DataCopyPad", where};
  emu::copy_in_padded(
      call, dst.at(), src.at(), emu::byte_blocks(call, p, true, sizeof(T)),
      {pad.isPad, emu::checked(call, "leftPadding", pad.leftPadding, 32 / sizeof(T)),
       emu::checked(call, "rightPadding", pad.rightPadding, 32 / sizeof(T)), emu::bits_of(pad.paddingValue)},
      sizeof(T));
}
template <typename T>
void DataCopyPad(const LocalTensor<T>& dst, const GlobalTensor<T>& src, const DataCopyParams& p,
                 const DataCopyPadParams& pad, Where where = Where::here()) {
  const emu::Call call{"DataCopyPad", where};
  emu::copy_in_padded(call, dst.at(), src.at(), emu::byte_blocks(call, p, true, sizeof(T)),
                      {pad.isPad, emu::checked(call, "leftPadding", pad.leftPadding, 32 / sizeof(T)),
                       emu::checked(call, "rightPadding", pad.rightPadding, 32 / sizeof(T)), pad.paddingValue},
                      sizeof(T));
}
template <typename T>
void DataCopyPad(const GlobalTensor<T>& dst, const LocalTensor<T>& src, const DataCopyExtParams& p,
                 Where where = Where::here()) {
  const emu::Call call{"DataCopyPad", where};
  emu::copy_out_padded(call, dst.at(), src.at(), emu::byte_blocks(call, p, false, sizeof(T)), emu::dtype_of<T>);
}
template <typename T>
void DataCopyPad(const GlobalTensor<T>& dst, const LocalTensor<T>& src, const DataCopyParams& p,
                 Where where = Where::here()) {
  const emu::Call call{"DataCopyPad", where};
  emu::copy_out_padded(call, dst.at(), src.at(), emu::byte_blocks(call, p, false, sizeof(T)), emu::dtype_of<T>);
}

template <typename T>
void SetAtomicAdd(Where where = Where::here()) {
  emu::set_atomic({"SetAtomicAdd", where}, true, emu::dtype_of<T>);
}
inline void SetAtomicNone(Where where = Where::here()) {
  emu::set_atomic({"SetAtomicNone", where}, false, emu::Dtype::kFloat);
}

// ---- the cube core

template <typename T>
void DataCopy(const LocalTensor<T>& dst, const GlobalTensor<T>& src, const Nd2NzParams& p,
              Where where = Where::here()) {
  const emu::Call call{"DataCopy", where};
  emu::copy_in_fractal(
      call, dst.at(), src.at(),
      {emu::checked(call, "ndNum", p.ndNum, 4095), emu::checked(call, "nValue", p.nValue, 16384),
       emu::checked(call, "dValue", p.dValue), emu::checked(call, "srcNdMatrixStride", p.srcNdMatrixStride),
       emu::checked(call, "srcDValue", p.srcDValue), emu::checked(call, "dstNzC0Stride", p.dstNzC0Stride, 16384),
       emu::checked(call, "dstNzNStride", p.dstNzNStride, 16384),
       emu::checked(call, "dstNzMatrixStride", p.dstNzMatrixStride)},
      sizeof(T));
}
template <typename T>
void DataCopy(const LocalTensor<T>& dst, const LocalTensor<T>& src, const Nd2NzParams&, Where where = Where::here()) {
  emu::copy_in_fractal({"DataCopy", where}, dst.at(), {}, {}, sizeof(T));  // refused: only global memory is a source
}

struct LoadData2DParams {
  LoadData2DParams() = default;
  LoadData2DParams(emu::Field<uint16_t> start, emu::Field<uint8_t> repeat, emu::Field<uint16_t> src, uint8_t id,
                   emu::Field<uint16_t> gap, bool transpose, uint8_t mode)
      : startIndex(start),
        repeatTimes(repeat),
        srcStride(src),
        sid(id),
        dstGap(gap),
        ifTranspose(transpose),
        addrMode(mode) {}
  emu::Field<uint16_t> startIndex = 0;
  emu::Field<uint8_t> repeatTimes = 0;
  emu::Field<uint16_t> srcStride = 0;
  uint8_t sid = 0;
  emu::Field<uint16_t> dstGap = 0;
  bool ifTranspose = false;
  uint8_t addrMode = 0;
};
template <typename T>
void LoadData(const LocalTensor<T>& dst, const LocalTensor<T>& src, const LoadData2DParams& p,
              Where where = Where::here()) {
  static_assert(sizeof(T) == 2, "LoadData: 16-bit elements");
  const emu::Call call{"LoadData", where};
  emu::load_fractals(call, dst.at(), src.at(),
                     {emu::checked(call, "startIndex", p.startIndex), emu::checked(call, "repeatTimes", p.repeatTimes),
                      emu::checked(call, "srcStride", p.srcStride), emu::checked(call, "dstGap", p.dstGap),
                      p.ifTranspose, p.addrMode == 1},
                     sizeof(T));
}

struct MmadParams {
  MmadParams() = default;
  MmadParams(emu::Field<uint16_t> rows, emu::Field<uint16_t> columns, emu::Field<uint16_t> depth, uint8_t unit,
             bool source, bool zero)
      : m(rows), n(columns), k(depth), cmatrixInitVal(zero), cmatrixSource(source), unitFlag(unit) {}
  emu::Field<uint16_t> m = 0, n = 0, k = 0;
  bool cmatrixInitVal = true;
  bool cmatrixSource = false;
  uint8_t unitFlag = 0;
};
template <typename D, typename A, typename B>
void Mmad(const LocalTensor<D>& dst, const LocalTensor<A>& a, const LocalTensor<B>& b, const MmadParams& p,
          Where where = Where::here()) {
  static_assert(__is_same(A, B) && emu::is_one_of<A, half, bfloat16_t>,
                "Mmad: half with half, or bfloat16 with bfloat16");
  const emu::Call call{"Mmad", where};
  if (!__is_same(D, float)) emu::fault_argument(call, "a result that is no float, size", sizeof(D), 4, 4);
  if (p.unitFlag != 0 || p.cmatrixSource) emu::fault_argument(call, "unitFlag", p.unitFlag, 0, 0);
  emu::multiply(call, dst.at(), a.at(), b.at(), emu::dtype_of<A>, emu::checked(call, "m", p.m, 4095),
                emu::checked(call, "n", p.n, 4095), emu::checked(call, "k", p.k, 4095), p.cmatrixInitVal);
}

struct FixpipeParamsV220 {
  FixpipeParamsV220() = default;
  FixpipeParamsV220(emu::Field<uint16_t> n, emu::Field<uint16_t> m, emu::Field<uint16_t> src, emu::Field<uint32_t> dst,
                    bool relu)
      : nSize(n), mSize(m), srcStride(src), dstStride(dst), reluEn(relu) {}
  emu::Field<uint16_t> nSize = 0, mSize = 0, srcStride = 0;
  emu::Field<uint32_t> dstStride = 0;
  QuantMode_t quantPre = QuantMode_t::NoQuant;
  bool reluEn = false;
  emu::Field<uint16_t> ndNum = 1, srcNdStride = 0, dstNdStride = 0;
  uint8_t unitFlag = 0;
};
template <typename T, typename U, const FixpipeConfig& config = CFG_ROW_MAJOR>
void Fixpipe(const GlobalTensor<T>& dst, const LocalTensor<U>& src, const FixpipeParamsV220& p,
             Where where = Where::here()) {
  static_assert(__is_same(U, float) && emu::is_one_of<T, float, half, bfloat16_t>,
                "Fixpipe: float to float, half or bfloat16");
  static_assert(config.format == CO2Layout::ROW_MAJOR, "Fixpipe: only row-major results");
  const emu::Call call{"Fixpipe", where};
  const QuantMode_t wanted = __is_same(T, float)  ? QuantMode_t::NoQuant
                             : __is_same(T, half) ? QuantMode_t::F322F16
                                                  : QuantMode_t::F322BF16;
  if (p.quantPre != wanted) emu::fault_argument(call, "quantPre", int(p.quantPre), int(wanted), int(wanted));
  emu::fix_out(call, dst.at(), src.at(),
               {emu::checked(call, "nSize", p.nSize, 4095), emu::checked(call, "mSize", p.mSize, 8192),
                emu::checked(call, "srcStride", p.srcStride), emu::checked(call, "dstStride", p.dstStride),
                emu::checked(call, "ndNum", p.ndNum), emu::checked(call, "srcNdStride", p.srcNdStride, 512),
                emu::checked(call, "dstNdStride", p.dstNdStride), p.quantPre, p.reluEn},
               emu::dtype_of<T>);
}

}  // namespace AscendC
