// What only a card can decide, with the best guess so far. `benchmarks/gpu_check.sh OUT --choices`
// times the alternatives.
#pragma once

// Blocks of forward that a multiprocessor shall hold: more of them hide more latency, fewer leave
// each thread more registers.
#ifndef TDPO_FORWARD_BLOCKS
#define TDPO_FORWARD_BLOCKS 4
#endif

// How logits are loaded: __ldcs (read once, first to leave the caches) or __ldg (through L1, where
// neighbouring rows that share a line of 128 bytes find it).
#ifndef TDPO_FORWARD_LOAD
#define TDPO_FORWARD_LOAD __ldcs
#endif
