// Numbers on the device: how each dtype is stored and what it is added up in, and exponentials.
//
// Each piece of inline PTX has plain C++ beside it with the same result (but for the last bits of
// ex2.approx). The tests that compile these files for the CPU use the plain C++.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include "../half_types.h"
#include "../vocab_stats.h"

#if defined(__CUDA_ARCH__)
#define TDPO_INLINE_PTX 1
#else
#define TDPO_INLINE_PTX 0
#endif

namespace tdpo::cuda {

// ---- one number to and from 16 bits ----
//
// NaN becomes 0x7fff, as the card's instructions have it.

__device__ __forceinline__ float float_of_float16_bits(uint16_t half) {
#if TDPO_INLINE_PTX
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
  return value;
#else
  return float_of_float16<float>(uint32_t(half));
#endif
}

__device__ __forceinline__ uint16_t float16_bits_of_float(float value) {
#if TDPO_INLINE_PTX
  uint16_t half;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
  return half;
#else
  if (value != value) return 0x7fff;
  return static_cast<uint16_t>(float16_of_float<uint32_t>(value));
#endif
}

__device__ __forceinline__ uint16_t bfloat16_bits_of_float(float value) {
  if (value != value) return 0x7fff;
  return static_cast<uint16_t>(rounded_to_bfloat16(bit_cast<uint32_t>(value)) >> 16);
}

// Two numbers as one word of two bfloat16s, the first in the lower half.
__device__ __forceinline__ uint32_t bfloat16_pair(float low, float high) {
#if TDPO_INLINE_PTX
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
#else
  return bfloat16_bits_of_float(low) | uint32_t(bfloat16_bits_of_float(high)) << 16;
#endif
}

// ---- storage ----

// How T is stored in a vector of four 32-bit words, and Real, the type that it is computed and
// added up in. unpack() turns words into numbers, pack() numbers into words. Where speed matters
// all indices are constants, so that the words stay in registers.
template <class T>
struct Storage;

template <>
struct Storage<float> {
  using Real = float;
  static constexpr int kPerVector = 4;
  static constexpr float kNegativeInfinity = -INFINITY;
  static __device__ __forceinline__ float get(const uint32_t (&words)[4], int i) {
    return bit_cast<float>(words[i]);
  }
  static __device__ __forceinline__ void set(uint32_t (&words)[4], int i, float value) {
    words[i] = bit_cast<uint32_t>(value);
  }
  template <int kWords>
  static __device__ __forceinline__ void unpack(const uint32_t (&words)[kWords],
                                                float (&values)[kWords]) {
    for (int i = 0; i < kWords; ++i) values[i] = bit_cast<float>(words[i]);
  }
  static __device__ __forceinline__ void pack(const float (&values)[4], uint32_t (&words)[4]) {
    for (int i = 0; i < 4; ++i) set(words, i, values[i]);
  }
};

template <>
struct Storage<double> {
  using Real = double;
  static constexpr int kPerVector = 2;
  static constexpr double kNegativeInfinity = -INFINITY;
  static __device__ __forceinline__ double get(const uint32_t (&words)[4], int i) {
    return bit_cast<double>(words[2 * i] | uint64_t(words[2 * i + 1]) << 32);
  }
  static __device__ __forceinline__ void set(uint32_t (&words)[4], int i, double value) {
    const uint64_t bits = bit_cast<uint64_t>(value);
    words[2 * i] = static_cast<uint32_t>(bits);
    words[2 * i + 1] = static_cast<uint32_t>(bits >> 32);
  }
  template <int kWords>
  static __device__ __forceinline__ void unpack(const uint32_t (&words)[kWords],
                                                double (&values)[kWords / 2]) {
    for (int i = 0; i < kWords / 2; ++i) {
      values[i] = bit_cast<double>(words[2 * i] | uint64_t(words[2 * i + 1]) << 32);
    }
  }
  static __device__ __forceinline__ void pack(const double (&values)[2], uint32_t (&words)[4]) {
    for (int i = 0; i < 2; ++i) set(words, i, values[i]);
  }
};

template <class T>
struct HalfWidthStorage {
  using Real = float;
  static constexpr int kPerVector = 8;
  static __device__ __forceinline__ T get(const uint32_t (&words)[4], int i) {
    return {static_cast<uint16_t>(words[i / 2] >> 16 * (i % 2))};
  }
  static __device__ __forceinline__ void set(uint32_t (&words)[4], int i, T value) {
    const uint32_t other = words[i / 2] & (i % 2 ? 0x0000ffff : 0xffff0000);
    words[i / 2] = other | uint32_t(value.bits) << 16 * (i % 2);
  }
};

template <>
struct Storage<BFloat16> : HalfWidthStorage<BFloat16> {
  static constexpr BFloat16 kNegativeInfinity = {0xff80};
  template <int kWords>
  static __device__ __forceinline__ void unpack(const uint32_t (&words)[kWords],
                                                float (&values)[2 * kWords]) {
    for (int i = 0; i < kWords; ++i) {
      values[2 * i] = bit_cast<float>(words[i] << 16);
      values[2 * i + 1] = bit_cast<float>(words[i] & 0xffff0000);
    }
  }
  static __device__ __forceinline__ void pack(const float (&values)[8], uint32_t (&words)[4]) {
    for (int i = 0; i < 4; ++i) words[i] = bfloat16_pair(values[2 * i], values[2 * i + 1]);
  }
};

template <>
struct Storage<Float16> : HalfWidthStorage<Float16> {
  static constexpr Float16 kNegativeInfinity = {0xfc00};
  template <int kWords>
  static __device__ __forceinline__ void unpack(const uint32_t (&words)[kWords],
                                                float (&values)[2 * kWords]) {
    for (int i = 0; i < kWords; ++i) {
      values[2 * i] = float_of_float16_bits(static_cast<uint16_t>(words[i]));
      values[2 * i + 1] = float_of_float16_bits(static_cast<uint16_t>(words[i] >> 16));
    }
  }
  static __device__ __forceinline__ void pack(const float (&values)[8], uint32_t (&words)[4]) {
    for (int i = 0; i < 4; ++i) {
      words[i] = float16_bits_of_float(values[2 * i]) |
                 uint32_t(float16_bits_of_float(values[2 * i + 1])) << 16;
    }
  }
};

template <class T>
using RealOf = typename Storage<T>::Real;

// a b + c, rounded once. In a sum of two products the compiler may contract either, and it
// chooses differently in two instantiations of a kernel; where bits must not depend on that, the
// choice is spelled out.
__device__ __forceinline__ float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double multiply_add(double a, double b, double c) {
  return fma(a, b, c);
}

// ---- exponentials ----

// 2^x. In float it is one result of the special-function unit, with a relative error of 2^-22, and
// 0 below the smallest normal number.
__device__ __forceinline__ float exp2_of(float x) {
#if TDPO_INLINE_PTX
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
#else
  return x < -126.0f ? 0.0f : exp2f(x);
#endif
}

constexpr float kLog2E = 1.44269504f;

// e^x. In float its relative error is that of rounding x log2(e), 6e-8 |x|.
__device__ __forceinline__ float exp_of(float x) { return exp2_of(x * kLog2E); }
__device__ __forceinline__ double exp_of(double x) { return exp(x); }

__device__ __forceinline__ double exp2_of(double x) { return exp2(x); }

// e^(x - base) with all its digits, however far x lies below the base, which is a whole number.
// What the roundings of x - base and of the exponent have lost is put back.
__device__ __forceinline__ float exp_below(float x, float base) {
  const float apart = x - base;
  const float lost = x - (apart + base);  // exact
  const float exponent = apart * kLog2E;
  const float rest =
      fmaf(exponent, 1.90465432e-09f, fmaf(exponent, -0.693147182f, apart)) + lost;  // ln 2 in two
  const float power = exp2_of(exponent);
  return exponent < -126.0f ? 0.0f : fmaf(power, rest, power);
}

__device__ __forceinline__ double exp_below(double x, double base) { return exp(x - base); }

// (e^d - 1 - d) / d^2 for |d| <= 1. In float the best polynomial of degree 6, with a relative error
// of 1e-7; in double the Taylor series.
__device__ __forceinline__ float excess_over_square(float d) {
  float sum = 2.49608147e-05f;
  sum = sum * d + 2.03254836e-04f;
  sum = sum * d + 1.38913351e-03f;
  sum = sum * d + 8.33093002e-03f;
  sum = sum * d + 4.16665152e-02f;
  sum = sum * d + 1.66666955e-01f;
  return sum * d + 0.5f;
}

// (2^d - 1 - d ln 2) / d^2 for |d| <= 1/2: the best polynomial of degree 4, with a relative error
// of at most 1.3e-7. One of degree 3 has 1e-6, and made the divergences of close policies ten times
// less exact.
__device__ __forceinline__ float excess_over_square_of_2(float d) {
  float sum = 1.54172783e-04f;
  sum = sum * d + 1.33812497e-03f;
  sum = sum * d + 9.61817242e-03f;
  sum = sum * d + 5.55038117e-02f;
  return sum * d + 2.40226507e-01f;
}

__device__ __forceinline__ double excess_over_square(double d) {
  double sum = 0;
  for (int n = 20; n >= 2; --n) sum = (sum * d + 1) / n;  // -> 1/2! + d/3! + d^2/4! + ...
  return sum;
}

}  // namespace tdpo::cuda
