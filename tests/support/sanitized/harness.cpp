// The CPU kernels under a C interface, for tests/support/sanitized_core.py to call with ctypes.
#include <stdexcept>
#include <string>

#include "cpu/row_kernels.h"
#include "description.h"
#include "token_stats.h"

namespace {

std::string message;

// Runs body with the kernels of an instruction set; the error's text, empty if there is none.
template <class Body>
const char* run(const char* instruction_set, const Body& body) {
  message.clear();
  try {
    body(tdpo::cpu::kernels_of(instruction_set));
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}

}  // namespace

extern "C" {

// "baseline avx2 ...": those of this processor.
const char* sanitized_instruction_sets() {
  static std::string names;
  names.clear();
  for (const auto* kernels : tdpo::cpu::available_kernels()) {
    names += (names.empty() ? "" : " ") + std::string(kernels->instruction_set);
  }
  return names.c_str();
}

const char* sanitized_description() {
  static const std::string text = tdpo::description();
  return text.c_str();
}

const char* sanitized_forward(const char* instruction_set, int threads,
                              const tdpo::TokenStatsForward* work, int64_t* wrong_label) {
  return run(instruction_set, [&](const auto& kernels) {
    *wrong_label = tdpo::cpu::token_stats_forward(*work, kernels, threads);
  });
}

const char* sanitized_loss_forward(const char* instruction_set, int threads,
                                   const tdpo::TdpoLossForward* work, int64_t* wrong_label) {
  return run(instruction_set, [&](const auto& kernels) {
    *wrong_label = tdpo::cpu::tdpo_loss_forward(*work, kernels, threads);
  });
}

const char* sanitized_loss_finish(const char* instruction_set, int threads,
                                  const tdpo::TdpoLossForward* work, int64_t* refusal) {
  return run(instruction_set,
             [&](const auto&) { *refusal = tdpo::cpu::tdpo_loss_finish(*work, threads); });
}

const char* sanitized_tile(const char* instruction_set, int threads,
                           const tdpo::TokenStatsTile* work) {
  return run(instruction_set,
             [&](const auto& kernels) { tdpo::cpu::token_stats_tile(*work, kernels, threads); });
}

const char* sanitized_finish(const char* instruction_set, int threads,
                             const tdpo::TokenStatsFinish* work) {
  return run(instruction_set, [&](const auto&) { tdpo::cpu::token_stats_finish(*work, threads); });
}

const char* sanitized_backward(const char* instruction_set, int threads,
                               const tdpo::TokenStatsBackward* work) {
  return run(instruction_set, [&](const auto& kernels) {
    tdpo::cpu::token_stats_backward(*work, kernels, threads);
  });
}

}  // extern "C"
