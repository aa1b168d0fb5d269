// The pybind11 module tdpo_ext._core. Each entry point takes one struct, as an object of its Python
// class, and where to run. Python has checked the tensors whose addresses are in it, and keeps them
// alive. The GIL is released while rows run.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cpu/row_kernels.h"
#include "cpu/threads.h"
#include "description.h"
#include "python_structs.h"
#include "token_stats.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

int64_t token_stats_forward(const std::string& instruction_set, int threads,
                            const tdpo::TokenStatsForward& work) {
  const tdpo::cpu::RowKernels& kernels = tdpo::cpu::kernels_of(instruction_set);
  const py::gil_scoped_release unlocked;
  return tdpo::cpu::token_stats_forward(work, kernels, threads);
}

void token_stats_tile(const std::string& instruction_set, int threads,
                      const tdpo::TokenStatsTile& work) {
  const tdpo::cpu::RowKernels& kernels = tdpo::cpu::kernels_of(instruction_set);
  const py::gil_scoped_release unlocked;
  tdpo::cpu::token_stats_tile(work, kernels, threads);
}

void token_stats_finish(const std::string&, int threads, const tdpo::TokenStatsFinish& work) {
  const py::gil_scoped_release unlocked;
  tdpo::cpu::token_stats_finish(work, threads);
}

void token_stats_backward(const std::string& instruction_set, int threads,
                          const tdpo::TokenStatsBackward& work) {
  const tdpo::cpu::RowKernels& kernels = tdpo::cpu::kernels_of(instruction_set);
  const py::gil_scoped_release unlocked;
  tdpo::cpu::token_stats_backward(work, kernels, threads);
}

int64_t tdpo_loss_forward(const std::string& instruction_set, int threads,
                          const tdpo::TdpoLossForward& work) {
  const tdpo::cpu::RowKernels& kernels = tdpo::cpu::kernels_of(instruction_set);
  const py::gil_scoped_release unlocked;
  return tdpo::cpu::tdpo_loss_forward(work, kernels, threads);
}

int64_t tdpo_loss_finish(const std::string&, int threads, const tdpo::TdpoLossForward& work) {
  const py::gil_scoped_release unlocked;
  return tdpo::cpu::tdpo_loss_finish(work, threads);
}

#if defined(TDPO_CUDA)

void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }

void cuda_token_stats_forward(int device, uintptr_t stream, const tdpo::TokenStatsForward& work,
                              uintptr_t workspace) {
  const py::gil_scoped_release unlocked;
  tdpo::cuda::token_stats_forward(work, pointer(workspace), {device, pointer(stream)});
}

void cuda_token_stats_tile(int device, uintptr_t stream, const tdpo::TokenStatsTile& work,
                           uintptr_t workspace) {
  const py::gil_scoped_release unlocked;
  tdpo::cuda::token_stats_tile(work, pointer(workspace), {device, pointer(stream)});
}

void cuda_token_stats_finish(int device, uintptr_t stream, const tdpo::TokenStatsFinish& work) {
  const py::gil_scoped_release unlocked;
  tdpo::cuda::token_stats_finish(work, {device, pointer(stream)});
}

void cuda_token_stats_backward(int device, uintptr_t stream, const tdpo::TokenStatsBackward& work) {
  const py::gil_scoped_release unlocked;
  tdpo::cuda::token_stats_backward(work, {device, pointer(stream)});
}

void cuda_tdpo_loss_forward(int device, uintptr_t stream, const tdpo::TdpoLossForward& work,
                            uintptr_t workspace) {
  const py::gil_scoped_release unlocked;
  tdpo::cuda::tdpo_loss_forward(work, pointer(workspace), {device, pointer(stream)});
}

void cuda_tdpo_loss_finish(int device, uintptr_t stream, const tdpo::TdpoLossForward& work,
                           uintptr_t workspace) {
  const py::gil_scoped_release unlocked;
  tdpo::cuda::tdpo_loss_finish(work, pointer(workspace), {device, pointer(stream)});
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

py::dict dtypes() {
  py::dict codes;
  for (const tdpo::NamedDType& named : tdpo::kDTypeNames) {
    codes[named.name] = static_cast<int>(named.dtype);
  }
  return codes;
}

py::dict build_info() {
#if defined(TDPO_CUDA)
  const bool cuda = true;
#else
  const bool cuda = false;
#endif
  py::dict info;
  info["compiler"] = TDPO_COMPILER;
  info["openmp"] = tdpo::cpu::openmp_runtime();
  info["cuda"] = cuda;
  info["no_cuda_because"] = TDPO_NO_CUDA_BECAUSE;
  return info;
}

}  // namespace

PYBIND11_MODULE(_core, module) {
  module.doc() =
      "Compiled kernels of tdpo_ext. tdpo_ext.token_statistics.kernels calls them, with checked "
      "tensors.";
  tdpo::python::bind_all(module, tdpo::AllStructs{});
  for (const tdpo::Constant& constant : tdpo::kConstants) {
    module.attr(constant.name) = constant.value;
  }
  module.attr("DTYPES") = dtypes();
  module.def("token_stats_forward", &token_stats_forward, "instruction_set"_a, "threads"_a,
             "work"_a);
  module.def("token_stats_tile", &token_stats_tile, "instruction_set"_a, "threads"_a, "work"_a);
  module.def("token_stats_finish", &token_stats_finish, "instruction_set"_a, "threads"_a, "work"_a);
  module.def("token_stats_backward", &token_stats_backward, "instruction_set"_a, "threads"_a,
             "work"_a);
  module.def("tdpo_loss_forward", &tdpo_loss_forward, "instruction_set"_a, "threads"_a, "work"_a);
  module.def("tdpo_loss_finish", &tdpo_loss_finish, "instruction_set"_a, "threads"_a, "work"_a);
  module.def("instruction_sets", &instruction_sets);
#if defined(TDPO_CUDA)
  module.def("cuda_forward_workspace_bytes", &tdpo::cuda::forward_workspace_bytes, "problem"_a);
  module.def("cuda_divergences_workspace_bytes", &tdpo::cuda::divergences_workspace_bytes,
             "problem"_a);
  module.def("cuda_token_stats_forward", &cuda_token_stats_forward, "device"_a, "stream"_a,
             "work"_a, "workspace"_a);
  module.def("cuda_token_stats_tile", &cuda_token_stats_tile, "device"_a, "stream"_a, "work"_a,
             "workspace"_a);
  module.def("cuda_token_stats_finish", &cuda_token_stats_finish, "device"_a, "stream"_a, "work"_a);
  module.def("cuda_token_stats_backward", &cuda_token_stats_backward, "device"_a, "stream"_a,
             "work"_a);
  module.def("cuda_loss_workspace_bytes", &tdpo::cuda::loss_workspace_bytes, "problem"_a);
  module.def("cuda_tdpo_loss_forward", &cuda_tdpo_loss_forward, "device"_a, "stream"_a, "work"_a,
             "workspace"_a);
  module.def("cuda_loss_finish_workspace_bytes", &tdpo::cuda::loss_finish_workspace_bytes,
             "problem"_a);
  module.def("cuda_tdpo_loss_finish", &cuda_tdpo_loss_finish, "device"_a, "stream"_a, "work"_a,
             "workspace"_a);
  module.def("cuda_runtime", &cuda_runtime);
  module.def("cuda_cannot_run_because", &tdpo::cuda::cannot_run_because, "device"_a);
#endif
  module.def("build_info", &build_info);
}
