// One row forward, one row backward, in the vectors of the instruction set whose file includes
// this.
//
// Roofline, per pair (z, r) of logits of S bytes: forward reads 2 S bytes and takes two
// exponentials and a polynomial; backward reads S or 2 S bytes, writes S, and takes one or two
// exponentials. One core streams 8 bytes in about 0.7 ns, in which it issues some 35 to 60 vector
// instructions for 16 pairs; forward needs about 50, so at float32 it is close to the memory's
// speed and at bfloat16 bound by arithmetic.
//
// Decomposition: one row, one thread. The row goes by in blocks small enough for the L1 cache:
// first the block's maxima (this reads memory, while the next block is prefetched), then its sums
// from L1.
#include <cmath>
#include <type_traits>

#include "../vocab_stats.h"
#include "row_kernels.h"
#include "simd.h"

namespace tdpo::cpu::TDPO_INSTRUCTION_SET {
namespace {

// Logits to a block: few enough that both sides stay in the L1 cache, and that a lane's float32 sum
// takes in no more than 128 terms before it joins the record.
template <class Real>
constexpr int64_t kBlock = 128 * Lanes<Real>::kCount;

// Calls body(z, r) with one vector of each at a time; the last may be padded with -inf.
template <class T, class Body>
TDPO_INLINE void for_each_vector(const T* policy, const T* reference, int64_t count, Body body) {
  constexpr int64_t kLanes = Lanes<typename Storage<T>::Accumulator>::kCount;
  int64_t at = 0;
  for (; at + kLanes <= count; at += kLanes) {
    body(Storage<T>::load(policy + at), Storage<T>::load(reference + at));
  }
  if (at < count) body(load_some(policy + at, count - at), load_some(reference + at, count - at));
}

template <class Real>
struct Extremes {
  Real policy_max;
  Real reference_max;
  Real policy_min;
};

template <class T, class Real = typename Storage<T>::Accumulator>
TDPO_INLINE Extremes<Real> extremes_of_block(const T* policy, const T* reference, int64_t count) {
  Vector<Real> policy_max = broadcast(-Real(INFINITY)), reference_max = policy_max;
  Vector<Real> policy_min = broadcast(Real(INFINITY));
  for_each_vector(policy, reference, count, [&](Vector<Real> z, Vector<Real> r) {
    policy_max = max_keeping_nan(policy_max, z);
    reference_max = max_keeping_nan(reference_max, r);
    policy_min = policy_min < z ? policy_min : z;
  });
  return {max_of_lanes<Real>(policy_max), max_of_lanes<Real>(reference_max),
          -max_of_lanes<Real>(-policy_min)};
}

template <class T>
TDPO_INLINE typename Storage<T>::Accumulator element(const T* from) {
  return load_some(from, 1)[0];
}

// lse(z) - lse(r) over a block.
template <class T, class Real>
Real centre_of_block(const T* policy, const T* reference, int64_t count,
                     const Extremes<Real>& extremes) {
  const Real policy_max = finite_or_zero(extremes.policy_max);
  const Real reference_max = finite_or_zero(extremes.reference_max);
  Vector<Real> policy_sum{}, reference_sum{};
  for_each_vector(policy, reference, count, [&](Vector<Real> z, Vector<Real> r) {
    policy_sum += exp_of_nonpositive<Real>(z - policy_max);
    reference_sum += exp_of_nonpositive<Real>(r - reference_max);
  });
  const Real ratio = sum_of_lanes<Real>(policy_sum) / sum_of_lanes<Real>(reference_sum);
  return finite_or_zero((extremes.policy_max - extremes.reference_max) + std::log(ratio));
}

// Whether some z is -inf where r is not. The padding of the last vector is -inf on both sides.
template <class T, class Real>
bool policy_excludes_an_entry(const T* policy, const T* reference, int64_t count) {
  typename Lanes<Real>::Mask found{};
  for_each_vector(policy, reference, count, [&](Vector<Real> z, Vector<Real> r) {
    found |= (z == -Real(INFINITY)) & (r > -Real(INFINITY));
  });
  bool any = false;
  for (int lane = 0; lane < Lanes<Real>::kCount; ++lane) any |= found[lane] != 0;
  return any;
}

// Adds a block to a record whose base already covers it (its maxima are at least the block's).
template <class T, class Real>
TDPO_INLINE void add_block(VocabStats<Real>& stats, const T* policy, const T* reference,
                           int64_t count, bool policy_has_minus_infinity) {
  const Base<Real>& base = stats.base;
  // Where all of a side is -inf so far any finite maximum will do: every exponential is 0.
  const Real policy_max = finite_or_zero(base.policy_max);
  const Real reference_max = finite_or_zero(base.reference_max);
  const Real k = finite_or_zero(linear_scale(base.reference_max, base.centre, base.policy_max));
  const Vector<Real> far_gap = broadcast(Real(1e30));
  Vector<Real> policy_sum{}, reference_sum{}, gap_sum{}, excess_sum{};
  for_each_vector(policy, reference, count, [&](Vector<Real> z, Vector<Real> r) {
    const Vector<Real> policy_mass = exp_of_nonpositive<Real>(z - policy_max);
    const Vector<Real> w = exp_of_nonpositive<Real>(r - reference_max);
    // Where w = 0 the gap may be infinite or NaN; any large number makes w d = 0 and the entry far.
    const Vector<Real> d = w == Real(0) ? far_gap : (z - r) - base.centre;
    const Vector<Real> d_squared = d * d;
    const Vector<Real> weighted_gap = w * d;
    const Vector<Real> linear = w * k;
    const Vector<Real> close = linear * excess_of_close<Real>(d, d_squared);
    const Vector<Real> far = policy_mass - k * (w + weighted_gap);
    policy_sum += policy_mass;
    reference_sum += w;
    gap_sum += weighted_gap;
    excess_sum += d_squared < CloseGap<Real>::squared ? close : far;
  });
  stats.policy_sum += sum_of_lanes<Real>(policy_sum);
  stats.reference_sum += sum_of_lanes<Real>(reference_sum);
  stats.gap_sum += sum_of_lanes<Real>(gap_sum);
  stats.excess_sum += sum_of_lanes<Real>(excess_sum);
  // p = 0 < q makes the KL infinite, also where q is too small for w to show it.
  if (policy_has_minus_infinity && policy_excludes_an_entry<T, Real>(policy, reference, count)) {
    stats.gap_sum = -Real(INFINITY);
  }
}

template <class T>
TDPO_INLINE void prefetch_block(const T* block, int64_t count) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t at = 0; at < count; at += kLine) __builtin_prefetch(block + at);
}

// Adds the entries [start, end) of a row to the record of others.
template <class T, class Real>
void add_range(VocabStats<Real>& stats, const T* policy, const T* reference, int64_t start,
               int64_t end) {
  for (; start < end; start += kBlock<Real>) {
    const int64_t left = end - start, count = left < kBlock<Real> ? left : kBlock<Real>;
    const T* z = policy + start;
    const T* r = reference + start;
    const Extremes<Real> extremes = extremes_of_block(z, r, count);
    Base<Real> base = stats.base;
    if (extremes.policy_max > base.policy_max) base.policy_max = extremes.policy_max;
    if (extremes.reference_max > base.reference_max) {
      base.reference_max = extremes.reference_max;
      base.centre = centre_of_block(z, r, count, extremes);
    }
    const bool moved =
        base.policy_max != stats.base.policy_max || base.reference_max != stats.base.reference_max;
    if (moved) stats = rebase(stats, base);
    const int64_t next = left - count < kBlock<Real> ? left - count : kBlock<Real>;
    prefetch_block(z + count, next);
    prefetch_block(r + count, next);
    add_block(stats, z, r, count, extremes.policy_min == -Real(INFINITY));
  }
}

template <class T>
void forward(const RowForward& row) {
  using Real = typename Storage<T>::Accumulator;
  const T* policy = static_cast<const T*>(row.policy);
  const T* reference = static_cast<const T*>(row.reference);
  LabelledStats<Real>& stats = *static_cast<LabelledStats<Real>*>(row.record);
  if (row.label < 0 || row.label >= row.vocabulary) {
    add_range(stats.rest, policy, reference, 0, row.vocabulary);
    return;
  }
  add_range(stats.rest, policy, reference, 0, row.label);
  add_range(stats.rest, policy, reference, row.label + 1, row.vocabulary);
  stats.label_policy = element(policy + row.label);
  stats.label_reference = element(reference + row.label);
}

// ---- backward ----

// The gradient of the entries but the label's, in three kinds. Each reads what its algebra needs
// and nothing else.

template <class Real>
struct PolicyOnly {  // g_k = 0: -g_m p
  static constexpr bool kReadsPolicy = true, kReadsReference = false;
  Normalizers<Real> of;
  Real g_m;
  TDPO_INLINE Vector<Real> gradient(Vector<Real> z, Vector<Real>) const {
    return exp_of_nonpositive<Real>(z - of.policy_max) * of.policy_scale * -g_m;
  }
  Real label_gradient() const { return g_m * of.policy_rest; }
};

template <class Real>
struct ReferenceOnly {  // g_k = g_m: -g_m p + g_m (p - q) = -g_m q
  static constexpr bool kReadsPolicy = false, kReadsReference = true;
  Normalizers<Real> of;
  Real g_m;
  TDPO_INLINE Vector<Real> gradient(Vector<Real>, Vector<Real> r) const {
    return exp_of_nonpositive<Real>(r - of.reference_max) * of.reference_scale * -g_m;
  }
  Real label_gradient() const { return g_m * of.reference_rest; }
};

// g_k (p - q) - g_m p. Where p and q are close, p - q = q (e^u - 1) with u = log p - log q keeps
// its digits, provided that u has them: with logits shifted far against each other it has not.
template <class Real>
struct Both {
  static constexpr bool kReadsPolicy = true, kReadsReference = true;
  Normalizers<Real> of;
  Real g_m, g_k, close_squared;
  Both(const Normalizers<Real>& of, Real g_m, Real g_k)
      : of(of),
        g_m(g_m),
        g_k(g_k),
        close_squared(std::fabs(of.log_sum_gap) < Real(2) ? CloseGap<Real>::squared : Real(0)) {}
  TDPO_INLINE Vector<Real> gradient(Vector<Real> z, Vector<Real> r) const {
    const Vector<Real> p = exp_of_nonpositive<Real>(z - of.policy_max) * of.policy_scale;
    const Vector<Real> q = exp_of_nonpositive<Real>(r - of.reference_max) * of.reference_scale;
    const Vector<Real> u = (z - r) - of.log_sum_gap;
    const Vector<Real> u_squared = u * u;
    const Vector<Real> close = q * (u + excess_of_close<Real>(u, u_squared));
    return (u_squared < close_squared ? close : p - q) * g_k - p * g_m;
  }
  Real label_gradient() const { return g_k * of.label_gap + g_m * of.policy_rest; }
};

template <class T, class Kind, class Real = typename Storage<T>::Accumulator>
TDPO_INLINE void write_gradient(const RowBackward& row, const Kind& kind) {
  constexpr int64_t kLanes = Lanes<Real>::kCount;
  const T* policy = static_cast<const T*>(row.policy);
  const T* reference = static_cast<const T*>(row.reference);
  T* gradient = static_cast<T*>(row.gradient);
  Vector<Real> z{}, r{};
  int64_t at = 0;
  for (; at + kLanes <= row.vocabulary; at += kLanes) {
    if (Kind::kReadsPolicy) z = Storage<T>::load(policy + at);
    if (Kind::kReadsReference) r = Storage<T>::load(reference + at);
    Storage<T>::store(gradient + at, kind.gradient(z, r));
  }
  if (const int64_t left = row.vocabulary - at; left > 0) {
    if (Kind::kReadsPolicy) z = load_some(policy + at, left);
    if (Kind::kReadsReference) r = load_some(reference + at, left);
    store_some(gradient + at, kind.gradient(z, r), left);
  }
  if (row.label >= 0 && row.label < row.vocabulary) {
    store_some(gradient + row.label, broadcast(kind.label_gradient()), 1);
  }
}

template <class T>
void backward(const RowBackward& row) {
  using Real = typename Storage<T>::Accumulator;
  const Normalizers<Real>& of = *static_cast<const Normalizers<Real>*>(row.normalizers);
  const Real g_m = *static_cast<const Real*>(row.grad_policy_logp);
  const Real g_k = *static_cast<const Real*>(row.grad_forward_kl);
  if (g_m == Real(0) && g_k == Real(0)) {
    std::memset(row.gradient, 0, static_cast<size_t>(row.vocabulary) * sizeof(T));
  } else if (g_k == Real(0)) {
    write_gradient<T>(row, PolicyOnly<Real>{of, g_m});
  } else if (g_k == g_m) {
    write_gradient<T>(row, ReferenceOnly<Real>{of, g_m});
  } else {
    write_gradient<T>(row, Both<Real>(of, g_m, g_k));
  }
}

constexpr RowKernels row_kernels(const char* instruction_set) {
  return {instruction_set,
          {forward<float>, forward<BFloat16>, forward<Float16>, forward<double>},
          {backward<float>, backward<BFloat16>, backward<Float16>, backward<double>}};
}

}  // namespace
}  // namespace tdpo::cpu::TDPO_INSTRUCTION_SET
