// Which rows have results, and where a row's results are stored: the same on both devices.
//
// A label is one of three kinds, and these are all their consequences:
//
//   an entry   in [0, vocabulary): the row is computed.
//   ignored    equal to ignore_index: the row is not read; its outputs and its gradient are 0.
//   outside    any other. Forward on the CPU writes nothing and returns the row's number, of which
//              Python makes an IndexError. Forward on CUDA and both `finish` write NaN to all
//              outputs and normalizers of the row, which CUDA's forward does not read. Backward
//              computes such a row from its NaN normalizers: its gradient is NaN, but 0 where both
//              upstream gradients are 0. In a tile a label outside belongs to another tile, and
//              the row is computed like any other. Where rows are `unlabelled` it stands for no
//              label, and the row is computed too.
#pragma once

#include <math.h>

#include "sequences.h"

namespace tdpo {

enum class LabelKind { kIgnored, kOutside, kEntry };

TDPO_ALGEBRA LabelKind label_kind(int64_t label, int64_t vocabulary, int64_t ignore_index) {
  if (label == ignore_index) return LabelKind::kIgnored;
  return label >= 0 && label < vocabulary ? LabelKind::kEntry : LabelKind::kOutside;
}

// Work: TokenStatsProblem or TokenStatsFinish.
template <class Work, class Index>
TDPO_ALGEBRA LabelKind label_kind(const Work& work, Index row) {
  return label_kind(label_of(work, row), work.vocabulary, work.ignore_index);
}

// What forward on the CPU returns instead of results: kBoundsNotUsable, or the first row whose
// label is outside the vocabulary; kAllLabelsValid if nothing is wrong.
static inline int64_t refusal_of(const TokenStatsProblem& problem) {
  if (!bounds_are_usable(problem)) return kBoundsNotUsable;
  for (int64_t row = 0; row < problem.rows; ++row) {
    if (label_kind(problem, row) == LabelKind::kOutside) return row;
  }
  return kAllLabelsValid;
}

template <class Real, class Index>
TDPO_ALGEBRA void write_outputs(const TokenStatsOutputs& outputs, Index row,
                                const RowSummary<Real>& summary) {
  static_cast<Real*>(outputs.policy_logps)[row] = summary.policy_logp;
  static_cast<Real*>(outputs.reference_logps)[row] = summary.reference_logp;
  static_cast<Real*>(outputs.forward_kl)[row] = summary.forward_kl;
  static_cast<Normalizers<Real>*>(outputs.normalizers)[row] = summary.normalizers;
}

template <class Real, class Index>
TDPO_ALGEBRA void write_outputs(const TokenStatsOutputs& outputs, Index row,
                                const DivergenceSummary<Real>& summary) {
  static_cast<Real*>(outputs.policy_logps)[row] = summary.policy_logp;
  static_cast<Real*>(outputs.reference_logps)[row] = summary.reference_logp;
  static_cast<Real*>(outputs.forward_kl)[row] = summary.forward_kl;
  static_cast<Real*>(outputs.reverse_kl)[row] = summary.reverse_kl;
  static_cast<Real*>(outputs.policy_entropy)[row] = summary.policy_entropy;
  static_cast<Real*>(outputs.reference_entropy)[row] = summary.reference_entropy;
  static_cast<DivergenceNormalizers<Real>*>(outputs.normalizers)[row] = summary.normalizers;
}

// For a row without results: 0 where the label is ignored, NaN where it is outside the vocabulary.
template <class Real, bool kDivergences = false, class Index>
TDPO_ALGEBRA void fill_outputs(const TokenStatsOutputs& outputs, Index row, LabelKind kind) {
  const Real x = kind == LabelKind::kIgnored ? Real(0) : Real(NAN);
  const Normalizers<Real> saved = {x, x, x, x, x, x, x, x};
  if constexpr (kDivergences) {
    write_outputs<Real>(outputs, row,
                        DivergenceSummary<Real>{x, x, x, x, x, x, {saved, x, x, x, x}});
  } else {
    write_outputs<Real>(outputs, row, RowSummary<Real>{x, x, x, saved});
  }
}

// Whether a row of this kind is computed; `unlabelled` as in TokenStatsForward.
TDPO_ALGEBRA bool has_results(LabelKind kind, bool unlabelled) {
  return kind == LabelKind::kEntry || (unlabelled && kind == LabelKind::kOutside);
}

}  // namespace tdpo
