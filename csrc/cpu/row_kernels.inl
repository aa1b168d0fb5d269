// The table of kernels of the instruction set whose file includes this: compiled once for each.
#include "row_backward.inl"
#include "row_forward.inl"

namespace tdpo::cpu::TDPO_INSTRUCTION_SET {
namespace {

constexpr RowKernels row_kernels(const char* instruction_set) {
  return {instruction_set,
          {forward<float, false>, forward<BFloat16, false>, forward<Float16, false>,
           forward<double, false>},
          {{backward<float, float>, backward<float, BFloat16>, backward<float, Float16>, nullptr},
           {nullptr, backward<BFloat16, BFloat16>, nullptr, nullptr},
           {nullptr, nullptr, backward<Float16, Float16>, nullptr},
           {nullptr, nullptr, nullptr, backward<double, double>}},
          {forward<float, true>, forward<BFloat16, true>, forward<Float16, true>,
           forward<double, true>},
          {divergences_backward<float>, divergences_backward<BFloat16>,
           divergences_backward<Float16>, divergences_backward<double>}};
}

}  // namespace
}  // namespace tdpo::cpu::TDPO_INSTRUCTION_SET
