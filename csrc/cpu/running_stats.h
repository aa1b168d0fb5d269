// The record of a row's entries while they go by (VocabStats, csrc/vocab_stats.h).
//
// With w = e^(r - reference_max), d = z - r - c and k = e^(reference_max + c - policy_max), every
// path adds the sums of m = e^(z - policy_max), w, w d and the excess k w (e^d - 1 - d), and with
// kDivergences those of DivergenceSums.
//
// The three paths. A block of 1024 entries takes one of them:
//
//   close   all |d| are small. One exponential, w, and a polynomial for (e^d - 1 - d) / d^2. The
//           excess has all its digits, however close policy and reference are, and
//           e^(z - policy_max) = k w (1 + d) + excess. The reverse excess, of 1 + e^d (d - 1), is
//           d^2 + (d - 1) (e^d - 1 - d), and m (z - policy_max) comes from m (r - reference_max).
//   far     the excess so far is a good part of the mass so far. Two exponentials, and the excess
//           as a difference, e^(z - policy_max) - k w (1 + d), which keeps enough digits then. So
//           does the reverse excess, k w - m (1 - d): |d| is below 90, and the terms of the reverse
//           excess are at least as many times smaller than those of the excess.
//   mixed   anything else: -inf, entries far above or below the base, a large centre. Two
//           exponentials and the polynomial, and each entry chooses between the two excesses.
//
// A block tries the far path if the sums so far allow it, then the close path. Both use
// exponentials that hold in a range around the base. A block on the far path that has an entry out
// of range, or too little excess, adds nothing and goes on to the close path. A group of 64 entries
// on the close path that has a large |d|, or an entry out of range, adds nothing and goes by on the
// mixed path.
//
// The base comes from a row's first 128 entries. Its maxima move only if entries exceed them by
// more than kHeadroom, so no pass looks for the maximum. Its centre moves with them where it has to
// (raise_base), and where sums with a good part of the mass show that it is off (recentre).
#pragma once

#include <cmath>

#include "../vocab_stats.h"
#include "simd.h"

namespace tdpo::cpu::TDPO_INSTRUCTION_SET {
namespace {

// Entries of a block. Both sides of it stay in the L1 cache, and a lane's float32 sum has at most
// 256 terms before it joins the record, which is kept in double.
constexpr int64_t kBlock = 1024;
// A row's first base is made from so many entries.
constexpr int64_t kSample = 128;

template <class Real>
struct Extremes {
  Real policy_max, reference_max, policy_min, reference_min;
};

template <class T, class Real = RealOf<T>>
Extremes<Real> extremes_of(const T* policy, const T* reference, int64_t count) {
  Vector<Real> policy_max = broadcast(-Real(INFINITY)), reference_max = policy_max;
  Vector<Real> policy_min = broadcast(Real(INFINITY)), reference_min = policy_min;
  for_each_vector(policy, reference, count, [&](Vector<Real> z, Vector<Real> r) {
    policy_max = max_keeping_nan(policy_max, z);
    reference_max = max_keeping_nan(reference_max, r);
    policy_min = policy_min < z ? policy_min : z;
    reference_min = reference_min < r ? reference_min : r;
  });
  return {max_of_lanes<Real>(policy_max), max_of_lanes<Real>(reference_max),
          -max_of_lanes<Real>(-policy_min), -max_of_lanes<Real>(-reference_min)};
}

// lse(z) - lse(r) of a few entries.
template <class T, class Real>
Real centre_of(const T* policy, const T* reference, int64_t count, const Extremes<Real>& extremes) {
  const Real policy_max = finite_or_zero(extremes.policy_max);
  const Real reference_max = finite_or_zero(extremes.reference_max);
  Vector<Real> policy_sum{}, reference_sum{};
  for_each_vector(policy, reference, count, [&](Vector<Real> z, Vector<Real> r) {
    policy_sum += exp_of<Real>(z - policy_max);
    reference_sum += exp_of<Real>(r - reference_max);
  });
  const double ratio = sum_of_lanes<Real>(policy_sum) / sum_of_lanes<Real>(reference_sum);
  return finite_or_zero((extremes.policy_max - extremes.reference_max) + Real(std::log(ratio)));
}

// Whether some logit of one side is -inf where the other's is not. The padding of the last vector
// is -inf on both sides.
template <class T, class Real = RealOf<T>>
bool excludes_an_entry(const T* side, const T* other, int64_t count) {
  typename Lanes<Real>::Mask found{};
  for_each_vector(side, other, count, [&](Vector<Real> x, Vector<Real> y) {
    found |= (x == -Real(INFINITY)) & (y > -Real(INFINITY));
  });
  return any_bit(found);
}

template <class T, bool kDivergences>
class RunningStats {
  using Real = RealOf<T>;
  using C = ExpConstants<Real>;

  // An entry may lie this far above the base: exp_in_range still holds there.
  static constexpr Real kHeadroom = 10;
  // While |maximum| is below this, the rounding constant that exp_in_range gets for it is exact.
  // The comparison is false for infinity and NaN as well.
  static constexpr double kLargestBase = kExactSteps<Real>;
  // The far path is exact enough if the excess, less what an inaccurate centre contributes to it,
  // is at least this part of the mass.
  static constexpr double kFarPart = 1.0 / 12;
  // At a centre of this size or more, rounding z - r loses digits of both. The mixed path then
  // subtracts a whole number near the centre from the larger side first, which is exact for every
  // entry that has mass.
  static constexpr Real kLargeCentre = 8;
  // After a block in which most groups needed the mixed path, so many blocks take it at once.
  static constexpr int kBlocksOnMixedPath = 8;

 public:
  explicit RunningStats(const StatsOf<Real, kDivergences>& record) {
    if constexpr (kDivergences) {
      stats = converted<double>(record.forward);
      more = converted<double>(record.more);
    } else {
      stats = converted<double>(record);
    }
    set_base();
  }

  StatsOf<Real, kDivergences> record() const {
    if constexpr (kDivergences) {
      return {converted<Real>(stats), converted<Real>(more)};
    } else {
      return converted<Real>(stats);
    }
  }

  void add(const T* policy, const T* reference, int64_t count) {
    int64_t here = kBlock;
    if (!base_is_quick) {  // the start of a row: its first entries make the base
      here = kSample;
      raise_base(policy, reference, count < kSample ? count : kSample);
    }
    for (int64_t at = 0; at < count; at += here, here = kBlock) {
      const int64_t left = count - at;
      if (left < here) here = left;
      const int64_t whole = here - here % kGroup;
      add_block(policy + at, reference + at, whole);
      if (here > whole) add_mixed(policy + at + whole, reference + at + whole, here - whole);
    }
  }

 private:
  VocabStats<double> stats;
  DivergenceSums<double> more = {};  // only with kDivergences
  // The base as the vectors need it; 0 where a side has no finite maximum yet.
  Real policy_base, reference_base, centre;
  double k;  // e^(reference_max + centre - policy_max); 0 where there is none
  // For exp_in_range: a rounding constant for each side, made from its maximum rounded to a
  // multiple of ln 2. The scales, e^(rounded maximum - maximum), correct the sums for that
  // rounding.
  Real policy_rounder, reference_rounder;
  double policy_scale, reference_scale;
  bool base_is_quick;  // whether these hold for the base; without it they are of an earlier one
  int blocks_on_mixed_path = 0;

  template <class To, class From>
  static VocabStats<To> converted(const VocabStats<From>& x) {
    return {{To(x.base.policy_max), To(x.base.reference_max), To(x.base.centre)},
            To(x.policy_sum),
            To(x.reference_sum),
            To(x.gap_sum),
            To(x.excess_sum)};
  }

  template <class To, class From>
  static DivergenceSums<To> converted(const DivergenceSums<From>& x) {
    return {To(x.policy_gap_sum), To(x.reverse_excess_sum), To(x.policy_log_sum),
            To(x.reference_log_sum)};
  }

  void set_base() {
    const Base<double>& base = stats.base;
    policy_base = Real(finite_or_zero(base.policy_max));
    reference_base = Real(finite_or_zero(base.reference_max));
    centre = Real(base.centre);
    const double scale = linear_scale(base.reference_max, base.centre, base.policy_max);
    k = finite_or_zero(Real(scale)) == 0 ? 0 : scale;
    const bool in_reach =
        std::fabs(base.policy_max) < kLargestBase && std::fabs(base.reference_max) < kLargestBase;
    base_is_quick = in_reach && k > 0;
    if (!base_is_quick) return;
    const Steps<Real> policy(policy_base), reference(reference_base);
    policy_rounder = policy.rounder(C::kCheckedBias);
    reference_rounder = reference.rounder(C::kCheckedBias);
    policy_scale = std::exp(policy.nats() - base.policy_max);
    reference_scale = std::exp(reference.nats() - base.reference_max);
  }

  void move_base(const Base<double>& base) {
    if (kDivergences) more = rebase(more, stats, base);
    stats = rebase(stats, base);
    set_base();
  }

  // Raises the base if entries lie more than kHeadroom above it.
  void raise_base(const T* policy, const T* reference, int64_t count) {
    raise_base(policy, reference, count, extremes_of(policy, reference, count));
  }

  void raise_base(const T* policy, const T* reference, int64_t count,
                  const Extremes<Real>& extremes) {
    Base<double> base = stats.base;
    const bool raise_policy = extremes.policy_max > base.policy_max + kHeadroom;
    const bool raise_reference = extremes.reference_max > base.reference_max + kHeadroom;
    if (!raise_policy && !raise_reference) return;
    if (extremes.policy_max > base.policy_max) base.policy_max = extremes.policy_max;
    const bool higher = extremes.reference_max > base.reference_max;
    if (higher) base.reference_max = extremes.reference_max;
    // Compute the centre anew if the reference's maximum rose, or if the policy's rose so far that
    // k underflows to 0: gaps from the old centre might overflow.
    if (higher || linear_scale(base.reference_max, base.centre, base.policy_max) == 0) {
      base.centre = centre_of(policy, reference, count, extremes);
    }
    move_base(base);
  }

  // Whether the close and far paths may be tried from here.
  bool quick_paths_hold() const { return base_is_quick && std::fabs(centre) < kLargeCentre; }

  void add_block(const T* policy, const T* reference, int64_t count) {
    if (blocks_on_mixed_path > 0 || !quick_paths_hold()) {
      if (blocks_on_mixed_path > 0) --blocks_on_mixed_path;
      return add_mixed(policy, reference, count);
    }
    const bool try_far = far_is_exact(0, 0, 0);
    if (try_far && add_far(policy, reference, count)) return;
    if (add_close(policy, reference, count)) return;
    if (try_far || !far_is_exact(0, 0, 0)) blocks_on_mixed_path = kBlocksOnMixedPath;
  }

  // Whether the far path keeps enough digits, with these sums added to those so far. The excess,
  // less what an inaccurate centre contributes to it, must be at least kFarPart of the mass. With
  // x = E[e^d] - 1 the centre is off by log(1 + x) and contributes about x^2 / 2.
  bool far_is_exact(double policy_sum, double reference_sum, double excess_sum) const {
    const double p = stats.policy_sum + policy_sum, w = k * (stats.reference_sum + reference_sum);
    const double off = p - w;
    return p > 0 && (stats.excess_sum + excess_sum) * w - off * off / 2 >= kFarPart * p * w;
  }

  // Returns false and adds nothing if the excess is too small or an entry is out of range.
  bool add_far(const T* policy, const T* reference, int64_t count) {
    Vector<Real> policy_sum{}, reference_sum{}, gap_sum{};
    Vector<Real> policy_gap{}, policy_log{}, reference_log{};
    Bits<Real> seen{};
    for (int64_t group = 0; group < count; group += kGroup) {
      prefetch_ahead(policy + group, kGroup);
      prefetch_ahead(reference + group, kGroup);
      for_each_vector(policy + group, reference + group, kGroup,
                      [&](Vector<Real> z, Vector<Real> r) {
                        const Vector<Real> m = exp_in_range<Real>(z, policy_rounder, seen);
                        policy_sum += m;
                        const Vector<Real> w = exp_in_range<Real>(r, reference_rounder, seen);
                        reference_sum += w;
                        gap_sum += w * ((z - r) - centre);
                        if constexpr (kDivergences) {
                          policy_gap += m * ((z - r) - centre);
                          policy_log += m * (z - policy_base);
                          reference_log += w * (r - reference_base);
                        }
                      });
    }
    if (any_bit(out_of_range<Real>(seen))) return false;
    const double p = policy_scale * sum_of_lanes<Real>(policy_sum);
    const double w = reference_scale * sum_of_lanes<Real>(reference_sum);
    const double gap = reference_scale * sum_of_lanes<Real>(gap_sum), excess = p - k * (w + gap);
    if (!far_is_exact(p, w, excess)) return false;
    stats.policy_sum += p;
    stats.reference_sum += w;
    stats.gap_sum += gap / kGapUnit;
    stats.excess_sum += excess;
    if (kDivergences) {
      const double gaps = policy_scale * sum_of_lanes<Real>(policy_gap);
      more.policy_gap_sum += gaps / kGapUnit;
      more.reverse_excess_sum += gaps - (p - k * w);
      more.policy_log_sum += policy_scale * sum_of_lanes<Real>(policy_log);
      more.reference_log_sum += reference_scale * sum_of_lanes<Real>(reference_log);
    }
    return true;
  }

  // With kDivergences also the sums of w d (e^d - 1), w (r - reference_max) and
  // w (e^d - 1) (r - reference_max).
  struct CloseSums {
    Vector<Real> reference{}, gap{}, excess{};
    Vector<Real> symmetric{}, reference_log{}, growth_log{};
  };

  // Adds groups to the sums up to the first that is not close, and returns where that one starts.
  int64_t close_groups(CloseSums& sums, const T* policy, const T* reference, int64_t at,
                       int64_t count) const {
    for (; at < count; at += kGroup) {
      prefetch_ahead(policy + at, kGroup);
      prefetch_ahead(reference + at, kGroup);
      CloseSums own;
      Bits<Real> seen{};
      Vector<Real> largest{};
      for_each_vector(policy + at, reference + at, kGroup, [&](Vector<Real> z, Vector<Real> r) {
        const Vector<Real> d = (z - r) - centre;
        const Vector<Real> w = exp_in_range<Real>(r, reference_rounder, seen);
        const Vector<Real> weighted_gap = w * d;
        largest = max_keeping_nan(largest, magnitude<Real>(d));
        own.reference += w;
        own.gap += weighted_gap;
        const Vector<Real> excess = (weighted_gap * d) * excess_over_square<Real>(d);
        own.excess += excess;
        if constexpr (kDivergences) {
          const Vector<Real> above = r - reference_base, growth = weighted_gap + excess;
          own.symmetric += growth * d;
          own.reference_log += w * above;
          own.growth_log += growth * above;
        }
      });
      if (any_bit(out_of_range<Real>(seen) | bit_cast<Bits<Real>>(largest > C::kClose))) break;
      sums.reference += own.reference;
      sums.gap += own.gap;
      sums.excess += own.excess;
      if constexpr (kDivergences) {
        sums.symmetric += own.symmetric;
        sums.reference_log += own.reference_log;
        sums.growth_log += own.growth_log;
      }
    }
    return at;
  }

  // Returns false if most groups needed the mixed path.
  bool add_close(const T* policy, const T* reference, int64_t count) {
    int64_t at = 0, groups_not_close = 0;
    bool may_recentre = true;
    while (at < count) {
      // A group on the mixed path may have moved the base to where this path does not hold.
      if (!quick_paths_hold()) {
        add_mixed(policy + at, reference + at, count - at);
        return true;
      }
      CloseSums sums;
      const int64_t start = at;
      at = close_groups(sums, policy, reference, start, count);
      const double w = reference_scale * sum_of_lanes<Real>(sums.reference);
      const double gap = reference_scale * sum_of_lanes<Real>(sums.gap);
      const double excess = reference_scale * sum_of_lanes<Real>(sums.excess);
      if (may_recentre && recentre(k * (w + gap + excess), w, k * excess)) {
        may_recentre = false;  // once in a block: with another centre other groups are close
        at = start;
        continue;
      }
      stats.policy_sum += k * (w + gap + excess);
      stats.reference_sum += w;
      stats.gap_sum += gap / kGapUnit;
      stats.excess_sum += k * excess;
      if (kDivergences) {
        const double symmetric = reference_scale * sum_of_lanes<Real>(sums.symmetric);
        const double gaps = k * (gap + symmetric);
        const double reference_log = reference_scale * sum_of_lanes<Real>(sums.reference_log);
        const double growth_log = reference_scale * sum_of_lanes<Real>(sums.growth_log);
        // m is k w e^d, so z - policy_max is log k more than r - reference_max + d.
        const Base<double>& base = stats.base;
        const double log_k = base.reference_max - base.policy_max + base.centre;
        more.policy_gap_sum += gaps / kGapUnit;
        more.reverse_excess_sum += k * (symmetric - excess);
        more.policy_log_sum +=
            k * (reference_log + growth_log) + gaps + log_k * (k * (w + gap + excess));
        more.reference_log_sum += reference_log;
      }
      if (at < count) {
        add_mixed(policy + at, reference + at, kGroup);
        at += kGroup;
        ++groups_not_close;
      }
    }
    return 2 * groups_not_close * kGroup <= count;
  }

  // Moves the centre to lse(z) - lse(r) of these sums, if they have a good part of the mass and
  // the centre is off. With x = E[e^d] - 1 a centre that is off by log(1 + x) adds x - log(1 + x)
  // to the mean excess; where that is most of the excess, the divergence loses its digits.
  bool recentre(double policy_sum, double reference_sum, double excess_sum) {
    const double mass = k * reference_sum, x = (policy_sum - mass) / mass;
    if (8 * reference_sum < stats.reference_sum || !(std::fabs(x) > 0.125)) return false;
    const double shift = std::log1p(x);
    if (!std::isfinite(shift) || 2 * (x - shift) * mass < excess_sum) return false;
    Base<double> base = stats.base;
    base.centre = Real(base.centre + shift);
    move_base(base);
    return true;
  }

  struct Shifts {
    Real policy, reference;
  };

  // The numbers subtracted from each side, one of them 0: see kLargeCentre.
  Shifts shifts() const {
    const Real size = std::fabs(centre);
    const Real shift =
        size >= kLargeCentre && size < Real(kLargestBase) ? std::rint(centre) : Real(0);
    if (std::fabs(policy_base) >= std::fabs(reference_base)) return {shift, Real(0)};
    return {Real(0), -shift};
  }

  void add_mixed(const T* policy, const T* reference, int64_t count, bool may_recentre = true) {
    const Extremes<Real> extremes = extremes_of(policy, reference, count);
    raise_base(policy, reference, count, extremes);
    const Real scale = Real(k);
    // Not a structured binding: Clang before 16 does not let the lambda below see one.
    const Shifts shift = shifts();
    const Real policy_shift = shift.policy, reference_shift = shift.reference;
    const Real centre_after = centre - (policy_shift - reference_shift);
    const Vector<Real> far_gap = broadcast(Real(1e30));
    Vector<Real> policy_sum{}, reference_sum{}, gap_sum{}, excess_sum{};
    Vector<Real> policy_gap{}, reverse_excess{}, policy_log{}, reference_log{};
    for_each_vector(policy, reference, count, [&](Vector<Real> z, Vector<Real> r) {
      const Vector<Real> policy_mass = exp_of<Real>(z - policy_base);
      const Vector<Real> w = exp_of<Real>(r - reference_base);
      // Where w = 0 the gap may be infinite or NaN. far_gap makes w d = 0 and selects far below.
      const Vector<Real> any_d = ((z - policy_shift) - (r - reference_shift)) - centre_after;
      const Vector<Real> d = w == Real(0) ? far_gap : any_d;
      const Vector<Real> weighted_gap = w * d;
      const Vector<Real> close = (scale * weighted_gap * d) * excess_over_square<Real>(d);
      const Vector<Real> far = policy_mass - scale * (w + weighted_gap);
      policy_sum += policy_mass;
      reference_sum += w;
      // In this order: a small w in this unit would underflow before it meets a huge gap.
      gap_sum += w * (d * Real(1 / kGapUnit));
      excess_sum += magnitude<Real>(d) < C::kClose ? close : far;
      if constexpr (kDivergences) {
        const Vector<Real> none{};
        const auto policy_has_mass = policy_mass != Real(0), reference_has_mass = w != Real(0);
        const Vector<Real> policy_d = policy_has_mass ? any_d : none;
        const Vector<Real> close_reverse = (scale * weighted_gap * d) + close * (d - 1);
        const Vector<Real> far_reverse = scale * w - policy_mass * (1 - policy_d);
        policy_gap += policy_mass * (policy_d * Real(1 / kGapUnit));
        reverse_excess += magnitude<Real>(d) < C::kClose ? close_reverse : far_reverse;
        policy_log += policy_has_mass ? policy_mass * (z - policy_base) : none;
        reference_log += reference_has_mass ? w * (r - reference_base) : none;
      }
    });
    const double p = sum_of_lanes<Real>(policy_sum), w = sum_of_lanes<Real>(reference_sum);
    const double excess = sum_of_lanes<Real>(excess_sum);
    if (may_recentre && recentre(p, w, excess)) return add_mixed(policy, reference, count, false);
    stats.policy_sum += p;
    stats.reference_sum += w;
    stats.gap_sum += sum_of_lanes<Real>(gap_sum);  // in kGapUnit already
    stats.excess_sum += excess;
    // p = 0 < q makes the KL infinite, also where q is so small that w = 0.
    const bool infinite_logits = extremes.policy_min == -Real(INFINITY);
    if (infinite_logits && excludes_an_entry(policy, reference, count)) stats.gap_sum = -INFINITY;
    if (kDivergences) {
      more.policy_gap_sum += sum_of_lanes<Real>(policy_gap);
      more.reverse_excess_sum += sum_of_lanes<Real>(reverse_excess);
      more.policy_log_sum += sum_of_lanes<Real>(policy_log);
      more.reference_log_sum += sum_of_lanes<Real>(reference_log);
      const bool no_reference = extremes.reference_min == -Real(INFINITY);
      if (no_reference && excludes_an_entry(reference, policy, count)) {
        more.policy_gap_sum = INFINITY;
      }
    }
  }
};

}  // namespace
}  // namespace tdpo::cpu::TDPO_INSTRUCTION_SET
