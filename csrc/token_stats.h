// The interface of the compiled core: six entry points for each device, and the structs that they
// take. Pointers, sizes, strides and a dtype; no torch, no Python. Strides and offsets have 64 bits
// and count elements, not bytes.
#pragma once

#include <cstdint>
#include <string>

#include "struct_fields.h"
#include "vocab_stats.h"

namespace tdpo {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

// PyTorch's names of them.
struct NamedDType {
  const char* name;
  DType dtype;
};
constexpr NamedDType kDTypeNames[] = {{"float32", DType::kFloat32},
                                      {"bfloat16", DType::kBFloat16},
                                      {"float16", DType::kFloat16},
                                      {"float64", DType::kFloat64}};

// Numbers of a row in the buffers below.
constexpr int64_t kNormalizers = sizeof(Normalizers<float>) / sizeof(float);
constexpr int64_t kRecord = sizeof(LabelledStats<float>) / sizeof(float);
constexpr int64_t kDivergenceNormalizers = sizeof(DivergenceNormalizers<float>) / sizeof(float);
constexpr int64_t kDivergenceRecord = sizeof(LabelledStats<float, true>) / sizeof(float);

// Where the rows of a [..., V] tensor start. The caller merges leading dimensions that one stride
// serves; the last dimension is contiguous.
struct RowLayout {
  static constexpr int kMaxDims = 4;
  int dims = 0;
  int64_t sizes[kMaxDims] = {};
  int64_t strides[kMaxDims] = {};
  TDPO_FIELDS("RowLayout", dims, sizes, strides)
};

// Where a row starts, in elements from the start of the tensor. Index is the type that the number
// of the row is divided in: int64_t, or uint32_t on a CUDA device.
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
  TDPO_FIELDS("Logits", data, rows)
};

// Which rows form a sequence: `length` rows each, or where `bounds` is given, those from one bound
// to the next. The functions of sequences.h read it.
struct Sequences {
  int64_t count;          // 2B, chosen before rejected; 0 where rows stand by themselves
  int64_t length;         // 0 where bounds are given
  const int64_t* bounds;  // [count + 1], from 0 to the number of rows; or null
  TDPO_FIELDS("Sequences", count, length, bounds)
};

// What every pass over logits takes. A row's label is labels[row], or with `shift` the label after
// it in its sequence, and the last row of a sequence is ignored (label_of in sequences.h).
struct TokenStatsProblem {
  DType dtype;
  int64_t rows;
  int64_t vocabulary;
  int64_t ignore_index;
  Logits policy;
  Logits reference;
  const int64_t* labels;  // [rows]
  int shift;              // 0 or 1
  Sequences sequences;
  TDPO_FIELDS("Problem", dtype, rows, vocabulary, ignore_index, policy, reference, labels, shift,
              sequences)
};

// Contiguous, in the accumulation type: float64 for float64 logits, else float32. Rows whose label
// is ignored get 0. The last three are given together, where divergences are asked for, or are
// null.
struct TokenStatsOutputs {
  void* policy_logps;          // [rows]
  void* reference_logps;       // [rows]
  void* forward_kl;            // [rows]
  void* normalizers;           // [rows] of Normalizers, or DivergenceNormalizers (vocab_stats.h)
  void* reverse_kl = nullptr;  // [rows]
  void* policy_entropy = nullptr;     // [rows]
  void* reference_entropy = nullptr;  // [rows]
  TDPO_FIELDS("Outputs", policy_logps, reference_logps, forward_kl, normalizers, reverse_kl,
              policy_entropy, reference_entropy)
};

TDPO_ALGEBRA bool has_divergences(const TokenStatsOutputs& outputs) { return outputs.reverse_kl; }

// Forward over whole rows. `unlabelled`, 0 or 1: a row whose label is outside the vocabulary has
// none, and is computed all the same. Only with divergences.
struct TokenStatsForward {
  TokenStatsProblem problem;
  TokenStatsOutputs outputs;
  int unlabelled = 0;
  TDPO_FIELDS("Forward", problem, outputs, unlabelled)
};

// Forward over one tile of the vocabulary: the logits are the tile's, `vocabulary` is its width,
// and labels count from its first entry. A label outside the tile belongs to another tile. Rows
// whose label is ignored are not read.
struct TokenStatsTile {
  TokenStatsProblem problem;
  void* records;        // [rows] of LabelledStats (vocab_stats.h); the tile is merged into them
  int divergences = 0;  // 0 or 1: which LabelledStats they are
  TDPO_FIELDS("Tile", problem, records, divergences)
};

// The end of a forward over tiles: outputs from the records of all tiles, which lie in one set or
// in several. Labels count from the first entry of the vocabulary.
struct TokenStatsFinish {
  DType dtype;
  int64_t rows;
  int64_t vocabulary;
  int64_t ignore_index;
  const int64_t* labels;  // [rows]
  int64_t sets;
  const void* records;  // [sets, rows] of LabelledStats, disjoint tiles in each set
  TokenStatsOutputs outputs;
  int unlabelled = 0;  // as in TokenStatsForward
  TDPO_FIELDS("Finish", dtype, rows, vocabulary, ignore_index, labels, sets, records, outputs,
              unlabelled)
};

enum class Reduction : int { kNone = 0, kMean = 1, kSum = 2 };

// The options of the loss. `tdpo1` and `average` are 0 or 1.
struct LossOptions {
  double beta;
  double alpha;
  double label_smoothing;
  int tdpo1;      // the variant: else TDPO2
  int average;    // divide a sequence's sums by the number of its labels that are not ignored
  int reduction;  // a Reduction
  TDPO_FIELDS("LossOptions", beta, alpha, label_smoothing, tdpo1, average, reduction)
};

// From logits, or from the statistics of rows, to the loss of each pair. Pointers are to the
// accumulation type. From logits the statistics may be null: they are then kept in a workspace.
struct TdpoLossForward {
  TokenStatsProblem problem;
  LossOptions options;
  TokenStatsOutputs statistics;
  void* slopes;  // [2B], the derivative of `loss` by each sequence's sum of log p(y)
  void* pairs;   // [kPairQuantities, B], in the order of PairQuantity (pair_loss.h)
  void* loss;    // [], or [B] where nothing is reduced
  TDPO_FIELDS("LossForward", problem, options, statistics, slopes, pairs, loss)
};

// Upstream gradients: of each row, or where `policy_logps` is null, of the loss of each pair. A
// row's are then its sequence's slope times that of its pair; that of its KL is the ratio times
// that of its log p(y). `slopes` does not tell the two apart, since it is null as well where there
// is no sequence. The last two are given together, beside the first two, or are null.
struct Upstream {
  const void* policy_logps;  // [rows], or null
  const void* forward_kl;    // [rows], or null
  const void* slopes;        // [2B], or null
  const void* loss;          // [B], or [1] with a stride of 0
  int64_t loss_stride;
  double chosen_kl_ratio;
  double rejected_kl_ratio;
  const void* reverse_kl = nullptr;      // [rows], or null
  const void* policy_entropy = nullptr;  // [rows], or null
  TDPO_FIELDS("Upstream", policy_logps, forward_kl, slopes, loss, loss_stride, chosen_kl_ratio,
              rejected_kl_ratio, reverse_kl, policy_entropy)
};

TDPO_ALGEBRA bool has_divergences(const Upstream& upstream) { return upstream.reverse_kl; }

// dz = g_m (onehot(label) - p) + g_k (p - q), with the upstream gradients g_m of log p(label) and
// g_k of the KL, of whole rows or of a tile (labels and vocabulary are then the tile's). With
// divergences g_r p (log p - log q - KL(p || q)) - g_H p (log p + H) is added, for g_r of the
// reverse KL and g_H of the policy's entropy H. The
// gradient has the logits' dtype, and may then lie over the policy's logits or over the
// reference's, row on row: entries are read before their gradient is stored. Where logits are
// float32 the gradient may be of a half-width type instead: it is rounded once, as it is stored,
// and lies in memory of its own.
struct TokenStatsBackward {
  TokenStatsProblem problem;
  const void* normalizers;  // [rows] of Normalizers, or DivergenceNormalizers
  Upstream upstream;
  DType gradient_dtype;
  void* gradient;
  RowLayout gradient_rows;
  TDPO_FIELDS("Backward", problem, normalizers, upstream, gradient_dtype, gradient, gradient_rows)
};

constexpr int64_t kAllLabelsValid = -1, kBoundsNotUsable = -2;

namespace cpu {

struct RowKernels;  // of one instruction set: csrc/cpu/row_kernels.h

// Returns kAllLabelsValid, or the first row whose label is neither in [0, vocabulary) nor
// ignore_index; in that case nothing is written.
int64_t token_stats_forward(const TokenStatsForward& work, const RowKernels& kernels, int threads);

void token_stats_tile(const TokenStatsTile& work, const RowKernels& kernels, int threads);

// Rows whose label is neither in [0, vocabulary) nor ignore_index come out as NaN.
void token_stats_finish(const TokenStatsFinish& work, int threads);

void token_stats_backward(const TokenStatsBackward& work, const RowKernels& kernels, int threads);

// As token_stats_forward; or kBoundsNotUsable where the sequences' bounds do not ascend from 0 to
// the number of rows. Backward of the loss is token_stats_backward with the pairs' upstream.
int64_t tdpo_loss_forward(const TdpoLossForward& work, const RowKernels& kernels, int threads);

// The same from statistics that are there: neither logits nor normalizers are needed, and labels
// only where the terms of sequences are means.
int64_t tdpo_loss_finish(const TdpoLossForward& work, int threads);

}  // namespace cpu

// The CUDA kernels. Calls launch and return; pointers are addresses on the device. Where a label is
// neither in [0, vocabulary) nor ignore_index, forward does not read the row and its outputs are
// NaN; from these, backward makes a gradient of NaN, or of 0 where both upstream gradients are 0.
// Failures throw std::runtime_error with the name of the kernel.
namespace cuda {

struct Launch {
  int device;
  void* stream;  // a cudaStream_t
};

// With four blocks of seven warps on a multiprocessor each thread has 72 registers, which the
// kernels need; with eight warps it would have 64.
constexpr int kBlockWarps = 7;

// The kernels count the entries of a row, and the rows, in 32 bits; offsets have 64.
constexpr int64_t kMaxVocabulary = int64_t(1) << 30;
constexpr int64_t kMaxRows = (int64_t(1) << 31) - 1;

// Bytes of device memory that forward, or a tile of it, needs beside its outputs: each warp leaves
// a record there.
int64_t forward_workspace_bytes(const TokenStatsProblem& problem);
int64_t divergences_workspace_bytes(const TokenStatsProblem& problem);

void token_stats_forward(const TokenStatsForward& work, void* workspace, const Launch& launch);
void token_stats_tile(const TokenStatsTile& work, void* workspace, const Launch& launch);
void token_stats_finish(const TokenStatsFinish& work, const Launch& launch);
void token_stats_backward(const TokenStatsBackward& work, const Launch& launch);

// Where the bounds of sequences are not usable, all outputs of the loss are NaN. Its workspace
// holds the statistics of rows and of sequences too.
int64_t loss_workspace_bytes(const TokenStatsProblem& problem);
void tdpo_loss_forward(const TdpoLossForward& work, void* workspace, const Launch& launch);
int64_t loss_finish_workspace_bytes(const TokenStatsProblem& problem);
void tdpo_loss_finish(const TdpoLossForward& work, void* workspace, const Launch& launch);

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
