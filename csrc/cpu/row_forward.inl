// Forward of one row, or of a part of one: its record.
//
//   record += sums over all entries but the label's of
//             e^(z - policy_max), w, w d, k w (e^d - 1 - d)     (VocabStats, csrc/vocab_stats.h)
//   and with kDivergences those of DivergenceSums
//
// Reads [vocabulary] policy and reference logits z and r of type T, and a label that may lie
// outside. Adds to one LabelledStats. token_stats.cpp makes log p(y), log q(y), KL(q || p)
// and the normalizers of a record, or of the merged records of a row's parts.
//
//   base = maxima and centre of the first 128 entries
//   for each block of 1024 entries, first before the label, then after it:
//     raise the base if an entry exceeds it too far
//     add the block on the close, far or mixed path          (running_stats.h says which is which)
//   store the label's two logits beside the sums
//
// Roofline, per pair (z, r) of logits of S bytes: reads 2 S bytes, once; one exponential and a
// polynomial, or two exponentials. With AVX2 that is 27 or 29 vector instructions for 8 pairs, 15
// or 16 of them multiplications: 8 cycles on a core with two multipliers (AMD Zen 3), in which it
// could read some 100 bytes. So arithmetic is the limit wherever memory gives a core more than 8
// bytes a cycle.
//
// Decomposition: one thread has the row or the part. Entries go by in order, two vectors at a time;
// what does not fill two vectors is padded with -inf.
#include "row_kernels.h"
#include "running_stats.h"

namespace tdpo::cpu::TDPO_INSTRUCTION_SET {
namespace {

// One entry as a Real.
template <class T>
TDPO_INLINE RealOf<T> value_of(const T* from) {
  T copies[kPerTwoVectors<RealOf<T>>];
  for (T& copy : copies) copy = *from;
  return Storage<T>::unpack(copies).first[0];
}

template <class T, bool kDivergences>
void forward(const RowForward& row) {
  using Real = RealOf<T>;
  const T* policy = static_cast<const T*>(row.policy);
  const T* reference = static_cast<const T*>(row.reference);
  auto& record = *static_cast<LabelledStats<Real, kDivergences>*>(row.record);
  RunningStats<T, kDivergences> stats(record.rest);
  if (row.label < 0 || row.label >= row.vocabulary) {
    stats.add(policy, reference, row.vocabulary);
  } else {
    const int64_t after = row.label + 1;
    stats.add(policy, reference, row.label);
    stats.add(policy + after, reference + after, row.vocabulary - after);
    record.label_policy = value_of(policy + row.label);
    record.label_reference = value_of(reference + row.label);
  }
  record.rest = stats.record();
}

}  // namespace
}  // namespace tdpo::cpu::TDPO_INSTRUCTION_SET
