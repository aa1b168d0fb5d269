// Which sequence a row belongs to, where a sequence begins and ends, and which label a row has: the
// same on both devices.
//
// Bounds of packed sequences may be anything on CUDA, where looking at them first would mean
// waiting for the device. So nothing here leaves [0, rows] whatever the bounds are.
#pragma once

#include "token_stats.h"

namespace tdpo {

// How many of the `count` bounds from `bounds` on, which ascend, are at most `limit`.
template <class Index>
TDPO_ALGEBRA Index bounds_up_to(const int64_t* bounds, Index count, int64_t limit) {
  Index low = 0;
  while (count > 0) {
    const Index half = count / 2;
    if (bounds[low + half] <= limit) {
      low += half + 1;
      count -= half + 1;
    } else {
      count = half;
    }
  }
  return low;
}

// The number of a row's sequence. There must be one.
template <class Index>
TDPO_ALGEBRA Index sequence_of(const Sequences& sequences, Index row) {
  if (!sequences.bounds) return row / static_cast<Index>(sequences.length);
  return bounds_up_to<Index>(sequences.bounds + 1, static_cast<Index>(sequences.count) - 1, row);
}

TDPO_ALGEBRA int64_t within(int64_t x, int64_t most) { return x < 0 ? 0 : x < most ? x : most; }

// The row where a sequence begins. The next one's, also after the last, is where it ends.
TDPO_ALGEBRA int64_t sequence_begin(const TokenStatsProblem& problem, int64_t sequence) {
  const Sequences& sequences = problem.sequences;
  return sequences.bounds ? within(sequences.bounds[sequence], problem.rows)
                          : sequence * sequences.length;
}

// Whether bound number `i` is where it may be: after the one before, the first at 0 and the last at
// the number of rows.
TDPO_ALGEBRA bool bound_is_usable(const TokenStatsProblem& problem, int64_t i) {
  const Sequences& sequences = problem.sequences;
  const int64_t bound = sequences.bounds[i];
  if (i == sequences.count && bound != problem.rows) return false;
  return i == 0 ? bound == 0 : sequences.bounds[i - 1] <= bound;
}

static inline bool bounds_are_usable(const TokenStatsProblem& problem) {
  if (!problem.sequences.bounds) return true;
  for (int64_t i = 0; i <= problem.sequences.count; ++i) {
    if (!bound_is_usable(problem, i)) return false;
  }
  return true;
}

template <class Index>
TDPO_ALGEBRA bool is_last_of_sequence(const TokenStatsProblem& problem, Index row) {
  const Sequences& sequences = problem.sequences;
  const Index next = row + 1;
  if (!sequences.bounds) return next % static_cast<Index>(sequences.length) == 0;
  const Index bounds = static_cast<Index>(sequences.count) + 1;
  const Index before = bounds_up_to<Index>(sequences.bounds, bounds, row);
  return next >= static_cast<Index>(problem.rows) ||
         (before < bounds && sequences.bounds[before] == static_cast<int64_t>(next));
}

// The label that a row is scored against.
template <class Index>
TDPO_ALGEBRA int64_t label_of(const TokenStatsProblem& problem, Index row) {
  if (!problem.shift) return problem.labels[row];
  return is_last_of_sequence(problem, row) ? problem.ignore_index : problem.labels[row + 1];
}

template <class Index>
TDPO_ALGEBRA int64_t label_of(const TokenStatsFinish& work, Index row) {
  return work.labels[row];
}

}  // namespace tdpo
