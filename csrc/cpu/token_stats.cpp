// Rows over threads. Each row is one thread's from start to end, so the same inputs give the same
// bits for any number of threads.
#include "../token_stats.h"

#include <cmath>
#include <cstring>
#include <type_traits>

#include "row_kernels.h"

namespace tdpo::cpu {
namespace {

// Below this many vocabulary entries in total a parallel region costs more than it gains.
constexpr int64_t kSerialWork = 1 << 15;
// What finishing a row costs, in such entries.
constexpr int64_t kWorkOfFinish = 256;

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
void for_each_row(int64_t rows, int64_t entries_of_a_row, int threads, const Body& body) {
  const bool parallel = threads > 1 && rows * entries_of_a_row > kSerialWork;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (parallel)
  for (int64_t row = 0; row < rows; ++row) body(row);
  static_cast<void>(parallel);
}

// Calls body with a 0 of the accumulation type.
template <class Body>
void with_real(DType dtype, const Body& body) {
  if (dtype == DType::kFloat64) {
    body(double(0));
  } else {
    body(float(0));
  }
}

RowForward row_of(const TokenStatsProblem& problem, int64_t row, void* record) {
  const size_t logit = logit_size(problem.dtype);
  return {advance(problem.policy.data, row_offset(problem.policy.rows, row), logit),
          advance(problem.reference.data, row_offset(problem.reference.rows, row), logit),
          problem.vocabulary, problem.labels[row], record};
}

template <class Real>
RowSummary<Real> row_of_nothing(Real x) {
  return {x, x, x, {x, x, x, x, x, x, x, x}};
}

template <class Real>
void write(const TokenStatsOutputs& outputs, int64_t row, const RowSummary<Real>& summary) {
  static_cast<Real*>(outputs.policy_logps)[row] = summary.policy_logp;
  static_cast<Real*>(outputs.reference_logps)[row] = summary.reference_logp;
  static_cast<Real*>(outputs.forward_kl)[row] = summary.forward_kl;
  static_cast<Normalizers<Real>*>(outputs.normalizers)[row] = summary.normalizers;
}

}  // namespace

int64_t token_stats_forward(const TokenStatsForward& work, const RowKernels& kernels, int threads) {
  const TokenStatsProblem& problem = work.problem;
  const int64_t wrong = first_wrong_label(problem);
  if (wrong != kAllLabelsValid) return wrong;
  const auto kernel = kernels.forward[static_cast<int>(problem.dtype)];
  with_real(problem.dtype, [&](auto real) {
    using Real = decltype(real);
    for_each_row(problem.rows, problem.vocabulary, threads, [&](int64_t row) {
      const int64_t label = problem.labels[row];
      if (label == problem.ignore_index) {
        write(work.outputs, row, row_of_nothing(Real(0)));
        return;
      }
      LabelledStats<Real> stats = empty_labelled_stats<Real>();
      kernel(row_of(problem, row, &stats));
      write(work.outputs, row, finalise(stats));
    });
  });
  return kAllLabelsValid;
}

void token_stats_tile(const TokenStatsTile& work, const RowKernels& kernels, int threads) {
  const TokenStatsProblem& problem = work.problem;
  const auto kernel = kernels.forward[static_cast<int>(problem.dtype)];
  with_real(problem.dtype, [&](auto real) {
    auto* records = static_cast<LabelledStats<decltype(real)>*>(work.records);
    for_each_row(problem.rows, problem.vocabulary, threads, [&](int64_t row) {
      if (problem.labels[row] == problem.ignore_index) return;
      kernel(row_of(problem, row, records + row));
    });
  });
}

void token_stats_finish(const TokenStatsFinish& work, int threads) {
  with_real(work.dtype, [&](auto real) {
    using Real = decltype(real);
    const auto* records = static_cast<const LabelledStats<Real>*>(work.records);
    for_each_row(work.rows, kWorkOfFinish, threads, [&](int64_t row) {
      const int64_t label = work.labels[row];
      const bool ignored = label == work.ignore_index;
      if (ignored || label < 0 || label >= work.vocabulary) {
        write(work.outputs, row, row_of_nothing(ignored ? Real(0) : Real(NAN)));
        return;
      }
      LabelledStats<Real> stats = records[row];
      for (int64_t set = 1; set < work.sets; ++set) {
        stats = merge(stats, records[set * work.rows + row]);
      }
      write(work.outputs, row, finalise(stats));
    });
  });
}

void token_stats_backward(const TokenStatsBackward& work, const RowKernels& kernels, int threads) {
  const TokenStatsProblem& problem = work.problem;
  const size_t logit = logit_size(problem.dtype), real = accumulator_size(problem.dtype);
  const auto kernel = kernels.backward[static_cast<int>(problem.dtype)];
  for_each_row(problem.rows, problem.vocabulary, threads, [&](int64_t row) {
    RowBackward one;
    one.vocabulary = problem.vocabulary;
    one.label = problem.labels[row];
    one.gradient = advance(work.gradient, row_offset(work.gradient_rows, row), logit);
    if (one.label == problem.ignore_index) {
      std::memset(one.gradient, 0, static_cast<size_t>(problem.vocabulary) * logit);
      return;
    }
    one.policy = advance(problem.policy.data, row_offset(problem.policy.rows, row), logit);
    one.reference = advance(problem.reference.data, row_offset(problem.reference.rows, row), logit);
    one.normalizers = advance(work.normalizers, row, sizeof(Normalizers<char>) * real);
    one.grad_policy_logp = advance(work.grad_policy_logps, row, real);
    one.grad_forward_kl = advance(work.grad_forward_kl, row, real);
    kernel(one);
  });
}

}  // namespace tdpo::cpu
