// The record of vocabulary statistics that one warp keeps while a row goes by.
//
// All lanes share the base; each has sums of its own, which `collect` adds up. A vector takes one
// of three ways, always the same for all lanes of the warp:
//
//   close   every |z - r - c| < 1, and c small enough for z - r to have its digits. Then e^z =
//           k w (1 + d + excess) follows from one exponential and a polynomial, which has the
//           digits of small divergences.
//   far     the sums of two exponentials, and the excess as their difference. It is exact enough
//           if the excess so far is a good part of the mass so far.
//   mixed   otherwise, after the sums of the far way: entry by entry, as its own |d| asks for.
//
// The base is that of the first vectors. It moves where entries exceed it too far, and where a lane
// has come to as much of the reference's mass as the whole warp had when the centre was last looked
// at: then what the centre was made from may be next to nothing, and if it lies off, the divergence
// is the small difference of two large numbers. A centre that was right for 1/m of the mass costs
// at most a factor of about m in the divergence's rounding error, since gaps that differ between
// parts of the row are a divergence themselves.
#pragma once

#include "row_vectors.cuh"
#include "team.cuh"

namespace tdpo::cuda {

template <class T>
struct Pair {
  Words policy, reference;
  bool present;  // else the words mean nothing
};

template <class T>
class WarpStats {
  using Real = RealOf<T>;
  static constexpr int kPerVector = Storage<T>::kPerVector;
  using Values = Real[kPerVector];
  using HalfValues = Real[kPerVector / 2];

  // Entries may lie above the base as long as a vector's sum stays below this.
  static constexpr Real kHeadroom = 65536;
  // The excess may come from a difference of masses if it is at least this part of the mass.
  static constexpr Real kFarPart = Real(0.25);
  // From this centre on z - r, rounded, loses digits of both. Their differences to the maxima keep
  // them: exact for the entries that matter, and at hand.
  static constexpr Real kLargeCentre = 8, kHugeCentre = 65536;
  // A centre that is off by less is kept.
  static constexpr Real kCentreOff = Real(0.125);
  static constexpr Real kPerGapUnit = Real(1 / kGapUnit);
  static constexpr Real kLowest =
      sizeof(Real) == 4 ? Real(-3.402823466e38) : Real(-1.7976931348623157e308);

 public:
  // Vectors of each lane, taken together.
  struct Start {
    Base<Real> base;
    Two<Real> sums;  // relative to the base
  };

  // Scope is the team, or Team<1> for the warp alone.
  template <class Scope>
  static __device__ Start start_of(Pair<T> vectors) {
    if (!vectors.present) vectors.policy = vectors.reference = Side<T>::nothing();
    Values z, r;
    unpack(vectors, z, r);
    Two<Real> largest = {z[0], r[0]}, sum = {0, 0};
    for (int i = 1; i < kPerVector; ++i) largest = Larger()(largest, {z[i], r[i]});
    largest = Scope::largest(largest);
    for (int i = 0; i < kPerVector; ++i) {
      sum = Sum()(sum, {exp_of(z[i] - finite_or_zero(largest.policy)),
                        exp_of(r[i] - finite_or_zero(largest.reference))});
    }
    sum = Scope::sum(sum);
    const Real log_sums = log(sum.policy) - log(sum.reference);
    const Real gap = (largest.policy - largest.reference) + log_sums;
    return {{largest.policy, largest.reference, finite_or_zero(gap)}, sum};
  }

  explicit __device__ WarpStats(const Base<Real>& base)
      : stats(empty_stats<Real>()), reference_limit(Real(INFINITY)) {
    set_base(base);
  }

  // False if the base should be looked at: then move_base and another call are wanted for what is
  // left of the vectors. After that the base is right in any case (NaN exceeds every base).
  __device__ __forceinline__ bool add(Pair<T>& vectors, bool base_is_right) {
    Values z, r, d;
    unpack(vectors, z, r);
    bool close = vectors.present && k > Real(0) && fabs(stats.base.centre) < kLargeCentre;
    for (int i = 0; i < kPerVector; ++i) {
      d[i] = (z[i] - r[i]) - stats.base.centre;
      close = close && fabs(d[i]) < Real(1);
    }
    return (all_of_warp(close) && add_close(r, d)) || add_far_or_mixed(vectors, base_is_right);
  }

  // Rare: a handful of times in a row.
  __device__ void move_base(const Pair<T>& vectors) {
    const Start own = start_of<Team<1>>(vectors);
    const Two<Real> before = Team<1>::sum(Two<Real>{stats.policy_sum, stats.reference_sum});
    Base<Real> base = stats.base;
    if (own.base.policy_max > base.policy_max) base.policy_max = own.base.policy_max;
    if (own.base.reference_max > base.reference_max) base.reference_max = own.base.reference_max;
    const Two<Real> of_own = relative(own.sums, own.base, base);
    const Two<Real> sums = Sum()(relative(before, stats.base, base), of_own);
    // lse(z) - lse(r) of all that is known: the centre from where E[e^d] = 1.
    const Real centre =
        (base.policy_max - base.reference_max) + (log(sums.policy) - log(sums.reference));
    const bool known = centre - centre == Real(0);
    if (known && !(fabs(centre - base.centre) <= kCentreOff)) base.centre = centre;
    stats = rebase(stats, base);
    set_base(base);
    reference_limit = Real(INFINITY);
  }

  // After vectors for which the base was made.
  __device__ void keep_base() {
    const Real sum = sum_lanes(stats.reference_sum);
    reference_limit = fmax(sum, 2 * stats.reference_sum);
  }

  // The sum over the lanes, in each of them.
  __device__ VocabStats<Real> collect() const {
    VocabStats<Real> all = stats;
    all.policy_sum = sum_lanes(stats.policy_sum);
    all.reference_sum = sum_lanes(stats.reference_sum);
    all.gap_sum = sum_lanes(stats.gap_sum);
    all.excess_sum = sum_lanes(stats.excess_sum);
    return all;
  }

 private:
  VocabStats<Real> stats;
  Real reference_limit;  // of a lane's reference_sum; from there the base is looked at
  Real k;  // e^(reference_max + centre - policy_max); 0 while one of them is not known

  static __device__ Two<Real> relative(Two<Real> sums, const Base<Real>& from,
                                       const Base<Real>& to) {
    return {sums.policy * relative_scale(from.policy_max, to.policy_max),
            sums.reference * relative_scale(from.reference_max, to.reference_max)};
  }

  static __device__ __forceinline__ void unpack(const Pair<T>& vectors, Values& z, Values& r) {
    Storage<T>::unpack(vectors.policy.word, z);
    Storage<T>::unpack(vectors.reference.word, r);
  }

  // Where there is no finite entry yet the base is the lowest number: anything exceeds it by more
  // than the headroom.
  __device__ void set_base(const Base<Real>& base) {
    stats.base = {fmax(base.policy_max, kLowest), fmax(base.reference_max, kLowest), base.centre};
    k = finite_or_zero(linear_scale(base.reference_max, base.centre, base.policy_max));
  }

  __device__ __forceinline__ bool within_limit(Real reference_sum) const {
    return !(reference_sum > reference_limit);  // NaN is let through: looking again would not help
  }

  // False, and nothing added, if the base should be looked at.
  __device__ __forceinline__ bool add_close(const Values& r, const Values& d) {
    Real reference_sum = 0, gap_sum = 0, excess_sum = 0;
    for (int i = 0; i < kPerVector; ++i) {
      const Real w = exp_of(r[i] - stats.base.reference_max);
      const Real weighted_gap = w * d[i];
      reference_sum += w;
      gap_sum += weighted_gap;
      excess_sum += (weighted_gap * d[i]) * excess_over_square(d[i]);
    }
    const Real reference_total = stats.reference_sum + reference_sum;
    if (!all_of_warp(reference_sum <= kHeadroom && within_limit(reference_total))) return false;
    stats.reference_sum = reference_total;
    stats.gap_sum += gap_sum * kPerGapUnit;
    stats.policy_sum += k * ((reference_sum + gap_sum) + excess_sum);
    stats.excess_sum += k * excess_sum;
    return true;
  }

  struct FarSums {
    Real policy, reference, gap;  // the last in kGapUnit
    bool excluded;  // some z = -inf < r: the KL is infinite, also if w is too small to show it
  };

  // How gaps are taken from the centre: that of z and r, or that of their differences to the
  // maxima.
  struct Gaps {
    bool of_differences;
    Real centre;
    __device__ __forceinline__ Real of(Real z, Real r, Real policy, Real reference) const {
      return (of_differences ? policy - reference : z - r) - centre;
    }
  };

  __device__ __forceinline__ Gaps gaps() const {
    const Base<Real>& base = stats.base;
    const Real size = fabs(base.centre);
    if (!(size >= kLargeCentre && size < kHugeCentre)) return {false, base.centre};
    const TwoSum<Real> apart = two_sum(base.policy_max, -base.reference_max);  // near the centre
    return {true, (base.centre - apart.rounded) - apart.lost};
  }
  // Instead of an infinite gap, or NaN where both are -inf: where w = 0 any will do.
  static __device__ __forceinline__ Real finite_gap(Real d) {
    return fmax(fmin(d, -kLowest), kLowest);
  }

  __device__ __forceinline__ FarSums far_sums(const HalfValues& z, const HalfValues& r) const {
    FarSums sums = {0, 0, 0, false};
    const Gaps gaps = this->gaps();
    for (int i = 0; i < kPerVector / 2; ++i) {
      const Real policy = z[i] - stats.base.policy_max, reference = r[i] - stats.base.reference_max;
      const Real w = exp_of(reference), d = gaps.of(z[i], r[i], policy, reference);
      sums.policy += exp_of(policy);
      sums.reference += w;
      sums.gap += w * (finite_gap(d) * kPerGapUnit);
      sums.excluded = sums.excluded || d == -Real(INFINITY);
    }
    return sums;
  }

  __device__ __forceinline__ Real mixed_excess(const HalfValues& z, const HalfValues& r) const {
    Real sum = 0;
    const Gaps gaps = this->gaps();
    for (int i = 0; i < kPerVector / 2; ++i) {
      const Real policy = z[i] - stats.base.policy_max, reference = r[i] - stats.base.reference_max;
      const Real linear = k * exp_of(reference), d = gaps.of(z[i], r[i], policy, reference);
      const Real close = (linear * d * d) * excess_over_square(d);
      const Real far = exp_of(policy) - (linear + linear * finite_gap(d));
      sum += fabs(d) < Real(1) ? close : far;
    }
    return sum;
  }

  // Half a vector at a time: more would not fit in the registers beside the next vector. A half
  // that has been added leaves nothing in its place, so that the rest may be added later.
  __device__ __forceinline__ bool add_far_or_mixed(Pair<T>& vectors, bool base_is_right) {
    if (!vectors.present) vectors = {Side<T>::nothing(), Side<T>::nothing(), true};
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      HalfValues z, r;
      Storage<T>::unpack({vectors.policy.word[0], vectors.policy.word[1]}, z);
      Storage<T>::unpack({vectors.reference.word[0], vectors.reference.word[1]}, r);
      const FarSums sums = far_sums(z, r);
      const Real reference_total = stats.reference_sum + sums.reference;
      const bool fits =
          sums.policy <= kHeadroom && sums.reference <= kHeadroom && within_limit(reference_total);
      if (!base_is_right && !all_of_warp(fits)) return false;
      Real excess = sums.policy - k * (sums.reference + sums.gap * Real(kGapUnit));
      stats.policy_sum += sums.policy;
      if (!all_of_warp(stats.excess_sum + excess >= kFarPart * stats.policy_sum)) {
        excess = mixed_excess(z, r);
      }
      stats.reference_sum = reference_total;
      stats.gap_sum += sums.gap;
      stats.excess_sum += excess;
      if (sums.excluded) stats.gap_sum = -Real(INFINITY);
      const Words policy = vectors.policy, reference = vectors.reference, none = Side<T>::nothing();
      vectors.policy = {{policy.word[2], policy.word[3], none.word[2], none.word[3]}};
      vectors.reference = {{reference.word[2], reference.word[3], none.word[2], none.word[3]}};
    }
    return true;
  }
};

}  // namespace tdpo::cuda
