// The pybind11 module tdpo_ext._core: integers in, status out. Addresses, sizes and strides come as
// integers; Python has checked them and keeps the tensors alive. The GIL is released while rows
// run.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/row_kernels.h"
#include "token_stats.h"

namespace py = pybind11;

namespace {

using tdpo::RowLayout;
using Sizes = std::vector<int64_t>;

void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }

RowLayout row_layout(const Sizes& sizes, const Sizes& strides) {
  if (sizes.size() != strides.size() || sizes.size() > RowLayout::kMaxDims) {
    throw std::invalid_argument("a row layout has at most 4 sizes and as many strides");
  }
  RowLayout layout;
  layout.dims = static_cast<int>(sizes.size());
  for (int dim = 0; dim < layout.dims; ++dim) {
    layout.sizes[dim] = sizes[dim];
    layout.strides[dim] = strides[dim];
  }
  return layout;
}

tdpo::DType dtype_of(int code) {
  if (code < 0 || code >= tdpo::cpu::kDTypes) throw std::invalid_argument("unknown dtype code");
  return static_cast<tdpo::DType>(code);
}

tdpo::TokenStatsProblem problem(int dtype, int64_t rows, int64_t vocabulary, int64_t ignore_index,
                                uintptr_t policy, const Sizes& policy_sizes,
                                const Sizes& policy_strides, uintptr_t reference,
                                const Sizes& reference_sizes, const Sizes& reference_strides,
                                uintptr_t labels) {
  return {dtype_of(dtype),
          rows,
          vocabulary,
          ignore_index,
          {pointer(policy), row_layout(policy_sizes, policy_strides)},
          {pointer(reference), row_layout(reference_sizes, reference_strides)},
          static_cast<const int64_t*>(pointer(labels))};
}

tdpo::TokenStatsOutputs outputs(uintptr_t policy_logps, uintptr_t reference_logps,
                                uintptr_t forward_kl, uintptr_t normalizers) {
  return {pointer(policy_logps), pointer(reference_logps), pointer(forward_kl),
          pointer(normalizers)};
}

tdpo::TokenStatsFinish finish(int dtype, int64_t rows, int64_t vocabulary, int64_t ignore_index,
                              uintptr_t labels, int64_t sets, uintptr_t records,
                              uintptr_t policy_logps, uintptr_t reference_logps,
                              uintptr_t forward_kl, uintptr_t normalizers) {
  return {dtype_of(dtype),
          rows,
          vocabulary,
          ignore_index,
          static_cast<const int64_t*>(pointer(labels)),
          sets,
          pointer(records),
          outputs(policy_logps, reference_logps, forward_kl, normalizers)};
}

int64_t token_stats_forward(const std::string& instruction_set, int threads, int dtype,
                            int64_t rows, int64_t vocabulary, int64_t ignore_index,
                            uintptr_t policy, const Sizes& policy_sizes,
                            const Sizes& policy_strides, uintptr_t reference,
                            const Sizes& reference_sizes, const Sizes& reference_strides,
                            uintptr_t labels, uintptr_t policy_logps, uintptr_t reference_logps,
                            uintptr_t forward_kl, uintptr_t normalizers) {
  const tdpo::TokenStatsForward work = {
      problem(dtype, rows, vocabulary, ignore_index, policy, policy_sizes, policy_strides,
              reference, reference_sizes, reference_strides, labels),
      outputs(policy_logps, reference_logps, forward_kl, normalizers)};
  const tdpo::cpu::RowKernels& kernels = tdpo::cpu::kernels_of(instruction_set);
  const py::gil_scoped_release unlocked;
  return tdpo::cpu::token_stats_forward(work, kernels, threads);
}

void token_stats_tile(const std::string& instruction_set, int threads, int dtype, int64_t rows,
                      int64_t vocabulary, int64_t ignore_index, uintptr_t policy,
                      const Sizes& policy_sizes, const Sizes& policy_strides, uintptr_t reference,
                      const Sizes& reference_sizes, const Sizes& reference_strides,
                      uintptr_t labels, uintptr_t records) {
  const tdpo::TokenStatsTile work = {
      problem(dtype, rows, vocabulary, ignore_index, policy, policy_sizes, policy_strides,
              reference, reference_sizes, reference_strides, labels),
      pointer(records)};
  const tdpo::cpu::RowKernels& kernels = tdpo::cpu::kernels_of(instruction_set);
  const py::gil_scoped_release unlocked;
  tdpo::cpu::token_stats_tile(work, kernels, threads);
}

void token_stats_finish(const std::string&, int threads, int dtype, int64_t rows,
                        int64_t vocabulary, int64_t ignore_index, uintptr_t labels, int64_t sets,
                        uintptr_t records, uintptr_t policy_logps, uintptr_t reference_logps,
                        uintptr_t forward_kl, uintptr_t normalizers) {
  const tdpo::TokenStatsFinish work =
      finish(dtype, rows, vocabulary, ignore_index, labels, sets, records, policy_logps,
             reference_logps, forward_kl, normalizers);
  const py::gil_scoped_release unlocked;
  tdpo::cpu::token_stats_finish(work, threads);
}

void token_stats_backward(const std::string& instruction_set, int threads, int dtype, int64_t rows,
                          int64_t vocabulary, int64_t ignore_index, uintptr_t policy,
                          const Sizes& policy_sizes, const Sizes& policy_strides,
                          uintptr_t reference, const Sizes& reference_sizes,
                          const Sizes& reference_strides, uintptr_t labels, uintptr_t normalizers,
                          uintptr_t grad_policy_logps, uintptr_t grad_forward_kl,
                          int gradient_dtype, uintptr_t gradient, const Sizes& gradient_sizes,
                          const Sizes& gradient_strides) {
  const tdpo::TokenStatsBackward work = {
      problem(dtype, rows, vocabulary, ignore_index, policy, policy_sizes, policy_strides,
              reference, reference_sizes, reference_strides, labels),
      pointer(normalizers),
      pointer(grad_policy_logps),
      pointer(grad_forward_kl),
      dtype_of(gradient_dtype),
      pointer(gradient),
      row_layout(gradient_sizes, gradient_strides)};
  const tdpo::cpu::RowKernels& kernels = tdpo::cpu::kernels_of(instruction_set);
  const py::gil_scoped_release unlocked;
  tdpo::cpu::token_stats_backward(work, kernels, threads);
}

#if defined(TDPO_CUDA)

int64_t cuda_forward_workspace_bytes(int dtype, int64_t rows, int64_t vocabulary) {
  tdpo::TokenStatsProblem shape = {};
  shape.dtype = dtype_of(dtype);
  shape.rows = rows;
  shape.vocabulary = vocabulary;
  return tdpo::cuda::forward_workspace_bytes(shape);
}

void cuda_token_stats_forward(int device, uintptr_t stream, uintptr_t workspace, int dtype,
                              int64_t rows, int64_t vocabulary, int64_t ignore_index,
                              uintptr_t policy, const Sizes& policy_sizes,
                              const Sizes& policy_strides, uintptr_t reference,
                              const Sizes& reference_sizes, const Sizes& reference_strides,
                              uintptr_t labels, uintptr_t policy_logps, uintptr_t reference_logps,
                              uintptr_t forward_kl, uintptr_t normalizers) {
  const tdpo::TokenStatsForward work = {
      problem(dtype, rows, vocabulary, ignore_index, policy, policy_sizes, policy_strides,
              reference, reference_sizes, reference_strides, labels),
      outputs(policy_logps, reference_logps, forward_kl, normalizers)};
  const py::gil_scoped_release unlocked;
  tdpo::cuda::token_stats_forward(work, pointer(workspace), {device, pointer(stream)});
}

void cuda_token_stats_tile(int device, uintptr_t stream, uintptr_t workspace, int dtype,
                           int64_t rows, int64_t vocabulary, int64_t ignore_index, uintptr_t policy,
                           const Sizes& policy_sizes, const Sizes& policy_strides,
                           uintptr_t reference, const Sizes& reference_sizes,
                           const Sizes& reference_strides, uintptr_t labels, uintptr_t records) {
  const tdpo::TokenStatsTile work = {
      problem(dtype, rows, vocabulary, ignore_index, policy, policy_sizes, policy_strides,
              reference, reference_sizes, reference_strides, labels),
      pointer(records)};
  const py::gil_scoped_release unlocked;
  tdpo::cuda::token_stats_tile(work, pointer(workspace), {device, pointer(stream)});
}

void cuda_token_stats_finish(int device, uintptr_t stream, int dtype, int64_t rows,
                             int64_t vocabulary, int64_t ignore_index, uintptr_t labels,
                             int64_t sets, uintptr_t records, uintptr_t policy_logps,
                             uintptr_t reference_logps, uintptr_t forward_kl,
                             uintptr_t normalizers) {
  const tdpo::TokenStatsFinish work =
      finish(dtype, rows, vocabulary, ignore_index, labels, sets, records, policy_logps,
             reference_logps, forward_kl, normalizers);
  const py::gil_scoped_release unlocked;
  tdpo::cuda::token_stats_finish(work, {device, pointer(stream)});
}

void cuda_token_stats_backward(int device, uintptr_t stream, int dtype, int64_t rows,
                               int64_t vocabulary, int64_t ignore_index, uintptr_t policy,
                               const Sizes& policy_sizes, const Sizes& policy_strides,
                               uintptr_t reference, const Sizes& reference_sizes,
                               const Sizes& reference_strides, uintptr_t labels,
                               uintptr_t normalizers, uintptr_t grad_policy_logps,
                               uintptr_t grad_forward_kl, int gradient_dtype, uintptr_t gradient,
                               const Sizes& gradient_sizes, const Sizes& gradient_strides) {
  const tdpo::TokenStatsBackward work = {
      problem(dtype, rows, vocabulary, ignore_index, policy, policy_sizes, policy_strides,
              reference, reference_sizes, reference_strides, labels),
      pointer(normalizers),
      pointer(grad_policy_logps),
      pointer(grad_forward_kl),
      dtype_of(gradient_dtype),
      pointer(gradient),
      row_layout(gradient_sizes, gradient_strides)};
  const py::gil_scoped_release unlocked;
  tdpo::cuda::token_stats_backward(work, {device, pointer(stream)});
}

py::dict cuda_runtime() {
  const tdpo::cuda::Runtime found = tdpo::cuda::runtime();
  py::dict info;
  info["runtime_version"] = found.runtime_version;
  info["driver_version"] = found.driver_version;
  info["devices"] = found.devices;
  info["architectures"] = found.architectures;
  info["error"] = found.error;
  return info;
}

#endif

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const tdpo::cpu::RowKernels* kernels : tdpo::cpu::available_kernels()) {
    names.emplace_back(kernels->instruction_set);
  }
  return names;
}

py::dict build_info() {
#if defined(_OPENMP)
  const bool openmp = true;
#else
  const bool openmp = false;
#endif
#if defined(TDPO_CUDA)
  const bool cuda = true;
#else
  const bool cuda = false;
#endif
  py::dict info;
  info["compiler"] = TDPO_COMPILER;
  info["openmp"] = openmp;
  info["cuda"] = cuda;
  info["no_cuda_because"] = TDPO_NO_CUDA_BECAUSE;
  return info;
}

}  // namespace

PYBIND11_MODULE(_core, module) {
  module.doc() = "Compiled kernels of tdpo_ext; called by tdpo_ext.ops with checked arguments.";
  module.def("token_stats_forward", &token_stats_forward);
  module.def("token_stats_tile", &token_stats_tile);
  module.def("token_stats_finish", &token_stats_finish);
  module.def("token_stats_backward", &token_stats_backward);
  module.def("instruction_sets", &instruction_sets);
#if defined(TDPO_CUDA)
  module.def("cuda_forward_workspace_bytes", &cuda_forward_workspace_bytes);
  module.def("cuda_token_stats_forward", &cuda_token_stats_forward);
  module.def("cuda_token_stats_tile", &cuda_token_stats_tile);
  module.def("cuda_token_stats_finish", &cuda_token_stats_finish);
  module.def("cuda_token_stats_backward", &cuda_token_stats_backward);
  module.def("cuda_runtime", &cuda_runtime);
  module.def("cuda_cannot_run_because", &tdpo::cuda::cannot_run_because);
#endif
  module.def("build_info", &build_info);
}
