// Rows over threads. A row is one thread's from start to end, or where rows are few each piece of
// it is; the shape alone decides, so the same inputs give the same bits for any number of threads.
#include "../token_stats.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "huge_pages.h"
#include "row_kernels.h"

namespace tdpo::cpu {
namespace {

// Below this many vocabulary entries in total a parallel region costs more than it gains.
constexpr int64_t kSerialWork = 1 << 15;
// What finishing a row costs, in such entries.
constexpr int64_t kWorkOfFinish = 256;

// Fewer rows than this are split, into about kPieces in all, none of them short.
constexpr int64_t kFewRows = 8, kPieces = 16, kLeastPiece = 16384;
// What backward decides for entries together: pieces start at a multiple of it.
constexpr int64_t kTogether = 64;

struct Split {
  int64_t pieces, width;  // of a row; the last piece may be narrower
};

Split split_of(const TokenStatsProblem& problem) {
  const int64_t rows = problem.rows, vocabulary = problem.vocabulary;
  if (rows >= kFewRows || vocabulary < 2 * kLeastPiece) return {1, vocabulary};
  const int64_t longest = vocabulary / kLeastPiece, wanted = kPieces / std::max<int64_t>(rows, 1);
  int64_t pieces = 1;  // a power of two: as much for each of 2, 4 or 8 threads
  while (2 * pieces <= std::min(longest, wanted)) pieces *= 2;
  const int64_t width = (vocabulary / pieces / kTogether + 1) * kTogether;
  return {(vocabulary + width - 1) / width, width};
}

// One piece of a row.
struct Piece {
  int64_t row, start, width, label;
};

Piece piece_of(const TokenStatsProblem& problem, const Split& split, int64_t index) {
  const int64_t row = index / split.pieces, start = index % split.pieces * split.width;
  return {row, start, std::min(split.width, problem.vocabulary - start),
          problem.labels[row] - start};
}

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

const void* logits_of(const Logits& logits, const Piece& piece, DType dtype) {
  return advance(logits.data, row_offset(logits.rows, piece.row) + piece.start, logit_size(dtype));
}

RowForward forward_of(const TokenStatsProblem& problem, const Piece& piece, void* record) {
  return {logits_of(problem.policy, piece, problem.dtype),
          logits_of(problem.reference, piece, problem.dtype), piece.width, piece.label, record};
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
  const Split split = split_of(problem);
  with_real(problem.dtype, [&](auto real) {
    using Real = decltype(real);
    using Records = std::vector<LabelledStats<Real>>;
    const int64_t pieces = problem.rows * split.pieces;
    Records records(split.pieces > 1 ? pieces : 0, empty_labelled_stats<Real>());
    const auto finish = [&](int64_t row, const LabelledStats<Real>* of_row) {
      LabelledStats<Real> stats = of_row[0];
      for (int64_t i = 1; i < split.pieces; ++i) stats = merge(stats, of_row[i]);
      write(work.outputs, row, finalise(stats));
    };
    for_each_row(pieces, split.width, threads, [&](int64_t index) {
      const Piece piece = piece_of(problem, split, index);
      if (problem.labels[piece.row] == problem.ignore_index) {
        if (piece.start == 0) write(work.outputs, piece.row, row_of_nothing(Real(0)));
      } else if (split.pieces > 1) {
        kernel(forward_of(problem, piece, &records[index]));
      } else {
        LabelledStats<Real> stats = empty_labelled_stats<Real>();
        kernel(forward_of(problem, piece, &stats));
        finish(piece.row, &stats);
      }
    });
    if (split.pieces == 1) return;
    for (int64_t row = 0; row < problem.rows; ++row) {
      if (problem.labels[row] != problem.ignore_index) finish(row, &records[row * split.pieces]);
    }
  });
  return kAllLabelsValid;
}

void token_stats_tile(const TokenStatsTile& work, const RowKernels& kernels, int threads) {
  const TokenStatsProblem& problem = work.problem;
  const auto kernel = kernels.forward[static_cast<int>(problem.dtype)];
  const Split whole = {1, problem.vocabulary};
  with_real(problem.dtype, [&](auto real) {
    auto* records = static_cast<LabelledStats<decltype(real)>*>(work.records);
    for_each_row(problem.rows, problem.vocabulary, threads, [&](int64_t row) {
      if (problem.labels[row] == problem.ignore_index) return;
      kernel(forward_of(problem, piece_of(problem, whole, row), records + row));
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
  const size_t entry = logit_size(work.gradient_dtype), real = accumulator_size(problem.dtype);
  const auto kernel =
      kernels.backward[static_cast<int>(problem.dtype)][static_cast<int>(work.gradient_dtype)];
  if (!kernel) throw std::invalid_argument("no kernel of this gradient's dtype");
  const Split split = split_of(problem);
  const RowLayout& rows = work.gradient_rows;
  if (work.gradient != problem.policy.data && rows.dims == 1 &&
      rows.strides[0] == problem.vocabulary) {
    wish_for_huge_pages(work.gradient,
                        static_cast<size_t>(problem.rows * problem.vocabulary) * entry);
  }
  for_each_row(problem.rows * split.pieces, split.width, threads, [&](int64_t index) {
    const Piece piece = piece_of(problem, split, index);
    const int64_t row = piece.row;
    RowBackward one;
    one.vocabulary = piece.width;
    one.label = piece.label;
    one.gradient = advance(work.gradient, row_offset(work.gradient_rows, row) + piece.start, entry);
    if (problem.labels[row] == problem.ignore_index) {
      std::memset(one.gradient, 0, static_cast<size_t>(piece.width) * entry);
      return;
    }
    one.policy = logits_of(problem.policy, piece, problem.dtype);
    one.reference = logits_of(problem.reference, piece, problem.dtype);
    one.normalizers = advance(work.normalizers, row, sizeof(Normalizers<char>) * real);
    one.grad_policy_logp = advance(work.grad_policy_logps, row, real);
    one.grad_forward_kl = advance(work.grad_forward_kl, row, real);
    kernel(one);
  });
}

}  // namespace tdpo::cpu
