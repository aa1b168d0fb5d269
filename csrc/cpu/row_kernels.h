// The table of kernels that each instruction set fills: one row forward and one row backward, for
// each dtype.
#pragma once

#include <string>
#include <vector>

#include "../token_stats.h"

namespace tdpo::cpu {

// The close path is chosen for so many entries at once. A longer group would more often hold an
// entry with a large gap; with a shorter one the test would cost more. Parts of a row start at
// multiples of it.
constexpr int64_t kGroup = 64;

// A row or a part of it. `label` counts from its first entry and may lie outside of it.
struct RowForward {
  const void* policy;     // [vocabulary] of T
  const void* reference;  // [vocabulary] of T
  int64_t vocabulary;
  int64_t label;
  void* record;  // LabelledStats<Real> (or with divergences), to which the entries are added
};

struct RowBackward {
  const void* policy;     // [vocabulary] of T
  const void* reference;  // [vocabulary] of T
  int64_t vocabulary;
  int64_t label;
  const void* normalizers;  // Normalizers<Real> of the row, or DivergenceNormalizers<Real>
  const void* upstream;     // RowUpstream<Real>, or DivergenceUpstream<Real>  (pair_loss.h)
  void* gradient;           // [vocabulary] of G; may be the logits of a side if G is T
};

constexpr int kDTypes = 4;

struct RowKernels {
  const char* instruction_set;
  void (*forward[kDTypes])(const RowForward&);  // [dtype of the logits, T]
  // [dtype of the logits, T][dtype of the gradient, G]; null where there is no kernel.
  void (*backward[kDTypes][kDTypes])(const RowBackward&);
  // The same with divergences; their gradient has the dtype of the logits.
  void (*divergences_forward[kDTypes])(const RowForward&);
  void (*divergences_backward[kDTypes])(const RowBackward&);
};

// The tables that this processor can run, the widest vectors last.
std::vector<const RowKernels*> available_kernels();

// Throws std::invalid_argument if this processor has no kernels of that name.
const RowKernels& kernels_of(const std::string& instruction_set);

extern const RowKernels kBaselineKernels;
#if defined(TDPO_X86)
extern const RowKernels kAvx2Kernels;
extern const RowKernels kAvx512Kernels;
#endif

}  // namespace tdpo::cpu
