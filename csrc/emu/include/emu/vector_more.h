// The vector instructions that are not element by element: filling, spreading, reducing, comparing, choosing,
// gathering.
#pragma once

#include "emu/vector.h"

namespace AscendC {

template <typename T>
void Duplicate(const LocalTensor<T>& dst, const T& scalar, const int32_t& count, Where where = Where::here()) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4, "Duplicate: no form for this type");
  emu::vector_op({"Duplicate", where}, emu::VectorOp::kDuplicate, emu::operand(dst), nullptr, 0,
                 emu::count_lanes(count), &scalar, emu::dtype_of<T>);
}
template <typename T, bool isSetMask = true>
void Duplicate(const LocalTensor<T>& dst, const T& scalar, uint64_t mask, const emu::Field<uint8_t> repeat,
               const emu::Field<uint16_t> block, const emu::Field<uint8_t> stride, Where where = Where::here()) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4, "Duplicate: no form for this type");
  const emu::Call call{"Duplicate", where};
  emu::vector_op(call, emu::VectorOp::kDuplicate, emu::operand(call, dst, block, stride), nullptr, 0,
                 emu::first_lanes<isSetMask>(call, mask, repeat), &scalar, emu::dtype_of<T>);
}
template <typename T, bool isSetMask = true>
void Duplicate(const LocalTensor<T>& dst, const T& scalar, uint64_t mask[], const emu::Field<uint8_t> repeat,
               const emu::Field<uint16_t> block, const emu::Field<uint8_t> stride, Where where = Where::here()) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4, "Duplicate: no form for this type");
  const emu::Call call{"Duplicate", where};
  emu::vector_op(call, emu::VectorOp::kDuplicate, emu::operand(call, dst, block, stride), nullptr, 0,
                 emu::bit_lanes<isSetMask>(call, mask, repeat), &scalar, emu::dtype_of<T>);
}

template <typename T, bool isSetMask = true>
void Copy(const LocalTensor<T>& dst, const LocalTensor<T>& src, const uint64_t mask, const emu::Field<uint8_t> repeat,
          const CopyRepeatParams& p, Where where = Where::here()) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4, "Copy: no form for this type");
  const emu::Call call{"Copy", where};
  const emu::Operand source = emu::operand(call, src, p.srcStride, p.srcRepeatSize);
  emu::vector_op(call, emu::VectorOp::kCopy, emu::operand(call, dst, p.dstStride, p.dstRepeatSize), &source, 1,
                 emu::first_lanes<isSetMask>(call, mask, repeat));
}
template <typename T, bool isSetMask = true>
void Copy(const LocalTensor<T>& dst, const LocalTensor<T>& src, const uint64_t mask[], const emu::Field<uint8_t> repeat,
          const CopyRepeatParams& p, Where where = Where::here()) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4, "Copy: no form for this type");
  const emu::Call call{"Copy", where};
  const emu::Operand source = emu::operand(call, src, p.srcStride, p.srcRepeatSize);
  emu::vector_op(call, emu::VectorOp::kCopy, emu::operand(call, dst, p.dstStride, p.dstRepeatSize), &source, 1,
                 emu::bit_lanes<isSetMask>(call, mask, repeat));
}

template <typename T>
void CreateVecIndex(LocalTensor<T> dst, const T& first, uint32_t count, Where where = Where::here()) {
  static_assert(emu::is_one_of<T, half, float, int16_t, int32_t>, "CreateVecIndex: no form for this type");
  emu::vector_op({"CreateVecIndex", where}, emu::VectorOp::kIndex, emu::operand(dst), nullptr, 0,
                 emu::count_lanes(count), &first, emu::dtype_of<T>);
}
template <typename T>
void CreateVecIndex(LocalTensor<T>& dst, const T& first, uint64_t mask, emu::Field<uint8_t> repeat,
                    emu::Field<uint16_t> block, emu::Field<uint8_t> stride, Where where = Where::here()) {
  static_assert(emu::is_one_of<T, half, float, int16_t, int32_t>, "CreateVecIndex: no form for this type");
  const emu::Call call{"CreateVecIndex", where};
  emu::vector_op(call, emu::VectorOp::kIndex, emu::operand(call, dst, block, stride), nullptr, 0,
                 emu::first_lanes<true>(call, mask, repeat), &first, emu::dtype_of<T>);
}

template <typename T>
void Brcb(const LocalTensor<T>& dst, const LocalTensor<T>& src, const emu::Field<uint8_t> repeat,
          const BrcbRepeatParams& p, Where where = Where::here()) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4, "Brcb: no form for this type");
  const emu::Call call{"Brcb", where};
  emu::broadcast_blocks(call, dst.at(), emu::operand(src), emu::checked(call, "repeat", repeat),
                        emu::checked(call, "dstBlkStride", p.dstBlkStride),
                        emu::checked(call, "dstRepStride", p.dstRepStride));
}

template <typename T>
void Gather(const LocalTensor<T>& dst, const LocalTensor<T>& src, const LocalTensor<uint32_t>& offsets,
            const uint32_t base, const uint32_t count, Where where = Where::here()) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4, "Gather: no form for this type");
  emu::gather({"Gather", where}, emu::operand(dst), src.at(), offsets.at(), base, emu::count_lanes(count));
}
template <typename T>
void Gather(const LocalTensor<T>& dst, const LocalTensor<T>& src, const LocalTensor<uint32_t>& offsets,
            const uint32_t base, const uint64_t mask, const emu::Field<uint8_t> repeat,
            const emu::Field<uint16_t> stride, Where where = Where::here()) {
  const emu::Call call{"Gather", where};
  emu::gather(call, emu::operand(call, dst, emu::Field<uint16_t>(1), stride), src.at(), offsets.at(), base,
              emu::first_lanes<true>(call, mask, repeat));
}
template <typename T>
void Gather(const LocalTensor<T>& dst, const LocalTensor<T>& src, const LocalTensor<uint32_t>& offsets,
            const uint32_t base, const uint64_t mask[], const emu::Field<uint8_t> repeat,
            const emu::Field<uint16_t> stride, Where where = Where::here()) {
  const emu::Call call{"Gather", where};
  emu::gather(call, emu::operand(call, dst, emu::Field<uint16_t>(1), stride), src.at(), offsets.at(), base,
              emu::bit_lanes<true>(call, mask, repeat));
}

// WholeReduce*: (mask, repeat), BlockReduce* and PairReduceSum: (repeat, mask), as in the interface.
#define EMU_WHOLE(name, op, defaults, order)                                                                        \
  template <typename T, bool isSetMask = true>                                                                      \
  void name(const LocalTensor<T>& dst, const LocalTensor<T>& src, const int32_t mask,                               \
            const emu::Field<uint8_t> repeat, const emu::Field<uint16_t> dstRepStride,                              \
            const emu::Field<uint16_t> srcBlkStride, const emu::Field<uint16_t> srcRepStride defaults,              \
            Where where = Where::here()) {                                                                          \
    static_assert(emu::is_one_of<T, half, float>, #name ": no form for this type");                                 \
    const emu::Call call{#name, where};                                                                             \
    emu::reduce(call, emu::ReduceOp::op, emu::ReduceUnit::kWhole, dst.at(),                                         \
                emu::operand(call, src, srcBlkStride, srcRepStride),                                                \
                emu::first_lanes<isSetMask>(call, static_cast<uint64_t>(int64_t{mask}), repeat),                    \
                emu::checked(call, "dstRepStride", dstRepStride), order);                                           \
  }                                                                                                                 \
  template <typename T, bool isSetMask = true>                                                                      \
  void name(const LocalTensor<T>& dst, const LocalTensor<T>& src, const uint64_t mask[],                            \
            const emu::Field<uint8_t> repeat, const emu::Field<uint16_t> dstRepStride,                              \
            const emu::Field<uint16_t> srcBlkStride, const emu::Field<uint16_t> srcRepStride defaults,              \
            Where where = Where::here()) {                                                                          \
    static_assert(emu::is_one_of<T, half, float>, #name ": no form for this type");                                 \
    const emu::Call call{#name, where};                                                                             \
    emu::reduce(call, emu::ReduceOp::op, emu::ReduceUnit::kWhole, dst.at(),                                         \
                emu::operand(call, src, srcBlkStride, srcRepStride), emu::bit_lanes<isSetMask>(call, mask, repeat), \
                emu::checked(call, "dstRepStride", dstRepStride), order);                                           \
  }
#define EMU_ORDER , ReduceOrder order = ReduceOrder::ORDER_VALUE_INDEX
#define EMU_NONE
EMU_WHOLE(WholeReduceSum, kSum, EMU_NONE, ReduceOrder::ORDER_ONLY_VALUE)
EMU_WHOLE(WholeReduceMax, kMax, EMU_ORDER, order)
EMU_WHOLE(WholeReduceMin, kMin, EMU_ORDER, order)
#undef EMU_WHOLE
#undef EMU_ORDER
#undef EMU_NONE

#define EMU_PARTS(name, op, unit)                                                                                    \
  template <typename T, bool isSetMask = true>                                                                       \
  void name(const LocalTensor<T>& dst, const LocalTensor<T>& src, const emu::Field<uint8_t> repeat,                  \
            const int32_t mask, const emu::Field<uint16_t> dstRepStride, const emu::Field<uint16_t> srcBlkStride,    \
            const emu::Field<uint16_t> srcRepStride, Where where = Where::here()) {                                  \
    static_assert(emu::is_one_of<T, half, float>, #name ": no form for this type");                                  \
    const emu::Call call{#name, where};                                                                              \
    emu::reduce(call, emu::ReduceOp::op, emu::ReduceUnit::unit, dst.at(),                                            \
                emu::operand(call, src, srcBlkStride, srcRepStride),                                                 \
                emu::first_lanes<isSetMask>(call, static_cast<uint64_t>(int64_t{mask}), repeat),                     \
                emu::checked(call, "dstRepStride", dstRepStride), ReduceOrder::ORDER_ONLY_VALUE);                    \
  }                                                                                                                  \
  template <typename T, bool isSetMask = true>                                                                       \
  void name(const LocalTensor<T>& dst, const LocalTensor<T>& src, const emu::Field<uint8_t> repeat,                  \
            const uint64_t mask[], const emu::Field<uint16_t> dstRepStride, const emu::Field<uint16_t> srcBlkStride, \
            const emu::Field<uint16_t> srcRepStride, Where where = Where::here()) {                                  \
    static_assert(emu::is_one_of<T, half, float>, #name ": no form for this type");                                  \
    const emu::Call call{#name, where};                                                                              \
    emu::reduce(call, emu::ReduceOp::op, emu::ReduceUnit::unit, dst.at(),                                            \
                emu::operand(call, src, srcBlkStride, srcRepStride), emu::bit_lanes<isSetMask>(call, mask, repeat),  \
                emu::checked(call, "dstRepStride", dstRepStride), ReduceOrder::ORDER_ONLY_VALUE);                    \
  }
EMU_PARTS(BlockReduceSum, kSum, kBlock)
EMU_PARTS(BlockReduceMax, kMax, kBlock)
EMU_PARTS(BlockReduceMin, kMin, kBlock)
EMU_PARTS(PairReduceSum, kSum, kPair)
#undef EMU_PARTS

template <typename T>
void ReduceSum(const LocalTensor<T>& dst, const LocalTensor<T>& src, const LocalTensor<T>& work, const int32_t count,
               Where where = Where::here()) {
  static_assert(emu::is_one_of<T, half, float>, "ReduceSum: no form for this type");
  emu::reduce_all({"ReduceSum", where}, emu::ReduceOp::kSum, dst.at(), emu::operand(src), work.at(),
                  emu::count_lanes(count), false);
}
#define EMU_REDUCE(name, op)                                                                                           \
  template <typename T>                                                                                                \
  void name(const LocalTensor<T>& dst, const LocalTensor<T>& src, const LocalTensor<T>& work, const int32_t count,     \
            bool calIndex = false, Where where = Where::here()) {                                                      \
    static_assert(emu::is_one_of<T, half, float>, #name ": no form for this type");                                    \
    emu::reduce_all({#name, where}, emu::ReduceOp::op, dst.at(), emu::operand(src), work.at(),                         \
                    emu::count_lanes(count), calIndex);                                                                \
  }                                                                                                                    \
  template <typename T>                                                                                                \
  void name(const LocalTensor<T>& dst, const LocalTensor<T>& src, const LocalTensor<T>& work, const int32_t mask,      \
            const emu::Field<uint8_t> repeat, const emu::Field<uint16_t> srcRepStride, bool calIndex = false,          \
            Where where = Where::here()) {                                                                             \
    static_assert(emu::is_one_of<T, half, float>, #name ": no form for this type");                                    \
    const emu::Call call{#name, where};                                                                                \
    emu::reduce_all(call, emu::ReduceOp::op, dst.at(), emu::operand(call, src, emu::Field<uint16_t>(1), srcRepStride), \
                    work.at(), emu::first_lanes<true>(call, static_cast<uint64_t>(int64_t{mask}), repeat), calIndex);  \
  }
EMU_REDUCE(ReduceMax, kMax)
EMU_REDUCE(ReduceMin, kMin)
#undef EMU_REDUCE

template <typename T, typename U>
void Compare(const LocalTensor<U>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1, CMPMODE mode,
             uint32_t count, Where where = Where::here()) {
  static_assert(emu::is_one_of<T, half, float, int32_t> && sizeof(U) == 1, "Compare: no form for these types");
  const emu::Operand second = emu::operand(src1);
  emu::compare({"Compare", where}, &dst.at(), emu::operand(src0), &second, nullptr, mode, emu::count_lanes(count));
}
template <typename T, typename U>
void Compare(const LocalTensor<U>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1, CMPMODE mode,
             const uint64_t mask, emu::Field<uint8_t> repeat, const BinaryRepeatParams& p,
             Where where = Where::here()) {
  static_assert(emu::is_one_of<T, half, float, int32_t> && sizeof(U) == 1, "Compare: no form for these types");
  const emu::Call call{"Compare", where};
  const emu::Operand second = emu::operand(call, src1, p.src1BlkStride, p.src1RepStride);
  emu::compare(call, &dst.at(), emu::operand(call, src0, p.src0BlkStride, p.src0RepStride), &second, nullptr, mode,
               emu::first_lanes<true>(call, mask, repeat));
}
template <typename T>
void Compare(const LocalTensor<T>& src0, const LocalTensor<T>& src1, CMPMODE mode, const uint64_t mask,
             const BinaryRepeatParams& p, Where where = Where::here()) {
  static_assert(emu::is_one_of<T, half, float>, "Compare: no form for these types");
  const emu::Call call{"Compare", where};
  const emu::Operand second = emu::operand(call, src1, p.src1BlkStride, p.src1RepStride);
  emu::compare(call, nullptr, emu::operand(call, src0, p.src0BlkStride, p.src0RepStride), &second, nullptr, mode,
               emu::first_lanes<true>(call, mask, emu::Field<uint8_t>(1)));
}
template <typename T, typename U>
void CompareScalar(const LocalTensor<U>& dst, const LocalTensor<T>& src, const T scalar, CMPMODE mode, uint32_t count,
                   Where where = Where::here()) {
  static_assert(emu::is_one_of<T, half, float, int32_t> && sizeof(U) == 1, "CompareScalar: no form for these types");
  emu::compare({"CompareScalar", where}, &dst.at(), emu::operand(src), nullptr, &scalar, mode, emu::count_lanes(count));
}
template <typename U>
void GetCmpMask(const LocalTensor<U>& dst, Where where = Where::here()) {
  emu::get_compare_register({"GetCmpMask", where}, dst.at());
}

template <typename T, typename U>
void Select(const LocalTensor<T>& dst, const LocalTensor<U>& bits, const LocalTensor<T>& src0,
            const LocalTensor<T>& src1, SELMODE mode, uint32_t count, Where where = Where::here()) {
  static_assert(emu::is_one_of<T, half, float>, "Select: no form for this type");
  const emu::Operand second = emu::operand(src1);
  emu::select({"Select", where}, emu::operand(dst), bits.at(), emu::operand(src0), &second, nullptr, mode,
              emu::count_lanes(count));
}
template <typename T, typename U>
void Select(const LocalTensor<T>& dst, const LocalTensor<U>& bits, const LocalTensor<T>& src0, T src1, SELMODE mode,
            uint32_t count, Where where = Where::here()) {
  static_assert(emu::is_one_of<T, half, float>, "Select: no form for this type");
  emu::select({"Select", where}, emu::operand(dst), bits.at(), emu::operand(src0), nullptr, &src1, mode,
              emu::count_lanes(count));
}
template <typename T, typename U>
void Select(const LocalTensor<T>& dst, const LocalTensor<U>& bits, const LocalTensor<T>& src0,
            const LocalTensor<T>& src1, SELMODE mode, uint64_t mask, emu::Field<uint8_t> repeat,
            const BinaryRepeatParams& p, Where where = Where::here()) {
  static_assert(emu::is_one_of<T, half, float>, "Select: no form for this type");
  const emu::Call call{"Select", where};
  const emu::Operand second = emu::operand(call, src1, p.src1BlkStride, p.src1RepStride);
  emu::select(call, emu::operand(call, dst, p.dstBlkStride, p.dstRepStride), bits.at(),
              emu::operand(call, src0, p.src0BlkStride, p.src0RepStride), &second, nullptr, mode,
              emu::first_lanes<true>(call, mask, repeat));
}
template <typename T, typename U>
void Select(const LocalTensor<T>& dst, const LocalTensor<U>& bits, const LocalTensor<T>& src0, T src1, SELMODE mode,
            uint64_t mask[], emu::Field<uint8_t> repeat, const BinaryRepeatParams& p, Where where = Where::here()) {
  static_assert(emu::is_one_of<T, half, float>, "Select: no form for this type");
  const emu::Call call{"Select", where};
  emu::select(call, emu::operand(call, dst, p.dstBlkStride, p.dstRepStride), bits.at(),
              emu::operand(call, src0, p.src0BlkStride, p.src0RepStride), nullptr, &src1, mode,
              emu::bit_lanes<true>(call, mask, repeat));
}

}  // namespace AscendC
