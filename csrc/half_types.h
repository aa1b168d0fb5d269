// The two 16-bit formats of logits, and their conversion from and to float32.
//
// The conversions work on the bits of a number, so one text serves a single number (uint32_t and
// float) and a vector of them (GCC's vector types, csrc/cpu/simd.h). A processor or card that has
// instructions for float16 uses those instead.
#pragma once

#include <stdint.h>
#include <string.h>

#include "vocab_stats.h"

// Internal linkage, as TDPO_ALGEBRA: each instruction set's file compiles its own copy.
#define TDPO_CONVERSION TDPO_HOST_DEVICE static inline __attribute__((always_inline))

namespace tdpo {

// 8 bits of exponent and 7 of mantissa: the upper half of a float.
struct BFloat16 {
  uint16_t bits;
};

// 5 bits of exponent and 10 of mantissa.
struct Float16 {
  uint16_t bits;
};

template <class To, class From>
TDPO_CONVERSION To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// Below, Float is float or a vector of floats, and Bits is uint32_t or a vector of as many.

// The bits of a float, rounded to the nearest bfloat16, ties to even; the upper half is the result.
// A NaN whose lower half alone is not 0 would become infinity: no processor makes one, and no
// bfloat16 becomes one.
template <class Bits>
TDPO_CONVERSION Bits rounded_to_bfloat16(Bits bits) {
  return bits + 0x7fff + ((bits >> 16) & 1);
}

template <class Float, class Bits>
TDPO_CONVERSION Float float_of_float16(Bits half) {
  const Bits magnitude = (half & 0x7fff) << 13;
  // Reading float16's exponent as float32's is off by 2^112; the product is exact, subnormals too.
  const Float scaled = bit_cast<Float>(magnitude) * 0x1p112f;
  const Bits special = magnitude | 0x7f800000;  // infinity or NaN
  const Bits bits = magnitude >= 0x0f800000 ? special : bit_cast<Bits>(scaled);
  return bit_cast<Float>(bits | ((half & 0x8000) << 16));
}

// Rounds to nearest, ties to even; from 65520 on the result is infinite, and NaN stays NaN.
template <class Bits, class Float>
TDPO_CONVERSION Bits float16_of_float(Float value) {
  const Bits bits = bit_cast<Bits>(value), magnitude = bits & 0x7fffffff;
  // Below 2^-14 the sum with 0.5 rounds to a multiple of 2^-24, float16's subnormal step.
  const Float sum = bit_cast<Float>(magnitude) + 0.5f;
  const Bits subnormal = bit_cast<Bits>(sum) - 0x3f000000;
  const Bits normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
  const Bits infinite = Bits{} + 0x7c00;
  Bits half = magnitude < 0x38800000 ? subnormal : normal;
  half = magnitude > 0x477fefff ? infinite : half;
  half = magnitude > 0x7f800000 ? infinite | 0x200 : half;
  return half | ((bits >> 16) & 0x8000);
}

}  // namespace tdpo
