// The kernels that every processor of this architecture can run: SSE2 on x86-64, NEON on aarch64.
#define TDPO_INSTRUCTION_SET baseline
#define TDPO_VECTOR_BYTES 16
#include "row_kernels.inl"

namespace tdpo::cpu {
constexpr RowKernels kBaselineKernels = baseline::row_kernels("baseline");
}  // namespace tdpo::cpu
