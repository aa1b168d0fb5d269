// The whole interface of the compiled core: plain parameter structs and four entry points.
// Pointers, sizes, strides and a dtype code; no torch, no Python. Strides and offsets are 64-bit
// and count elements, not bytes.
#pragma once

#include <cstdint>
#include <string>

#include "vocab_stats.h"

namespace tdpo {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

// Where the rows of a [..., V] tensor start. Leading dimensions that one stride serves are merged
// by the caller; the last dimension is contiguous.
struct RowLayout {
  static constexpr int kMaxDims = 4;
  int dims = 0;
  int64_t sizes[kMaxDims] = {};
  int64_t strides[kMaxDims] = {};
};

// Index is the type that the row is divided in: int64_t, or on the device uint32_t.
template <class Index>
TDPO_ALGEBRA int64_t row_offset(const RowLayout& layout, Index row) {
  int64_t offset = 0;
  for (int dim = layout.dims - 1; dim > 0; --dim) {
    const Index size = static_cast<Index>(layout.sizes[dim]);
    offset += static_cast<int64_t>(row % size) * layout.strides[dim];
    row /= size;
  }
  return layout.dims > 0 ? offset + static_cast<int64_t>(row) * layout.strides[0] : offset;
}

struct Logits {
  const void* data;
  RowLayout rows;
};

struct TokenStatsProblem {
  DType dtype;
  int64_t rows;
  int64_t vocabulary;
  int64_t ignore_index;
  Logits policy;
  Logits reference;
  const int64_t* labels;  // [rows]
};

// Contiguous, in the accumulation type; 0 where the label is ignored.
struct TokenStatsOutputs {
  void* policy_logps;     // [rows]
  void* reference_logps;  // [rows]
  void* forward_kl;       // [rows]
  void* normalizers;      // [rows] of Normalizers (vocab_stats.h)
};

struct TokenStatsForward {
  TokenStatsProblem problem;
  TokenStatsOutputs outputs;
};

// Forward over tiles of the vocabulary. The logits are a tile's, `vocabulary` its width, and labels
// count from its first entry: one that lies outside is another tile's. Ignored rows are not read.
struct TokenStatsTile {
  TokenStatsProblem problem;
  void* records;  // [rows] of LabelledStats (vocab_stats.h); the tile's are merged into them
};

// The end of it: outputs from the records of all tiles, in one set or in several. Labels count from
// the first entry of the vocabulary.
struct TokenStatsFinish {
  DType dtype;
  int64_t rows;
  int64_t vocabulary;
  int64_t ignore_index;
  const int64_t* labels;  // [rows]
  int64_t sets;
  const void* records;  // [sets, rows] of LabelledStats, disjoint tiles in each set
  TokenStatsOutputs outputs;
};

// dz = grad_policy_logps (onehot(label) - p) + grad_forward_kl (p - q), of whole rows or of a tile
// (labels and vocabulary are its own then). The gradient has the logits' dtype, and may be stored
// over the policy's logits then; or logits are float32, and it is rounded once to a half-width
// type.
struct TokenStatsBackward {
  TokenStatsProblem problem;
  const void* normalizers;        // [rows] of Normalizers
  const void* grad_policy_logps;  // [rows]
  const void* grad_forward_kl;    // [rows]
  DType gradient_dtype;
  void* gradient;
  RowLayout gradient_rows;
};

constexpr int64_t kAllLabelsValid = -1;

namespace cpu {

struct RowKernels;  // of one instruction set: csrc/cpu/row_kernels.h

// Returns kAllLabelsValid, or the first row whose label is neither in [0, vocabulary) nor
// ignore_index; nothing has been written then.
int64_t token_stats_forward(const TokenStatsForward& work, const RowKernels& kernels, int threads);

void token_stats_tile(const TokenStatsTile& work, const RowKernels& kernels, int threads);

// Rows whose label is neither in [0, vocabulary) nor ignore_index come out as NaN.
void token_stats_finish(const TokenStatsFinish& work, int threads);

void token_stats_backward(const TokenStatsBackward& work, const RowKernels& kernels, int threads);

}  // namespace cpu

// The CUDA kernels. Calls launch and return; the pointers are the device's. A row whose label is
// neither in [0, vocabulary) nor ignore_index is not read, and its outputs and its gradient are
// NaN. Failures throw std::runtime_error with the name of the kernel.
namespace cuda {

struct Launch {
  int device;
  void* stream;  // a cudaStream_t
};

// On the device the entries of a row, and the rows, are counted in 32 bits; offsets are 64-bit.
constexpr int64_t kMaxVocabulary = int64_t(1) << 30;
constexpr int64_t kMaxRows = (int64_t(1) << 31) - 1;

// Device memory that forward, or a tile of it, needs beside its outputs: a record of each warp.
int64_t forward_workspace_bytes(const TokenStatsProblem& problem);

void token_stats_forward(const TokenStatsForward& work, void* workspace, const Launch& launch);
void token_stats_tile(const TokenStatsTile& work, void* workspace, const Launch& launch);
void token_stats_finish(const TokenStatsFinish& work, const Launch& launch);
void token_stats_backward(const TokenStatsBackward& work, const Launch& launch);

// What is built in and what this machine has; `error` is empty if its devices can be used.
struct Runtime {
  int runtime_version, driver_version, devices;
  const char* architectures;
  const char* error;
};
Runtime runtime();

// Empty if the build has machine code, or PTX, for the device.
std::string cannot_run_because(int device);

}  // namespace cuda
}  // namespace tdpo
