// csrc/vocab_stats.h behind a C interface, so that Python can split vocabularies and merge records.
// It uses the record one entry at a time, as slowly and plainly as can be.
#include "vocab_stats.h"

namespace {

template <class Real>
tdpo::VocabStats<Real> record_of(const Real* z, const Real* r, long count) {
  tdpo::VocabStats<Real> stats = tdpo::empty_stats<Real>();
  for (long v = 0; v < count; ++v) stats = tdpo::merge(stats, tdpo::stats_of_one(z[v], r[v]));
  return stats;
}

template <class Real>
tdpo::DivergenceStats<Real> divergences_of(const Real* z, const Real* r, long count) {
  auto stats = tdpo::empty_stats_of<Real, true>();
  for (long v = 0; v < count; ++v) {
    stats = tdpo::merge(stats, tdpo::divergence_stats_of_one(z[v], r[v]));
  }
  return stats;
}

}  // namespace

#define TDPO_HARNESS(Real, suffix)                                                                 \
  extern "C" int stats_size_##suffix() { return sizeof(tdpo::VocabStats<Real>) / sizeof(Real); }   \
  extern "C" void record_##suffix(const Real* z, const Real* r, long count,                        \
                                  tdpo::VocabStats<Real>* stats) {                                 \
    *stats = record_of(z, r, count);                                                               \
  }                                                                                                \
  extern "C" void merge_##suffix(const tdpo::VocabStats<Real>* a, const tdpo::VocabStats<Real>* b, \
                                 tdpo::VocabStats<Real>* sum) {                                    \
    *sum = tdpo::merge(*a, *b);                                                                    \
  }                                                                                                \
  extern "C" void summarise_##suffix(const tdpo::VocabStats<Real>* stats, Real* results) {         \
    const tdpo::PartSummary part = tdpo::summarise(*stats);                                        \
    results[0] = Real(part.policy_log_sum);                                                        \
    results[1] = Real(part.reference_log_sum);                                                     \
    results[2] = Real(part.log_sum_gap);                                                           \
    results[3] = part.forward_kl < 0 ? Real(0) : Real(part.forward_kl);                            \
  }                                                                                                \
  extern "C" void finalise_##suffix(const tdpo::VocabStats<Real>* rest, Real z, Real r,            \
                                    tdpo::RowSummary<Real>* row) {                                 \
    *row = tdpo::finalise(tdpo::LabelledStats<Real>{*rest, z, r});                                 \
  }                                                                                                \
  extern "C" int divergences_size_##suffix() {                                                     \
    return sizeof(tdpo::DivergenceStats<Real>) / sizeof(Real);                                     \
  }                                                                                                \
  extern "C" void divergences_record_##suffix(const Real* z, const Real* r, long count,            \
                                              tdpo::DivergenceStats<Real>* stats) {                \
    *stats = divergences_of(z, r, count);                                                          \
  }                                                                                                \
  extern "C" void divergences_merge_##suffix(const tdpo::DivergenceStats<Real>* a,                 \
                                             const tdpo::DivergenceStats<Real>* b,                 \
                                             tdpo::DivergenceStats<Real>* sum) {                   \
    *sum = tdpo::merge(*a, *b);                                                                    \
  }                                                                                                \
  extern "C" void divergences_finalise_##suffix(const tdpo::DivergenceStats<Real>* rest, Real z,   \
                                                Real r, tdpo::DivergenceSummary<Real>* row) {      \
    *row = tdpo::finalise(tdpo::LabelledStats<Real, true>{*rest, z, r});                           \
  }

TDPO_HARNESS(float, float32)
TDPO_HARNESS(double, float64)
