// Threads that work on one row together: one warp, or all warps of a block.
#pragma once

#include "../token_stats.h"
#include "numbers.cuh"

namespace tdpo::cuda {

constexpr int kLanes = 32;
constexpr unsigned kAllLanes = 0xffffffff;
constexpr int kThreads = kBlockWarps * kLanes;

__device__ __forceinline__ int lane_index() { return threadIdx.x % kLanes; }
__device__ __forceinline__ int warp_index() { return threadIdx.x / kLanes; }

__device__ __forceinline__ bool all_of_warp(bool condition) {
  return __all_sync(kAllLanes, condition);
}

template <class Real>
struct Two {
  Real policy, reference;
};

struct Larger {  // of NaN and a number, the number
  template <class Real>
  __device__ __forceinline__ Two<Real> operator()(const Two<Real>& a, const Two<Real>& b) const {
    return {fmax(a.policy, b.policy), fmax(a.reference, b.reference)};
  }
};

struct Sum {
  template <class Real>
  __device__ __forceinline__ Two<Real> operator()(const Two<Real>& a, const Two<Real>& b) const {
    return {a.policy + b.policy, a.reference + b.reference};
  }
};

// The same in every lane, to the bit: each step adds the same two numbers on both sides.
template <class Real, class Operation>
__device__ __forceinline__ Two<Real> reduce_lanes(Two<Real> value, Operation operation) {
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    const Two<Real> other = {__shfl_xor_sync(kAllLanes, value.policy, distance),
                             __shfl_xor_sync(kAllLanes, value.reference, distance)};
    value = operation(value, other);
  }
  return value;
}

template <class Real>
__device__ __forceinline__ Real sum_lanes(Real value) {
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, distance);
  }
  return value;
}

// What the warps of a block tell each other. One place for each message: no place is written twice,
// so one barrier is enough for each.
template <class Real>
struct Exchange {
  Two<Real> largest[kBlockWarps];
  Two<Real> sum[kBlockWarps];
};

extern __shared__ unsigned char tdpo_shared_memory[];

template <int kWarps>
struct Team;

template <>
struct Team<1> {
  static constexpr int kTeams = kBlockWarps;  // in a block
  template <class Real>
  static constexpr int kSharedBytes = 0;

  static __device__ __forceinline__ int index() { return warp_index(); }
  static __device__ __forceinline__ int rank() { return lane_index(); }
  static __device__ __forceinline__ int size() { return kLanes; }
  template <class Real>
  static __device__ __forceinline__ Two<Real> largest(Two<Real> value) {
    return reduce_lanes(value, Larger());
  }
  template <class Real>
  static __device__ __forceinline__ Two<Real> sum(Two<Real> value) {
    return reduce_lanes(value, Sum());
  }
};

template <>
struct Team<kBlockWarps> {
  static constexpr int kTeams = 1;
  template <class Real>
  static constexpr int kSharedBytes = sizeof(Exchange<Real>);

  static __device__ __forceinline__ int index() { return 0; }
  static __device__ __forceinline__ int rank() { return threadIdx.x; }
  static __device__ __forceinline__ int size() { return kThreads; }

  template <class Real>
  static __device__ __forceinline__ Exchange<Real>& exchange() {
    return *reinterpret_cast<Exchange<Real>*>(tdpo_shared_memory);
  }
  template <class Real>
  static __device__ __forceinline__ Two<Real> largest(Two<Real> value) {
    return reduce_block(value, exchange<Real>().largest, Larger());
  }
  template <class Real>
  static __device__ __forceinline__ Two<Real> sum(Two<Real> value) {
    return reduce_block(value, exchange<Real>().sum, Sum());
  }

 private:
  template <class Real, class Operation>
  static __device__ __forceinline__ Two<Real> reduce_block(Two<Real> value, Two<Real>* place,
                                                           Operation operation) {
    const Two<Real> of_warp = reduce_lanes(value, operation);
    if (lane_index() == 0) place[warp_index()] = of_warp;
    __syncthreads();
    Two<Real> result = place[0];
    for (int warp = 1; warp < kBlockWarps; ++warp) result = operation(result, place[warp]);
    return result;
  }
};

}  // namespace tdpo::cuda
