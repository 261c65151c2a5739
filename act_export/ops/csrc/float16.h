// float16 and bfloat16 storage, converted to and from float with round to nearest even. No branches that stop a
// compiler from vectorising the conversion to float.
#pragma once

#include <cstdint>
#include <cstring>

namespace act {

struct Float16 {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

inline float FloatFromBits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint32_t BitsFromFloat(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float ToFloat(float value) { return value; }

inline float ToFloat(BFloat16 value) { return FloatFromBits(static_cast<uint32_t>(value.bits) << 16); }

inline float ToFloat(Float16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t shifted = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;
  const uint32_t exponent = shifted & (0x1fu << 23);
  const uint32_t rebiased = shifted + ((127 - 15) << 23);
  // A subnormal is built as a normal number and shifted down, so that flush-to-zero modes do not touch it.
  const uint32_t subnormal = BitsFromFloat(FloatFromBits(rebiased + (1u << 23)) - FloatFromBits((127 - 14) << 23));
  const uint32_t infinite_or_nan = rebiased + ((128 - 16) << 23);
  const uint32_t magnitude = exponent == 0 ? subnormal : (exponent == (0x1fu << 23) ? infinite_or_nan : rebiased);
  return FloatFromBits(sign | magnitude);
}

template <typename T>
T FromFloat(float value);

template <>
inline float FromFloat<float>(float value) {
  return value;
}

template <>
inline BFloat16 FromFloat<BFloat16>(float value) {
  const uint32_t bits = BitsFromFloat(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};  // a quiet NaN
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

template <>
inline Float16 FromFloat<Float16>(float value) {
  const uint32_t bits = BitsFromFloat(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;  // a quiet NaN
  } else if (magnitude >= 0x477ff000u) {
    half = 0x7c00u;  // rounds beyond 65504
  } else if (magnitude < 0x38800000u) {
    // Subnormal: adding 0.5 lets the float adder round to the last bit that float16 keeps.
    half = BitsFromFloat(FloatFromBits(magnitude) + 0.5f) - BitsFromFloat(0.5f);
  } else {
    half = (magnitude - ((127 - 15) << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return {static_cast<uint16_t>(sign | half)};
}

}  // namespace act
