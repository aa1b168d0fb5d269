// Vectors of float or double: loads and stores of every dtype, and exponentials.
//
// The vectors are the compiler's own types (GCC and Clang), so one text serves SSE2, AVX2, AVX-512
// and NEON. Each file that includes this one first defines TDPO_INSTRUCTION_SET, a namespace, and
// TDPO_VECTOR_BYTES, the width of its vectors. Flags such as -march=native may enable wider
// instructions; the vectors keep their width.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "../half_types.h"

#define TDPO_INLINE inline __attribute__((always_inline))

namespace tdpo::cpu::TDPO_INSTRUCTION_SET {

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

template <class Real>
TDPO_INLINE Vector<Real> broadcast(Real value) {
  return Vector<Real>{} + value;
}

// The larger of the two; x where either is NaN. x86's max instructions do the same.
template <class V>
TDPO_INLINE V max_keeping_nan(V floor, V x) {
  return floor > x ? floor : x;
}

// Asks for the logits 2 KiB ahead of these, every cache line of them. A prefetch past the end of a
// row does no harm.
template <class T>
TDPO_INLINE void prefetch_ahead(const T* entries, int64_t count) {
  constexpr int64_t kAhead = 2048 / sizeof(T), kLine = 64 / sizeof(T);
#pragma GCC unroll 8
  for (int64_t at = 0; at < count; at += kLine) __builtin_prefetch(entries + kAhead + at);
}

// ---- loads and stores: no alignment is assumed ----
//
// unpack() reads entries into two vectors of Real, pack() writes two such vectors. They come in
// twos because a 32-bit lane of memory holds two bfloat16s: the lower halves become one vector, the
// upper halves the other. So Storage<T> decides which entry goes into which lane. Kernels treat all
// entries alike, and pack() puts each back in its place.

template <class Real>
struct TwoVectors {
  Vector<Real> first, second;
};

// Entries in two vectors.
template <class Real>
constexpr int64_t kPerTwoVectors = 2 * Lanes<Real>::kCount;

// How T is stored, and Real, the type that it is computed and added up in.
template <class T>
struct Storage;

template <class T>
using RealOf = typename Storage<T>::Real;

template <class Number>
struct PlainStorage {
  using Real = Number;
  static constexpr Real kNegativeInfinity = -__builtin_inf();
  static TDPO_INLINE Vector<Real> load(const Real* from) {
    Vector<Real> value;
    std::memcpy(&value, from, sizeof(value));
    return value;
  }
  static TDPO_INLINE void store(Real* to, Vector<Real> value) {
    std::memcpy(to, &value, sizeof(value));
  }
  static TDPO_INLINE TwoVectors<Real> unpack(const Real* from) {
    return {load(from), load(from + Lanes<Real>::kCount)};
  }
  static TDPO_INLINE void pack(Real* to, const TwoVectors<Real>& values) {
    store(to, values.first);
    store(to + Lanes<Real>::kCount, values.second);
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

// A bfloat16 is the upper half of a float. A 32-bit lane holds two: one becomes a float by a shift,
// the other by a mask.
template <>
struct Storage<BFloat16> {
  using Real = float;
  static constexpr BFloat16 kNegativeInfinity = {0xff80};
  static constexpr uint32_t kUpper = 0xffff0000;
  static TDPO_INLINE TwoVectors<float> unpack(const BFloat16* from) {
    Bits<float> both;
    std::memcpy(&both, from, sizeof(both));
    return {bit_cast<Vector<float>>(both << 16), bit_cast<Vector<float>>(both & kUpper)};
  }
  static TDPO_INLINE void pack(BFloat16* to, const TwoVectors<float>& values) {
    const Bits<float> both = (rounded(values.first) >> 16) | (rounded(values.second) & kUpper);
    std::memcpy(to, &both, sizeof(both));
  }
  // For vectors that another type's unpack() has filled, where entries are in order.
  static TDPO_INLINE void pack_in_order(BFloat16* to, const TwoVectors<float>& values) {
    store_half_bits(to, rounded(values.first) >> 16);
    store_half_bits(to + Lanes<float>::kCount, rounded(values.second) >> 16);
  }

 private:
  static TDPO_INLINE Bits<float> rounded(Vector<float> value) {
    return rounded_to_bfloat16(bit_cast<Bits<float>>(value));
  }
};

template <>
struct Storage<Float16> {
  using Real = float;
  static constexpr Float16 kNegativeInfinity = {0xfc00};
  static TDPO_INLINE TwoVectors<float> unpack(const Float16* from) {
    return {load(from), load(from + Lanes<float>::kCount)};
  }
  static TDPO_INLINE void pack(Float16* to, const TwoVectors<float>& values) {
    store(to, values.first);
    store(to + Lanes<float>::kCount, values.second);
  }
  static TDPO_INLINE void pack_in_order(Float16* to, const TwoVectors<float>& values) {
    pack(to, values);
  }

 private:
#if defined(__AVX512F__) && TDPO_VECTOR_BYTES == 64
  static TDPO_INLINE Vector<float> load(const Float16* from) {
    return (Vector<float>)_mm512_cvtph_ps((__m256i)load_half_bits(from));
  }
  static TDPO_INLINE void store(Float16* to, Vector<float> value) {
    const __m256i bits = _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT);
    std::memcpy(to, &bits, sizeof(bits));
  }
#elif defined(__F16C__) && TDPO_VECTOR_BYTES == 32
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
    return float_of_float16<Vector<float>>(half);
  }
  static TDPO_INLINE void store(Float16* to, Vector<float> value) {
    store_half_bits(to, float16_of_float<Bits<float>>(value));
  }
#endif
};

// The first `count` < kPerTwoVectors entries; the lanes behind them get -inf, which has no mass.
template <class T, class Real = RealOf<T>>
TDPO_INLINE TwoVectors<Real> unpack_some(const T* from, int64_t count) {
  T padded[kPerTwoVectors<Real>];
  for (T& element : padded) element = Storage<T>::kNegativeInfinity;
  std::memcpy(padded, from, static_cast<size_t>(count) * sizeof(T));
  return Storage<T>::unpack(padded);
}

// Writes vectors whose entries are in the lanes where Storage<T>::unpack puts them.
template <class T, class To, class Real>
TDPO_INLINE void pack_from(To* to, const TwoVectors<Real>& values) {
  if constexpr (std::is_same_v<T, To>) {
    Storage<To>::pack(to, values);
  } else {
    Storage<To>::pack_in_order(to, values);
  }
}

template <class T, class To, class Real>
TDPO_INLINE void pack_some_from(To* to, const TwoVectors<Real>& values, int64_t count) {
  To padded[kPerTwoVectors<Real>];
  pack_from<T>(padded, values);
  std::memcpy(to, padded, static_cast<size_t>(count) * sizeof(To));
}

// Calls body(z, r) with one vector of each at a time; the last may be padded with -inf.
template <class T, class Body>
TDPO_INLINE void for_each_vector(const T* policy, const T* reference, int64_t count, Body body) {
  constexpr int64_t kStep = kPerTwoVectors<RealOf<T>>;
  int64_t at = 0;
  for (; at + kStep <= count; at += kStep) {
    const auto z = Storage<T>::unpack(policy + at), r = Storage<T>::unpack(reference + at);
    body(z.first, r.first);
    body(z.second, r.second);
  }
  if (at < count) {
    const auto z = unpack_some(policy + at, count - at),
               r = unpack_some(reference + at, count - at);
    body(z.first, r.first);
    body(z.second, r.second);
  }
}

// ---- exponentials ----
//
// e^(x - N ln 2) = 2^(x log2(e) - N) = 2^n 2^f with n = round(x log2(e)) - N and |f| <= 1/2.
//
// One addition rounds to an integer:
//
//   t = x log2(e) 2^-s + rounder,     rounder = 3 + (bias - N) 2^-s,
//
// where 2^-s (kUnit) is the unit in the last place of numbers in [2, 4). The lowest bits of t are
// n + bias, and a shift makes them an exponent. What the addition has rounded away is f 2^-s.
//
// N is the base of a sum (its largest x) as a whole number of powers of two. It is part of the
// rounder, so the base is not subtracted from each x.

template <class Real>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  static constexpr int kMantissaBits = 23;
  static constexpr float kUnit = 0x1p-22f;
  static constexpr float kLog2E = 1.44269504f;
  static constexpr float kLn2High = 0.693359375f;  // few bits: n kLn2High is exact
  static constexpr float kLn2Low = -2.12194440e-4f;
  // Minimax (Remez) for 2^f with 2^0 = 1: relative error 9.2e-8.
  static constexpr float kExp[] = {1.0f,           0.6931469776f,   0.2402224209f,
                                   0.05550733746f, 0.009671512633f, 0.001326472641f};
  // Minimax for (e^d - 1 - d) / d^2 on |d| <= kClose: relative error 4.1e-7.
  static constexpr float kClose = 1.25f;
  static constexpr float kExcess[] = {0.500000058592f,   0.166667779609f,   0.0416660896189f,
                                      0.00832747925823f, 0.00138949093043f, 0.000205995459198f,
                                      2.50490478339e-5f};
  static constexpr int kFullExponent = 127;
  static constexpr float kLowest = -88.1f;  // n = -127: the exponent's bits are 0, and so is 2^n
  static constexpr int kCheckedBits = 7, kCheckedBias = 112;  // -112 <= n < 16
};

template <>
struct ExpConstants<double> {
  static constexpr int kMantissaBits = 52;
  static constexpr double kUnit = 0x1p-51;
  static constexpr double kLog2E = 1.4426950408889634;
  static constexpr double kLn2High = 0.6931471803691238;
  static constexpr double kLn2Low = 1.9082149292705878e-10;
  // Taylor: ln(2)^k / k!; the first term left out is below 5e-18 of the sum.
  static constexpr double kExp[] = {1.0,
                                    0.69314718055994531,
                                    0.24022650695910072,
                                    0.055504108664821580,
                                    0.0096181291076284772,
                                    0.0013333558146428443,
                                    0.00015403530393381608,
                                    1.5252733804059841e-5,
                                    1.3215486790144309e-6,
                                    1.0178086009239699e-7,
                                    7.0549116208011233e-9,
                                    4.4455382718708115e-10,
                                    2.5678435993488205e-11,
                                    1.3691488853904128e-12};
  static constexpr double kClose = 0.5;
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
  static constexpr int kFullExponent = 1023;
  static constexpr double kLowest = -709.4;                    // n = -1023
  static constexpr int kCheckedBits = 10, kCheckedBias = 960;  // -960 <= n < 64
};

// The coefficients of 2^f 2^-bias as a polynomial in f kUnit.
template <class Real>
struct ScaledExp {
  static constexpr int kTerms = sizeof(ExpConstants<Real>::kExp) / sizeof(Real);
  Real coefficients[kTerms];
  explicit constexpr ScaledExp(int bias) : coefficients() {
    Real scale = 1;
    for (int i = 0; i < bias; ++i) scale /= 2;
    for (int term = 0; term < kTerms; ++term) {
      coefficients[term] = ExpConstants<Real>::kExp[term] * scale;
      scale /= ExpConstants<Real>::kUnit;
    }
  }
};

template <class Real, int kTerms>
TDPO_INLINE Vector<Real> polynomial(const Real (&coefficients)[kTerms], Vector<Real> x) {
  Vector<Real> sum = broadcast(coefficients[kTerms - 1]);
#pragma GCC unroll 16
  for (int term = kTerms - 2; term >= 0; --term) sum = sum * x + coefficients[term];
  return sum;
}

#if defined(__FMA__) || defined(__aarch64__)
constexpr bool kRoundsOnce = true;  // a * b + c
#else
constexpr bool kRoundsOnce = false;
#endif

// N = round(x log2(e)): a base x as a whole number of powers of two.
template <class Real>
struct Steps {
  int count;
  explicit Steps(Real x) : count(static_cast<int>(std::lround(x * ExpConstants<Real>::kLog2E))) {}
  // N powers of two in nats, with the same ln 2 as remainder().
  double nats() const {
    return kRoundsOnce ? count / double(ExpConstants<Real>::kLog2E) : count * 0.6931471805599453;
  }
  // 3 + (bias - N) 2^-s.
  Real rounder(int bias) const { return Real(3) + Real(bias - count) * ExpConstants<Real>::kUnit; }
};

// f 2^-s, from x and n = round(x log2(e)) 2^-s.
template <class Real>
TDPO_INLINE Vector<Real> remainder(Vector<Real> x, Vector<Real> n) {
  using C = ExpConstants<Real>;
  if (kRoundsOnce) return x * (C::kLog2E * C::kUnit) - n;
  constexpr Real kPerUnit = 1 / C::kUnit;
  return ((x - n * (C::kLn2High * kPerUnit)) - n * (C::kLn2Low * kPerUnit)) *
         (C::kLog2E * C::kUnit);
}

// For |x| below this the rounder of x's Steps is exact, and so is n kLn2High in remainder().
template <class Real>
constexpr Real kExactSteps = kRoundsOnce || sizeof(Real) == sizeof(double) ? 65536 : 32000;

// 2^n times a polynomial in f with the given coefficients: e^(x - N ln 2) times the factor that
// they were scaled by. The rounder is Steps::rounder(kFullExponent). The result is 0 for x <=
// lowest, where n = -kFullExponent.
template <class Real, int kTerms>
TDPO_INLINE Vector<Real> exp_with(Vector<Real> x, Real lowest, Real rounder,
                                  const Real (&coefficients)[kTerms]) {
  using C = ExpConstants<Real>;
  x = max_keeping_nan(broadcast(lowest), x);
  const Vector<Real> t = x * (C::kLog2E * C::kUnit) + rounder;
  const Vector<Real> f = remainder<Real>(x, t - rounder);
  const Bits<Real> exponent = bit_cast<Bits<Real>>(t) << C::kMantissaBits;
  return polynomial<Real>(coefficients, f) * bit_cast<Vector<Real>>(exponent);
}

// e^x for any x below the overflow: exactly 1 at 0, exactly 0 where e^x would be subnormal, NaN for
// NaN.
template <class Real>
TDPO_INLINE Vector<Real> exp_of(Vector<Real> x) {
  using C = ExpConstants<Real>;
  static constexpr ScaledExp<Real> kPower(0);
  constexpr Real kRounder = Real(3) + C::kFullExponent * C::kUnit;
  return exp_with<Real>(x, C::kLowest, kRounder, kPower.coefficients);
}

// e^(x - N ln 2) in fewer instructions, where x - N ln 2 is from about -77 to 10, or -665 to 44 in
// double. The rounder is Steps::rounder(kCheckedBias).
//
// While x is in range, t is 3 plus less than 2^kCheckedBits units: it differs from 3 in its lowest
// kCheckedBits bits alone. `seen` gathers the bits in which any t differs from 3; out_of_range()
// finds the others.
template <class Real>
TDPO_INLINE Vector<Real> exp_in_range(Vector<Real> x, Real rounder, Bits<Real>& seen) {
  using C = ExpConstants<Real>;
  static constexpr ScaledExp<Real> kPower(C::kCheckedBias);
  const Vector<Real> t = x * (C::kLog2E * C::kUnit) + rounder;
  const Vector<Real> f = remainder<Real>(x, t - rounder);
  const Bits<Real> bits = bit_cast<Bits<Real>>(t);
  using Word = std::remove_reference_t<decltype(bits[0])>;
  seen |= bits ^ bit_cast<std::remove_cv_t<Word>>(Real(3));
  const Vector<Real> power = polynomial<Real>(kPower.coefficients, f);
  return bit_cast<Vector<Real>>(bit_cast<Bits<Real>>(power) + (bits << C::kMantissaBits));
}

template <class V>
TDPO_INLINE bool any_bit(V bits) {
#if defined(__AVX512F__) && TDPO_VECTOR_BYTES == 64
  return _mm512_test_epi32_mask((__m512i)bits, (__m512i)bits) != 0;
#elif defined(__AVX2__) && TDPO_VECTOR_BYTES == 32
  return !_mm256_testz_si256((__m256i)bits, (__m256i)bits);
#else
  const Bits<double> words = bit_cast<Bits<double>>(bits);
  uint64_t all = 0;
  for (int lane = 0; lane < Lanes<double>::kCount; ++lane) all |= words[lane];
  return all != 0;
#endif
}

// The bits of `seen` that stay 0 while every x is in range.
template <class Real>
TDPO_INLINE Bits<Real> out_of_range(Bits<Real> seen) {
  using Word = std::remove_reference_t<decltype(seen[0])>;
  const Word lowest = (Word(1) << ExpConstants<Real>::kCheckedBits) - 1;
  return seen & ~lowest;
}

// (e^d - 1 - d) / d^2 for |d| <= kClose.
template <class Real>
TDPO_INLINE Vector<Real> excess_over_square(Vector<Real> d) {
  return polynomial<Real>(ExpConstants<Real>::kExcess, d);
}

// ---- over the lanes of a vector ----

template <class Real>
TDPO_INLINE double sum_of_lanes(Vector<Real> value) {
  double sum = 0;
  for (int lane = 0; lane < Lanes<Real>::kCount; ++lane) sum += double(value[lane]);
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

template <class Real>
TDPO_INLINE Vector<Real> magnitude(Vector<Real> value) {
  constexpr int kSign = 8 * sizeof(Real) - 1;
  return bit_cast<Vector<Real>>(bit_cast<Bits<Real>>(value) & ~((Bits<Real>{} + 1) << kSign));
}

}  // namespace tdpo::cpu::TDPO_INSTRUCTION_SET
