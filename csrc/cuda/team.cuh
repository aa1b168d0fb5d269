// Teams: the threads that work on one row, or on a part of it, together. A team is one warp, or all
// seven warps of a block.
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

// A number of each side.
template <class Real>
struct Sides {
  Real policy, reference;
};

struct Larger {  // where one is NaN, the other
  template <class Real>
  __device__ __forceinline__ Sides<Real> operator()(const Sides<Real>& a,
                                                    const Sides<Real>& b) const {
    return {fmax(a.policy, b.policy), fmax(a.reference, b.reference)};
  }
};

struct Sum {
  template <class Real>
  __device__ __forceinline__ Sides<Real> operator()(const Sides<Real>& a,
                                                    const Sides<Real>& b) const {
    return {a.policy + b.policy, a.reference + b.reference};
  }
};

// The result is the same in every lane, to the bit: in each step both lanes of a pair combine the
// same two numbers.
template <class Real, class Operation>
__device__ __forceinline__ Sides<Real> reduce_lanes(Sides<Real> value, Operation operation) {
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    const Sides<Real> other = {__shfl_xor_sync(kAllLanes, value.policy, distance),
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

// Shared memory through which the warps of a block exchange their results. Each reduction has a
// place of its own that is written once in a kernel, so one barrier is enough for each.
template <class Real>
struct Exchange {
  Sides<Real> largest[kBlockWarps];
  Sides<Real> sum[kBlockWarps];
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
  static __device__ __forceinline__ Sides<Real> largest(Sides<Real> value) {
    return reduce_lanes(value, Larger());
  }
  template <class Real>
  static __device__ __forceinline__ Sides<Real> sum(Sides<Real> value) {
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
  static __device__ __forceinline__ Sides<Real> largest(Sides<Real> value) {
    return reduce_block(value, exchange<Real>().largest, Larger());
  }
  template <class Real>
  static __device__ __forceinline__ Sides<Real> sum(Sides<Real> value) {
    return reduce_block(value, exchange<Real>().sum, Sum());
  }

 private:
  template <class Real, class Operation>
  static __device__ __forceinline__ Sides<Real> reduce_block(Sides<Real> value, Sides<Real>* place,
                                                             Operation operation) {
    const Sides<Real> of_warp = reduce_lanes(value, operation);
    if (lane_index() == 0) place[warp_index()] = of_warp;
    __syncthreads();
    Sides<Real> result = place[0];
    for (int warp = 1; warp < kBlockWarps; ++warp) result = operation(result, place[warp]);
    return result;
  }
};

}  // namespace tdpo::cuda
