// Forward of the loss: from the statistics of rows to the losses of pairs.
//
//   margin = sum log p(y) - log q(y)     K = sum KL(q || p)     loss = -log sigmoid(beta (...))
//
// over the rows of each sequence, the loss as in pair_loss.h. Reads log p(y), log q(y) and KL [N]
// of Real, and labels where means are asked for. Writes PairQuantity [9, B], slopes [2B] and the
// loss in Real; in between, four doubles a sequence in the workspace.
//
//   rows, as in token_stats_forward.cu
//   a block per sequence: each thread adds every 224th row in double; then lanes, then warps
//   one block: each thread takes every 224th pair; their losses are added likewise
//
// Roofline: 12 bytes a row beside the 2 V S bytes of its logits, and a few operations in double.
// The two kernels take the time of two launches. A sequence of 65536 rows gives each thread 293 of
// them.
//
// Decomposition: the order of sums depends on the length of a sequence and on nothing else. There
// are no atomics, and the host waits for nothing.
#include "../pair_loss.h"
#include "launch.cuh"

namespace tdpo::cuda {
namespace {

// Shared memory of a sum over a block: a number of each warp. Written once in a kernel, so one
// barrier is enough.
struct Place {
  double of_warp[kBlockWarps];
};

__device__ __forceinline__ Place* places() { return reinterpret_cast<Place*>(tdpo_shared_memory); }

// The same bits in every thread.
__device__ __forceinline__ double sum_block(double value, Place& place) {
  const double of_warp = sum_lanes(value);
  if (lane_index() == 0) place.of_warp[warp_index()] = of_warp;
  __syncthreads();
  double sum = 0;
  for (int warp = 0; warp < kBlockWarps; ++warp) sum += place.of_warp[warp];
  return sum;
}

template <class Real>
__global__ void __launch_bounds__(kThreads, 1)
    sequence_sums_kernel(const TdpoLossForward work, SequenceTerms* sums) {
  const int64_t sequence = blockIdx.x;
  const uint32_t end = static_cast<uint32_t>(sequence_begin(work.problem, sequence + 1));
  uint32_t row = static_cast<uint32_t>(sequence_begin(work.problem, sequence)) + threadIdx.x;
  SequenceTerms own = no_terms();
  for (; row < end; row += kThreads) add_row<Real>(own, work, row);
  const SequenceTerms all = {sum_block(own.logps, places()[0]), sum_block(own.margin, places()[1]),
                             sum_block(own.kl, places()[2]), sum_block(own.kept, places()[3])};
  if (threadIdx.x == 0) sums[sequence] = all;
}

__device__ SequenceTerms plus(const SequenceTerms& terms, double x) {
  return {terms.logps + x, terms.margin + x, terms.kl + x, terms.kept};
}

// Where the bounds of sequences are not usable, NaN is added to all terms.
template <class Real>
__global__ void __launch_bounds__(kThreads, 1)
    pairs_kernel(const TdpoLossForward work, const SequenceTerms* sums) {
  const Sequences& sequences = work.problem.sequences;
  double not_usable = 0;
  if (sequences.bounds) {
    for (int64_t i = threadIdx.x; i <= sequences.count; i += kThreads) {
      not_usable += bound_is_usable(work.problem, i) ? 0 : 1;
    }
  }
  not_usable = sum_block(not_usable, places()[0]);
  const double poison = not_usable > 0 ? double(NAN) : 0;
  const int64_t pairs = sequences.count / 2;
  double own = poison;
  for (int64_t pair = threadIdx.x; pair < pairs; pair += kThreads) {
    const SequenceTerms chosen = plus(sums[pair], poison);
    const SequenceTerms rejected = plus(sums[pairs + pair], poison);
    own += write_pair<Real>(work, pair, pairs, chosen, rejected);
  }
  const double sum = sum_block(own, places()[1]);
  if (threadIdx.x == 0) write_reduced<Real>(work, sum, pairs);
}

// The parts of the workspace: what the rows' kernels need, the statistics of rows, and the sums of
// sequences. Each begins at a multiple of 16 bytes.
struct Workspace {
  int64_t statistics, of_statistic, sums, bytes;
};

int64_t rounded_up(int64_t bytes) { return (bytes + 15) / 16 * 16; }

Workspace workspace_of(const TokenStatsProblem& problem) {
  const int64_t real_bytes = problem.dtype == DType::kFloat64 ? 8 : 4;
  Workspace parts;
  parts.statistics = rounded_up(forward_workspace_bytes(problem));
  parts.of_statistic = rounded_up(problem.rows * real_bytes);
  parts.sums = parts.statistics + 3 * parts.of_statistic;
  parts.bytes = parts.sums + loss_finish_workspace_bytes(problem);
  return parts;
}

template <class Real>
void launch_finish(const TdpoLossForward& work, SequenceTerms* sums, const Launch& launch) {
  const int64_t sequences = work.problem.sequences.count;
  if (sequences > 0) {
    launch_kernel("sequence_sums_kernel", sequence_sums_kernel<Real>,
                  dim3(blocks_for(sequences, 1)), 4 * int(sizeof(Place)), launch, work, sums);
  }
  launch_kernel("pairs_kernel", pairs_kernel<Real>, dim3(1), 2 * int(sizeof(Place)), launch, work,
                sums);
}

}  // namespace

int64_t loss_workspace_bytes(const TokenStatsProblem& problem) {
  return workspace_of(problem).bytes;
}

int64_t loss_finish_workspace_bytes(const TokenStatsProblem& problem) {
  return problem.sequences.count * int64_t(sizeof(SequenceTerms));
}

void tdpo_loss_forward(const TdpoLossForward& work, void* workspace, const Launch& launch) {
  const Workspace parts = workspace_of(work.problem);
  char* start = static_cast<char*>(workspace);
  char* statistics = start + parts.statistics;
  TdpoLossForward of_rows = work;
  of_rows.statistics = {statistics, statistics + parts.of_statistic,
                        statistics + 2 * parts.of_statistic, work.statistics.normalizers};
  token_stats_forward({work.problem, of_rows.statistics}, workspace, launch);
  tdpo_loss_finish(of_rows, start + parts.sums, launch);
}

void tdpo_loss_finish(const TdpoLossForward& work, void* workspace, const Launch& launch) {
  check_rows(work.problem.rows);
  const OnDevice guard(launch.device);
  auto* sums = static_cast<SequenceTerms*>(workspace);
  if (work.problem.dtype == DType::kFloat64) {
    launch_finish<double>(work, sums, launch);
  } else {
    launch_finish<float>(work, sums, launch);
  }
}

}  // namespace tdpo::cuda
