// The vector instructions: typed fronts that name an operation, its operands and its lanes; arithmetic is in the
// machine.
#pragma once

#include "emu/tensor.h"

namespace AscendC {

struct BinaryRepeatParams {
  BinaryRepeatParams() = default;
  BinaryRepeatParams(emu::Field<uint8_t> dst_block, emu::Field<uint8_t> src0_block, emu::Field<uint8_t> src1_block,
                     emu::Field<uint8_t> dst_repeat, emu::Field<uint8_t> src0_repeat, emu::Field<uint8_t> src1_repeat)
      : dstBlkStride(dst_block),
        src0BlkStride(src0_block),
        src1BlkStride(src1_block),
        dstRepStride(dst_repeat),
        src0RepStride(src0_repeat),
        src1RepStride(src1_repeat) {}
  emu::Field<uint8_t> dstBlkStride = 1, src0BlkStride = 1, src1BlkStride = 1;
  emu::Field<uint8_t> dstRepStride = 8, src0RepStride = 8, src1RepStride = 8;
};
struct UnaryRepeatParams {
  UnaryRepeatParams() = default;
  UnaryRepeatParams(emu::Field<uint16_t> dst_block, emu::Field<uint16_t> src_block, emu::Field<uint8_t> dst_repeat,
                    emu::Field<uint8_t> src_repeat)
      : dstBlkStride(dst_block), srcBlkStride(src_block), dstRepStride(dst_repeat), srcRepStride(src_repeat) {}
  emu::Field<uint16_t> dstBlkStride = 1, srcBlkStride = 1;
  emu::Field<uint8_t> dstRepStride = 8, srcRepStride = 8;
};
struct CopyRepeatParams {
  CopyRepeatParams() = default;
  CopyRepeatParams(emu::Field<uint16_t> dst, emu::Field<uint16_t> src, emu::Field<uint16_t> dst_repeat,
                   emu::Field<uint16_t> src_repeat)
      : dstStride(dst), srcStride(src), dstRepeatSize(dst_repeat), srcRepeatSize(src_repeat) {}
  emu::Field<uint16_t> dstStride = 1, srcStride = 1, dstRepeatSize = 8, srcRepeatSize = 8;
};
struct BrcbRepeatParams {
  BrcbRepeatParams() = default;
  BrcbRepeatParams(emu::Field<uint16_t> dst_block, emu::Field<uint16_t> dst_repeat)
      : dstBlkStride(dst_block), dstRepStride(dst_repeat) {}
  emu::Field<uint16_t> dstBlkStride = 1, dstRepStride = 8;
};

template <typename T, MaskMode mode = MaskMode::NORMAL>
void SetVectorMask(const uint64_t high, const uint64_t low) {
  emu::set_mask(mode == MaskMode::COUNTER, high, low);
}
template <typename T, MaskMode mode = MaskMode::NORMAL>
void SetVectorMask(int32_t length) {
  if (mode == MaskMode::COUNTER) return emu::set_mask(true, 0, length);
  const auto ones = [](int32_t n) { return n <= 0 ? 0 : n >= 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1; };
  emu::set_mask(false, ones(length - 64), ones(length));
}
inline void SetMaskCount() { emu::set_mask_mode(true); }
inline void SetMaskNorm() { emu::set_mask_mode(false); }
inline void ResetMask() { emu::reset_mask(); }
inline void SetDeqScale(half scale) { emu::set_dequantization_scale(scale); }

}  // namespace AscendC

namespace emu {

using AscendC::LocalTensor;

inline Lanes count_lanes(int64_t count) { return {Lanes::kCount, static_cast<uint64_t>(count), count < 0, 1}; }
template <bool set_mask>
Lanes first_lanes(Call call, uint64_t mask, const Field<uint8_t>& repeat) {
  return {set_mask ? Lanes::kFirst : Lanes::kRegister, mask, 0, checked(call, "repeat", repeat)};
}
template <bool set_mask>
Lanes bit_lanes(Call call, const uint64_t* mask, const Field<uint8_t>& repeat) {
  return {set_mask ? Lanes::kBits : Lanes::kRegister, mask[0], mask[1], checked(call, "repeat", repeat)};
}
template <typename T>
Operand operand(const LocalTensor<T>& tensor) {
  return {tensor.at(), dtype_of<T>};
}
template <typename T, typename B, typename R>
Operand operand(Call call, const LocalTensor<T>& tensor, const Field<B>& block, const Field<R>& repeat) {
  return {tensor.at(), dtype_of<T>, checked(call, "block stride", block), checked(call, "repeat stride", repeat)};
}

template <typename T, typename U>
void binary(Call call, VectorOp op, const LocalTensor<T>& dst, const LocalTensor<U>& a, const LocalTensor<U>& b,
            const Lanes& lanes, const AscendC::BinaryRepeatParams& p = {}) {
  const Operand sources[] = {operand(call, a, p.src0BlkStride, p.src0RepStride),
                             operand(call, b, p.src1BlkStride, p.src1RepStride)};
  vector_op(call, op, operand(call, dst, p.dstBlkStride, p.dstRepStride), sources, 2, lanes);
}
template <typename T, typename U>
void unary(Call call, VectorOp op, const LocalTensor<T>& dst, const LocalTensor<U>& src, const Lanes& lanes,
           const AscendC::UnaryRepeatParams& p = {}, const U* scalar = nullptr, int mode = 0) {
  const Operand source = operand(call, src, p.srcBlkStride, p.srcRepStride);
  vector_op(call, op, operand(call, dst, p.dstBlkStride, p.dstRepStride), &source, 1, lanes, scalar, dtype_of<U>, mode);
}
// The strides of the count form, whatever the widths: both run on without a gap.
template <typename T, typename U>
AscendC::UnaryRepeatParams without_gaps() {
  constexpr int widest = sizeof(T) > sizeof(U) ? sizeof(T) : sizeof(U);
  return {1, 1, int(8 * sizeof(T) / widest), int(8 * sizeof(U) / widest)};
}

}  // namespace emu

namespace AscendC {

#define EMU_BINARY(name, op, ...)                                                                                    \
  template <typename T>                                                                                              \
  void name(const LocalTensor<T>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1, const int32_t& count, \
            Where where = Where::here()) {                                                                           \
    static_assert(emu::is_one_of<T, __VA_ARGS__>, #name ": no form for this type");                                  \
    emu::binary({#name, where}, emu::VectorOp::op, dst, src0, src1, emu::count_lanes(count));                        \
  }                                                                                                                  \
  template <typename T, bool isSetMask = true>                                                                       \
  void name(const LocalTensor<T>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1, uint64_t mask,        \
            const emu::Field<uint8_t> repeat, const BinaryRepeatParams& p, Where where = Where::here()) {            \
    static_assert(emu::is_one_of<T, __VA_ARGS__>, #name ": no form for this type");                                  \
    const emu::Call call{#name, where};                                                                              \
    emu::binary(call, emu::VectorOp::op, dst, src0, src1, emu::first_lanes<isSetMask>(call, mask, repeat), p);       \
  }                                                                                                                  \
  template <typename T, bool isSetMask = true>                                                                       \
  void name(const LocalTensor<T>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1, uint64_t mask[],      \
            const emu::Field<uint8_t> repeat, const BinaryRepeatParams& p, Where where = Where::here()) {            \
    static_assert(emu::is_one_of<T, __VA_ARGS__>, #name ": no form for this type");                                  \
    const emu::Call call{#name, where};                                                                              \
    emu::binary(call, emu::VectorOp::op, dst, src0, src1, emu::bit_lanes<isSetMask>(call, mask, repeat), p);         \
  }
EMU_BINARY(Add, kAdd, half, float, int16_t, int32_t)
EMU_BINARY(Sub, kSub, half, float, int16_t, int32_t)
EMU_BINARY(Mul, kMul, half, float, int16_t, int32_t)
EMU_BINARY(Div, kDiv, half, float)
EMU_BINARY(Max, kMax, half, float, int16_t, int32_t)
EMU_BINARY(Min, kMin, half, float, int16_t, int32_t)
EMU_BINARY(FusedMulAdd, kFusedMulAdd, half, float)
#undef EMU_BINARY

#define EMU_SCALAR(name, op, ...)                                                                               \
  template <typename T, bool isSetMask = true>                                                                  \
  void name(const LocalTensor<T>& dst, const LocalTensor<T>& src, const T& scalar, const int32_t& count,        \
            Where where = Where::here()) {                                                                      \
    static_assert(emu::is_one_of<T, __VA_ARGS__>, #name ": no form for this type");                             \
    emu::unary({#name, where}, emu::VectorOp::op, dst, src, emu::count_lanes(count), {}, &scalar);              \
  }                                                                                                             \
  template <typename T, bool isSetMask = true>                                                                  \
  void name(const LocalTensor<T>& dst, const LocalTensor<T>& src, const T& scalar, uint64_t mask,               \
            const emu::Field<uint8_t> repeat, const UnaryRepeatParams& p, Where where = Where::here()) {        \
    static_assert(emu::is_one_of<T, __VA_ARGS__>, #name ": no form for this type");                             \
    const emu::Call call{#name, where};                                                                         \
    emu::unary(call, emu::VectorOp::op, dst, src, emu::first_lanes<isSetMask>(call, mask, repeat), p, &scalar); \
  }                                                                                                             \
  template <typename T, bool isSetMask = true>                                                                  \
  void name(const LocalTensor<T>& dst, const LocalTensor<T>& src, const T& scalar, uint64_t mask[],             \
            const emu::Field<uint8_t> repeat, const UnaryRepeatParams& p, Where where = Where::here()) {        \
    static_assert(emu::is_one_of<T, __VA_ARGS__>, #name ": no form for this type");                             \
    const emu::Call call{#name, where};                                                                         \
    emu::unary(call, emu::VectorOp::op, dst, src, emu::bit_lanes<isSetMask>(call, mask, repeat), p, &scalar);   \
  }
EMU_SCALAR(Adds, kAdds, half, float, int16_t, int32_t)
EMU_SCALAR(Muls, kMuls, half, float, int16_t, int32_t)
EMU_SCALAR(Maxs, kMaxs, half, float, int16_t, int32_t)
EMU_SCALAR(Mins, kMins, half, float, int16_t, int32_t)
#undef EMU_SCALAR

#define EMU_UNARY(name, op, ...)                                                                                       \
  template <typename T>                                                                                                \
  void name(const LocalTensor<T>& dst, const LocalTensor<T>& src, const int32_t& count, Where where = Where::here()) { \
    static_assert(emu::is_one_of<T, __VA_ARGS__>, #name ": no form for this type");                                    \
    emu::unary({#name, where}, emu::VectorOp::op, dst, src, emu::count_lanes(count));                                  \
  }                                                                                                                    \
  template <typename T, bool isSetMask = true>                                                                         \
  void name(const LocalTensor<T>& dst, const LocalTensor<T>& src, uint64_t mask, const emu::Field<uint8_t> repeat,     \
            const UnaryRepeatParams& p, Where where = Where::here()) {                                                 \
    static_assert(emu::is_one_of<T, __VA_ARGS__>, #name ": no form for this type");                                    \
    const emu::Call call{#name, where};                                                                                \
    emu::unary(call, emu::VectorOp::op, dst, src, emu::first_lanes<isSetMask>(call, mask, repeat), p);                 \
  }                                                                                                                    \
  template <typename T, bool isSetMask = true>                                                                         \
  void name(const LocalTensor<T>& dst, const LocalTensor<T>& src, uint64_t mask[], const emu::Field<uint8_t> repeat,   \
            const UnaryRepeatParams& p, Where where = Where::here()) {                                                 \
    static_assert(emu::is_one_of<T, __VA_ARGS__>, #name ": no form for this type");                                    \
    const emu::Call call{#name, where};                                                                                \
    emu::unary(call, emu::VectorOp::op, dst, src, emu::bit_lanes<isSetMask>(call, mask, repeat), p);                   \
  }
EMU_UNARY(Exp, kExp, half, float)
EMU_UNARY(Ln, kLn, half, float)
EMU_UNARY(Abs, kAbs, half, float)
EMU_UNARY(Sqrt, kSqrt, half, float)
EMU_UNARY(Rsqrt, kRsqrt, half, float)
EMU_UNARY(Reciprocal, kReciprocal, half, float)
EMU_UNARY(Relu, kRelu, half, float, int32_t)
#undef EMU_UNARY

}  // namespace AscendC

namespace emu {
// half with half, float with float, and float from half: the pairs of Axpy and MulAddDst.
template <typename T, typename U>
inline constexpr bool widens =
    is_one_of<T, half, float> && (__is_same(T, U) || (__is_same(T, float) && __is_same(U, half)));
}  // namespace emu

namespace AscendC {

template <typename T, typename U, bool isSetMask = true>
void Axpy(const LocalTensor<T>& dst, const LocalTensor<U>& src, const U& scalar, const int32_t& count,
          Where where = Where::here()) {
  static_assert(emu::widens<T, U>, "Axpy: no form for these types");
  emu::unary({"Axpy", where}, emu::VectorOp::kAxpy, dst, src, emu::count_lanes(count), emu::without_gaps<T, U>(),
             &scalar);
}
template <typename T, typename U, bool isSetMask = true>
void Axpy(const LocalTensor<T>& dst, const LocalTensor<U>& src, const U& scalar, uint64_t mask,
          const emu::Field<uint8_t> repeat, const UnaryRepeatParams& p, Where where = Where::here()) {
  static_assert(emu::widens<T, U>, "Axpy: no form for these types");
  const emu::Call call{"Axpy", where};
  emu::unary(call, emu::VectorOp::kAxpy, dst, src, emu::first_lanes<isSetMask>(call, mask, repeat), p, &scalar);
}
template <typename T, typename U, bool isSetMask = true>
void Axpy(const LocalTensor<T>& dst, const LocalTensor<U>& src, const U& scalar, uint64_t mask[],
          const emu::Field<uint8_t> repeat, const UnaryRepeatParams& p, Where where = Where::here()) {
  static_assert(emu::widens<T, U>, "Axpy: no form for these types");
  const emu::Call call{"Axpy", where};
  emu::unary(call, emu::VectorOp::kAxpy, dst, src, emu::bit_lanes<isSetMask>(call, mask, repeat), p, &scalar);
}

template <typename T, typename U, bool isSetMask = true>
void MulAddDst(const LocalTensor<T>& dst, const LocalTensor<U>& src0, const LocalTensor<U>& src1, const int32_t& count,
               Where where = Where::here()) {
  static_assert(emu::widens<T, U>, "MulAddDst: no form for these types");
  constexpr int step = 8 * sizeof(U) / sizeof(T);
  emu::binary({"MulAddDst", where}, emu::VectorOp::kMulAddDst, dst, src0, src1, emu::count_lanes(count),
              {1, 1, 1, 8, step, step});
}
template <typename T, typename U, bool isSetMask = true>
void MulAddDst(const LocalTensor<T>& dst, const LocalTensor<U>& src0, const LocalTensor<U>& src1, uint64_t mask,
               const emu::Field<uint8_t> repeat, const BinaryRepeatParams& p, Where where = Where::here()) {
  static_assert(emu::widens<T, U>, "MulAddDst: no form for these types");
  const emu::Call call{"MulAddDst", where};
  emu::binary(call, emu::VectorOp::kMulAddDst, dst, src0, src1, emu::first_lanes<isSetMask>(call, mask, repeat), p);
}
template <typename T, typename U, bool isSetMask = true>
void MulAddDst(const LocalTensor<T>& dst, const LocalTensor<U>& src0, const LocalTensor<U>& src1, uint64_t mask[],
               const emu::Field<uint8_t> repeat, const BinaryRepeatParams& p, Where where = Where::here()) {
  static_assert(emu::widens<T, U>, "MulAddDst: no form for these types");
  const emu::Call call{"MulAddDst", where};
  emu::binary(call, emu::VectorOp::kMulAddDst, dst, src0, src1, emu::bit_lanes<isSetMask>(call, mask, repeat), p);
}

}  // namespace AscendC

namespace emu {
// The rounding modes that a conversion takes, a bit each; 0 where there is no such conversion.
template <typename T, typename U>
constexpr unsigned rounding_modes() {
  constexpr unsigned none = 1, named = 0b0111110, any = 0b0111111, all = 0b1111111;
  if constexpr (__is_same(U, float)) {
    if constexpr (__is_same(T, half)) return all;
    if constexpr (is_one_of<T, bfloat16_t, float, int32_t, int16_t, int64_t>) return named;
  } else if constexpr (__is_same(U, half)) {
    if constexpr (__is_same(T, float)) return none;
    if constexpr (is_one_of<T, int32_t, int16_t>) return named;
    if constexpr (is_one_of<T, int8_t, uint8_t>) return any;
  } else if constexpr (__is_same(U, bfloat16_t)) {
    if constexpr (__is_same(T, float)) return none;
    if constexpr (__is_same(T, int32_t)) return named;
  } else if constexpr (__is_same(U, int32_t)) {
    if constexpr (__is_same(T, float)) return any;
    if constexpr (is_one_of<T, int16_t, int64_t, half>) return none;
  } else if constexpr (__is_same(U, int16_t)) {
    if constexpr (__is_same(T, half)) return any;
    if constexpr (__is_same(T, float)) return none;
  } else if constexpr (__is_same(U, int64_t)) {
    if constexpr (__is_same(T, float)) return named;
    if constexpr (__is_same(T, int32_t)) return none;
  } else if constexpr (is_one_of<U, int8_t, uint8_t>) {
    if constexpr (__is_same(T, half)) return none;
  }
  return 0;
}
template <typename T, typename U>
void cast(Call call, const LocalTensor<T>& dst, const LocalTensor<U>& src, AscendC::RoundMode mode, const Lanes& lanes,
          const AscendC::UnaryRepeatParams& p) {
  static_assert(rounding_modes<T, U>() != 0, "Cast: no conversion between these types");
  if (!(rounding_modes<T, U>() >> int(mode) & 1)) {
    fault_argument(call, "a rounding mode that this conversion does not take, a mode", int(mode), 0, 6);
  }
  unary(call, VectorOp::kCast, dst, src, lanes, p, static_cast<const U*>(nullptr), int(mode));
}
}  // namespace emu

namespace AscendC {

template <typename T1, typename T2>
void Cast(const LocalTensor<T1>& dst, const LocalTensor<T2>& src, const RoundMode& mode, const uint32_t count,
          Where where = Where::here()) {
  emu::cast({"Cast", where}, dst, src, mode, emu::count_lanes(count), emu::without_gaps<T1, T2>());
}
template <typename T1, typename T2, bool isSetMask = true>
void Cast(const LocalTensor<T1>& dst, const LocalTensor<T2>& src, const RoundMode& mode, const uint64_t mask,
          const emu::Field<uint8_t> repeat, const UnaryRepeatParams& p, Where where = Where::here()) {
  const emu::Call call{"Cast", where};
  emu::cast(call, dst, src, mode, emu::first_lanes<isSetMask>(call, mask, repeat), p);
}
template <typename T1, typename T2, bool isSetMask = true>
void Cast(const LocalTensor<T1>& dst, const LocalTensor<T2>& src, const RoundMode& mode, const uint64_t mask[],
          const emu::Field<uint8_t> repeat, const UnaryRepeatParams& p, Where where = Where::here()) {
  const emu::Call call{"Cast", where};
  emu::cast(call, dst, src, mode, emu::bit_lanes<isSetMask>(call, mask, repeat), p);
}

}  // namespace AscendC
