// Conversions by way of an exact form: sign, integer, power of two.
#include "convert.h"

#include <cstring>

namespace emu {
namespace {

using AscendC::RoundMode;

struct Format {  // of IEEE 754: bits in all, of the exponent, of the fraction
  int bits, exponent, fraction;
  int bias() const { return (1 << (exponent - 1)) - 1; }
};
constexpr Format kHalf{16, 5, 10}, kBFloat16{16, 8, 7}, kFloat{32, 8, 23};

struct Exact {
  bool negative = false, nan = false, infinite = false;
  uint64_t integer = 0;
  int power = 0;
};

const Format* format_of(Dtype type) {
  return type == Dtype::kHalf       ? &kHalf
         : type == Dtype::kBFloat16 ? &kBFloat16
         : type == Dtype::kFloat    ? &kFloat
                                    : nullptr;
}

Exact from_format(const Format& format, uint32_t bits) {
  Exact exact;
  exact.negative = bits >> (format.bits - 1) & 1;
  const uint32_t exponent = bits >> format.fraction & ((1u << format.exponent) - 1),
                 fraction = bits & ((1u << format.fraction) - 1);
  if (exponent == (1u << format.exponent) - 1) {
    exact.nan = fraction != 0;
    exact.infinite = fraction == 0;
    return exact;
  }
  exact.integer = exponent == 0 ? fraction : fraction | 1u << format.fraction;
  exact.power = (exponent == 0 ? 1 : int(exponent)) - format.bias() - format.fraction;
  return exact;
}

Exact from_integer(int64_t value) {
  Exact exact;
  exact.negative = value < 0;
  exact.integer = value < 0 ? ~uint64_t(value) + 1 : uint64_t(value);
  return exact;
}

// integer * 2^power in units of 2^unit.
uint64_t rounded(const Exact& exact, int unit, RoundMode mode) {
  const int shift = unit - exact.power;
  if (shift <= 0) return exact.integer << -shift;
  const uint64_t whole = shift >= 64 ? 0 : exact.integer >> shift;
  const uint64_t rest = shift >= 64 ? exact.integer : exact.integer & ((uint64_t{1} << shift) - 1);
  if (rest == 0) return whole;
  const uint64_t half = shift > 64 ? ~uint64_t{0} : uint64_t{1} << (shift - 1);
  switch (mode) {
    case RoundMode::CAST_FLOOR:
      return whole + exact.negative;
    case RoundMode::CAST_CEIL:
      return whole + !exact.negative;
    case RoundMode::CAST_TRUNC:
      return whole;
    case RoundMode::CAST_ODD:
      return whole | 1;
    case RoundMode::CAST_ROUND:
      return whole + (shift <= 64 && rest >= half);
    default:
      return whole + (shift <= 64 && (rest > half || (rest == half && (whole & 1))));
  }
}

uint32_t to_format(const Format& format, const Exact& exact, RoundMode mode) {
  const uint32_t sign = uint32_t{exact.negative} << (format.bits - 1);
  const uint32_t infinity = ((1u << format.exponent) - 1) << format.fraction;
  if (exact.nan) return sign | infinity | 1u << (format.fraction - 1);
  if (exact.infinite) return sign | infinity;
  if (exact.integer == 0) return sign;
  const int top = 63 - __builtin_clzll(exact.integer) + exact.power;
  const int smallest = 1 - format.bias() - format.fraction;
  const int unit = top - format.fraction > smallest ? top - format.fraction : smallest;
  uint64_t value = rounded(exact, unit, mode);
  int exponent = unit - smallest + 1;
  if (value >> (format.fraction + 1)) {
    value >>= 1;
    ++exponent;
  }
  if (value >> format.fraction == 0) exponent = 0;
  if (exponent >= (1 << format.exponent) - 1) {  // too large: a mode that rounds towards zero stops at the largest
    const bool towards_zero = mode == RoundMode::CAST_TRUNC || mode == RoundMode::CAST_ODD ||
                              (mode == RoundMode::CAST_FLOOR && !exact.negative) ||
                              (mode == RoundMode::CAST_CEIL && exact.negative);
    return (sign | infinity) - (towards_zero ? 1 : 0);
  }
  return sign | uint32_t(exponent) << format.fraction | (uint32_t(value) & ((1u << format.fraction) - 1));
}

int64_t to_integer(const Exact& exact, RoundMode mode, int64_t low, int64_t high) {
  if (exact.nan) return 0;
  const bool large = exact.infinite || (exact.integer != 0 && 63 - __builtin_clzll(exact.integer) + exact.power >= 63);
  if (large) return exact.negative ? low : high;
  const int64_t value = int64_t(rounded(exact, 0, mode)) * (exact.negative ? -1 : 1);
  return value < low ? low : value > high ? high : value;
}

Exact exact_of(Dtype type, const uint8_t* at) {
  if (const Format* format = format_of(type)) {
    return from_format(*format, format->bits == 16 ? load<uint16_t>(at) : load<uint32_t>(at));
  }
  switch (type) {
    case Dtype::kInt8:
      return from_integer(load<int8_t>(at));
    case Dtype::kUInt8:
      return from_integer(load<uint8_t>(at));
    case Dtype::kInt16:
      return from_integer(load<int16_t>(at));
    case Dtype::kUInt16:
      return from_integer(load<uint16_t>(at));
    case Dtype::kInt32:
      return from_integer(load<int32_t>(at));
    case Dtype::kUInt32:
      return from_integer(load<uint32_t>(at));
    default:
      return from_integer(load<int64_t>(at));
  }
}

void put(Dtype type, uint8_t* at, const Exact& exact, RoundMode mode) {
  if (const Format* format = format_of(type)) {
    const uint32_t bits = to_format(*format, exact, mode);
    return format->bits == 16 ? store<uint16_t>(at, uint16_t(bits)) : store<uint32_t>(at, bits);
  }
  switch (type) {
    case Dtype::kInt8:
      return store<int8_t>(at, int8_t(to_integer(exact, mode, INT8_MIN, INT8_MAX)));
    case Dtype::kUInt8:
      return store<uint8_t>(at, uint8_t(to_integer(exact, mode, 0, UINT8_MAX)));
    case Dtype::kInt16:
      return store<int16_t>(at, int16_t(to_integer(exact, mode, INT16_MIN, INT16_MAX)));
    case Dtype::kUInt16:
      return store<uint16_t>(at, uint16_t(to_integer(exact, mode, 0, UINT16_MAX)));
    case Dtype::kInt32:
      return store<int32_t>(at, int32_t(to_integer(exact, mode, INT32_MIN, INT32_MAX)));
    case Dtype::kUInt32:
      return store<uint32_t>(at, uint32_t(to_integer(exact, mode, 0, UINT32_MAX)));
    default:
      return store<int64_t>(at, to_integer(exact, mode, INT64_MIN, INT64_MAX));
  }
}

// fp32 to fp32 is rounding to a whole number.
Exact whole_number(const Exact& exact, RoundMode mode) {
  if (exact.nan || exact.infinite || exact.power >= 0) return exact;
  Exact result = exact;
  result.integer = rounded(exact, 0, mode);
  result.power = 0;
  return result;
}

const std::vector<float>& half_table() {
  static const std::vector<float> table = [] {
    std::vector<float> values(65536);
    for (uint32_t bits = 0; bits < 65536; ++bits) {
      const uint32_t wide = to_format(kFloat, from_format(kHalf, bits), RoundMode::CAST_RINT);
      std::memcpy(&values[bits], &wide, 4);
    }
    return values;
  }();
  return table;
}

}  // namespace

uint16_t half_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t exponent = bits >> 23 & 255;
  if (exponent > 112 && exponent < 142) {  // a normal number before and after: round the fraction, a carry goes up
    const uint32_t rest = bits & 0x7FFFFFFF;
    return uint16_t(bits >> 16 & 0x8000) | uint16_t((rest - (112u << 23) + 0xFFF + (rest >> 13 & 1)) >> 13);
  }
  return uint16_t(to_format(kHalf, from_format(kFloat, bits), RoundMode::CAST_RINT));
}
float half_value(uint16_t bits) { return half_table()[bits]; }
uint16_t bfloat16_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (value != value) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
float bfloat16_value(uint16_t bits) {
  const uint32_t wide = uint32_t{bits} << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

void convert(Dtype to, uint8_t* target, Dtype from, const uint8_t* source, uint64_t count, int mode) {
  const RoundMode rounding = static_cast<RoundMode>(mode);
  const bool nearest = rounding == RoundMode::CAST_RINT || rounding == RoundMode::CAST_NONE;
  const int in = size_of(from), out = size_of(to);
  for (uint64_t i = 0; i < count; ++i) {
    const uint8_t* at = source + i * in;
    uint8_t* put_at = target + i * out;
    if (from == Dtype::kHalf && to == Dtype::kFloat)
      store(put_at, half_value(load<uint16_t>(at)));
    else if (from == Dtype::kBFloat16 && to == Dtype::kFloat)
      store(put_at, bfloat16_value(load<uint16_t>(at)));
    else if (from == Dtype::kFloat && to == Dtype::kHalf && nearest)
      store(put_at, half_bits(load<float>(at)));
    else if (from == Dtype::kFloat && to == Dtype::kBFloat16 && nearest)
      store(put_at, bfloat16_bits(load<float>(at)));
    else if (from == to && from == Dtype::kFloat)
      put(to, put_at, whole_number(exact_of(from, at), rounding), rounding);
    else
      put(to, put_at, exact_of(from, at), rounding);
  }
}

}  // namespace emu
