// The record of a row's entries while they go by (VocabStats, csrc/vocab_stats.h), kept by one
// warp.
//
// All lanes share the base. Each lane has sums of its own, which `record` adds up at the end. With
// w = e^(r - reference_max) and d = z - r - centre an entry adds w, w d, w e^d and w (e^d - 1 - d),
// the last two times k, and with kDivergences what DivergenceSums are made of. There are two paths,
// and all lanes of a warp take the same one:
//
//   quick   gaps of any size. In units of ln 2 an exponential is one multiply-add and one result of
//           the special-function unit. With L = log2(e), M = reference_max L and C = centre L:
//             w = 2^(r L - M), D = (z - r) L - C, e^d = 2^D
//             e^d - 1 - d = a polynomial where |D| is small, else (2^D - 1) - D ln 2
//           For DivergenceSums it adds w e^d D, w (r L - M) and w e^d (r L - M). There e^d - 1
//           comes from the polynomial where |D| is small.
//   mixed   everything else, which is rare: infinities; logits so far apart that w may underflow
//           where w e^d does not; entries far above the base; a centre so large that z - r has lost
//           its digits. Each entry chooses, as on the CPU's path of this name.
//
// The base is made from the first vectors. It moves in two cases:
//
//   - An entry exceeds it by more than the headroom.
//   - A lane alone has come to as much of the reference's mass as the whole warp had when the
//     base was last looked at (reference_limit). The entries that the centre came from may then
//     be a small part of the mass; if their gaps are not typical, KL is a small difference of two
//     large numbers.
//
// Between two such looks the centre comes from at least 1/m of the mass, with an m of 64 or less.
// That costs the divergence at most a factor of about m in rounding error: if the rest of the row
// has other gaps, then the difference of the gaps is itself a divergence, and KL is not small.
#pragma once

#include "row_vectors.cuh"
#include "team.cuh"

namespace tdpo::cuda {

// A vector of each side.
template <class T>
struct SideVectors {
  Words policy, reference;
  bool present;  // whether there is one; if not, the words have no meaning
};

template <class T, bool kDivergences>
class RunningStats {
  using Real = RealOf<T>;
  static constexpr int kPerVector = Storage<T>::kPerVector;
  using Values = Real[kPerVector];
  using HalfValues = Real[kPerVector / 2];

  // Entries may lie above the base as long as the sum of one lane's entries stays below this.
  static constexpr Real kHeadroom = 65536;
  // At a centre of size kLargeCentre or more, rounding z - r loses digits of both. The mixed path
  // then takes the gap from z - policy_max and r - reference_max, which are exact for every entry
  // that has mass. At kHugeCentre or more it does not, and the digits are lost.
  static constexpr Real kLargeCentre = 8, kHugeCentre = 65536;
  // The centre moves only if it is off by more than this.
  static constexpr Real kCentreOff = Real(0.125);
  static constexpr Real kPerGapUnit = Real(1 / kGapUnit);
  static constexpr Real kLowest =
      sizeof(Real) == 4 ? Real(-3.402823466e38) : Real(-1.7976931348623157e308);
  static constexpr float kLn2 = 0.693147182f;
  // The quick path's polynomial holds for |D| < kClose.
  static constexpr float kClose = 0.5f;
  // The bits of 58.0f. For D from there on, w may underflow to 0 where w 2^D does not.
  static constexpr int kFarthest = 0x42680000;

 public:
  // The base that some vectors have by themselves, and their sums relative to it.
  struct OwnBase {
    Base<Real> base;
    Sides<Real> sums;
  };

  // The same for all lanes: of one vector of each thread of the team, or with Team<1> of the warp.
  template <class Scope>
  static __device__ OwnBase own_base_of(SideVectors<T> vectors) {
    if (!vectors.present) vectors.policy = vectors.reference = Side<T>::without_mass();
    Values z, r;
    unpack(vectors, z, r);
    Sides<Real> largest = {z[0], r[0]}, sum = {0, 0};
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

  // The vectors that the base was made from should be added first. `long_row`: whether the row is
  // so long that the rounding errors of the quick path average out.
  __device__ RunningStats(const Base<Real>& base, bool long_row)
      : stats(empty_stats<Real>()), more(), reference_limit(kHeadroom), long_row(long_row) {
    set_base(base);
  }

  // Whether the quick path may be tried. It has no exponentials for float64.
  __device__ __forceinline__ bool may_be_quick() const {
    return sizeof(Real) == 4 && base_is_quick;
  }

  // A lane's sums on the quick path, and the bits of its largest D as an integer. The bits of NaN
  // are larger than those of any number, and those of a negative D are negative.
  struct QuickSums {
    float reference = 0, gap = 0, policy = 0, excess = 0;
    int farthest = 0;
    float policy_gap = 0, policy_log = 0, reference_log = 0;  // with kDivergences
  };

  __device__ __forceinline__ void sum_quickly(const SideVectors<T>& vectors,
                                              QuickSums& sums) const {
    Values z, r;
    unpack(vectors, z, r);
    for (int i = 0; i < kPerVector; ++i) {
      const float exponent = fmaf(float(r[i]), kLog2E, -shift.reference);
      const float w = exp2_of(exponent);
      const float d = fmaf(float(z[i] - r[i]), kLog2E, -shift.centre);  // D
      const float power = exp2_of(d);
      const float close = (d * d) * excess_over_square_of_2(d), far = (power - 1) - d * kLn2;
      const bool is_close = fabs(d) < kClose;
      sums.reference += w;
      sums.gap += w * d;
      sums.excess += w * (is_close ? close : far);
      sums.farthest = max(sums.farthest, bit_cast<int>(d));
      if constexpr (kDivergences) {
        // `power` is off by up to 2^-22 of itself, and by almost as much for all entries of close
        // rows. That part of sum w d, which is large where the centre is off, would be the error of
        // sum m d - sum w d, from which the reverse KL is made.
        const float growth = is_close ? fmaf(d, kLn2, close) : power - 1;  // e^d - 1
        const float m = fmaf(w, growth, w);
        sums.policy += m;
        sums.policy_gap += m * d;
        sums.policy_log += m * exponent;
        sums.reference_log += w * exponent;
      } else {
        sums.policy += w * power;
      }
    }
  }

  // Returns false and adds nothing if a lane has an entry that the quick path cannot take, or if a
  // lane's sum has reached reference_limit: add() the vectors one by one then.
  __device__ __forceinline__ bool add_quickly(const QuickSums& sums) {
    const Real total =
        multiply_add(Real(scale.reference), Real(sums.reference), stats.reference_sum);
    const bool near_enough = sums.farthest < kFarthest;
    bool fits = near_enough && sums.gap > -1e30f && total <= reference_limit;
    if (kDivergences) fits = fits && sums.reference_log > -1e30f;  // NaN where r L is -inf
    if (!all_of_warp(fits)) return false;
    stats.reference_sum = total;
    stats.gap_sum += Real(scale.reference * (sums.gap * float(kLn2 / kGapUnit)));
    stats.policy_sum = multiply_add(Real(scale.policy), Real(sums.policy), stats.policy_sum);
    stats.excess_sum += Real(scale.excess * sums.excess);
    if constexpr (kDivergences) add_divergences(sums);
    return true;
  }

  // One vector of each lane, with any entries. `quickly`: whether to try the quick path first.
  __device__ __forceinline__ void add(const SideVectors<T>& vectors, bool quickly) {
    QuickSums sums;
    quickly = quickly && may_be_quick();
    if (quickly && vectors.present) sum_quickly(vectors, sums);
    if (!quickly || !add_quickly(sums)) add_mixed(vectors);
  }

  // Sets reference_limit anew. To be called when the vectors that the base was made from are added.
  __device__ void keep_base() {
    const Real sum = sum_lanes(stats.reference_sum);
    reference_limit = fmax(sum, 2 * stats.reference_sum);
  }

  // Moves the base to that of all sums so far and of these vectors, which should be added next. It
  // happens a handful of times in a row.
  __device__ void move_base(const SideVectors<T>& vectors) {
    const OwnBase own = own_base_of<Team<1>>(vectors);
    const Sides<Real> before = Team<1>::sum(Sides<Real>{stats.policy_sum, stats.reference_sum});
    Base<Real> base = stats.base;
    if (own.base.policy_max > base.policy_max) base.policy_max = own.base.policy_max;
    if (own.base.reference_max > base.reference_max) base.reference_max = own.base.reference_max;
    const Sides<Real> of_own = relative(own.sums, own.base, base);
    const Sides<Real> sums = Sum()(relative(before, stats.base, base), of_own);
    // lse(z) - lse(r) of all these sums: from there E[e^d] = 1.
    const Real centre =
        (base.policy_max - base.reference_max) + (log(sums.policy) - log(sums.reference));
    const bool known = centre - centre == Real(0);
    if (known && !(fabs(centre - base.centre) <= kCentreOff)) base.centre = centre;
    if constexpr (kDivergences) more = rebase(more, stats, base);
    stats = rebase(stats, base);
    set_base(base);
  }

  // The record of the whole warp: sums over its lanes, the same in each of them.
  __device__ StatsOf<Real, kDivergences> record() const {
    VocabStats<Real> all = stats;
    all.policy_sum = sum_lanes(stats.policy_sum);
    all.reference_sum = sum_lanes(stats.reference_sum);
    all.gap_sum = sum_lanes(stats.gap_sum);
    all.excess_sum = sum_lanes(stats.excess_sum);
    if constexpr (kDivergences) {
      return {all,
              {sum_lanes(more.policy_gap_sum), sum_lanes(more.reverse_excess_sum),
               sum_lanes(more.policy_log_sum), sum_lanes(more.reference_log_sum)}};
    } else {
      return all;
    }
  }

 private:
  // What a lane's sums on the quick path give DivergenceSums. The rounding of M and C is undone as
  // in `scale`; z - policy_max is r - reference_max + d + log k. The sums of both sides' logits are
  // written alike, so that entropies of equal rows have the same bits.
  __device__ __forceinline__ void add_divergences(const QuickSums& sums) {
    const float gaps = scale.excess * kLn2 * sums.policy_gap;
    const float difference = kLn2 * (sums.policy_gap - sums.gap);  // sum w (e^d - 1) d
    const float reference = scale.reference * sums.reference, policy = scale.policy * sums.policy;
    more.policy_gap_sum += Real(gaps * float(1 / kGapUnit));
    more.reverse_excess_sum += Real(scale.excess * (difference - sums.excess));
    const float of_policy = multiply_add(scale.policy * kLn2, sums.policy_log, gaps);
    const float of_reference = multiply_add(scale.reference * kLn2, sums.reference_log, 0.0f);
    more.policy_log_sum += Real(multiply_add(above.policy, policy, of_policy));
    more.reference_log_sum += Real(multiply_add(above.reference, reference, of_reference));
  }

  // Adds half a vector at a time, which needs fewer registers. Then the other half moves to the
  // front, and -inf, which has no mass, takes its place: so move_base makes the base from what is
  // not added yet.
  __device__ __forceinline__ void add_mixed(SideVectors<T> vectors) {
    if (!vectors.present) vectors = {Side<T>::without_mass(), Side<T>::without_mass(), true};
    bool base_is_right = false;
#pragma unroll 1
    for (int half = 0; half < 2;) {
      HalfValues z, r;
      Storage<T>::unpack({vectors.policy.word[0], vectors.policy.word[1]}, z);
      Storage<T>::unpack({vectors.reference.word[0], vectors.reference.word[1]}, r);
      const Sums sums = sums_of(z, r);
      const Real total = stats.reference_sum + sums.reference;
      // Comparisons with NaN are false, so NaN fits: moving the base would not help.
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
      if constexpr (kDivergences) {
        more.policy_gap_sum =
            sums.reference_excluded ? Real(INFINITY) : more.policy_gap_sum + sums.policy_gap;
        more.reverse_excess_sum += sums.reverse_excess;
        more.policy_log_sum += sums.policy_log;
        more.reference_log_sum += sums.reference_log;
      }
      const Words policy = vectors.policy, reference = vectors.reference,
                  none = Side<T>::without_mass();
      vectors.policy = {{policy.word[2], policy.word[3], none.word[2], none.word[3]}};
      vectors.reference = {{reference.word[2], reference.word[3], none.word[2], none.word[3]}};
      ++half;
    }
    if (base_is_right) keep_base();
  }

  struct Sums {
    Real policy, reference, gap, excess;  // the gap in units of kGapUnit
    bool excluded;  // whether some z = -inf < r: the KL is infinite, also where w has become 0
    // With kDivergences; the last says whether some r = -inf < z.
    Real policy_gap, reverse_excess, policy_log, reference_log;
    bool reference_excluded;
  };

  VocabStats<Real> stats;
  DivergenceSums<Real> more;  // only with kDivergences
  Real reference_limit;       // when a lane's reference_sum reaches this, the base is looked at
  Real k;                     // e^(reference_max + centre - policy_max); 0 while one is not known
  const bool long_row;
  bool base_is_quick;
  // For the quick path: M and C, which are rounded, and the factors of its sums, which undo that
  // rounding.
  struct {
    float reference, centre;
  } shift;
  struct {
    float reference, policy, excess;
  } scale;
  // With kDivergences, in nats: r - reference_max is (r L - M) ln 2 + above.reference, and z -
  // policy_max is (r L - M + D) ln 2 + above.policy.
  struct {
    float policy, reference;
  } above;

  static __device__ Sides<Real> relative(Sides<Real> sums, const Base<Real>& from,
                                         const Base<Real>& to) {
    return {sums.policy * relative_scale(from.policy_max, to.policy_max),
            sums.reference * relative_scale(from.reference_max, to.reference_max)};
  }

  static __device__ __forceinline__ void unpack(const SideVectors<T>& vectors, Values& z,
                                                Values& r) {
    Storage<T>::unpack(vectors.policy.word, z);
    Storage<T>::unpack(vectors.reference.word, r);
  }

  // While a side has no finite entry its maximum is the lowest number: every finite entry then
  // exceeds it by more than the headroom.
  __device__ void set_base(const Base<Real>& base) {
    stats.base = {fmax(base.policy_max, kLowest), fmax(base.reference_max, kLowest), base.centre};
    k = finite_or_zero(linear_scale(base.reference_max, base.centre, base.policy_max));
    base_is_quick = long_row && k > Real(0) && fabs(base.centre) < kLargeCentre &&
                    fabs(base.reference_max) < kHugeCentre;
    const float top = float(base.reference_max), centre = float(base.centre), scale_k = float(k);
    shift = {top * kLog2E, centre * kLog2E};
    // What the rounding of M and C has added, in nats: so small that e^x is 1 + x.
    const float of_reference = fmaf(top, kLog2E, -shift.reference) * kLn2;
    const float of_centre = fmaf(centre, kLog2E, -shift.centre) * kLn2;
    scale.reference = 1 - of_reference;
    scale.excess = scale_k - scale_k * of_reference;
    scale.policy = scale_k - scale_k * (of_reference + of_centre);
    if constexpr (kDivergences) {
      const TwoSum<Real> apart = two_sum(base.reference_max, -base.policy_max);
      const TwoSum<Real> sum = two_sum(apart.rounded, base.centre);
      const Real log_k = sum.rounded + (apart.lost + sum.lost);
      above = {float(log_k) - (of_reference + of_centre), -of_reference};
    }
  }

  // How the mixed path takes a gap: from z - r, or from z - policy_max and r - reference_max (see
  // kLargeCentre). `centre` is relative to that.
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
    Sums sums = {};
    const Gaps gaps = this->gaps();
    for (int i = 0; i < kPerVector / 2; ++i) {
      const Real policy = z[i] - stats.base.policy_max, reference = r[i] - stats.base.reference_max;
      const Real p = exp_of(policy), w = exp_of(reference), linear = k * w;
      // The gap as a finite number, also where it is infinite, or NaN because both are -inf: w is 0
      // there, or the KL infinite.
      const Real d = gaps.of(z[i], r[i], policy, reference);
      const Real gap = fmax(fmin(d, -kLowest), kLowest);
      const Real close = (linear * d * d) * excess_over_square(d),
                 far = p - (linear + linear * gap);
      sums.policy += p;
      sums.reference += w;
      sums.gap += w * (gap * kPerGapUnit);
      sums.excess += fabs(d) < Real(1) ? close : far;
      sums.excluded = sums.excluded || (z[i] == -Real(INFINITY) && r[i] > -Real(INFINITY));
      if constexpr (kDivergences) {
        const Real policy_gap = p == Real(0) ? Real(0) : gap;
        sums.policy_gap += p * (policy_gap * kPerGapUnit);
        sums.reverse_excess +=
            fabs(d) < Real(1) ? linear * d * d + close * (d - 1) : linear - p * (1 - policy_gap);
        sums.policy_log += p == Real(0) ? Real(0) : p * policy;
        sums.reference_log += w == Real(0) ? Real(0) : w * reference;
        sums.reference_excluded =
            sums.reference_excluded || (r[i] == -Real(INFINITY) && z[i] > -Real(INFINITY));
      }
    }
    return sums;
  }
};

}  // namespace tdpo::cuda
