// The algebra of the library: a record of vocabulary statistics that merges, for host and device.
//
// A row has policy logits z, reference logits r and distributions p = softmax(z), q = softmax(r).
// The kernels compute the log-sum-exps of z and r, and KL(q || p) = sum_v q_v (log q_v - log p_v).
//
// Let d = z - r - c be the gap of an entry, measured from any centre c, and E the expectation under
// q. Then
//
//   lse(z) - lse(r) = c + log E[e^d]          KL(q || p) = log E[e^d] - E[d].
//
// Where policy and reference are close, both terms of the KL are almost equal, and in float32 their
// difference keeps no digits. So the record holds E[d] and the excess E[e^d - 1 - d]. Each term of
// the excess is at least 0, and small when d is small:
//
//   x = E[d] + E[e^d - 1 - d]                 KL = E[e^d - 1 - d] - (x - log(1 + x)).
//
// Sums are kept relative to a base (the largest z, the largest r, the centre), so nothing
// overflows. `rebase` moves a record to another base. Records of disjoint parts of the vocabulary,
// moved to a common base, add up field by field. SIMD lanes, threads, blocks, tiles of the
// vocabulary and tensor-parallel ranks all merge with these functions.
//
// The reverse KL(p || q) = sum_v p_v (log p_v - log q_v) and the entropies of p and q need four
// more sums, DivergenceSums. They are kept only where they are asked for.
//
// A row's record leaves the label's entry out, and `finalise` takes the label and the rest as two
// parts. So log p(y) and 1 - p(y) have all their digits also where the label has almost all of the
// mass. docs/algebra.md derives all of this.
#pragma once

#include <math.h>

#include <type_traits>

#if defined(__CUDACC__)
#define TDPO_HOST_DEVICE __host__ __device__
#else
#define TDPO_HOST_DEVICE
#endif

// Functions with internal linkage: each instruction set's file compiles its own copy with its own
// flags, and the linker must not keep one copy for all.
#define TDPO_ALGEBRA TDPO_HOST_DEVICE static inline

namespace tdpo {

// What the sums of a record are relative to.
//
// The centre is lse(z) - lse(r) of a part of the vocabulary (an entry, a block) that has much of
// q's mass. With this centre E[e^d] = 1 over that part. The part's lse(r) is at most a few nats
// below reference_max, so reference_max + centre exceeds policy_max by at most these nats and the
// logarithm of the part's size: no exponential below overflows.
template <class Real>
struct Base {
  Real policy_max;     // max z, or a number at most a few nats below it
  Real reference_max;  // max r, likewise
  Real centre;         // c; 0 where it would not be finite
};

template <class Real>
struct VocabStats {
  Base<Real> base;
  Real policy_sum;     // sum e^(z - policy_max)
  Real reference_sum;  // sum w,       w = e^(r - reference_max)
  Real gap_sum;        // sum w d,     d = z - r - centre, in units of kGapUnit nats
  Real excess_sum;  // sum e^(z - policy_max) - k w (1 + d),  k = e^(reference_max + c - policy_max)
                    //   = sum k w (e^d - 1 - d), and it counts policy mass where q = 0 as well
};

// Sums of gaps are in this unit, so that they stay finite: entries may be masked with the lowest
// number, -3.4e38 in float32, and a row has up to 2^30 entries with weights w up to 2^16. A gap_sum
// of -inf then has one meaning, p = 0 < q. The excess may still overflow to inf or NaN; `summarise`
// uses it only where it is small.
constexpr double kGapUnit = 0x1p48;

// What the reverse KL and the entropies need beside VocabStats, relative to the same base.
template <class Real>
struct DivergenceSums {
  Real policy_gap_sum;      // sum m d,  m = e^(z - policy_max), in units of kGapUnit nats;
                            // inf where p > 0 = q
  Real reverse_excess_sum;  // sum k w - m (1 - d) = sum m (e^-d - 1 + d), k w where p = 0
  Real policy_log_sum;      // sum m (z - policy_max)
  Real reference_log_sum;   // sum w (r - reference_max)
};

// The record of a row whose reverse KL and entropies are asked for.
template <class Real>
struct DivergenceStats {
  VocabStats<Real> forward;
  DivergenceSums<Real> more;
};

template <class Real, bool kDivergences>
using StatsOf = std::conditional_t<kDivergences, DivergenceStats<Real>, VocabStats<Real>>;

// The record of a row whose vocabulary comes in several tiles, one of which may hold the label:
// that of all other entries, and the label's two logits, which are -inf until its tile has come,
// and stay so in a row without label.
template <class Real, bool kDivergences = false>
struct LabelledStats {
  StatsOf<Real, kDivergences> rest;
  Real label_policy, label_reference;
};

// What forward saves for backward: eight numbers for each row. p = e^(z - policy_max) policy_scale,
// q likewise, and log p - log q = z - r - log_sum_gap, which keeps its digits where p and q are
// close.
//
// The maxima are rounded to whole numbers, so that (z - policy_max) + policy_max is exact, also for
// logits from 2^24 on, which are whole numbers themselves. Backward finds from it what the rounding
// of z - policy_max has lost.
template <class Real>
struct Normalizers {
  Real policy_max;
  Real policy_scale;  // e^(policy_max - lse(z))
  Real reference_max;
  Real reference_scale;
  Real log_sum_gap;     // lse(z) - lse(r)
  Real policy_rest;     // 1 - p(y): the mass of everything but the label
  Real reference_rest;  // 1 - q(y)
  Real label_gap;       // p(y) - q(y)
};

// What backward needs beside these for the reverse KL and the policy's entropy H.
template <class Real>
struct DivergenceNormalizers {
  Normalizers<Real> forward;
  Real reverse_kl;
  Real entropy_offset;  // H + log(policy_scale): log p + H = z - policy_max + entropy_offset
  Real label_reverse;   // p(y) (log p(y) - log q(y) - KL(p || q))
  Real label_log;       // p(y) (log p(y) + H)
};

// A row's results.
template <class Real>
struct RowSummary {
  Real policy_logp;     // log p(y)
  Real reference_logp;  // log q(y)
  Real forward_kl;      // KL(q || p) >= 0, nats
  Normalizers<Real> normalizers;
};

template <class Real>
struct DivergenceSummary {
  Real policy_logp, reference_logp, forward_kl;
  Real reverse_kl;  // KL(p || q) >= 0, nats
  Real policy_entropy, reference_entropy;
  DivergenceNormalizers<Real> normalizers;
};

template <class Real, bool kDivergences>
using SummaryOf = std::conditional_t<kDivergences, DivergenceSummary<Real>, RowSummary<Real>>;

// Below this |d| the excess e^d - 1 - d is computed as a series; above, as the plain difference,
// which keeps its digits there.
template <class Real>
struct CloseGap {
  static constexpr Real value = Real(0.5);
};

template <class Real>
TDPO_ALGEBRA Real finite_or_zero(Real x) {
  return x - x == Real(0) ? x : Real(0);
}

template <class Real>
TDPO_ALGEBRA VocabStats<Real> empty_stats() {
  const Real nothing = -Real(INFINITY);
  return {{nothing, nothing, Real(0)}, Real(0), Real(0), Real(0), Real(0)};
}

template <class Real, bool kDivergences>
TDPO_ALGEBRA StatsOf<Real, kDivergences> empty_stats_of() {
  if constexpr (kDivergences) {
    return {empty_stats<Real>(), {Real(0), Real(0), Real(0), Real(0)}};
  } else {
    return empty_stats<Real>();
  }
}

// The record of one vocabulary entry.
template <class Real>
TDPO_ALGEBRA VocabStats<Real> stats_of_one(Real z, Real r) {
  const Real nothing = -Real(INFINITY);
  const bool policy_has_mass = z != nothing, reference_has_mass = r != nothing;
  VocabStats<Real> stats = empty_stats<Real>();
  stats.base = {z, r, reference_has_mass ? finite_or_zero(z - r) : Real(0)};
  if (reference_has_mass && z - r - stats.base.centre != Real(0)) {  // z - r overflows, or is NaN
    stats.gap_sum = Real((double(z) - double(r)) / kGapUnit);
  }
  stats.policy_sum = policy_has_mass ? Real(1) : Real(0);
  stats.reference_sum = reference_has_mass ? Real(1) : Real(0);
  if (reference_has_mass && !policy_has_mass) stats.gap_sum = nothing;  // p = 0 < q: KL is infinite
  if (!reference_has_mass) stats.excess_sum = stats.policy_sum;         // q = 0: all of p is excess
  return stats;
}

// The same with the sums of divergences. Relative to its own base an entry has no gap and no logit.
template <class Real>
TDPO_ALGEBRA DivergenceStats<Real> divergence_stats_of_one(Real z, Real r) {
  const Real nothing = -Real(INFINITY);
  DivergenceStats<Real> stats = {stats_of_one(z, r), {Real(0), Real(0), Real(0), Real(0)}};
  if (z == nothing) return stats;  // rebase knows that the reverse excess is k w
  if (r == nothing) {
    stats.more.policy_gap_sum = Real(INFINITY);  // p > 0 = q: the reverse KL is infinite
  } else if (z - r - stats.forward.base.centre != Real(0)) {  // z - r overflows, or is NaN
    stats.more.policy_gap_sum = stats.forward.gap_sum;
    stats.more.reverse_excess_sum = Real(INFINITY);
  }
  return stats;
}

// e^x - 1 - x.
template <class Real>
TDPO_ALGEBRA Real excess_of(Real x) {
  if (fabs(x) >= CloseGap<Real>::value) return expm1(x) - x;
  // Horner form of x^2 (1/2! + x/3! + x^2/4! + ...); the terms left out are below 1e-17 of the sum.
  Real sum = Real(0);
  for (int n = 16; n >= 2; --n)
    sum = (sum * x + Real(1)) * (Real(1) / Real(n));  // -> 1/2! + x/3! + x^2/4! + ...
  return sum * x * x;
}

// e^(a - b), and 0 for a = -inf also where b = -inf.
template <class Real>
TDPO_ALGEBRA Real relative_scale(Real a, Real b) {
  return a == -Real(INFINITY) ? Real(0) : a == b ? Real(1) : exp(a - b);
}

// a + b, rounded, and what the rounding lost, exactly (Knuth's two-sum).
template <class Real>
struct TwoSum {
  Real rounded, lost;
};

template <class Real>
TDPO_ALGEBRA TwoSum<Real> two_sum(Real a, Real b) {
  const Real sum = a + b, back = sum - a;
  return {sum, (a - (sum - back)) + (b - back)};
}

// k = e^(reference_max + centre - policy_max). What the rounding of the sum loses is put back:
// where logits are shifted, or masked with numbers such as -1e38, the sum alone has no digits left.
template <class Real>
TDPO_ALGEBRA Real linear_scale(Real reference_max, Real centre, Real policy_max) {
  const TwoSum<Real> apart = two_sum(reference_max, -policy_max);
  const TwoSum<Real> sum = two_sum(apart.rounded, centre);
  return exp(sum.rounded) * exp(finite_or_zero(apart.lost + sum.lost));
}

// The same record relative to another base, whose maxima are not smaller.
//
// With s = centre - new centre each gap grows by s, so sum w d becomes sum w d + s sum w. The
// linear mass k w (1 + d) changes too, and the difference goes into the excess:
//   e^(reference_max + c' - policy_max') [ (e^s - 1 - s) sum w + (e^s - 1) sum w d ].
// It is computed in double, because s may be as large as the numbers that entries are masked with.
// That costs little: a row is rebased only a few times.
template <class Real>
TDPO_ALGEBRA VocabStats<Real> rebase(const VocabStats<Real>& stats, const Base<Real>& base) {
  const Base<Real>& old = stats.base;
  const Real policy_scale = relative_scale(old.policy_max, base.policy_max);
  const Real reference_scale = relative_scale(old.reference_max, base.reference_max);
  const double s = double(old.centre) - double(base.centre);  // may exceed float's range
  const double reference_sum = stats.reference_sum, gap_sum = stats.gap_sum * kGapUnit;
  VocabStats<Real> moved = stats;
  moved.base = base;
  moved.policy_sum *= policy_scale;
  moved.reference_sum *= reference_scale;
  const bool infinite = stats.gap_sum == -Real(INFINITY);  // an infinite KL stays so, at any scale
  if (reference_scale == Real(0)) {  // all that is left is policy mass, and s may have overflowed
    if (!infinite) moved.gap_sum = Real(0);
    moved.excess_sum = moved.policy_sum;
    return moved;
  }
  if (!infinite) {
    moved.gap_sum = Real(reference_scale * (stats.gap_sum + s / kGapUnit * reference_sum));
  }
  moved.excess_sum *= policy_scale;
  if (s == 0 || stats.reference_sum == Real(0)) return moved;
  const double linear = reference_sum + gap_sum;
  const double to_new = linear_scale(old.reference_max, base.centre, base.policy_max);
  if (fabs(s) < CloseGap<Real>::value) {
    const double growth = expm1(Real(s)), excess = excess_of(Real(s));
    moved.excess_sum += Real(to_new * (excess * reference_sum + growth * gap_sum));
  } else {  // the same, without e^s, which might overflow
    const double to_old = linear_scale(old.reference_max, old.centre, base.policy_max);
    moved.excess_sum += Real(to_old * linear - to_new * (linear + s * reference_sum));
  }
  return moved;
}

// The reverse excess relative to another base, whose gaps are larger by s and whose policy_max is
// larger. sum k w - m (1 - d) grows by
//   (e^-s - 1 + s) k sum w + s (sum m - k sum w),
// where sum m - k sum w is k sum w d plus the excess.
template <class Real>
TDPO_ALGEBRA Real rebased_reverse_excess(Real reverse_excess, const VocabStats<Real>& stats,
                                         const Base<Real>& base) {
  const Base<Real>& old = stats.base;
  const double policy_scale = relative_scale(old.policy_max, base.policy_max);
  const double reference_sum = stats.reference_sum;
  const double to_new = linear_scale(old.reference_max, base.centre, base.policy_max);
  if (policy_scale == 0) return Real(to_new * reference_sum);  // all of q's mass is excess
  const double s = double(old.centre) - double(base.centre);
  const double moved = policy_scale * reverse_excess, policy_sum = policy_scale * stats.policy_sum;
  if (s == 0) return Real(moved);
  const double to_old = linear_scale(old.reference_max, old.centre, base.policy_max);
  const double shifted = to_old * reference_sum;
  if (!(fabs(s) < CloseGap<Real>::value)) {  // without e^-s, which might overflow
    return Real(moved + (to_new * reference_sum - shifted) + s * policy_sum);
  }
  // Where these two are large they may have lost their digits; the plain difference has its own.
  const double gaps = to_old * (stats.gap_sum * kGapUnit), excess = policy_scale * stats.excess_sum;
  const bool close = fabs(gaps) < policy_sum && fabs(excess) < policy_sum;
  const double difference = close ? gaps + excess : policy_sum - shifted;
  return Real(moved + shifted * excess_of(-s) + s * difference);
}

// What `rebase` does to the sums of divergences; `stats` is the record before it.
template <class Real>
TDPO_ALGEBRA DivergenceSums<Real> rebase(const DivergenceSums<Real>& sums,
                                         const VocabStats<Real>& stats, const Base<Real>& base) {
  const Base<Real>& old = stats.base;
  const Real policy_scale = relative_scale(old.policy_max, base.policy_max);
  const Real reference_scale = relative_scale(old.reference_max, base.reference_max);
  const double s = double(old.centre) - double(base.centre);
  DivergenceSums<Real> moved = {Real(0), Real(0), Real(0), Real(0)};
  if (policy_scale != Real(0)) {
    const Real lower = old.policy_max - base.policy_max;
    moved.policy_gap_sum =
        Real(policy_scale * (sums.policy_gap_sum + s / kGapUnit * stats.policy_sum));
    moved.policy_log_sum = policy_scale * (sums.policy_log_sum + lower * stats.policy_sum);
  }
  if (reference_scale != Real(0)) {
    const Real lower = old.reference_max - base.reference_max;
    moved.reference_log_sum =
        reference_scale * (sums.reference_log_sum + lower * stats.reference_sum);
  }
  // An infinite KL stays so, also where the mass has become 0.
  if (sums.policy_gap_sum == Real(INFINITY)) moved.policy_gap_sum = sums.policy_gap_sum;
  moved.reverse_excess_sum = rebased_reverse_excess(sums.reverse_excess_sum, stats, base);
  return moved;
}

template <class Real>
TDPO_ALGEBRA DivergenceStats<Real> rebase(const DivergenceStats<Real>& stats,
                                          const Base<Real>& base) {
  return {rebase(stats.forward, base), rebase(stats.more, stats.forward, base)};
}

// The base that two parts share: the larger maxima, and the centre that is nearer to lse(z) -
// lse(r) of both parts together, from where E[e^d] = 1. The centre of the part that has more of q's
// mass would not do, since the policy may mask its entries.
template <class Real>
TDPO_ALGEBRA Base<Real> common_base(const VocabStats<Real>& a, const VocabStats<Real>& b) {
  const Base<Real>&base_a = a.base, &base_b = b.base;
  const Real policy_max =
      base_a.policy_max > base_b.policy_max ? base_a.policy_max : base_b.policy_max;
  const Real reference_max =
      base_a.reference_max > base_b.reference_max ? base_a.reference_max : base_b.reference_max;
  const Real policy_sum = a.policy_sum * relative_scale(base_a.policy_max, policy_max) +
                          b.policy_sum * relative_scale(base_b.policy_max, policy_max);
  const Real a_sum = a.reference_sum * relative_scale(base_a.reference_max, reference_max);
  const Real b_sum = b.reference_sum * relative_scale(base_b.reference_max, reference_max);
  const double gap = (double(policy_max) - double(reference_max)) +
                     (double(log(policy_sum)) - double(log(a_sum + b_sum)));
  bool as_a = a_sum >= b_sum;  // where there is no gap, or only one side has a centre
  if (a_sum > 0 && b_sum > 0 && fabs(gap) < double(INFINITY)) {
    as_a = fabs(base_a.centre - gap) <= fabs(base_b.centre - gap);
  }
  return {policy_max, reference_max, as_a ? base_a.centre : base_b.centre};
}

// The record of two disjoint parts of the vocabulary together.
template <class Real>
TDPO_ALGEBRA VocabStats<Real> merge(const VocabStats<Real>& a, const VocabStats<Real>& b) {
  const Base<Real> base = common_base(a, b);
  VocabStats<Real> sum = rebase(a, base);
  const VocabStats<Real> other = rebase(b, base);
  sum.policy_sum += other.policy_sum;
  sum.reference_sum += other.reference_sum;
  sum.gap_sum += other.gap_sum;
  sum.excess_sum += other.excess_sum;
  return sum;
}

template <class Real>
TDPO_ALGEBRA DivergenceStats<Real> merge(const DivergenceStats<Real>& a,
                                         const DivergenceStats<Real>& b) {
  const Base<Real> base = common_base(a.forward, b.forward);
  DivergenceSums<Real> sum = rebase(a.more, a.forward, base);
  const DivergenceSums<Real> other = rebase(b.more, b.forward, base);
  sum.policy_gap_sum += other.policy_gap_sum;
  sum.reverse_excess_sum += other.reverse_excess_sum;
  sum.policy_log_sum += other.policy_log_sum;
  sum.reference_log_sum += other.reference_log_sum;
  return {merge(a.forward, b.forward), sum};
}

template <class Real, bool kDivergences = false>
TDPO_ALGEBRA LabelledStats<Real, kDivergences> empty_labelled_stats() {
  return {empty_stats_of<Real, kDivergences>(), -Real(INFINITY), -Real(INFINITY)};
}

// The record of two disjoint sets of tiles together.
template <class Real, bool kDivergences>
TDPO_ALGEBRA LabelledStats<Real, kDivergences> merge(const LabelledStats<Real, kDivergences>& a,
                                                     const LabelledStats<Real, kDivergences>& b) {
  const Real nothing = -Real(INFINITY);
  return {merge(a.rest, b.rest), a.label_policy == nothing ? b.label_policy : a.label_policy,
          a.label_reference == nothing ? b.label_reference : a.label_reference};
}

// ---- from the record to the results: once per row, so it is done in double ----

// The results for a part of the vocabulary.
struct PartSummary {
  double policy_log_sum;     // lse(z)
  double reference_log_sum;  // lse(r)
  double log_sum_gap;        // their difference, with digits that subtracting them would lose
  double forward_kl;         // between the part's own softmaxes; 0 where q has no mass in it
};

template <class Real>
TDPO_ALGEBRA PartSummary summarise(const VocabStats<Real>& stats) {
  const double policy_max = stats.base.policy_max, reference_max = stats.base.reference_max;
  const double centre = stats.base.centre, reference_sum = stats.reference_sum;
  PartSummary part;
  part.policy_log_sum = policy_max + log(double(stats.policy_sum));
  part.reference_log_sum = reference_max + log(reference_sum);
  part.log_sum_gap = part.policy_log_sum - part.reference_log_sum;
  part.forward_kl = 0;
  if (reference_sum == 0) return part;
  const double mean_gap = double(stats.gap_sum) / reference_sum * kGapUnit;
  const double excess =
      double(stats.excess_sum) * exp(policy_max - reference_max - centre) / reference_sum;
  // The excess is exact where it and E[d] are small. It has lost its digits where entries with next
  // to no mass have huge gaps; then it comes out large itself, or the plain difference does.
  const double plain = part.log_sum_gap - centre - mean_gap;
  if (fabs(mean_gap) < 0.5 && fabs(excess) < 0.5 && !(plain > 1)) {
    const double x = mean_gap + excess;
    part.log_sum_gap = centre + log1p(x);
    part.forward_kl = excess - (x - log1p(x));
  } else if (mean_gap == -INFINITY) {
    part.forward_kl = INFINITY;
  } else {  // policy and reference are far apart, so the plain difference keeps its digits
    part.forward_kl = plain;
  }
  return part;
}

// The results for a part of the vocabulary that DivergenceSums give, between the part's own
// softmaxes; 0 where p, or for the last q, has no mass in it.
struct PartDivergences {
  double reverse_kl, policy_entropy, reference_entropy;
};

TDPO_ALGEBRA double entropy_of_part(double sum, double log_sum) {
  const double entropy = sum == 0 ? 0 : log(sum) - log_sum / sum;
  return entropy < 0 ? 0 : entropy;
}

// As for the forward KL, with p in the place of q and -d in the place of d:
//   E_p[e^-d] = e^-a  with  a = lse(z) - lse(r) - centre,
//   KL(p || q) = E_p[d] - a = E_p[e^-d - 1 + d] - (e^-a - 1 + a).
template <class Real>
TDPO_ALGEBRA PartDivergences summarise(const DivergenceStats<Real>& stats,
                                       const PartSummary& part) {
  const VocabStats<Real>& forward = stats.forward;
  const double policy_sum = forward.policy_sum;
  PartDivergences result;
  result.policy_entropy = entropy_of_part(policy_sum, stats.more.policy_log_sum);
  result.reference_entropy = entropy_of_part(forward.reference_sum, stats.more.reference_log_sum);
  result.reverse_kl = 0;
  if (policy_sum == 0) return result;
  const double mean_gap = double(stats.more.policy_gap_sum) / policy_sum * kGapUnit;
  const double excess = double(stats.more.reverse_excess_sum) / policy_sum;
  const double a = part.log_sum_gap - double(forward.base.centre), plain = mean_gap - a;
  // Where gaps of q are large (entries that the policy masks), the reverse excess may have lost its
  // digits, since on CUDA it is a difference of their sums.
  const double forward_gap = double(forward.gap_sum) / forward.reference_sum * kGapUnit;
  const bool digits = fabs(forward_gap) < 1;
  if (digits && fabs(mean_gap) < 0.5 && fabs(excess) < 0.5 && !(plain > 1)) {
    result.reverse_kl = excess - excess_of(-a);
  } else {
    result.reverse_kl = mean_gap == INFINITY ? INFINITY : plain;
  }
  if (result.reverse_kl < 0) result.reverse_kl = 0;
  return result;
}

// The mass of the label and of the rest of the vocabulary under one softmax.
struct Shares {
  double label, rest, log_label, log_rest, log_sum;
};

TDPO_ALGEBRA Shares shares_of(double label, double rest_log_sum) {
  if (label == INFINITY) label = NAN;        // as elsewhere in the row: inf - inf
  const double odds = rest_log_sum - label;  // log of rest / label
  Shares shares;
  shares.label = 1 / (1 + exp(odds));
  shares.rest = 1 / (1 + exp(-odds));
  shares.log_label = odds > 0 ? -odds - log1p(exp(-odds)) : 0 - log1p(exp(odds));
  shares.log_rest = odds > 0 ? -log1p(exp(-odds)) : odds - log1p(exp(odds));
  shares.log_sum = odds > 0 ? rest_log_sum - shares.log_rest : label - shares.log_label;
  return shares;
}

// lse(z) - lse(r) of the row, from z - r of the label and lse(z) - lse(r) of the rest. Either one
// gives it, with a correction that is smaller for the one that has more of q's mass.
TDPO_ALGEBRA double row_gap(const Shares& p, const Shares& q, double label_gap, double rest_gap) {
  const bool apart_in_both = (q.label == 0 && p.rest == 0) || (q.rest == 0 && p.label == 0);
  if (apart_in_both) return p.log_sum - q.log_sum;  // below, -inf would be subtracted from -inf
  if (q.label == 0) return rest_gap - p.log_rest;
  if (q.rest == 0) return label_gap - p.log_label;
  const double apart = label_gap - rest_gap;
  if (!(fabs(apart) < 700)) return p.log_sum - q.log_sum;
  return q.label <= 0.5 ? rest_gap + log1p(q.label * expm1(apart))
                        : label_gap + log1p(q.rest * expm1(-apart));
}

// p - q and p - q - q u, where u = log p - log q.
TDPO_ALGEBRA double mass_difference(double p, double q, double u) {
  return fabs(u) < 0.5 ? q * expm1(u) : p - q;
}
TDPO_ALGEBRA double mass_excess(double p, double q, double u) {
  return q == 0 ? p : fabs(u) < 0.5 ? q * excess_of(u) : p - q - q * u;
}

// A row as a distribution over two things, the label and the rest of the vocabulary.
struct LabelAndRest {
  Shares p, q;
  double gap;                                            // lse(z) - lse(r) of the row
  double u_label, u_rest;                                // log p - log q of their masses
  bool policy_excludes_label, reference_excludes_label;  // p(y) = 0 < q(y), q(y) = 0 < p(y)
  // Whether p or q is no distribution: a logit is NaN or inf, or all logits of a side are -inf.
  bool undefined;
};

TDPO_ALGEBRA LabelAndRest label_and_rest(double z, double r, const PartSummary& rest) {
  LabelAndRest row;
  row.p = shares_of(z, rest.policy_log_sum);
  row.q = shares_of(r, rest.reference_log_sum);
  row.gap = row_gap(row.p, row.q, z - r, rest.log_sum_gap);
  row.u_label = (z - r) - row.gap;
  row.u_rest = rest.log_sum_gap - row.gap;
  row.policy_excludes_label = z == -INFINITY && r > -INFINITY;
  row.reference_excludes_label = r == -INFINITY && z > -INFINITY;
  row.undefined = row.p.log_sum != row.p.log_sum || row.q.log_sum != row.q.log_sum;
  return row;
}

// The row's results, from the label's two logits and the record of all other entries.
//
// By the chain rule KL(q || p) is the divergence between the masses of label and rest, plus the
// divergence within the rest times the reference's mass of the rest:
//   KL = sum over {label, rest} of q (e^u - 1 - u) + q(rest) KL(rest),   u = log p - log q,
// where every term is at least 0.
template <class Real>
TDPO_ALGEBRA RowSummary<Real> finalise(const LabelledStats<Real>& stats, const PartSummary& part,
                                       const LabelAndRest& of_row) {
  const Shares &p = of_row.p, &q = of_row.q;
  double kl =
      mass_excess(p.label, q.label, of_row.u_label) + mass_excess(p.rest, q.rest, of_row.u_rest);
  if (of_row.undefined) {
    kl = NAN;
  } else if (of_row.policy_excludes_label || part.forward_kl == INFINITY) {
    kl = INFINITY;  // also where q underflows
  } else {
    kl += q.rest * part.forward_kl;
  }
  const Base<Real>& base = stats.rest.base;
  const Real label_policy = stats.label_policy, label_reference = stats.label_reference;
  RowSummary<Real> row;
  row.policy_logp = Real(p.log_label);
  row.reference_logp = Real(q.log_label);
  row.forward_kl = kl < 0 ? Real(0) : Real(kl);
  Normalizers<Real>& saved = row.normalizers;
  saved.policy_max = rint(base.policy_max > label_policy ? base.policy_max : label_policy);
  saved.policy_scale = Real(exp(double(saved.policy_max) - p.log_sum));
  saved.reference_max =
      rint(base.reference_max > label_reference ? base.reference_max : label_reference);
  saved.reference_scale = Real(exp(double(saved.reference_max) - q.log_sum));
  saved.log_sum_gap = Real(of_row.gap);
  saved.policy_rest = Real(p.rest);
  saved.reference_rest = Real(q.rest);
  saved.label_gap = Real(q.label < q.rest ? mass_difference(p.label, q.label, of_row.u_label)
                                          : -mass_difference(p.rest, q.rest, of_row.u_rest));
  return row;
}

template <class Real>
TDPO_ALGEBRA RowSummary<Real> finalise(const LabelledStats<Real>& stats) {
  const PartSummary part = summarise(stats.rest);
  return finalise(stats, part, label_and_rest(stats.label_policy, stats.label_reference, part));
}

TDPO_ALGEBRA double entropy_of(const Shares& shares) {
  const double of_label = shares.label == 0 ? 0 : -shares.label * shares.log_label;
  return of_label + (shares.rest == 0 ? 0 : -shares.rest * shares.log_rest);
}

// The same with the reverse KL and the entropies, by the same chain rule.
//
// What a label has more than the row's mean, p(y) (x(y) - mean of x), is p(y) p(rest) times the
// difference between x(y) and the mean within the rest. That keeps its digits for a label that has
// almost all of the mass.
template <class Real>
TDPO_ALGEBRA DivergenceSummary<Real> finalise(const LabelledStats<Real, true>& stats) {
  const VocabStats<Real>& rest = stats.rest.forward;
  const PartSummary part = summarise(rest);
  const PartDivergences more = summarise(stats.rest, part);
  const LabelAndRest of_row = label_and_rest(stats.label_policy, stats.label_reference, part);
  const Shares &p = of_row.p, &q = of_row.q;
  const RowSummary<Real> forward = finalise<Real>(
      LabelledStats<Real>{rest, stats.label_policy, stats.label_reference}, part, of_row);
  double reverse_kl =
      mass_excess(q.label, p.label, -of_row.u_label) + mass_excess(q.rest, p.rest, -of_row.u_rest);
  if (of_row.undefined) {
    reverse_kl = NAN;
  } else if (of_row.reference_excludes_label || more.reverse_kl == INFINITY) {
    reverse_kl = INFINITY;
  } else {
    reverse_kl += p.rest * more.reverse_kl;
  }
  if (reverse_kl < 0) reverse_kl = 0;
  const double policy_entropy = entropy_of(p) + p.rest * more.policy_entropy;
  const double product = p.label * p.rest;
  DivergenceSummary<Real> row;
  row.policy_logp = forward.policy_logp;
  row.reference_logp = forward.reference_logp;
  row.forward_kl = forward.forward_kl;
  row.reverse_kl = Real(reverse_kl);
  row.policy_entropy = Real(policy_entropy);
  row.reference_entropy = Real(entropy_of(q) + q.rest * more.reference_entropy);
  DivergenceNormalizers<Real>& saved = row.normalizers;
  saved.forward = forward.normalizers;
  saved.reverse_kl = Real(reverse_kl);
  saved.entropy_offset = Real(policy_entropy + (double(saved.forward.policy_max) - p.log_sum));
  saved.label_reverse = saved.label_log = Real(0);
  if (product != 0) {
    saved.label_reverse = Real(product * (of_row.u_label - of_row.u_rest - more.reverse_kl));
    saved.label_log = Real(product * (p.log_label - p.log_rest + more.policy_entropy));
  }
  if (reverse_kl == INFINITY && p.label != 0) {
    saved.label_reverse = Real(p.label * (of_row.u_label - reverse_kl));
  }
  return row;
}

}  // namespace tdpo
