// Threads for loops: those of the OpenMP runtime that torch has loaded, whatever its name.
//
// The core is compiled and linked without OpenMP. A runtime of its own beside torch's would mean
// two teams of threads, each waiting for processors that the other keeps busy; and torch's wheels
// name theirs differently (libgomp.so.1, libgomp-a34b3233.so.1, libomp.dylib).
#pragma once

#include <cstdint>
#include <string>

namespace tdpo::cpu {

// The file of the runtime; empty if torch has loaded none, and loops then use one thread.
std::string openmp_runtime();

using LoopBody = void (*)(const void* context, int64_t index);

// Calls body(context, i) for every i from 0 to count - 1. At most `threads` threads take the
// indices one by one.
void run_on_threads(int64_t count, int threads, LoopBody body, const void* context);

}  // namespace tdpo::cpu
