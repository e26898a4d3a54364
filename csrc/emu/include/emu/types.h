// What kernels name besides functions: keywords, element types, enumerations. Nothing here does anything.
#pragma once

#include <cstdint>

#define __aicore__
#define __global__
#define __gm__
#define __ubuf__
#define __cbuf__
#define __ca__
#define __cb__
#define __cc__
#define __inline__ inline
#define GM_ADDR uint8_t*
#define __NPU_ARCH__ 2201
#define __CCE_AICORE__ 220
#define ASCENDC_CPU_DEBUG 1

enum pipe_t { PIPE_S = 0, PIPE_V, PIPE_M, PIPE_MTE1, PIPE_MTE2, PIPE_MTE3, PIPE_FIX, PIPE_ALL };
enum event_t { EVENT_ID0 = 0, EVENT_ID1, EVENT_ID2, EVENT_ID3, EVENT_ID4, EVENT_ID5, EVENT_ID6, EVENT_ID7 };

namespace emu {

// Conversions by way of float, to the nearest, ties to even; convert.cpp.
uint16_t half_bits(float value);
float half_value(uint16_t bits);
uint16_t bfloat16_bits(float value);
float bfloat16_value(uint16_t bits);

}  // namespace emu

struct half {
  uint16_t bits;
  half() = default;
  half(float value) : bits(emu::half_bits(value)) {}
  operator float() const { return emu::half_value(bits); }
};

struct bfloat16_t {
  uint16_t bits;
  bfloat16_t() = default;
  bfloat16_t(float value) : bits(emu::bfloat16_bits(value)) {}
  operator float() const { return emu::bfloat16_value(bits); }
};

namespace emu {

enum class Dtype : uint8_t {
  kHalf,
  kBFloat16,
  kFloat,
  kInt8,
  kUInt8,
  kInt16,
  kUInt16,
  kInt32,
  kUInt32,
  kInt64,
  kUInt64
};

template <typename T>
struct DtypeOf;
#define EMU_DTYPE(type, name)                   \
  template <>                                   \
  struct DtypeOf<type> {                        \
    static constexpr Dtype value = Dtype::name; \
  };
EMU_DTYPE(half, kHalf)
EMU_DTYPE(bfloat16_t, kBFloat16)
EMU_DTYPE(float, kFloat)
EMU_DTYPE(int8_t, kInt8)
EMU_DTYPE(uint8_t, kUInt8)
EMU_DTYPE(int16_t, kInt16)
EMU_DTYPE(uint16_t, kUInt16)
EMU_DTYPE(int32_t, kInt32)
EMU_DTYPE(uint32_t, kUInt32)
EMU_DTYPE(int64_t, kInt64)
EMU_DTYPE(uint64_t, kUInt64)
#undef EMU_DTYPE
template <typename T>
inline constexpr Dtype dtype_of = DtypeOf<T>::value;

template <typename T, typename... Ts>
inline constexpr bool is_one_of = (__is_same(T, Ts) || ...);

}  // namespace emu

namespace AscendC {

enum class TPosition : uint8_t {
  GM,
  A1,
  A2,
  B1,
  B2,
  C1,
  C2,
  CO1,
  CO2,
  VECIN,
  VECOUT,
  VECCALC,
  LCM = VECCALC,
  TSCM,
  SPM,
  MAX
};
using QuePosition = TPosition;
using TEventID = int8_t;

enum KernelType {
  KERNEL_TYPE_AIV_ONLY,
  KERNEL_TYPE_AIC_ONLY,
  KERNEL_TYPE_MIX_AIV_1_0,
  KERNEL_TYPE_MIX_AIC_1_0,
  KERNEL_TYPE_MIX_AIC_1_1,
  KERNEL_TYPE_MIX_AIC_1_2
};
enum CoreType { AIC = 1, AIV = 2 };

// Source pipe, destination pipe: those that the toolkit has, and no others.
enum class HardEvent : uint8_t {
  MTE2_V,
  V_MTE2,
  V_MTE3,
  MTE3_V,
  MTE3_MTE2,
  MTE2_MTE3,
  V_S,
  S_V,
  MTE2_S,
  S_MTE2,
  S_MTE3,
  MTE3_S,
  MTE2_MTE1,
  MTE1_MTE2,
  MTE1_M,
  M_MTE1,
  M_FIX,
  FIX_M,
  FIX_MTE2,
  MTE2_FIX,
  FIX_S,
  MTE3_MTE1,
  MTE1_MTE3,
  M_S,
  FIX_MTE3,
  MAX
};

enum class RoundMode : uint8_t { CAST_NONE, CAST_RINT, CAST_FLOOR, CAST_CEIL, CAST_ROUND, CAST_TRUNC, CAST_ODD };
enum class CMPMODE : uint8_t { LT, GT, EQ, LE, GE, NE };
enum class SELMODE : uint8_t { VSEL_CMPMASK_SPR, VSEL_TENSOR_SCALAR_MODE, VSEL_TENSOR_TENSOR_MODE };
enum class ReduceOrder : uint8_t { ORDER_VALUE_INDEX, ORDER_INDEX_VALUE, ORDER_ONLY_VALUE, ORDER_ONLY_INDEX };
enum class MaskMode : uint8_t { NORMAL, COUNTER };
enum class CacheLine : uint8_t { SINGLE_CACHE_LINE, ENTIRE_DATA_CACHE };
enum class DcciDst : uint8_t { CACHELINE_ALL, CACHELINE_UB, CACHELINE_OUT, CACHELINE_ATOMIC };
enum class QuantMode_t : uint8_t { NoQuant, F322F16, F322BF16 };
enum class CO2Layout : uint8_t { NZ, ROW_MAJOR };
struct FixpipeConfig {
  CO2Layout format;
};
inline constexpr FixpipeConfig CFG_ROW_MAJOR{CO2Layout::ROW_MAJOR};

inline constexpr uint64_t MASK_PLACEHOLDER = 0;

}  // namespace AscendC
using AscendC::MASK_PLACEHOLDER;
using AscendC::QuantMode_t;
