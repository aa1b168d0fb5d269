// The record of vocabulary statistics that one warp keeps while a row goes by.
//
// All lanes share the base; each has sums of its own, which `collect` adds up. Per entry, with
// w = e^(r - reference_max) and d = z - r - centre, wanted are the sums of w, w d, w e^d and
// w (e^d - 1 - d). Vectors are taken in one of two ways, always the same for all lanes of the warp:
//
//   quick   for every gap between policy and reference. In units of log 2 an exponential is one
//           multiply-add and one result of the special-function unit:
//             w = 2^(r L - M), D = (z - r) L - C, e^d = 2^D
//             e^d - 1 - d: a polynomial where |D| is small, else (2^D - 1) - D ln 2
//   any     everything else, rare: infinities, logits so far apart that w may underflow where p
//   does
//           not, entries that exceed the base, a centre so large that z - r has lost its digits.
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

  // Entries may lie above the base as long as the sum of a lane's stays below this.
  static constexpr Real kHeadroom = 65536;
  // From this centre on z - r, rounded, loses digits of both. Their differences to the maxima keep
  // them: exact for the entries that matter, and at hand.
  static constexpr Real kLargeCentre = 8, kHugeCentre = 65536;
  // A centre that is off by less is kept.
  static constexpr Real kCentreOff = Real(0.125);
  static constexpr Real kPerGapUnit = Real(1 / kGapUnit);
  static constexpr Real kLowest =
      sizeof(Real) == 4 ? Real(-3.402823466e38) : Real(-1.7976931348623157e308);
  static constexpr float kLn2 = 0.693147182f;
  // Of D: the polynomial holds below the first. Above the second w may be 0 and w 2^D may not.
  static constexpr float kClose = 0.5f;
  static constexpr int kFarthest = 0x42680000;  // the bits of 58.0f

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

  // Vectors for which the base was made should come next. `long_row`: the quick way's rounding
  // errors average out.
  __device__ WarpStats(const Base<Real>& base, bool long_row)
      : stats(empty_stats<Real>()), reference_limit(kHeadroom), long_row(long_row) {
    set_base(base);
  }

  // Whether the quick way may be tried. float64 has no quick exponentials.
  __device__ __forceinline__ bool may_be_quick() const {
    return sizeof(Real) == 4 && base_is_quick;
  }

  // The quick way's sums of some vectors of each lane, and the largest D among them as the integer
  // of its bits: NaN is large.
  struct QuickSums {
    float reference = 0, gap = 0, policy = 0, excess = 0;
    int farthest = 0;
  };

  __device__ __forceinline__ void sum_quickly(const Pair<T>& vectors, QuickSums& sums) const {
    Values z, r;
    unpack(vectors, z, r);
    for (int i = 0; i < kPerVector; ++i) {
      const float w = exp2_of(fmaf(float(r[i]), kLog2E, -shift.reference));
      const float d = fmaf(float(z[i] - r[i]), kLog2E, -shift.centre);  // D
      const float power = exp2_of(d);
      const float close = (d * d) * excess_over_square_of_2(d), far = (power - 1) - d * kLn2;
      sums.reference += w;
      sums.gap += w * d;
      sums.policy += w * power;
      sums.excess += w * (fabs(d) < kClose ? close : far);
      sums.farthest = max(sums.farthest, bit_cast<int>(d));
    }
  }

  // False, and nothing added, if there is an entry that the quick way does not take, or if the base
  // should be looked at.
  __device__ __forceinline__ bool add_quickly(const QuickSums& sums) {
    const Real total = stats.reference_sum + Real(scale.reference * sums.reference);
    const bool near_enough = sums.farthest < kFarthest;
    const bool fits = near_enough && sums.gap > -1e30f && total <= reference_limit;
    if (!all_of_warp(fits)) return false;
    stats.reference_sum = total;
    stats.gap_sum += Real(scale.reference * (sums.gap * float(kLn2 / kGapUnit)));
    stats.policy_sum += Real(scale.policy * sums.policy);
    stats.excess_sum += Real(scale.excess * sums.excess);
    return true;
  }

  // One vector of each lane, any at all; `quickly`: by the quick way if it takes them.
  __device__ __forceinline__ void add(const Pair<T>& vectors, bool quickly) {
    QuickSums sums;
    quickly = quickly && may_be_quick();
    if (quickly && vectors.present) sum_quickly(vectors, sums);
    if (!quickly || !add_quickly(sums)) add_any(vectors);
  }

  // After vectors for which the base was made.
  __device__ void keep_base() {
    const Real sum = sum_lanes(stats.reference_sum);
    reference_limit = fmax(sum, 2 * stats.reference_sum);
  }

  // Rare: a handful of times in a row. Vectors for which the base is made should come next.
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
  // Half a vector at a time, which needs fewer registers. A half that has been added leaves nothing
  // in its place, so that the base is made from the rest.
  __device__ __forceinline__ void add_any(Pair<T> vectors) {
    if (!vectors.present) vectors = {Side<T>::nothing(), Side<T>::nothing(), true};
    bool base_is_right = false;
#pragma unroll 1
    for (int half = 0; half < 2;) {
      HalfValues z, r;
      Storage<T>::unpack({vectors.policy.word[0], vectors.policy.word[1]}, z);
      Storage<T>::unpack({vectors.reference.word[0], vectors.reference.word[1]}, r);
      const Sums sums = sums_of(z, r);
      const Real total = stats.reference_sum + sums.reference;
      // NaN is let through: looking again would not help.
      const bool fits = !(sums.policy > kHeadroom) && !(total > reference_limit);
      if (!base_is_right && !all_of_warp(fits)) {
        move_base(vectors);
        base_is_right = true;
        continue;
      }
      stats.policy_sum += sums.policy;
      stats.reference_sum = total;
      stats.gap_sum = sums.excluded ? -Real(INFINITY) : stats.gap_sum + sums.gap;
      stats.excess_sum += sums.excess;
      const Words policy = vectors.policy, reference = vectors.reference, none = Side<T>::nothing();
      vectors.policy = {{policy.word[2], policy.word[3], none.word[2], none.word[3]}};
      vectors.reference = {{reference.word[2], reference.word[3], none.word[2], none.word[3]}};
      ++half;
    }
    if (base_is_right) keep_base();
  }

  struct Sums {
    Real policy, reference, gap, excess;  // the gap in kGapUnit
    bool excluded;  // some z = -inf < r: the KL is infinite, also if w is too small to show it
  };

  VocabStats<Real> stats;
  Real reference_limit;  // of a lane's reference_sum; from there the base is looked at
  Real k;  // e^(reference_max + centre - policy_max); 0 while one of them is not known
  const bool long_row;
  bool base_is_quick;
  // For the quick path: M and C, and what its sums are multiplied by. M and C are rounded; the
  // scales put that back.
  struct {
    float reference, centre;
  } shift;
  struct {
    float reference, policy, excess;
  } scale;

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
    base_is_quick = long_row && k > Real(0) && fabs(base.centre) < kLargeCentre &&
                    fabs(base.reference_max) < kHugeCentre;
    const float top = float(base.reference_max), centre = float(base.centre), scale_k = float(k);
    shift = {top * kLog2E, centre * kLog2E};
    // 2^(what rounding has added): so small that its series ends after the first term.
    const float of_reference = fmaf(top, kLog2E, -shift.reference) * kLn2;
    const float of_centre = fmaf(centre, kLog2E, -shift.centre) * kLn2;
    scale.reference = 1 - of_reference;
    scale.excess = scale_k - scale_k * of_reference;
    scale.policy = scale_k - scale_k * (of_reference + of_centre);
  }

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

  __device__ __forceinline__ Sums sums_of(const HalfValues& z, const HalfValues& r) const {
    Sums sums = {0, 0, 0, 0, false};
    const Gaps gaps = this->gaps();
    for (int i = 0; i < kPerVector / 2; ++i) {
      const Real policy = z[i] - stats.base.policy_max, reference = r[i] - stats.base.reference_max;
      const Real p = exp_of(policy), w = exp_of(reference), linear = k * w;
      // Instead of an infinite gap, or NaN where both are -inf: where w = 0 any will do.
      const Real d = gaps.of(z[i], r[i], policy, reference);
      const Real gap = fmax(fmin(d, -kLowest), kLowest);
      const Real close = (linear * d * d) * excess_over_square(d),
                 far = p - (linear + linear * gap);
      sums.policy += p;
      sums.reference += w;
      sums.gap += w * (gap * kPerGapUnit);
      sums.excess += fabs(d) < Real(1) ? close : far;
      sums.excluded = sums.excluded || (z[i] == -Real(INFINITY) && r[i] > -Real(INFINITY));
    }
    return sums;
  }
};

}  // namespace tdpo::cuda
