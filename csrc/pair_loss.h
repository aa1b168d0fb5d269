// From the statistics of rows to the loss of pairs, and from its slope back to rows: for host and
// device. No torch, no Python.
//
// With the sums over a response's tokens (Zeng et al., 2024, arXiv 2404.11999)
//
//   margin = sum log p(y) - log q(y)       K = sum KL(q || p)       dm = margin(c) - margin(r)
//
// of the chosen response c and the rejected one r, or with their means,
//
//   TDPO1:  difference = dm - (K(r) - K(c))
//   TDPO2:  difference = dm - alpha (K(r) - stop_grad(K(c)))        (alpha = 0: DPO)
//   loss = -(1 - e) log sigmoid(beta difference) - e log sigmoid(-beta difference)
//
// where e is the label smoothing. The slope is the derivative of the loss by the difference. That
// by margin(c) is the slope, that by margin(r) its negative, and that by a K is one ratio of TDPO1
// or TDPO2 times that by its margin.
//
// All of it is computed in double; sums go by in an order that depends on nothing but the lengths.
// python/tdpo_ext/loss.py says the same in PyTorch.
#pragma once

#include <math.h>

#include "row_outputs.h"

namespace tdpo {

// The rows of TdpoLossForward::pairs, in the order of the fields of TDPOOutput.
enum class PairQuantity : int {
  kLoss,
  kChosenReward,  // beta (margin + K)
  kRejectedReward,
  kChosenLogps,
  kRejectedLogps,
  kChosenKl,
  kRejectedKl,
  kChosenDpoReward,  // beta margin
  kRejectedDpoReward,
  kCount
};
constexpr int kPairQuantities = static_cast<int>(PairQuantity::kCount);

// Sums over rows of a sequence, or once they are `finished`, its terms.
struct SequenceTerms {
  double logps, margin, kl;
  double kept;  // the number of labels that are not ignored, if terms are means
};

TDPO_ALGEBRA SequenceTerms no_terms() { return {0, 0, 0, 0}; }

template <class Real, class Index>
TDPO_ALGEBRA void add_row(SequenceTerms& sums, const TdpoLossForward& work, Index row) {
  const TokenStatsOutputs& rows = work.statistics;
  const double logp = double(static_cast<const Real*>(rows.policy_logps)[row]);
  sums.logps += logp;
  sums.margin += logp - double(static_cast<const Real*>(rows.reference_logps)[row]);
  sums.kl += double(static_cast<const Real*>(rows.forward_kl)[row]);
  if (work.options.average) {
    sums.kept += label_of(work.problem, row) == work.problem.ignore_index ? 0 : 1;
  }
}

// What a sequence's terms are divided by.
TDPO_ALGEBRA double divisor_of(const SequenceTerms& sums, const LossOptions& options) {
  return options.average && sums.kept > 1 ? sums.kept : 1;
}

TDPO_ALGEBRA SequenceTerms finished(const SequenceTerms& sums, const LossOptions& options) {
  const double by = divisor_of(sums, options);
  return {sums.logps / by, sums.margin / by, sums.kl / by, sums.kept};
}

TDPO_ALGEBRA double log_sigmoid(double x) { return (x < 0 ? x : 0) - log1p(exp(-fabs(x))); }

TDPO_ALGEBRA double sigmoid(double x) {
  const double e = exp(-fabs(x));
  return (x < 0 ? e : 1) / (1 + e);
}

TDPO_ALGEBRA double pair_difference(const SequenceTerms& chosen, const SequenceTerms& rejected,
                                    const LossOptions& options) {
  const double margins = chosen.margin - rejected.margin;
  if (options.tdpo1) return margins - (rejected.kl - chosen.kl);
  // DPO leaves the KLs out, since one may be infinite, and 0 * inf is NaN.
  return options.alpha == 0 ? margins : margins - options.alpha * (rejected.kl - chosen.kl);
}

TDPO_ALGEBRA double pair_loss(double difference, const LossOptions& options) {
  const double logit = options.beta * difference, e = options.label_smoothing;
  const double loss = -log_sigmoid(logit);
  return e > 0 ? (1 - e) * loss - e * log_sigmoid(-logit) : loss;
}

TDPO_ALGEBRA double pair_slope(double difference, const LossOptions& options) {
  const double logit = options.beta * difference, e = options.label_smoothing;
  return options.beta * (e * sigmoid(logit) - (1 - e) * sigmoid(-logit));
}

// Writes what pair number `pair` of `pairs` gives, from its sequences' sums, and returns its loss.
template <class Real>
TDPO_ALGEBRA double write_pair(const TdpoLossForward& work, int64_t pair, int64_t pairs,
                               const SequenceTerms& chosen_sums,
                               const SequenceTerms& rejected_sums) {
  const LossOptions& options = work.options;
  const SequenceTerms chosen = finished(chosen_sums, options);
  const SequenceTerms rejected = finished(rejected_sums, options);
  const double difference = pair_difference(chosen, rejected, options);
  const double loss = pair_loss(difference, options), beta = options.beta;
  const double quantities[kPairQuantities] = {loss,
                                              beta * (chosen.margin + chosen.kl),
                                              beta * (rejected.margin + rejected.kl),
                                              chosen.logps,
                                              rejected.logps,
                                              chosen.kl,
                                              rejected.kl,
                                              beta * chosen.margin,
                                              beta * rejected.margin};
  Real* to = static_cast<Real*>(work.pairs) + pair;
  for (int i = 0; i < kPairQuantities; ++i) to[i * pairs] = Real(quantities[i]);
  Real* slopes = static_cast<Real*>(work.slopes) + pair;
  const Reduction reduction = static_cast<Reduction>(options.reduction);
  if (reduction == Reduction::kNone) static_cast<Real*>(work.loss)[pair] = Real(loss);
  const double slope =
      pair_slope(difference, options) / (reduction == Reduction::kMean ? double(pairs) : 1.0);
  slopes[0] = Real(slope / divisor_of(chosen_sums, options));
  slopes[pairs] = Real(-slope / divisor_of(rejected_sums, options));
  return loss;
}

// Writes the loss of a batch from the sum over its pairs, unless nothing is reduced.
template <class Real>
TDPO_ALGEBRA void write_reduced(const TdpoLossForward& work, double sum, int64_t pairs) {
  const Reduction reduction = static_cast<Reduction>(work.options.reduction);
  if (reduction == Reduction::kNone) return;
  *static_cast<Real*>(work.loss) = Real(reduction == Reduction::kMean ? sum / double(pairs) : sum);
}

// The upstream gradients of a row: g_m of log p(y) and g_k of the KL.
template <class Real>
struct RowUpstream {
  Real policy_logp, forward_kl;
};

template <class Real, class Index>
TDPO_ALGEBRA RowUpstream<Real> upstream_of(const TokenStatsBackward& work, Index row) {
  const Upstream& upstream = work.upstream;
  if (upstream.policy_logps) {
    return {static_cast<const Real*>(upstream.policy_logps)[row],
            static_cast<const Real*>(upstream.forward_kl)[row]};
  }
  const Sequences& sequences = work.problem.sequences;
  if (sequences.count == 0) return {Real(NAN), Real(NAN)};  // bounds without a sequence
  const Index sequence = sequence_of(sequences, row);
  const Index pairs = static_cast<Index>(sequences.count / 2);
  const bool chosen = sequence < pairs;
  const int64_t pair = static_cast<int64_t>(chosen ? sequence : sequence - pairs);
  const Real of_loss = static_cast<const Real*>(upstream.loss)[pair * upstream.loss_stride];
  const Real of_logp = static_cast<const Real*>(upstream.slopes)[sequence] * of_loss;
  const Real ratio = Real(chosen ? upstream.chosen_kl_ratio : upstream.rejected_kl_ratio);
  return {of_logp, ratio == Real(0) ? Real(0) : of_logp * ratio};
}

// The upstream gradients of a row with divergences: those of the reverse KL and of the policy's
// entropy too.
template <class Real>
struct DivergenceUpstream {
  Real policy_logp, forward_kl, reverse_kl, policy_entropy;
};

template <class Real, class Index>
TDPO_ALGEBRA DivergenceUpstream<Real> divergence_upstream_of(const Upstream& upstream, Index row) {
  const auto of_row = [&](const void* rows) { return static_cast<const Real*>(rows)[row]; };
  return {of_row(upstream.policy_logps), of_row(upstream.forward_kl), of_row(upstream.reverse_kl),
          of_row(upstream.policy_entropy)};
}

}  // namespace tdpo
