// The host's side of a launch: the caller's device and stream, how rows are split over blocks,
// which alignments are alike, and errors that name the kernel.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "../token_stats.h"
#include "team.cuh"

namespace tdpo::cuda {

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // clears the error, so that the next call does not report it
  throw std::runtime_error(std::string(what) + ": CUDA error " + std::to_string(int(status)) +
                           " (" + cudaGetErrorString(status) + ")");
}

// Makes a device current as long as it lives.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before), "cudaGetDevice");
    moved = before != device;
    if (moved) check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~OnDevice() {
    if (moved) cudaSetDevice(before);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before = 0;
  bool moved = false;
};

template <class... Parameters, class... Arguments>
void launch_kernel(const char* name, void (*kernel)(Parameters...), dim3 grid, int shared_bytes,
                   const Launch& launch, Arguments&&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = static_cast<cudaStream_t>(launch.stream);
  check(cudaLaunchKernelEx(&config, kernel, arguments...), name);
}

inline void check_rows(int64_t rows) {
  if (rows > kMaxRows) {
    throw std::runtime_error("the CUDA kernels take at most 2^31 - 1 rows, got " +
                             std::to_string(rows));
  }
}

inline void check_sizes(const TokenStatsProblem& problem) {
  check_rows(problem.rows);
  if (problem.vocabulary > kMaxVocabulary) {
    throw std::runtime_error("the CUDA kernels take at most 2^30 vocabulary entries, got " +
                             std::to_string(problem.vocabulary));
  }
}

inline unsigned blocks_for(int64_t items, int items_of_a_block) {
  return static_cast<unsigned>((items + items_of_a_block - 1) / items_of_a_block);
}

inline dim3 a_thread_per_row(int64_t rows) { return dim3(blocks_for(rows, kThreads)); }

// One warp takes a row of at most this many vectors; a block takes a longer one.
constexpr int kVectorsOfAWarp = 512;

// With kDivergences a block takes each row: a kernel for short rows would take its time to compile,
// and vocabularies are long.
template <class T, bool kDivergences = false>
bool one_warp_per_row(const TokenStatsProblem& problem) {
  return !kDivergences && problem.vocabulary <= int64_t(kVectorsOfAWarp) * Storage<T>::kPerVector;
}

// Whether one kernel takes logits that lie alike in memory and those that do not: also a kernel
// less to compile, where arithmetic takes the time.
template <class T, bool kDivergences>
constexpr bool takes_any_alignment = kDivergences && sizeof(T) == 8;

// Where rows are few, each is split over several blocks, so that there are about this many: four
// for each of 132 multiprocessors (H100, H200). The number does not depend on the card at hand, so
// the bits of the results do not either.
constexpr int64_t kWantedBlocks = 528;
// A part has at least this many vectors; in a shorter one its start and its merge would cost more
// than it gains.
constexpr int64_t kVectorsOfAPart = 4 * kThreads;

template <class T>
int parts_of_row(const TokenStatsProblem& problem) {
  if (problem.rows == 0 || one_warp_per_row<T>(problem)) return 1;
  const int64_t vectors = problem.vocabulary / Storage<T>::kPerVector;
  const int64_t wanted = (kWantedBlocks + problem.rows - 1) / problem.rows;
  return static_cast<int>(std::max<int64_t>(1, std::min(wanted, vectors / kVectorsOfAPart)));
}

// The rows of one tensor.
struct Rows {
  const void* data;
  RowLayout layout;
  int64_t entry_bytes;
};

// Whether every row of one tensor begins as far after a multiple of 16 bytes as the same row of the
// other, counted in entries.
inline bool same_alignment(const Rows& one, const Rows& other, int64_t per_vector) {
  const auto past_vector = [&](const Rows& rows) {
    return static_cast<int64_t>(reinterpret_cast<uintptr_t>(rows.data)) / rows.entry_bytes %
           per_vector;
  };
  if (past_vector(one) != past_vector(other)) return false;
  const auto whole_vectors = [&](int64_t entries) { return entries % per_vector == 0; };
  bool same = one.layout.dims == other.layout.dims, aligned = true;
  for (int dim = 0; dim < RowLayout::kMaxDims; ++dim) {
    const int64_t of_one = one.layout.strides[dim], of_other = other.layout.strides[dim];
    same = same && one.layout.sizes[dim] == other.layout.sizes[dim] &&
           whole_vectors(of_one - of_other);
    aligned = aligned && whole_vectors(of_one) && whole_vectors(of_other);
  }
  return same || aligned;
}

// Calls body with T{}, where T is the type that a dtype is stored in.
template <class Body>
auto with_storage(DType dtype, Body body) {
  switch (dtype) {  // without a default: a new dtype shall be a compiler's warning here
    case DType::kBFloat16:
      return body(BFloat16{});
    case DType::kFloat16:
      return body(Float16{});
    case DType::kFloat64:
      return body(double{});
    case DType::kFloat32:
      return body(float{});
  }
  throw std::runtime_error("unknown dtype");
}

}  // namespace tdpo::cuda
