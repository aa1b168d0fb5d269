// Rows over threads. Each row is one thread's from start to end, so the same inputs give the same
// bits for any number of threads.
#include "../token_stats.h"

#include <cstring>
#include <type_traits>

#include "row_kernels.h"

namespace tdpo::cpu {
namespace {

// Below this many vocabulary entries in total a parallel region costs more than it gains.
constexpr int64_t kSerialWork = 1 << 15;

size_t logit_size(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return 4;
    case DType::kFloat64:
      return 8;
    default:
      return 2;
  }
}

size_t accumulator_size(DType dtype) { return dtype == DType::kFloat64 ? 8 : 4; }

template <class Pointer>
Pointer advance(Pointer data, int64_t elements, size_t element_size) {
  using Byte =
      std::conditional_t<std::is_const_v<std::remove_pointer_t<Pointer>>, const char, char>;
  return static_cast<Byte*>(data) + elements * static_cast<int64_t>(element_size);
}

int64_t first_wrong_label(const TokenStatsProblem& problem) {
  for (int64_t row = 0; row < problem.rows; ++row) {
    const int64_t label = problem.labels[row];
    const bool inside = label >= 0 && label < problem.vocabulary;
    if (!inside && label != problem.ignore_index) return row;
  }
  return kAllLabelsValid;
}

// Ignored rows cost nothing, so an even split of the rows would be uneven work: threads take rows a
// few at a time.
template <class Body>
void for_each_row(const TokenStatsProblem& problem, int threads, const Body& body) {
  const bool parallel = threads > 1 && problem.rows * problem.vocabulary > kSerialWork;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (parallel)
  for (int64_t row = 0; row < problem.rows; ++row) body(row);
  static_cast<void>(parallel);
}

}  // namespace

int64_t token_stats_forward(const TokenStatsForward& work, const RowKernels& kernels, int threads) {
  const TokenStatsProblem& problem = work.problem;
  const int64_t wrong = first_wrong_label(problem);
  if (wrong != kAllLabelsValid) return wrong;
  const size_t logit = logit_size(problem.dtype), real = accumulator_size(problem.dtype);
  const auto kernel = kernels.forward[static_cast<int>(problem.dtype)];
  for_each_row(problem, threads, [&](int64_t row) {
    RowForward one;
    one.vocabulary = problem.vocabulary;
    one.label = problem.labels[row];
    one.policy_logp = advance(work.policy_logps, row, real);
    one.reference_logp = advance(work.reference_logps, row, real);
    one.forward_kl = advance(work.forward_kl, row, real);
    one.normalizers = advance(work.normalizers, row, sizeof(Normalizers<char>) * real);
    if (one.label == problem.ignore_index) {
      std::memset(one.policy_logp, 0, real);
      std::memset(one.reference_logp, 0, real);
      std::memset(one.forward_kl, 0, real);
      std::memset(one.normalizers, 0, sizeof(Normalizers<char>) * real);
      return;
    }
    one.policy = advance(problem.policy.data, row_offset<int64_t>(problem.policy.rows, row), logit);
    one.reference = advance(problem.reference.data, row_offset(problem.reference.rows, row), logit);
    kernel(one);
  });
  return kAllLabelsValid;
}

void token_stats_backward(const TokenStatsBackward& work, const RowKernels& kernels, int threads) {
  const TokenStatsProblem& problem = work.problem;
  const size_t logit = logit_size(problem.dtype), real = accumulator_size(problem.dtype);
  const auto kernel = kernels.backward[static_cast<int>(problem.dtype)];
  for_each_row(problem, threads, [&](int64_t row) {
    RowBackward one;
    one.vocabulary = problem.vocabulary;
    one.label = problem.labels[row];
    one.gradient = advance(work.gradient, row_offset(work.gradient_rows, row), logit);
    if (one.label == problem.ignore_index) {
      std::memset(one.gradient, 0, static_cast<size_t>(problem.vocabulary) * logit);
      return;
    }
    one.policy = advance(problem.policy.data, row_offset<int64_t>(problem.policy.rows, row), logit);
    one.reference = advance(problem.reference.data, row_offset(problem.reference.rows, row), logit);
    one.normalizers = advance(work.normalizers, row, sizeof(Normalizers<char>) * real);
    one.grad_policy_logp = advance(work.grad_policy_logps, row, real);
    one.grad_forward_kl = advance(work.grad_forward_kl, row, real);
    kernel(one);
  });
}

}  // namespace tdpo::cpu
