// Vectors of float or double, as wide as the instruction set that includes this file. They are the
// compiler's vector types (GCC and Clang): one text serves SSE2, AVX2, AVX-512 and NEON.
//
// Each including file defines TDPO_INSTRUCTION_SET (a namespace) and TDPO_VECTOR_BYTES first.
// CXXFLAGS (-march=native) may bring more instructions than the width is for.
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

// The larger; x where either is NaN (x86's max instructions do just that).
template <class V>
TDPO_INLINE V max_keeping_nan(V floor, V x) {
  return floor > x ? floor : x;
}

// Logits that will be wanted soon; past the end of a row it asks for nothing that could fail.
template <class T>
TDPO_INLINE void prefetch_ahead(const T* entries) {
  constexpr int64_t kAhead = 2048 / sizeof(T);
  __builtin_prefetch(entries + kAhead);
}

// ---- loads and stores: no alignment is assumed ----
//
// Two vectors at a time, since two of bfloat16 are best taken apart together. Which entry goes into
// which lane is the storage's own affair: kernels treat all alike.

template <class Real>
struct Two {
  Vector<Real> first, second;
};

// Entries in two vectors.
template <class Real>
constexpr int64_t kTwo = 2 * Lanes<Real>::kCount;

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
  static TDPO_INLINE Two<Real> load_two(const Real* from) {
    return {load(from), load(from + Lanes<Real>::kCount)};
  }
  static TDPO_INLINE void store_two(Real* to, const Two<Real>& values) {
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

// A bfloat16 is the upper half of a float. A 32-bit lane holds two of them: one becomes a float by
// a shift, the other by a mask.
template <>
struct Storage<BFloat16> {
  using Accumulator = float;
  static constexpr BFloat16 kNegativeInfinity = {0xff80};
  static constexpr uint32_t kUpper = 0xffff0000;
  static TDPO_INLINE Two<float> load_two(const BFloat16* from) {
    Bits<float> both;
    std::memcpy(&both, from, sizeof(both));
    return {bit_cast<Vector<float>>(both << 16), bit_cast<Vector<float>>(both & kUpper)};
  }
  static TDPO_INLINE void store_two(BFloat16* to, const Two<float>& values) {
    const Bits<float> both = (rounded(values.first) >> 16) | (rounded(values.second) & kUpper);
    std::memcpy(to, &both, sizeof(both));
  }
  // Takes vectors that another storage has loaded: entries in their order.
  static TDPO_INLINE void store_in_order(BFloat16* to, const Two<float>& values) {
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
  using Accumulator = float;
  static constexpr Float16 kNegativeInfinity = {0xfc00};
  static TDPO_INLINE Two<float> load_two(const Float16* from) {
    return {load(from), load(from + Lanes<float>::kCount)};
  }
  static TDPO_INLINE void store_two(Float16* to, const Two<float>& values) {
    store(to, values.first);
    store(to + Lanes<float>::kCount, values.second);
  }
  static TDPO_INLINE void store_in_order(Float16* to, const Two<float>& values) {
    store_two(to, values);
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

// The first `count` < kTwo elements; what lies behind them becomes -inf, an entry without mass.
template <class T, class Real = typename Storage<T>::Accumulator>
TDPO_INLINE Two<Real> load_some(const T* from, int64_t count) {
  T padded[kTwo<Real>];
  for (T& element : padded) element = Storage<T>::kNegativeInfinity;
  std::memcpy(padded, from, static_cast<size_t>(count) * sizeof(T));
  return Storage<T>::load_two(padded);
}

// Stores what Storage<T> has loaded, computed on.
template <class T, class To, class Real>
TDPO_INLINE void store_two_of(To* to, const Two<Real>& values) {
  if constexpr (std::is_same_v<T, To>) {
    Storage<To>::store_two(to, values);
  } else {
    Storage<To>::store_in_order(to, values);
  }
}

template <class T, class To, class Real>
TDPO_INLINE void store_some_of(To* to, const Two<Real>& values, int64_t count) {
  To padded[kTwo<Real>];
  store_two_of<T>(padded, values);
  std::memcpy(to, padded, static_cast<size_t>(count) * sizeof(To));
}

// Entries that are close together or not: seldom spoilt by one of them, and worth the question.
constexpr int64_t kGroup = 64;

// Calls body(z, r) with one vector of each at a time; the last may be padded with -inf.
template <class T, class Body>
TDPO_INLINE void for_each_vector(const T* policy, const T* reference, int64_t count, Body body) {
  constexpr int64_t kStep = kTwo<typename Storage<T>::Accumulator>;
  int64_t at = 0;
  for (; at + kStep <= count; at += kStep) {
    const auto z = Storage<T>::load_two(policy + at), r = Storage<T>::load_two(reference + at);
    body(z.first, r.first);
    body(z.second, r.second);
  }
  if (at < count) {
    const auto z = load_some(policy + at, count - at), r = load_some(reference + at, count - at);
    body(z.first, r.first);
    body(z.second, r.second);
  }
}

// ---- exponentials ----
//
// 2^(x log2 e - N) = 2^n 2^f, n = round(x log2 e) - N, |f| <= 1/2. Rounding to an integer is the
// sum
//
//   t = x log2(e) 2^-s + (3 + (bias - N) 2^-s),
//
// where 2^-s is the unit in the last place of numbers in [2, 4): the lowest bits of t are n + bias,
// and f 2^-s is what t has rounded away. A shift makes those bits an exponent. The steps N of a
// whole power of two stand for the largest x, so that it need not be subtracted from each.

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
  static constexpr float kLowest = -88.1f;  // n = -127: the exponent is 0 and so is 2^n
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

// A whole number N of powers of two near x.
template <class Real>
struct Steps {
  int count;
  explicit Steps(Real x) : count(static_cast<int>(std::lround(x * ExpConstants<Real>::kLog2E))) {}
  // N in nats, by the logarithm that remainder() uses.
  double nats() const {
    return kRoundsOnce ? count / double(ExpConstants<Real>::kLog2E) : count * 0.6931471805599453;
  }
  // 3 + (bias - N) 2^-s.
  Real rounder(int bias) const { return Real(3) + Real(bias - count) * ExpConstants<Real>::kUnit; }
};

// f 2^-s, from x and round(x log2 e) 2^-s.
template <class Real>
TDPO_INLINE Vector<Real> remainder(Vector<Real> x, Vector<Real> n) {
  using C = ExpConstants<Real>;
  if (kRoundsOnce) return x * (C::kLog2E * C::kUnit) - n;
  constexpr Real kPerUnit = 1 / C::kUnit;
  return ((x - n * (C::kLn2High * kPerUnit)) - n * (C::kLn2Low * kPerUnit)) *
         (C::kLog2E * C::kUnit);
}

// Numbers within this of 0 have exact steps: so has their rounder, and n kLn2High.
template <class Real>
constexpr Real kExactSteps = kRoundsOnce || sizeof(Real) == sizeof(double) ? 65536 : 32000;

// A polynomial in f, times 2^n: e^(x - N in nats) times what has scaled the coefficients of 2^f.
// The rounder is that of N and kFullExponent. x up to `lowest`, where n = -kFullExponent, give 0.
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

// e^x for x up to the headroom of a base and beyond: exactly 1 at 0, exactly 0 where it would be
// subnormal, NaN for NaN.
template <class Real>
TDPO_INLINE Vector<Real> exp_of(Vector<Real> x) {
  using C = ExpConstants<Real>;
  static constexpr ScaledExp<Real> kPower(0);
  constexpr Real kRounder = Real(3) + C::kFullExponent * C::kUnit;
  return exp_with<Real>(x, C::kLowest, kRounder, kPower.coefficients);
}

// e^(x - N in nats) in fewer instructions, for a difference from about -77 to 10, or -665 to 44 in
// double. The rounder is that of N and kCheckedBias. `seen` gathers the bits of t: if all x were in
// range they are those of 3 and the lowest kCheckedBits, since among numbers above 0 only those in
// [2, 4) have no other bits in their exponent. (At t = 0 the result is 2^-kCheckedBias or less.)
template <class Real>
TDPO_INLINE Vector<Real> exp_in_range(Vector<Real> x, Real rounder, Bits<Real>& seen) {
  using C = ExpConstants<Real>;
  static constexpr ScaledExp<Real> kPower(C::kCheckedBias);
  const Vector<Real> t = x * (C::kLog2E * C::kUnit) + rounder;
  const Vector<Real> f = remainder<Real>(x, t - rounder);
  const Bits<Real> bits = bit_cast<Bits<Real>>(t);
  seen |= bits;
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

// The bits that should not have been seen.
template <class Real>
TDPO_INLINE Bits<Real> out_of_range(Bits<Real> seen) {
  using C = ExpConstants<Real>;
  using Word = std::remove_reference_t<decltype(seen[0])>;
  const Word three = bit_cast<Word>(Real(3)), lowest = (Word(1) << C::kCheckedBits) - 1;
  return seen & ~(three | lowest);
}

// (e^d - 1 - d) / d^2 for |d| <= kClose.
template <class Real>
TDPO_INLINE Vector<Real> excess_over_square(Vector<Real> d) {
  return polynomial<Real>(ExpConstants<Real>::kExcess, d);
}

// ---- lanes together ----

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
