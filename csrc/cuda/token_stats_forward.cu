// Forward of the token statistics.
//
// Roofline, per pair (z, r) of logits of S bytes: reads 2 S bytes, once. Per row: writes 11
// numbers, and 7 for each warp that works on it, which are read once. Exponentials: one a pair
// where the policy is close to its reference, else two. A card that moves 4.3 TB/s with 132
// multiprocessors at 1.9 GHz passes 1.07e12 bfloat16 pairs a second, which leaves a pair 30 issued
// instructions and 3.7 results of the special-function unit. The close way takes about 22 and 1,
// the far way about 22 and 2, the mixed way about 34 and 2: memory is the limit except where the
// gap between policy and reference is about 1/2 throughout. float32 has twice that room. float64 is
// bound by its arithmetic on cards that have little of it.
//
// Decomposition: a row is one warp's (short rows), one block's, or several blocks' (few long rows).
// Lanes take vectors of 16 bytes in turn; the next vector is on its way while one is worked on. The
// base of a block's sums comes from the first vector of each thread, so that it seldom moves. Each
// warp leaves its record; a second kernel, a thread per row, merges them and computes the results.
#include "launch.cuh"
#include "warp_stats.cuh"

namespace tdpo::cuda {
namespace {

// Blocks that a multiprocessor shall hold at least: with four, 28 KiB are on their way, and 4.3
// TB/s with a latency of 650 ns need 21. Where a side has to be shifted, or a warp is alone with
// its row, registers allow fewer; float64 is bound by arithmetic.
template <class T, int kWarps, bool kShifted>
constexpr int kResidentBlocks = sizeof(T) == 8 ? 1
                                : kWarps == 1  ? 2
                                : kShifted     ? 3
                                               : 4;

template <class T>
__device__ RealOf<T> value_of(T entry) {
  Words words = {};
  Storage<T>::set(words.word, 0, entry);
  RealOf<T> values[Storage<T>::kPerVector];
  Storage<T>::unpack(words.word, values);
  return values[0];
}

enum class LabelKind { kIgnored, kOutside, kEntry };

__device__ __forceinline__ LabelKind label_kind(const TokenStatsProblem& problem, uint32_t row) {
  const int64_t label = problem.labels[row];
  if (label == problem.ignore_index) return LabelKind::kIgnored;
  return label >= 0 && label < problem.vocabulary ? LabelKind::kEntry : LabelKind::kOutside;
}

template <class Real>
__device__ void write_outputs(const TokenStatsForward& work, uint32_t row,
                              const RowSummary<Real>& summary) {
  static_cast<Real*>(work.policy_logps)[row] = summary.policy_logp;
  static_cast<Real*>(work.reference_logps)[row] = summary.reference_logp;
  static_cast<Real*>(work.forward_kl)[row] = summary.forward_kl;
  static_cast<Normalizers<Real>*>(work.normalizers)[row] = summary.normalizers;
}

// For rows that are not read: 0 where the label is ignored, NaN where there is no such label.
template <class Real>
__device__ void fill_outputs(const TokenStatsForward& work, uint32_t row, Real x) {
  write_outputs<Real>(work, row, {x, x, x, {x, x, x, x, x, x, x, x}});
}

// Records of everything but the label: one of each warp that has worked on the row.
// kShifted: some rows of the reference are aligned otherwise than the policy's.
template <class T, int kWarps, bool kShifted>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<T, kWarps, kShifted>)
    row_records_kernel(const TokenStatsForward work, VocabStats<RealOf<T>>* records) {
  using Scope = Team<kWarps>;
  const uint32_t row = blockIdx.x * Scope::kTeams + Scope::index();
  const int part = blockIdx.y, parts = gridDim.y;
  const TokenStatsProblem& problem = work.problem;
  if (row >= problem.rows || label_kind(problem, row) != LabelKind::kEntry) return;

  const T* policy = start_of_row<T>(problem.policy, row);
  const int before = entries_before(policy), vocabulary = static_cast<int>(problem.vocabulary);
  const T* reference = start_of_row<T>(problem.reference, row);
  const Side<T> z(policy), r = kShifted ? Side<T>(reference, before) : Side<T>(reference);
  const RowVectors<T> vectors(before, vocabulary, r.shift == 0);
  const int label = static_cast<int>(problem.labels[row]), label_vector = vectors.of_entry(label);
  const int begin = vectors.part_begin(part, parts), end = vectors.part_begin(part + 1, parts);

  const auto load_inner = [&](int index) {
    Pair<T> pair;
    pair.present = index < end && index != label_vector;
    if (pair.present) {
      pair.policy = z.load(index);
      pair.reference = r.load(index);
    }
    return pair;
  };
  // The entries beside the inner vectors, and those beside the label: one for each lane, since 16
  // loads at a time would need many registers. `round` counts from the first such round.
  const auto load_outer = [&](int round) {
    const int n = round * kLanes + lane_index(), place = n % RowVectors<T>::kPerVector;
    const int index = vectors.outer(n / RowVectors<T>::kPerVector, label_vector);
    const int entry = vectors.start(index) + place;
    Pair<T> pair = {Side<T>::nothing(), Side<T>::nothing(), true};
    if (entry >= 0 && entry < vocabulary && entry != label) {
      Storage<T>::set(pair.policy.word, 0, z.entry(index, place));
      Storage<T>::set(pair.reference.word, 0, r.entry(index, place));
    }
    return pair;
  };

  const int inner_rounds = max(1, (end - begin + Scope::size() - 1) / Scope::size());
  const bool takes_outer = part == 0 && Scope::rank() < kLanes;  // the first warp of the row
  const int rounds = inner_rounds + (takes_outer ? RowVectors<T>::kOuterRounds : 0);
  Pair<T> pair = load_inner(begin + Scope::rank());
  WarpStats<T> stats(WarpStats<T>::template base_of<Scope>(pair));
  bool raised = false;
  for (int round = 1;;) {
    Pair<T> next = {};
    if (round < inner_rounds) next = load_inner(begin + round * Scope::size() + Scope::rank());
    if (!stats.add(pair, raised)) {
      stats.raise_base(pair);
      raised = true;
      continue;  // and load `next` again: kept meanwhile it would cost registers
    }
    raised = false;
    if (round == rounds) break;
    pair = round < inner_rounds ? next : load_outer(round - inner_rounds);
    ++round;
  }
  const VocabStats<RealOf<T>> of_warp = stats.collect();
  if (lane_index() != 0) return;
  const uint64_t block = uint64_t(blockIdx.x) * gridDim.y + blockIdx.y;
  records[block * kBlockWarps + warp_index()] = of_warp;
}

// One thread per row: merges the row's records and writes its results.
template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    finish_rows_kernel(const TokenStatsForward work, int records_of_row,
                       const VocabStats<RealOf<T>>* records) {
  using Real = RealOf<T>;
  const TokenStatsProblem& problem = work.problem;
  const uint32_t row = blockIdx.x * kThreads + threadIdx.x;
  if (row >= problem.rows) return;
  const LabelKind kind = label_kind(problem, row);
  if (kind != LabelKind::kEntry) {
    fill_outputs<Real>(work, row, kind == LabelKind::kIgnored ? Real(0) : Real(NAN));
    return;
  }
  VocabStats<Real> rest = empty_stats<Real>();
  records += uint64_t(row) * records_of_row;
#pragma unroll 1
  for (int i = 0; i < records_of_row; ++i) rest = merge(rest, records[i]);
  const int64_t label = problem.labels[row];
  const Real z = value_of<T>(start_of_row<T>(problem.policy, row)[label]);
  const Real r = value_of<T>(start_of_row<T>(problem.reference, row)[label]);
  write_outputs(work, row, finalise(rest, z, r));
}

template <class T>
int warps_of_row(const TokenStatsProblem& problem) {
  return one_warp_per_row<T>(problem) ? 1 : kBlockWarps * parts_of_row<T>(problem);
}

template <class T, int kWarps>
void launch_row_records(const TokenStatsForward& work, int parts, VocabStats<RealOf<T>>* records,
                        const Launch& launch) {
  using Scope = Team<kWarps>;
  const bool shifted = !same_alignment(work.problem, sizeof(T));
  launch_kernel(
      "row_records_kernel",
      shifted ? row_records_kernel<T, kWarps, true> : row_records_kernel<T, kWarps, false>,
      dim3(blocks_for(work.problem.rows, Scope::kTeams), parts),
      Scope::template kSharedBytes<RealOf<T>>, launch, work, records);
}

template <class T>
void forward(const TokenStatsForward& work, void* workspace, const Launch& launch) {
  auto* records = static_cast<VocabStats<RealOf<T>>*>(workspace);
  if (one_warp_per_row<T>(work.problem)) {
    launch_row_records<T, 1>(work, 1, records, launch);
  } else {
    launch_row_records<T, kBlockWarps>(work, parts_of_row<T>(work.problem), records, launch);
  }
  launch_kernel("finish_rows_kernel", finish_rows_kernel<T>,
                dim3(blocks_for(work.problem.rows, kThreads)), 0, launch, work,
                warps_of_row<T>(work.problem), records);
}

}  // namespace

int64_t forward_workspace_bytes(const TokenStatsProblem& problem) {
  return with_storage(problem.dtype, [&](auto storage) -> int64_t {
    using T = decltype(storage);
    return problem.rows * warps_of_row<T>(problem) * int64_t(sizeof(VocabStats<RealOf<T>>));
  });
}

void token_stats_forward(const TokenStatsForward& work, void* workspace, const Launch& launch) {
  if (work.problem.rows == 0) return;
  check_sizes(work.problem);
  const OnDevice guard(launch.device);
  with_storage(work.problem.dtype,
               [&](auto storage) { forward<decltype(storage)>(work, workspace, launch); });
}

}  // namespace tdpo::cuda
