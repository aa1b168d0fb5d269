// Forward of the token statistics.
//
//   log p(y) = z_y - lse(z)          log q(y) = r_y - lse(r)
//   KL(q || p) = sum_v q_v (log q_v - log p_v)
//
// and with kDivergences KL(p || q) and the entropies of p and q.
//
// Reads policy and reference logits z, r [N, V] of type T, and labels y [N] of int64. Writes, in
// Real (float, or double for double logits), log p(y), log q(y) and KL [N], and the 8 Normalizers
// [N, 8] that backward needs. A tile's forward instead adds to one LabelledStats for each row [N,
// 9]. With kDivergences these are [N, 12] and [N, 13]. The formulas as sums that merge:
// csrc/vocab_stats.h, docs/algebra.md.
//
//   for each row, by a warp, a block or several blocks:
//     base = maxima and lse(z) - lse(r) of the first vectors
//     for each turn of two vectors of each thread:   w = 2^(r L - M), D = (z - r) L - C
//       add up w, w D, w 2^D, w (2^D - 1 - D ln 2)   or on the mixed path (running_stats.cuh)
//     leave a record; a thread per row merges the row's records and adds the label
//
// Roofline, per pair (z, r) of logits of S bytes: reads 2 S bytes, once. Per row: writes 11
// numbers, and 7 for each warp that works on it, which are read once. An H200 (4.3 TB/s in a copy,
// 132 multiprocessors at 1.9 GHz) passes 1.07e12 bfloat16 pairs a second, which leaves a pair 31
// issued instructions and 3.7 results of the special-function unit. The loop of turns takes 23 and
// 2 for gaps of any size (.ci/check_machine_code.py counts them), so memory is the limit. float32
// has twice that room. float64 is bound by its arithmetic on cards that have few units for it.
//
// Decomposition: a warp takes a short row, a block a longer one, several blocks one of few long
// rows. Lanes take vectors of 16 bytes in turn, and load the next while they work on one. The base
// of a block's sums comes from the first vector of each of its threads, so it seldom moves.
#include "../row_outputs.h"
#include "choices.cuh"
#include "launch.cuh"
#include "running_stats.cuh"

namespace tdpo::cuda {
namespace {

// How many blocks a multiprocessor shall hold at least. With five, 35 KiB are in flight, and an
// H200's 4.3 TB/s at a latency of 650 ns need 21. Where a side has to be shifted, a warp is alone
// with its row, or there are more sums, registers allow fewer; float64 is bound by arithmetic.
template <class T, int kWarps, bool kShifted, bool kDivergences>
constexpr int kResidentBlocks = sizeof(T) == 8                              ? 1
                                : kWarps == 1 || (kShifted && kDivergences) ? 2
                                : kShifted || kDivergences                  ? 3
                                                                            : TDPO_FORWARD_BLOCKS;

// At most so many rounds go by one at a time before turns are tried again.
constexpr int kMostSingleRounds = 16;

// One entry as a Real.
template <class T>
__device__ RealOf<T> value_of(T entry) {
  Words words = {};
  Storage<T>::set(words.word, 0, entry);
  RealOf<T> values[Storage<T>::kPerVector];
  Storage<T>::unpack(words.word, values);
  return values[0];
}

// Leaves a record of all entries but the label's for each warp that works on a row.
//
// kShifted: whether some row of the reference is aligned differently from the policy's. `tile`:
// whether the rows are those of a tile, or unlabelled; a row whose label is outside is read then.
template <class T, int kWarps, bool kShifted, bool kDivergences>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<T, kWarps, kShifted, kDivergences>)
    row_records_kernel(const TokenStatsProblem problem, bool tile,
                       StatsOf<RealOf<T>, kDivergences>* records) {
  using Scope = Team<kWarps>;
  using Running = RunningStats<T, kDivergences>;
  const uint32_t row = blockIdx.x * Scope::kTeams + Scope::index();
  const int part = blockIdx.y, parts = gridDim.y;
  if (row >= problem.rows) return;
  const int64_t label_of_row = label_of(problem, row);
  const LabelKind kind = label_kind(label_of_row, problem.vocabulary, problem.ignore_index);
  const bool has_label = kind == LabelKind::kEntry;
  if (kind == LabelKind::kIgnored || (!has_label && !tile)) return;

  const T* policy = start_of_row<T>(problem.policy, row);
  const int before = entries_before(policy), vocabulary = static_cast<int>(problem.vocabulary);
  const T* reference = start_of_row<T>(problem.reference, row);
  const Side<T> z(policy), r = kShifted ? Side<T>(reference, before) : Side<T>(reference);
  const RowVectors<T> vectors(before, vocabulary, r.shift == 0);
  const int label = has_label ? static_cast<int>(label_of_row) : -1;
  const int label_vector = has_label ? vectors.of_entry(label) : -1;
  const int begin = vectors.part_begin(part, parts), end = vectors.part_begin(part + 1, parts);

  const auto load_16 = [](const uint4* address) { return TDPO_FORWARD_LOAD(address); };
  const auto load_inner = [&](int index) {
    SideVectors<T> loaded;
    loaded.present = index >= begin && index < end && index != label_vector;
    if (loaded.present) {
      loaded.policy = z.load(index, load_16);
      loaded.reference = r.load(index, load_16);
    }
    return loaded;
  };
  // The entries of the outer vectors and the others in the label's vector: one for each lane, since
  // all entries of a vector at once would need many registers. `round` counts from the first such
  // round.
  const auto load_outer = [&](int round) {
    const int n = round * kLanes + lane_index(), place = n % RowVectors<T>::kPerVector;
    const int index = vectors.outer(n / RowVectors<T>::kPerVector, label_vector);
    const int entry = vectors.start(index) + place;
    SideVectors<T> loaded = {Side<T>::without_mass(), Side<T>::without_mass(), true};
    if (entry >= 0 && entry < vocabulary && entry != label) {
      Storage<T>::set(loaded.policy.word, 0, z.entry(index, place));
      Storage<T>::set(loaded.reference.word, 0, r.entry(index, place));
    }
    return loaded;
  };

  // A round is one vector of each thread of the team, and a turn is two rounds. Turns go by on the
  // quick path as long as all their vectors are inner ones and none is the label's; all lanes of a
  // warp know where that is. All other rounds go by one at a time, with each entry checked. If the
  // quick path refuses a turn, that turn goes by in single rounds, and after several refusals more
  // rounds do before turns are tried again.
  //
  // Rounds begin at whole sectors of the policy, so the first may begin before the row. It is never
  // in a turn.
  const int start = begin - vectors.past_sectors(z.first + begin);
  const int size = Scope::size(), first_index = start + Scope::rank();
  const int whole_rounds = (end - start) / size;
  const int inner_rounds = max(1, (end - start + size - 1) / size);
  const bool takes_outer = part == 0 && Scope::rank() < kLanes;  // only the row's first warp does
  const int rounds = inner_rounds + (takes_outer ? RowVectors<T>::kOuterRounds : 0);
  const int from_start = label_vector - start, label_rank = from_start % size;
  const bool label_is_here =
      label_vector >= begin && label_vector < end && label_rank / kLanes == Scope::rank() / kLanes;
  const int label_round = label_is_here ? from_start / size : rounds;

  const auto load = [&](int round) {
    return round < inner_rounds ? load_inner(first_index + round * size)
                                : load_outer(round - inner_rounds);
  };
  const auto load_whole = [&](int round) -> SideVectors<T> {
    const int index = first_index + round * size;
    return {z.load(index, load_16), r.load(index, load_16), true};
  };

  SideVectors<T> loaded = load(0);
  Running stats(Running::template own_base_of<Scope>(loaded).base, whole_rounds >= 2);
  bool taken = true;  // whether the quick path took the last turn
  for (int round = 0, last = 1, single_rounds = 1;;) {
    for (;;) {  // single rounds
      stats.add(loaded, taken && round < inner_rounds);
      if (round == 0) stats.keep_base();
      if (++round == last) break;
      loaded = load(round);
    }
    taken = true;
    const int stop = round <= label_round ? min(whole_rounds, label_round) : whole_rounds;
    if (stats.may_be_quick() && round + 2 <= stop) {
      SideVectors<T> first = load_whole(round);
#pragma unroll 1
      for (bool more = true; more; round += 2) {
        const SideVectors<T> second = load_whole(round + 1);
        typename Running::QuickSums sums;
        stats.sum_quickly(first, sums);
        more = round + 4 <= stop;
        if (more) first = load_whole(round + 2);
        stats.sum_quickly(second, sums);
        taken = stats.add_quickly(sums);
        if (!taken) break;
      }
    }
    if (round == rounds) break;
    single_rounds = taken ? 2 : min(2 * single_rounds, kMostSingleRounds);
    last = min(round + single_rounds, rounds);
    loaded = load(round);
  }
  const StatsOf<RealOf<T>, kDivergences> of_warp = stats.record();
  if (lane_index() != 0) return;
  const uint64_t block = uint64_t(blockIdx.x) * gridDim.y + blockIdx.y;
  records[block * kBlockWarps + warp_index()] = of_warp;
}

// `stats`, with the records that a row's warps have left and the row's label added.
template <class T, bool kDivergences>
__device__ LabelledStats<RealOf<T>, kDivergences> labelled_stats(
    const TokenStatsProblem& problem, uint32_t row, LabelledStats<RealOf<T>, kDivergences> stats,
    const StatsOf<RealOf<T>, kDivergences>* records, int records_of_row) {
  records += uint64_t(row) * records_of_row;
#pragma unroll 1
  for (int i = 0; i < records_of_row; ++i) stats.rest = merge(stats.rest, records[i]);
  const int64_t label = label_of(problem, row);
  if (label >= 0 && label < problem.vocabulary) {
    stats.label_policy = value_of<T>(start_of_row<T>(problem.policy, row)[label]);
    stats.label_reference = value_of<T>(start_of_row<T>(problem.reference, row)[label]);
  }
  return stats;
}

// The three kernels below have one thread for each row.

template <class T, bool kDivergences>
__global__ void __launch_bounds__(kThreads, 1)
    finish_rows_kernel(const TokenStatsForward work, int records_of_row,
                       const StatsOf<RealOf<T>, kDivergences>* records) {
  using Real = RealOf<T>;
  const TokenStatsProblem& problem = work.problem;
  const uint32_t row = blockIdx.x * kThreads + threadIdx.x;
  if (row >= problem.rows) return;
  const LabelKind kind = label_kind(problem, row);
  if (!has_results(kind, kDivergences && work.unlabelled)) {
    fill_outputs<Real, kDivergences>(work.outputs, row, kind);
    return;
  }
  const auto empty = empty_labelled_stats<Real, kDivergences>();
  const auto stats = labelled_stats<T, kDivergences>(problem, row, empty, records, records_of_row);
  write_outputs(work.outputs, row, finalise(stats));
}

template <class T, bool kDivergences>
__global__ void __launch_bounds__(kThreads, 1)
    merge_tile_kernel(const TokenStatsTile work, int records_of_row,
                      const StatsOf<RealOf<T>, kDivergences>* records) {
  const uint32_t row = blockIdx.x * kThreads + threadIdx.x;
  if (row >= work.problem.rows || label_kind(work.problem, row) == LabelKind::kIgnored) return;
  auto& stats = static_cast<LabelledStats<RealOf<T>, kDivergences>*>(work.records)[row];
  stats = labelled_stats<T, kDivergences>(work.problem, row, stats, records, records_of_row);
}

template <class Real, bool kDivergences>
__global__ void __launch_bounds__(kThreads, 1) finish_tiles_kernel(const TokenStatsFinish work) {
  using Stats = LabelledStats<Real, kDivergences>;
  const uint32_t row = blockIdx.x * kThreads + threadIdx.x;
  if (row >= work.rows) return;
  const LabelKind kind = label_kind(work, row);
  if (!has_results(kind, kDivergences && work.unlabelled)) {
    fill_outputs<Real, kDivergences>(work.outputs, row, kind);
    return;
  }
  const Stats* records = static_cast<const Stats*>(work.records) + row;
  Stats stats = *records;
#pragma unroll 1
  for (int64_t set = 1; set < work.sets; ++set) stats = merge(stats, records[set * work.rows]);
  write_outputs(work.outputs, row, finalise(stats));
}

template <class T, bool kDivergences>
int warps_of_row(const TokenStatsProblem& problem) {
  return one_warp_per_row<T, kDivergences>(problem) ? 1 : kBlockWarps * parts_of_row<T>(problem);
}

template <class T, int kWarps, bool kDivergences>
void launch_row_records(const TokenStatsProblem& problem, bool tile, int parts,
                        StatsOf<RealOf<T>, kDivergences>* records, const Launch& launch) {
  using Scope = Team<kWarps>;
  const auto rows = [](const Logits& logits) { return Rows{logits.data, logits.rows, sizeof(T)}; };
  const bool shifted =
      !same_alignment(rows(problem.policy), rows(problem.reference), Storage<T>::kPerVector);
  constexpr bool kAlwaysShifted = takes_any_alignment<T, kDivergences>;
  launch_kernel("row_records_kernel",
                shifted ? row_records_kernel<T, kWarps, true, kDivergences>
                        : row_records_kernel<T, kWarps, kAlwaysShifted, kDivergences>,
                dim3(blocks_for(problem.rows, Scope::kTeams), parts),
                Scope::template kSharedBytes<RealOf<T>>, launch, problem, tile, records);
}

template <class T, bool kDivergences>
void launch_row_records(const TokenStatsProblem& problem, bool tile,
                        StatsOf<RealOf<T>, kDivergences>* records, const Launch& launch) {
  if constexpr (!kDivergences) {
    if (one_warp_per_row<T, kDivergences>(problem)) {
      return launch_row_records<T, 1, kDivergences>(problem, tile, 1, records, launch);
    }
  }
  const int parts = parts_of_row<T>(problem);
  launch_row_records<T, kBlockWarps, kDivergences>(problem, tile, parts, records, launch);
}

// Calls body with T{}, the type that the logits are stored in, and a constant that says whether
// divergences are asked for.
template <class Body>
void with_kernel(DType dtype, bool divergences, const Body& body) {
  with_storage(dtype, [&](auto storage) {
    divergences ? body(storage, std::true_type()) : body(storage, std::false_type());
  });
}

template <bool kDivergences>
int64_t workspace_bytes(const TokenStatsProblem& problem) {
  return with_storage(problem.dtype, [&](auto storage) -> int64_t {
    using T = decltype(storage);
    const int64_t of_row = warps_of_row<T, kDivergences>(problem);
    return problem.rows * of_row * int64_t(sizeof(StatsOf<RealOf<T>, kDivergences>));
  });
}

}  // namespace

int64_t forward_workspace_bytes(const TokenStatsProblem& problem) {
  return workspace_bytes<false>(problem);
}

int64_t divergences_workspace_bytes(const TokenStatsProblem& problem) {
  return workspace_bytes<true>(problem);
}

void token_stats_forward(const TokenStatsForward& work, void* workspace, const Launch& launch) {
  const TokenStatsProblem& problem = work.problem;
  if (problem.rows == 0) return;
  check_sizes(problem);
  const OnDevice guard(launch.device);
  with_kernel(problem.dtype, has_divergences(work.outputs), [&](auto storage, auto divergences) {
    using T = decltype(storage);
    constexpr bool kDivergences = decltype(divergences)::value;
    auto* records = static_cast<StatsOf<RealOf<T>, kDivergences>*>(workspace);
    launch_row_records<T, kDivergences>(problem, work.unlabelled, records, launch);
    launch_kernel("finish_rows_kernel", finish_rows_kernel<T, kDivergences>,
                  a_thread_per_row(problem.rows), 0, launch, work,
                  warps_of_row<T, kDivergences>(problem), records);
  });
}

void token_stats_tile(const TokenStatsTile& work, void* workspace, const Launch& launch) {
  const TokenStatsProblem& problem = work.problem;
  if (problem.rows == 0) return;
  check_sizes(problem);
  const OnDevice guard(launch.device);
  with_kernel(problem.dtype, work.divergences, [&](auto storage, auto divergences) {
    using T = decltype(storage);
    constexpr bool kDivergences = decltype(divergences)::value;
    auto* records = static_cast<StatsOf<RealOf<T>, kDivergences>*>(workspace);
    launch_row_records<T, kDivergences>(problem, true, records, launch);
    launch_kernel("merge_tile_kernel", merge_tile_kernel<T, kDivergences>,
                  a_thread_per_row(problem.rows), 0, launch, work,
                  warps_of_row<T, kDivergences>(problem), records);
  });
}

void token_stats_finish(const TokenStatsFinish& work, const Launch& launch) {
  if (work.rows == 0) return;
  check_rows(work.rows);
  const OnDevice guard(launch.device);
  const bool wide = work.dtype == DType::kFloat64;
  const auto finish = [&](auto kernel) {
    launch_kernel("finish_tiles_kernel", kernel, a_thread_per_row(work.rows), 0, launch, work);
  };
  if (has_divergences(work.outputs)) {
    finish(wide ? finish_tiles_kernel<double, true> : finish_tiles_kernel<float, true>);
  } else {
    finish(wide ? finish_tiles_kernel<double, false> : finish_tiles_kernel<float, false>);
  }
}

}  // namespace tdpo::cuda
