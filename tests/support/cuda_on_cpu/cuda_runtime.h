// CUDA's language and runtime, as far as csrc/cuda uses them, on the CPU.
//
// g++ finds this header instead of CUDA's and compiles the .cu files as they are. The threads of a
// block are fibers that run in turn. A fiber that comes to a barrier or to an exchange within its
// warp waits until all others that must come have come. What would hang or go wrong on a card is an
// error here: lanes that wait at different places, threads that never come, addresses that are not
// aligned. Shared memory starts out as NaN. It does not see races within a warp, nor the order in
// which memory becomes visible.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <mutex>
#include <string>
#include <vector>

#include "fibers.h"

#define __global__
#define __device__
#define __host__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1) : x(x), y(y) {}
};

inline dim3 threadIdx, blockIdx, gridDim;

using std::max;
using std::min;

namespace cuda_on_cpu {

constexpr int kLanes = 32;

// A place where threads wait, by its line: different places do not match.
struct Site {
  const char* what = nullptr;
  unsigned line = 0;
  bool operator==(const Site& other) const { return what == other.what && line == other.line; }
};

struct Thread {
  enum State { kReady, kAtBarrier, kInWarp, kDone } state = kReady;
  Site site;
  Fiber fiber;
};

// What the lanes of a warp give at an exchange, and what all of them take when all have given.
struct Warp {
  uint64_t given[kLanes], taken[kLanes];
};

inline std::vector<Thread> threads;
inline std::vector<Warp> warps;
inline int current = 0;
inline std::string error;
inline std::mutex one_launch_at_a_time;
inline long launches = 0;
inline bool run_warps_backwards = false;  // any order is right, so results must not depend on it

// The shared memory of the one block that runs; defined beside the kernels.
struct SharedMemory {
  void* data;
  size_t bytes;
};
SharedMemory shared_memory();

// An error on the card ends the launch; so does this one.
[[noreturn]] inline void fail(const std::string& what) {
  if (error.empty()) error = what;
  threads[current].state = Thread::kDone;
  for (;;) leave_fiber(threads[current].fiber);
}

inline void wait(Thread::State state, Site site) {
  Thread& self = threads[current];
  self.state = state;
  self.site = site;
  leave_fiber(self.fiber);
}

inline const uint64_t* exchange(const char* what, unsigned mask, uint64_t value, unsigned line) {
  if (mask != 0xffffffff) fail(std::string(what) + ": only whole warps are supported here");
  Warp& warp = warps[current / kLanes];
  warp.given[current % kLanes] = value;
  wait(Thread::kInWarp, {what, line});
  return warp.taken;
}

template <class T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8, "a lane gives at most 64 bits");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <class T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline std::string describe_waiting() {
  std::string text = "threads wait for each other:";
  for (size_t i = 0; i < threads.size(); ++i) {
    const Thread& thread = threads[i];
    if (i > 0 && thread.state == threads[i - 1].state && thread.site == threads[i - 1].site)
      continue;
    text += " from thread " + std::to_string(i);
    text += thread.state == Thread::kDone ? " they have returned,"
                                          : std::string(" at ") + thread.site.what + " of line " +
                                                std::to_string(thread.site.line) + ",";
  }
  text.pop_back();
  return text;
}

// Lets the 32 lanes of a warp go on if all are at the same exchange.
inline bool release_warp(size_t first) {
  const Thread& lane0 = threads[first];
  for (size_t i = first; i < first + kLanes; ++i) {
    if (threads[i].state != Thread::kInWarp || !(threads[i].site == lane0.site)) return false;
  }
  Warp& warp = warps[first / kLanes];
  std::memcpy(warp.taken, warp.given, sizeof(warp.given));
  for (size_t i = first; i < first + kLanes; ++i) threads[i].state = Thread::kReady;
  return true;
}

// Lets a block go on if every thread that has not returned is at the same barrier.
inline bool release_block() {
  Site site;
  for (const Thread& thread : threads) {
    if (thread.state == Thread::kDone) continue;
    if (thread.state != Thread::kAtBarrier) return false;
    if (site.what != nullptr && !(site == thread.site)) return false;
    site = thread.site;
  }
  for (Thread& thread : threads) {
    if (thread.state == Thread::kAtBarrier) thread.state = Thread::kReady;
  }
  return site.what != nullptr;
}

inline void run_block(const std::function<void()>& body, size_t size) {
  threads.resize(size);
  warps.resize(size / kLanes);
  for (Thread& thread : threads) {
    thread.state = Thread::kReady;
    start_fiber(thread.fiber, [&thread, &body] {
      body();
      thread.state = Thread::kDone;
    });
  }
  for (bool moved = true; moved && error.empty();) {
    moved = false;
    for (size_t turn = 0; turn < size; turn += kLanes) {
      const size_t first = run_warps_backwards ? size - kLanes - turn : turn;
      for (size_t i = first; i < first + kLanes; ++i) {
        if (threads[i].state != Thread::kReady) continue;
        current = static_cast<int>(i);
        threadIdx.x = static_cast<unsigned>(i);
        enter_fiber(threads[i].fiber);
        moved = true;
        if (!error.empty()) return;
      }
      moved = release_warp(first) || moved;
    }
    moved = release_block() || moved;
  }
  for (const Thread& thread : threads) {
    if (thread.state != Thread::kDone && error.empty()) error = describe_waiting();
  }
}

}  // namespace cuda_on_cpu

// ---- what a kernel calls ----

inline void __syncthreads(unsigned line = __builtin_LINE()) {
  cuda_on_cpu::wait(cuda_on_cpu::Thread::kAtBarrier, {"__syncthreads", line});
}

inline bool __all_sync(unsigned mask, bool condition, unsigned line = __builtin_LINE()) {
  const uint64_t* lanes = cuda_on_cpu::exchange("__all_sync", mask, condition, line);
  bool all = true;
  for (int lane = 0; lane < cuda_on_cpu::kLanes; ++lane) all = all && lanes[lane] != 0;
  return all;
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance, unsigned line = __builtin_LINE()) {
  const uint64_t bits = cuda_on_cpu::to_bits(value);
  const uint64_t* lanes = cuda_on_cpu::exchange("__shfl_xor_sync", mask, bits, line);
  return cuda_on_cpu::from_bits<T>(lanes[(threadIdx.x % cuda_on_cpu::kLanes) ^ distance]);
}

template <class T>
void check_alignment(const T* address) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T) != 0)
    cuda_on_cpu::fail("misaligned address");
}

template <class T>
T __ldcs(const T* address) {
  check_alignment(address);
  return *address;
}

template <class T>
void __stcs(T* address, T value) {
  check_alignment(address);
  *address = value;
}

namespace cuda_on_cpu {

// The relative error of ex2.approx, the same for all results but 2^0. On a card it is at most 2^-22
// and almost the same for numbers that are close to each other.
inline double ex2_error = 0;

inline float approximate_exp2(float x) {
  return ex2_error == 0 || x == 0 ? std::exp2(x) : float(std::exp2(double(x)) * (1 + ex2_error));
}

}  // namespace cuda_on_cpu

#define exp2f(x) cuda_on_cpu::approximate_exp2(x)

inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((uint64_t(high) << 32 | low) >> (shift & 31));
}

// ---- what the host calls ----

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0, cudaErrorLaunchFailure = 719;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return cuda_on_cpu::error.c_str(); }

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  using namespace cuda_on_cpu;
  const std::lock_guard<std::mutex> lock(one_launch_at_a_time);
  error.clear();
  ++launches;
  const SharedMemory shared = shared_memory();
  if (config->dynamicSmemBytes > shared.bytes) std::abort();
  gridDim = config->gridDim;
  const unsigned blocks = gridDim.x * gridDim.y;
  for (unsigned block = 0; block < blocks && error.empty(); ++block) {
    std::memset(shared.data, 0xff, config->dynamicSmemBytes);
    blockIdx = dim3(block % gridDim.x, block / gridDim.x);
    run_block([&] { kernel(arguments...); }, config->blockDim.x);
  }
  return error.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}
