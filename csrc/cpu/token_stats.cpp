// The entry points on the CPU: rows over threads.
//
// A thread takes a whole row, or where rows are few a part of one. How rows are split depends on
// the shape alone, and the records of parts are merged in order, so the same inputs give the same
// bits for any number of threads. The kernels of a row are in row_forward.inl and row_backward.inl.
#include "../token_stats.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "../pair_loss.h"
#include "../row_outputs.h"
#include "huge_pages.h"
#include "row_kernels.h"
#include "threads.h"

namespace tdpo::cpu {
namespace {

// Below this many vocabulary entries in total a parallel region costs more than it gains.
constexpr int64_t kSerialWork = 1 << 15;
// Finishing a row costs as much as this many entries, and adding its statistics to its sequence's
// as much as this many.
constexpr int64_t kWorkOfFinish = 256, kWorkOfRowSum = 8;

// Fewer rows than kFewRows are split into about kWantedParts parts in all, each at least kLeastPart
// wide.
constexpr int64_t kFewRows = 8, kWantedParts = 16, kLeastPart = 16384;

struct Split {
  int64_t parts;  // parts of each row
  int64_t width;  // of a part; the last may be narrower
};

Split split_of(const TokenStatsProblem& problem) {
  const int64_t rows = problem.rows, vocabulary = problem.vocabulary;
  if (rows >= kFewRows || vocabulary < 2 * kLeastPart) return {1, vocabulary};
  const int64_t most = std::min(vocabulary / kLeastPart, kWantedParts / std::max<int64_t>(rows, 1));
  int64_t parts = 1;  // a power of two, so that 2, 4 or 8 threads have equal work
  while (2 * parts <= most) parts *= 2;
  const int64_t width = (vocabulary / parts / kGroup + 1) * kGroup;
  return {(vocabulary + width - 1) / width, width};
}

constexpr int64_t kNoLabel = -1;

// A part of a row. The label counts from the part's first entry.
struct Part {
  int64_t row, start, width, label;
  bool ignored;
};

Part part_of(const TokenStatsProblem& problem, const Split& split, int64_t index) {
  const int64_t row = index / split.parts, start = index % split.parts * split.width;
  const int64_t label = label_of(problem, row);
  // ignore_index may be the lowest number.
  return {row, start, std::min(split.width, problem.vocabulary - start),
          label == problem.ignore_index ? kNoLabel : label - start, label == problem.ignore_index};
}

size_t logit_size(DType dtype) {
  switch (dtype) {  // without a default: a new dtype shall be a compiler's warning here
    case DType::kFloat32:
      return 4;
    case DType::kFloat64:
      return 8;
    case DType::kBFloat16:
    case DType::kFloat16:
      return 2;
  }
  throw std::invalid_argument("unknown dtype");
}

template <class Pointer>
Pointer advance(Pointer data, int64_t elements, size_t element_size) {
  using Byte =
      std::conditional_t<std::is_const_v<std::remove_pointer_t<Pointer>>, const char, char>;
  return static_cast<Byte*>(data) + elements * static_cast<int64_t>(element_size);
}

// Calls body with 0 to count - 1: the indices of rows, or of their parts. Threads take them one by
// one, since ignored rows cost nothing and an even split of the rows would be uneven work.
template <class Body>
void in_parallel(int64_t count, int64_t entries_of_each, int threads, const Body& body) {
  if (threads == 1 || count * entries_of_each <= kSerialWork) {
    for (int64_t index = 0; index < count; ++index) body(index);
    return;
  }
  const auto call = [](const void* body, int64_t index) {
    (*static_cast<const Body*>(body))(index);
  };
  run_on_threads(count, threads, call, &body);
}

// Calls body with a 0 of Real, the type that a dtype is computed and added up in.
template <class Body>
void with_real(DType dtype, const Body& body) {
  if (dtype == DType::kFloat64) {
    body(double(0));
  } else {
    body(float(0));
  }
}

const void* logits_of(const Logits& logits, const Part& part, DType dtype) {
  return advance(logits.data, row_offset(logits.rows, part.row) + part.start, logit_size(dtype));
}

RowForward forward_of(const TokenStatsProblem& problem, const Part& part, void* record) {
  return {logits_of(problem.policy, part, problem.dtype),
          logits_of(problem.reference, part, problem.dtype), part.width, part.label, record};
}

template <bool kDivergences>
auto forward_kernel(const RowKernels& kernels, DType dtype) {
  const auto& of_dtypes = kDivergences ? kernels.divergences_forward : kernels.forward;
  return of_dtypes[static_cast<int>(dtype)];
}

// Calls body with a constant that says whether divergences are asked for.
template <class Body>
void with_divergences(bool divergences, const Body& body) {
  divergences ? body(std::true_type()) : body(std::false_type());
}

// The statistics of rows, whose labels are all valid.
template <class Real, bool kDivergences>
void forward_rows(const TokenStatsForward& work, const RowKernels& kernels, int threads) {
  using Stats = LabelledStats<Real, kDivergences>;
  const TokenStatsProblem& problem = work.problem;
  const auto kernel = forward_kernel<kDivergences>(kernels, problem.dtype);
  const Split split = split_of(problem);
  const int64_t parts = problem.rows * split.parts;
  const Stats empty = empty_labelled_stats<Real, kDivergences>();
  std::vector<Stats> records(split.parts > 1 ? parts : 0, empty);
  const auto finish = [&](int64_t row, const Stats* of_row) {
    Stats stats = of_row[0];
    for (int64_t i = 1; i < split.parts; ++i) stats = merge(stats, of_row[i]);
    write_outputs(work.outputs, row, finalise(stats));
  };
  in_parallel(parts, split.width, threads, [&](int64_t index) {
    const Part part = part_of(problem, split, index);
    if (part.ignored) {
      if (part.start == 0) {
        fill_outputs<Real, kDivergences>(work.outputs, part.row, LabelKind::kIgnored);
      }
    } else if (split.parts > 1) {
      kernel(forward_of(problem, part, &records[index]));
    } else {
      Stats stats = empty;
      kernel(forward_of(problem, part, &stats));
      finish(part.row, &stats);
    }
  });
  if (split.parts == 1) return;
  for (int64_t row = 0; row < problem.rows; ++row) {
    if (label_kind(problem, row) != LabelKind::kIgnored) finish(row, &records[row * split.parts]);
  }
}

template <class Real>
SequenceTerms sums_of_sequence(const TdpoLossForward& work, int64_t sequence) {
  const int64_t end = sequence_begin(work.problem, sequence + 1);
  SequenceTerms sums = no_terms();
  for (int64_t row = sequence_begin(work.problem, sequence); row < end; ++row) {
    add_row<Real>(sums, work, row);
  }
  return sums;
}

template <class Real>
void finish_loss(const TdpoLossForward& work, int threads) {
  const int64_t pairs = work.problem.sequences.count / 2;
  std::vector<double> losses(pairs);
  const int64_t rows_of_pair = work.problem.rows / std::max<int64_t>(pairs, 1) + 1;
  in_parallel(pairs, rows_of_pair * kWorkOfRowSum, threads, [&](int64_t pair) {
    losses[pair] = write_pair<Real>(work, pair, pairs, sums_of_sequence<Real>(work, pair),
                                    sums_of_sequence<Real>(work, pairs + pair));
  });
  double sum = 0;
  for (const double loss : losses) sum += loss;
  write_reduced<Real>(work, sum, pairs);
}

}  // namespace

int64_t token_stats_forward(const TokenStatsForward& work, const RowKernels& kernels, int threads) {
  const int64_t refusal = work.unlabelled ? kAllLabelsValid : refusal_of(work.problem);
  if (refusal != kAllLabelsValid) return refusal;
  with_real(work.problem.dtype, [&](auto real) {
    with_divergences(has_divergences(work.outputs), [&](auto divergences) {
      forward_rows<decltype(real), divergences()>(work, kernels, threads);
    });
  });
  return kAllLabelsValid;
}

int64_t tdpo_loss_forward(const TdpoLossForward& work, const RowKernels& kernels, int threads) {
  const int64_t refusal = refusal_of(work.problem);
  if (refusal != kAllLabelsValid) return refusal;
  with_real(work.problem.dtype, [&](auto real) {
    using Real = decltype(real);
    const int64_t rows = work.problem.rows;
    const std::unique_ptr<Real[]> statistics(new Real[3 * rows]);
    TdpoLossForward of_rows = work;
    of_rows.statistics = {&statistics[0], &statistics[rows], &statistics[2 * rows],
                          work.statistics.normalizers};
    forward_rows<Real, false>({work.problem, of_rows.statistics}, kernels, threads);
    finish_loss<Real>(of_rows, threads);
  });
  return kAllLabelsValid;
}

int64_t tdpo_loss_finish(const TdpoLossForward& work, int threads) {
  if (!bounds_are_usable(work.problem)) return kBoundsNotUsable;
  with_real(work.problem.dtype, [&](auto real) { finish_loss<decltype(real)>(work, threads); });
  return kAllLabelsValid;
}

void token_stats_tile(const TokenStatsTile& work, const RowKernels& kernels, int threads) {
  const TokenStatsProblem& problem = work.problem;
  const Split whole = {1, problem.vocabulary};
  with_real(problem.dtype, [&](auto real) {
    with_divergences(work.divergences, [&](auto divergences) {
      const auto kernel = forward_kernel<divergences()>(kernels, problem.dtype);
      auto* records = static_cast<LabelledStats<decltype(real), divergences()>*>(work.records);
      in_parallel(problem.rows, problem.vocabulary, threads, [&](int64_t row) {
        const Part part = part_of(problem, whole, row);
        if (!part.ignored) kernel(forward_of(problem, part, records + row));
      });
    });
  });
}

void token_stats_finish(const TokenStatsFinish& work, int threads) {
  const auto finish = [&](auto real, auto divergences) {
    using Real = decltype(real);
    using Stats = LabelledStats<Real, divergences()>;
    const auto* records = static_cast<const Stats*>(work.records);
    in_parallel(work.rows, kWorkOfFinish, threads, [&](int64_t row) {
      const LabelKind kind = label_kind(work, row);
      if (!has_results(kind, work.unlabelled)) {
        return fill_outputs<Real, divergences()>(work.outputs, row, kind);
      }
      Stats stats = records[row];
      for (int64_t set = 1; set < work.sets; ++set) {
        stats = merge(stats, records[set * work.rows + row]);
      }
      write_outputs(work.outputs, row, finalise(stats));
    });
  };
  with_real(work.dtype, [&](auto real) {
    with_divergences(has_divergences(work.outputs),
                     [&](auto divergences) { finish(real, divergences); });
  });
}

namespace {

auto backward_kernel(const TokenStatsBackward& work, const RowKernels& kernels) {
  const int dtype = static_cast<int>(work.problem.dtype);
  auto kernel = kernels.backward[dtype][static_cast<int>(work.gradient_dtype)];
  if (has_divergences(work.upstream)) {
    kernel =
        work.gradient_dtype == work.problem.dtype ? kernels.divergences_backward[dtype] : nullptr;
  }
  if (!kernel) throw std::invalid_argument("no kernel of this gradient's dtype");
  return kernel;
}

}  // namespace

void token_stats_backward(const TokenStatsBackward& work, const RowKernels& kernels, int threads) {
  const TokenStatsProblem& problem = work.problem;
  const size_t entry_bytes = logit_size(work.gradient_dtype);
  const auto kernel = backward_kernel(work, kernels);
  const Split split = split_of(problem);
  const RowLayout& rows = work.gradient_rows;
  if (work.gradient != problem.policy.data && rows.dims == 1 &&
      rows.strides[0] == problem.vocabulary) {
    wish_for_huge_pages(work.gradient,
                        static_cast<size_t>(problem.rows * problem.vocabulary) * entry_bytes);
  }
  with_real(problem.dtype, [&](auto real) {
    using Real = decltype(real);
    in_parallel(problem.rows * split.parts, split.width, threads, [&](int64_t index) {
      const Part part = part_of(problem, split, index);
      const int64_t row = part.row;
      RowBackward work_of_part;
      work_of_part.vocabulary = part.width;
      work_of_part.label = part.label;
      work_of_part.gradient =
          advance(work.gradient, row_offset(work.gradient_rows, row) + part.start, entry_bytes);
      if (part.ignored) {
        std::memset(work_of_part.gradient, 0, static_cast<size_t>(part.width) * entry_bytes);
        return;
      }
      work_of_part.policy = logits_of(problem.policy, part, problem.dtype);
      work_of_part.reference = logits_of(problem.reference, part, problem.dtype);
      const auto compute = [&](const auto* normalizers, const auto& upstream) {
        work_of_part.normalizers = normalizers + row;
        work_of_part.upstream = &upstream;
        kernel(work_of_part);
      };
      if (has_divergences(work.upstream)) {
        compute(static_cast<const DivergenceNormalizers<Real>*>(work.normalizers),
                divergence_upstream_of<Real>(work.upstream, row));
      } else {
        compute(static_cast<const Normalizers<Real>*>(work.normalizers),
                upstream_of<Real>(work, row));
      }
    });
  });
}

}  // namespace tdpo::cpu
