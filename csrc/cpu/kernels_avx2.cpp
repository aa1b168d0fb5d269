// The kernels for AVX2, FMA and F16C: compiled with those flags (cmake/cpu_kernels.cmake), called
// only where the processor has them.
#define TDPO_INSTRUCTION_SET avx2
#define TDPO_VECTOR_BYTES 32
#include "row_kernels.inl"

namespace tdpo::cpu {
constexpr RowKernels kAvx2Kernels = avx2::row_kernels("avx2");
}  // namespace tdpo::cpu
