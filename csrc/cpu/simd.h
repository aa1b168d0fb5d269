// Vectors of float or double, as wide as the instruction set that includes this file. They are the
// compiler's vector types (GCC and Clang): one text serves SSE2, AVX2, AVX-512 and NEON.
//
// Each including file defines TDPO_INSTRUCTION_SET (a namespace) and TDPO_VECTOR_BYTES first.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#define TDPO_INLINE inline __attribute__((always_inline))

namespace tdpo::cpu::TDPO_INSTRUCTION_SET {

// Bits of the two 16-bit formats; the accumulation type is float.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class Real>
struct Lanes;

template <>
struct Lanes<float> {
  static constexpr int kCount = TDPO_VECTOR_BYTES / 4;
  typedef float Vector __attribute__((vector_size(TDPO_VECTOR_BYTES)));
  typedef int32_t Mask __attribute__((vector_size(TDPO_VECTOR_BYTES)));
  typedef uint32_t Bits __attribute__((vector_size(TDPO_VECTOR_BYTES)));
  typedef uint16_t HalfBits __attribute__((vector_size(TDPO_VECTOR_BYTES / 2)));
};

template <>
struct Lanes<double> {
  static constexpr int kCount = TDPO_VECTOR_BYTES / 8;
  typedef double Vector __attribute__((vector_size(TDPO_VECTOR_BYTES)));
  typedef int64_t Mask __attribute__((vector_size(TDPO_VECTOR_BYTES)));
  typedef uint64_t Bits __attribute__((vector_size(TDPO_VECTOR_BYTES)));
};

template <class Real>
using Vector = typename Lanes<Real>::Vector;
template <class Real>
using Bits = typename Lanes<Real>::Bits;
using HalfBits = Lanes<float>::HalfBits;

template <class To, class From>
TDPO_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

template <class Real>
TDPO_INLINE Vector<Real> broadcast(Real value) {
  return Vector<Real>{} + value;
}

// The larger; x where either is NaN (x86's max instructions do just that).
template <class V>
TDPO_INLINE V max_keeping_nan(V floor, V x) {
  return floor > x ? floor : x;
}

// ---- loads and stores: no alignment is assumed
// ---------------------------------------------------

template <class T>
struct Storage;

template <class Real>
struct PlainStorage {
  using Accumulator = Real;
  static constexpr Real kNegativeInfinity = -__builtin_inf();
  static TDPO_INLINE Vector<Real> load(const Real* from) {
    Vector<Real> value;
    std::memcpy(&value, from, sizeof(value));
    return value;
  }
  static TDPO_INLINE void store(Real* to, Vector<Real> value) {
    std::memcpy(to, &value, sizeof(value));
  }
};
template <>
struct Storage<float> : PlainStorage<float> {};
template <>
struct Storage<double> : PlainStorage<double> {};

TDPO_INLINE HalfBits load_half_bits(const void* from) {
  HalfBits bits;
  std::memcpy(&bits, from, sizeof(bits));
  return bits;
}

TDPO_INLINE void store_half_bits(void* to, Bits<float> value) {
  const HalfBits bits = __builtin_convertvector(value, HalfBits);
  std::memcpy(to, &bits, sizeof(bits));
}

template <>
struct Storage<BFloat16> {
  using Accumulator = float;
  static constexpr BFloat16 kNegativeInfinity = {0xff80};
  static TDPO_INLINE Vector<float> load(const BFloat16* from) {
    const Bits<float> bits = __builtin_convertvector(load_half_bits(from), Bits<float>);
    return bit_cast<Vector<float>>(bits << 16);
  }
  // Round to nearest, ties to even; NaN stays NaN.
  static TDPO_INLINE void store(BFloat16* to, Vector<float> value) {
    const Bits<float> bits = bit_cast<Bits<float>>(value);
    const Bits<float> rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Bits<float> quiet_nan = (bits >> 16) | 0x40;
    store_half_bits(to, value == value ? rounded : quiet_nan);
  }
};

template <>
struct Storage<Float16> {
  using Accumulator = float;
  static constexpr Float16 kNegativeInfinity = {0xfc00};
#if defined(__AVX512F__)
  static TDPO_INLINE Vector<float> load(const Float16* from) {
    return (Vector<float>)_mm512_cvtph_ps((__m256i)load_half_bits(from));
  }
  static TDPO_INLINE void store(Float16* to, Vector<float> value) {
    const __m256i bits = _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT);
    std::memcpy(to, &bits, sizeof(bits));
  }
#elif defined(__F16C__)
  static TDPO_INLINE Vector<float> load(const Float16* from) {
    return (Vector<float>)_mm256_cvtph_ps((__m128i)load_half_bits(from));
  }
  static TDPO_INLINE void store(Float16* to, Vector<float> value) {
    const __m128i bits = _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT);
    std::memcpy(to, &bits, sizeof(bits));
  }
#else
  static TDPO_INLINE Vector<float> load(const Float16* from) {
    const Bits<float> half = __builtin_convertvector(load_half_bits(from), Bits<float>);
    const Bits<float> magnitude = (half & 0x7fff) << 13;
    // Reading float16's exponent as float32's is off by 2^112; the product is exact, subnormals
    // too.
    const Vector<float> scaled = bit_cast<Vector<float>>(magnitude) * 0x1p112f;
    const Bits<float> special = magnitude | 0x7f800000;
    const Bits<float> bits = magnitude >= 0x0f800000 ? special : bit_cast<Bits<float>>(scaled);
    return bit_cast<Vector<float>>(bits | ((half & 0x8000) << 16));
  }
  // Round to nearest, ties to even.
  static TDPO_INLINE void store(Float16* to, Vector<float> value) {
    const Bits<float> bits = bit_cast<Bits<float>>(value);
    const Bits<float> magnitude = bits & 0x7fffffff;
    // Below 2^-14 the sum with 0.5 rounds to a multiple of 2^-24, float16's subnormal step.
    const Vector<float> sum = bit_cast<Vector<float>>(magnitude) + 0.5f;
    const Bits<float> subnormal = bit_cast<Bits<float>>(sum) - 0x3f000000;
    const Bits<float> normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
    const Bits<float> infinite = Bits<float>{} + 0x7c00;
    Bits<float> half = magnitude < 0x38800000 ? subnormal : normal;
    half = magnitude > 0x477fefff ? infinite : half;
    half = magnitude > 0x7f800000 ? infinite | 0x200 : half;
    store_half_bits(to, half | ((bits >> 16) & 0x8000));
  }
#endif
};

// The first `count` < kCount elements; what lies behind them becomes -inf, an entry without mass.
template <class T>
TDPO_INLINE auto load_some(const T* from, int64_t count) {
  using Real = typename Storage<T>::Accumulator;
  T padded[Lanes<Real>::kCount];
  for (T& element : padded) element = Storage<T>::kNegativeInfinity;
  std::memcpy(padded, from, static_cast<size_t>(count) * sizeof(T));
  return Storage<T>::load(padded);
}

template <class T>
TDPO_INLINE void store_some(T* to, Vector<typename Storage<T>::Accumulator> value, int64_t count) {
  T padded[Lanes<typename Storage<T>::Accumulator>::kCount];
  Storage<T>::store(padded, value);
  std::memcpy(to, padded, static_cast<size_t>(count) * sizeof(T));
}

// ---- exponentials
// --------------------------------------------------------------------------------
//
// e^x = 2^n e^f, n = round(x / ln 2), |f| <= ln 2 / 2. Adding kRoundToInteger leaves n plus the
// exponent bias in the low bits of the sum, where a shift makes them the exponent of 2^n.

template <class Real>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  static constexpr float kLowest = -88.1f;  // n = -127: the exponent field is 0 and so is 2^n
  static constexpr float kLog2E = 1.44269504f;
  static constexpr float kRoundToInteger = 12582912.0f + 127.0f;  // 1.5 2^23, and the bias
  static constexpr float kLn2High = 0.693359375f;                 // few bits: n kLn2High is exact
  static constexpr float kLn2Low = -2.12194440e-4f;
  static constexpr int kMantissaBits = 23;
  // Minimax (Remez) for e^f = 1 + f + f^2 P(f): relative error 3e-9.
  static constexpr float kExp[] = {
      1.0f, 1.0f, 0.4999999343f, 0.166665204f, 0.04166839077f, 0.008368745038f, 0.001381454055f};
  // Minimax for (e^d - 1 - d) / d^2 on |d| <= 1/2: relative error 2.4e-8.
  static constexpr float kExcess[] = {0.500000012f,    0.1666666546f,   0.04166579594f,
                                      0.008333452171f, 0.001398199736f, 0.0001987562958f};
};

template <>
struct ExpConstants<double> {
  static constexpr double kLowest = -709.4;  // n = -1023
  static constexpr double kLog2E = 1.4426950408889634;
  static constexpr double kRoundToInteger = 6755399441055744.0 + 1023.0;  // 1.5 2^52, and the bias
  static constexpr double kLn2High = 0.6931471803691238;
  static constexpr double kLn2Low = 1.9082149292705878e-10;
  static constexpr int kMantissaBits = 52;
  // Taylor: the first term left out is below 5e-18 of the sum.
  static constexpr double kExp[] = {1.0,
                                    1.0,
                                    1.0 / 2,
                                    1.0 / 6,
                                    1.0 / 24,
                                    1.0 / 120,
                                    1.0 / 720,
                                    1.0 / 5040,
                                    1.0 / 40320,
                                    1.0 / 362880,
                                    1.0 / 3628800,
                                    1.0 / 39916800,
                                    1.0 / 479001600,
                                    1.0 / 6227020800};
  static constexpr double kExcess[] = {1.0 / 2,
                                       1.0 / 6,
                                       1.0 / 24,
                                       1.0 / 120,
                                       1.0 / 720,
                                       1.0 / 5040,
                                       1.0 / 40320,
                                       1.0 / 362880,
                                       1.0 / 3628800,
                                       1.0 / 39916800,
                                       1.0 / 479001600,
                                       1.0 / 6227020800,
                                       1.0 / 87178291200,
                                       1.0 / 1307674368000,
                                       1.0 / 20922789888000};
};

template <class Real, int kTerms>
TDPO_INLINE Vector<Real> polynomial(const Real (&coefficients)[kTerms], Vector<Real> x) {
  Vector<Real> sum = broadcast(coefficients[kTerms - 1]);
#pragma GCC unroll 16
  for (int term = kTerms - 2; term >= 0; --term) sum = sum * x + coefficients[term];
  return sum;
}

// e^x for x <= 0: exactly 1 at 0, exactly 0 where it would be subnormal, NaN for NaN.
template <class Real>
TDPO_INLINE Vector<Real> exp_of_nonpositive(Vector<Real> x) {
  using C = ExpConstants<Real>;
  x = max_keeping_nan(broadcast(C::kLowest), x);
  const Vector<Real> shifted = x * C::kLog2E + C::kRoundToInteger;
  const Vector<Real> n = shifted - C::kRoundToInteger;
  const Vector<Real> f = (x - n * C::kLn2High) - n * C::kLn2Low;
  const Bits<Real> exponent = bit_cast<Bits<Real>>(shifted) << C::kMantissaBits;
  return polynomial<Real>(C::kExp, f) * bit_cast<Vector<Real>>(exponent);
}

// e^d - 1 - d for |d| <= 1/2, from d and d^2: exactly 0 at 0.
template <class Real>
TDPO_INLINE Vector<Real> excess_of_close(Vector<Real> d, Vector<Real> d_squared) {
  return d_squared * polynomial<Real>(ExpConstants<Real>::kExcess, d);
}

// ---- lanes together
// ------------------------------------------------------------------------------

template <class Real>
TDPO_INLINE Real sum_of_lanes(Vector<Real> value) {
  Real sum = 0;
  for (int lane = 0; lane < Lanes<Real>::kCount; ++lane) sum += value[lane];
  return sum;
}

template <class Real>
TDPO_INLINE Real max_of_lanes(Vector<Real> value) {
  Real largest = value[0];
  for (int lane = 1; lane < Lanes<Real>::kCount; ++lane) {
    largest = largest > value[lane] ? largest : value[lane];
  }
  return largest;
}

}  // namespace tdpo::cpu::TDPO_INSTRUCTION_SET
