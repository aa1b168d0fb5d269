// What one instruction set offers: a kernel per dtype for a row forward, and one backward.
#pragma once

#include <string>
#include <vector>

#include "../token_stats.h"

namespace tdpo::cpu {

// A row, or a tile of one, whose label may lie outside.
struct RowForward {
  const void* policy;
  const void* reference;
  int64_t vocabulary;
  int64_t label;
  void* record;  // a LabelledStats, to which the row is added
};

struct RowBackward {
  const void* policy;
  const void* reference;
  int64_t vocabulary;
  int64_t label;
  const void* normalizers;
  const void* grad_policy_logp;
  const void* grad_forward_kl;
  void* gradient;
};

constexpr int kDTypes = 4;

struct RowKernels {
  const char* instruction_set;
  void (*forward[kDTypes])(const RowForward&);  // indexed by DType
  // Indexed by the DType of the logits, then by that of the gradient; null: there is none.
  void (*backward[kDTypes][kDTypes])(const RowBackward&);
};

// Those this processor can run, the best last.
std::vector<const RowKernels*> available_kernels();

// Throws std::invalid_argument if this processor has none of that name.
const RowKernels& kernels_of(const std::string& instruction_set);

extern const RowKernels kBaselineKernels;
#if defined(TDPO_X86)
extern const RowKernels kAvx2Kernels;
extern const RowKernels kAvx512Kernels;
#endif

}  // namespace tdpo::cpu
