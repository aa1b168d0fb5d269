// The kernels of one row in the vectors of the instruction set whose file includes this.
#include "row_backward.inl"
#include "row_forward.inl"

namespace tdpo::cpu::TDPO_INSTRUCTION_SET {
namespace {

constexpr RowKernels row_kernels(const char* instruction_set) {
  return {instruction_set,
          {forward<float>, forward<BFloat16>, forward<Float16>, forward<double>},
          {backward<float>, backward<BFloat16>, backward<Float16>, backward<double>}};
}

}  // namespace
}  // namespace tdpo::cpu::TDPO_INSTRUCTION_SET
