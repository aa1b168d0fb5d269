// Finds out at run time which kernels this processor can run.
#include <stdexcept>

#include "row_kernels.h"

namespace tdpo::cpu {

std::vector<const RowKernels*> available_kernels() {
  std::vector<const RowKernels*> kernels = {&kBaselineKernels};
#if defined(TDPO_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  // kernels_avx2.cpp also needs F16C, which every processor with AVX2 and FMA has.
  if (avx2) kernels.push_back(&kAvx2Kernels);
  if (avx2 && avx512) kernels.push_back(&kAvx512Kernels);
#endif
  return kernels;
}

const RowKernels& kernels_of(const std::string& instruction_set) {
  for (const RowKernels* kernels : available_kernels()) {
    if (instruction_set == kernels->instruction_set) return *kernels;
  }
  throw std::invalid_argument("this processor has no kernels for instruction set " +
                              instruction_set);
}

}  // namespace tdpo::cpu
