// AVX2, FMA and F16C: compiled with those flags, run only where the processor has them.
#define TDPO_INSTRUCTION_SET avx2
#define TDPO_VECTOR_BYTES 32
#include "row_kernels.inl"

namespace tdpo::cpu {
const RowKernels kAvx2Kernels = TDPO_ROW_KERNELS("avx2");
}
