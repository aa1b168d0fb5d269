// One row forward, or a part of one, in the vectors of the instruction set whose file includes
// this: its record (vocab_stats.h).
//
// Roofline, per pair (z, r) of logits of S bytes: 2 S bytes to read; one exponential and a
// polynomial, or two exponentials. On AVX2 that is 27 or 29 vector instructions for 8 pairs, 15 or
// 16 of them multiplications: 8 cycles on a core with two multipliers, in which it could read some
// 100 bytes. So it is bound by arithmetic wherever memory gives a core more than 8 bytes a cycle.
#include "row_kernels.h"
#include "running_stats.h"

namespace tdpo::cpu::TDPO_INSTRUCTION_SET {
namespace {

template <class T>
TDPO_INLINE typename Storage<T>::Accumulator element(const T* from) {
  T copies[kTwo<typename Storage<T>::Accumulator>];
  for (T& copy : copies) copy = *from;
  return Storage<T>::load_two(copies).first[0];
}

template <class T>
void forward(const RowForward& row) {
  using Real = typename Storage<T>::Accumulator;
  const T* policy = static_cast<const T*>(row.policy);
  const T* reference = static_cast<const T*>(row.reference);
  LabelledStats<Real>& record = *static_cast<LabelledStats<Real>*>(row.record);
  RowStats<T> stats(record.rest);
  if (row.label < 0 || row.label >= row.vocabulary) {
    stats.add(policy, reference, row.vocabulary);
  } else {
    const int64_t after = row.label + 1;
    stats.add(policy, reference, row.label);
    stats.add(policy + after, reference + after, row.vocabulary - after);
    record.label_policy = element(policy + row.label);
    record.label_reference = element(reference + row.label);
  }
  record.rest = stats.record();
}

}  // namespace
}  // namespace tdpo::cpu::TDPO_INSTRUCTION_SET
