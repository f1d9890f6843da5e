// Conversions between the dtypes of tensors and the float that the kernels compute in.
//
// For half the compiler has no vector conversion without a target that every machine would need,
// and calls of the scalar one keep loops from being vectorised. These are selects and integer
// arithmetic, so they vectorise; both directions agree with IEEE 754, rounding to nearest even.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>

namespace diffad {

template <class To, class From>
inline __attribute__((always_inline)) To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

template <class To, class From>
inline __attribute__((always_inline)) To convert(From value) {
  using torch::headeronly::Half;
  if constexpr (std::is_same_v<From, Half> && std::is_same_v<To, float>) {
    const uint32_t magnitude = (value.x & 0x7fffu) << 13;  // exponent and fraction, in place
    const uint32_t exponent = magnitude & 0x0f800000u;
    // The exponent's bias goes from 15 to 127; infinity and NaN go to the largest exponent.
    const uint32_t shift = exponent == 0x0f800000u ? 224u << 23 : 112u << 23;
    // A subnormal is fraction * 2^-24: with an exponent of 2^-14 put in front, subtract that.
    const float subnormal =
        bits_as<float>(magnitude + (113u << 23)) - bits_as<float>(uint32_t{113u << 23});
    const uint32_t result = exponent == 0 ? bits_as<uint32_t>(subnormal) : magnitude + shift;
    return bits_as<float>(result | (value.x & 0x8000u) << 16);
  } else if constexpr (std::is_same_v<From, float> && std::is_same_v<To, Half>) {
    const uint32_t all = bits_as<uint32_t>(value);
    const uint32_t magnitude = all & 0x7fffffffu;
    // Round to 10 bits of fraction (half of the last kept bit, less one on ties to even), a carry
    // moving on into the exponent, and change the bias from 127 to 15.
    const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    // Below 2^-14 the last bit is worth 2^-24, as that of a float in [0.5, 1): add rounds there.
    const uint32_t subnormal =
        bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - bits_as<uint32_t>(0.5f);
    uint32_t result = magnitude < (113u << 23) ? subnormal : normal;
    result = magnitude >= (143u << 23) ? 0x7c00u : result;    // 65536 and more
    result = magnitude > 0x7f800000u ? 0x7e00u : result;      // NaN
    return Half(static_cast<uint16_t>(result | (all >> 16 & 0x8000u)), Half::from_bits());
  } else {
    return static_cast<To>(value);
  }
}

}  // namespace diffad
