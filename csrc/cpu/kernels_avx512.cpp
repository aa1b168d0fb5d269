// The kernels for AVX-512 F, BW, DQ and VL: compiled with those flags (cmake/cpu_kernels.cmake),
// called only where the processor has them.
#define TDPO_INSTRUCTION_SET avx512
#define TDPO_VECTOR_BYTES 64
#include "row_kernels.inl"

namespace tdpo::cpu {
constexpr RowKernels kAvx512Kernels = avx512::row_kernels("avx512");
}  // namespace tdpo::cpu
