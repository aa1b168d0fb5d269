// The CUDA kernels, compiled for the CPU, behind a C interface for the tests.
#include <cuda_runtime.h>

#include <exception>

#include "cuda/team.cuh"
#include "description.h"
#include "row_outputs.h"
#include "token_stats.h"

namespace tdpo::cuda {
constexpr size_t kSharedBytes = 4096;
alignas(16) unsigned char tdpo_shared_memory[kSharedBytes];
}  // namespace tdpo::cuda

cuda_on_cpu::SharedMemory cuda_on_cpu::shared_memory() {
  return {tdpo::cuda::tdpo_shared_memory, tdpo::cuda::kSharedBytes};
}

namespace {

std::string message;

template <class Body>
const char* message_of(const Body& body) {
  message.clear();
  try {
    body();
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}

}  // namespace

// Memory from an allocator holds old data. Here that is NaN, which shows in the results if a kernel
// reads what it has not written.
std::vector<uint64_t> workspace_of(int64_t bytes) {
  return std::vector<uint64_t>(static_cast<size_t>(bytes) / sizeof(uint64_t) + 1, ~uint64_t(0));
}

std::vector<uint64_t> workspace_for(const tdpo::TokenStatsProblem& problem, bool divergences) {
  return workspace_of(divergences ? tdpo::cuda::divergences_workspace_bytes(problem)
                                  : tdpo::cuda::forward_workspace_bytes(problem));
}

// Each function returns an error message, which is empty if there was no error.

extern "C" const char* emulated_forward(const tdpo::TokenStatsForward* work) {
  return message_of([&] {
    auto workspace = workspace_for(work->problem, tdpo::has_divergences(work->outputs));
    tdpo::cuda::token_stats_forward(*work, workspace.data(), {0, nullptr});
  });
}

extern "C" const char* emulated_tile(const tdpo::TokenStatsTile* work) {
  return message_of([&] {
    auto workspace = workspace_for(work->problem, work->divergences);
    tdpo::cuda::token_stats_tile(*work, workspace.data(), {0, nullptr});
  });
}

extern "C" const char* emulated_finish(const tdpo::TokenStatsFinish* work) {
  return message_of([&] { tdpo::cuda::token_stats_finish(*work, {0, nullptr}); });
}

extern "C" const char* emulated_backward(const tdpo::TokenStatsBackward* work) {
  return message_of([&] { tdpo::cuda::token_stats_backward(*work, {0, nullptr}); });
}

extern "C" const char* emulated_loss_forward(const tdpo::TdpoLossForward* work) {
  return message_of([&] {
    auto workspace = workspace_of(tdpo::cuda::loss_workspace_bytes(work->problem));
    tdpo::cuda::tdpo_loss_forward(*work, workspace.data(), {0, nullptr});
  });
}

extern "C" const char* emulated_loss_finish(const tdpo::TdpoLossForward* work) {
  return message_of([&] {
    auto workspace = workspace_of(tdpo::cuda::loss_finish_workspace_bytes(work->problem));
    tdpo::cuda::tdpo_loss_finish(*work, workspace.data(), {0, nullptr});
  });
}

// Whether the bounds of sequences are what tdpo_loss_finish needs; the kernels do not look first.
extern "C" int emulated_bounds_are_usable(const tdpo::TokenStatsProblem* problem) {
  return tdpo::bounds_are_usable(*problem);
}

// The check that the op makes on the CPU; the kernels do not make it on a card.
extern "C" int64_t emulated_refusal(const tdpo::TokenStatsProblem* problem) {
  return tdpo::refusal_of(*problem);
}

extern "C" const char* emulated_description() {
  static const std::string text = tdpo::description();
  return text.c_str();
}

extern "C" long emulated_launches() { return cuda_on_cpu::launches; }

extern "C" const char* emulated_path() { return TDPO_INLINE_PTX ? "inline PTX" : "plain"; }

// Whether a * b + c rounds the product before the sum ("plain") or not ("fma").
extern "C" const char* emulated_rounding() {
  volatile float above_1 = 1 + 0x1p-12f, minus_square = -(1 + 0x1p-11f);
  const float factor = above_1;
  return factor * factor + minus_square == 0 ? "plain" : "fma";
}

extern "C" void emulated_set_ex2_error(double relative) { cuda_on_cpu::ex2_error = relative; }

extern "C" void emulated_run_warps_backwards(int backwards) {
  cuda_on_cpu::run_warps_backwards = backwards != 0;
}
