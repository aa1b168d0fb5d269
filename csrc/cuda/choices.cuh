// Settings whose best value only a measurement on a card can tell, each with the best known value.
// `benchmarks/gpu_check.sh OUT --choices` times the alternatives.
#pragma once

// How many blocks of forward a multiprocessor shall hold. More blocks hide more latency; fewer
// leave each thread more registers.
#ifndef TDPO_FORWARD_BLOCKS
#define TDPO_FORWARD_BLOCKS 5
#endif

// How many vectors of 16 bytes a thread of backward asks for before it uses the first. Where both
// sides are read, half of them are of each.
#ifndef TDPO_BACKWARD_VECTORS
#define TDPO_BACKWARD_VECTORS 4
#endif

// The load that forward uses, and backward where it reads one side or both: __ldcs, after which the
// line is the first to leave the caches, or load_through_l1.
#ifndef TDPO_FORWARD_LOAD
#define TDPO_FORWARD_LOAD __ldcs
#endif
#ifndef TDPO_BACKWARD_LOAD_ONE
#define TDPO_BACKWARD_LOAD_ONE load_through_l1
#endif
#ifndef TDPO_BACKWARD_LOAD_BOTH
#define TDPO_BACKWARD_LOAD_BOTH load_through_l1
#endif
