// What only a card can decide, with the best guess so far. `benchmarks/gpu_check.sh OUT --choices`
// times the alternatives.
#pragma once

// Blocks of forward that a multiprocessor shall hold: more of them hide more latency, fewer leave
// each thread more registers.
#ifndef TDPO_FORWARD_BLOCKS
#define TDPO_FORWARD_BLOCKS 4
#endif

// Vectors of 16 bytes that a thread of backward has on their way, where one side is read; half of
// them of each where both are.
#ifndef TDPO_BACKWARD_VECTORS
#define TDPO_BACKWARD_VECTORS 4
#endif

// How a row is loaded by forward, and by backward where one side or both are read: __ldcs (what is
// read once shall be the first to leave the caches) or load_through_l1.
#ifndef TDPO_FORWARD_LOAD
#define TDPO_FORWARD_LOAD __ldcs
#endif
#ifndef TDPO_BACKWARD_LOAD_ONE
#define TDPO_BACKWARD_LOAD_ONE __ldcs
#endif
#ifndef TDPO_BACKWARD_LOAD_BOTH
#define TDPO_BACKWARD_LOAD_BOTH load_through_l1
#endif
