// Backward of the token statistics: the gradient of the policy's logits,
//
//   dz = g_m (onehot(y) - p) + g_k (p - q),     p = softmax(z), q = softmax(r).
//
// Reads policy and reference logits z, r [N, V] of type T, only the side that the kind of gradient
// needs; labels y [N] of int64; in Real the 8 Normalizers [N, 8] that forward has saved, and the
// upstream gradients g_m (of log p(y)) and g_k (of KL(q || p)), [N] each, or what they are made of:
// slopes [2B] and the upstream gradient of the loss. Writes dz [N, V] of type
// G, which is T, or half width where T is float.
//
//   for each row, by a warp, a block or several blocks:
//     choose the kind of gradient from g_m and g_k
//     for each 2 or 4 vectors of each thread:
//       load what the kind reads of all of them, then for each entry p, q or both, and write
//     write the label's own gradient, by the thread that wrote its vector
//
// Roofline, per entry of S bytes: writes S, and reads 2 S where both sides are needed, S where one
// distribution cancels (TDPO1 reads no policy; DPO and the chosen rows of TDPO2 no reference),
// nothing where both upstream gradients are 0 or the label is ignored. One or two exponentials. In
// the time that an H200 (4.3 TB/s in a copy, 132 multiprocessors at 1.9 GHz) needs for the bytes of
// a bfloat16 entry, it has room for so many instructions and results of the special-function unit:
//
//   entry reads    instructions: room, used    special-function results: room, used
//   both sides     45, at most 28              5.6, 2
//   one side       30, 6                       3.7, 1
//
// So memory is the limit, as long as enough of it is asked for: at a latency of 650 ns that is 21
// KiB a multiprocessor, and four blocks of seven warps with four vectors of 16 bytes a thread ask
// for up to 56.
//
// Decomposition: every entry stands by itself, since forward has saved all that a row needs.
// Vectors are aligned where the gradient is written. The gradient may lie over the logits of either
// side: each thread reads its vectors of both before it writes the gradient's. In that case the
// gradient and those logits have the same alignment. Where G is narrower than T, a vector has as
// many entries as one of T, in half the bytes.
#include <type_traits>

#include "../pair_loss.h"
#include "choices.cuh"
#include "launch.cuh"
#include "row_vectors.cuh"

namespace tdpo::cuda {
namespace {

// e^(x - max). Half-width logits have a half-width gradient, whose rounding hides the error of the
// shorter exponential.
template <class T>
__device__ __forceinline__ RealOf<T> mass_of(RealOf<T> x, RealOf<T> max) {
  if constexpr (sizeof(T) == 2) {
    return exp_of(x - max);
  } else {
    return exp_below(x, max);
  }
}

// The five kinds of gradient: gradient() of all entries but the label's, and label(). Each reads
// only the logits that its formula needs, and leaves the compiler no choice of what to contract, so
// that its bits do not depend on where the rows begin. csrc/cpu/row_backward.inl has PolicyOnly,
// ReferenceOnly, Direct and Mixed too. It writes zeros without a kind, chooses Direct for more
// rows, and has Close for groups of close entries.

template <class T>
struct Zero {
  using Real = RealOf<T>;
  static constexpr bool kReadsPolicy = false, kReadsReference = false, kHasLabel = false;
  __device__ __forceinline__ Real gradient(Real, Real) const { return 0; }
  __device__ __forceinline__ Real label() const { return 0; }
};

template <class T>
struct PolicyOnly {  // g_k = 0: -g_m p
  using Real = RealOf<T>;
  static constexpr bool kReadsPolicy = true, kReadsReference = false, kHasLabel = true;
  const Normalizers<Real>& saved;
  Real g_m, policy_max, weight;
  __device__ PolicyOnly(const Normalizers<Real>& saved, Real g_m)
      : saved(saved), g_m(g_m), policy_max(saved.policy_max), weight(-g_m * saved.policy_scale) {}
  __device__ __forceinline__ Real gradient(Real z, Real) const {
    return mass_of<T>(z, policy_max) * weight;
  }
  __device__ __forceinline__ Real label() const { return g_m * saved.policy_rest; }
};

template <class T>
struct ReferenceOnly {  // g_k = g_m: -g_m p + g_m (p - q) = -g_m q
  using Real = RealOf<T>;
  static constexpr bool kReadsPolicy = false, kReadsReference = true, kHasLabel = true;
  const Normalizers<Real>& saved;
  Real g_m, reference_max, weight;
  __device__ ReferenceOnly(const Normalizers<Real>& saved, Real g_m)
      : saved(saved),
        g_m(g_m),
        reference_max(saved.reference_max),
        weight(-g_m * saved.reference_scale) {}
  __device__ __forceinline__ Real gradient(Real, Real r) const {
    return mass_of<T>(r, reference_max) * weight;
  }
  __device__ __forceinline__ Real label() const { return g_m * saved.reference_rest; }
};

// (g_k - g_m) p - g_k q as it stands, for g_k between 0 and g_m: both terms have the same sign, so
// nothing cancels. These are the rejected rows of TDPO2 with 0 < alpha < 1.
template <class T>
struct Direct {
  using Real = RealOf<T>;
  static constexpr bool kReadsPolicy = true, kReadsReference = true, kHasLabel = true;
  const Normalizers<Real>& saved;
  Real g_m, g_k, policy_max, policy_weight, reference_max, reference_weight;
  __device__ Direct(const Normalizers<Real>& saved, Real g_m, Real g_k)
      : saved(saved),
        g_m(g_m),
        g_k(g_k),
        policy_max(saved.policy_max),
        policy_weight((g_k - g_m) * saved.policy_scale),
        reference_max(saved.reference_max),
        reference_weight(-g_k * saved.reference_scale) {}
  __device__ __forceinline__ Real gradient(Real z, Real r) const {
    return multiply_add(mass_of<T>(z, policy_max), policy_weight,
                        mass_of<T>(r, reference_max) * reference_weight);
  }
  __device__ __forceinline__ Real label() const {
    return multiply_add(g_k, saved.label_gap, g_m * saved.policy_rest);
  }
};

// g_k (p - q) - g_m p, and each entry chooses. Where p and q are close, p - q = q (e^u - 1) with
// u = log p - log q keeps all digits, if u has them: not where the logits are shifted far against
// each other.
template <class T>
struct Mixed {
  using Real = RealOf<T>;
  static constexpr bool kReadsPolicy = true, kReadsReference = true, kHasLabel = true;
  const Normalizers<Real>& saved;
  Real g_m, g_k, g_p, policy_max, policy_scale, reference_max, reference_scale, log_sum_gap,
      close_gap;
  __device__ Mixed(const Normalizers<Real>& saved, Real g_m, Real g_k)
      : saved(saved),
        g_m(g_m),
        g_k(g_k),
        g_p(g_k - g_m),
        policy_max(saved.policy_max),
        policy_scale(saved.policy_scale),
        reference_max(saved.reference_max),
        reference_scale(saved.reference_scale),
        log_sum_gap(saved.log_sum_gap),
        close_gap(fabs(log_sum_gap) < Real(2) ? Real(1) : Real(0)) {}
  __device__ __forceinline__ Real gradient(Real z, Real r) const {
    const Real p = mass_of<T>(z, policy_max) * policy_scale;
    const Real q = mass_of<T>(r, reference_max) * reference_scale;
    const Real u = (z - r) - log_sum_gap;
    const Real close = q * multiply_add(u * u, excess_over_square(u), u);
    return fabs(u) < close_gap ? multiply_add(g_k, close, -(g_m * p))
                               : multiply_add(g_p, p, -(g_k * q));
  }
  __device__ __forceinline__ Real label() const {
    return multiply_add(g_k, saved.label_gap, g_m * saved.policy_rest);
  }
};

// A team's work: a row or a part of it, and the loop that writes its gradient. T: type of the
// logits; G: type of the gradient. kShifted: whether some row of the logits is aligned differently
// from the gradient's.
template <class T, class G, int kWarps, bool kShifted>
struct GradientRow {
  using Real = RealOf<T>;
  using Scope = Team<kWarps>;
  static constexpr int kPerVector = Storage<T>::kPerVector;
  static constexpr int kStoredBytes = kPerVector * static_cast<int>(sizeof(G));

  const TokenStatsBackward& work;
  uint32_t row;
  int part, parts;

  template <class Kind>
  __device__ __forceinline__ void write(const Kind& kind) const {
    const TokenStatsProblem& problem = work.problem;
    const int vocabulary = static_cast<int>(problem.vocabulary);
    G* gradient = static_cast<G*>(work.gradient) + row_offset(work.gradient_rows, row);
    const int before =
        static_cast<int>(reinterpret_cast<uintptr_t>(gradient) % kStoredBytes / sizeof(G));
    const Side<T> z = side(problem.policy, before), r = side(problem.reference, before);
    const bool aligned = !(Kind::kReadsPolicy && z.shift) && !(Kind::kReadsReference && r.shift);
    const RowVectors<T> vectors(before, vocabulary, aligned);
    const int begin = vectors.part_begin(part, parts), end = vectors.part_begin(part + 1, parts);

    const auto write_vector = [&](int index, const Words& policy, const Words& reference) {
      store(gradient - before, index, gradient_of(kind, policy, reference));
    };
    constexpr int kSides = Kind::kReadsPolicy + Kind::kReadsReference;
    constexpr int kAtOnce = kSides == 0 || sizeof(T) == 8 ? 1 : TDPO_BACKWARD_VECTORS / kSides;
    const auto load_16 = [](const uint4* address) {
      return kSides == 1 ? TDPO_BACKWARD_LOAD_ONE(address) : TDPO_BACKWARD_LOAD_BOTH(address);
    };
    const G* start_of_part = gradient - before + static_cast<int64_t>(begin) * kPerVector;
    const int first = begin - vectors.past_sectors(start_of_part, kStoredBytes);
    const int size = Scope::size();
    int index = first + Scope::rank();
    // Rounds, one vector of each thread of the team, begin at whole sectors of the gradient, so the
    // first may begin before the row.
    if (index < begin) index += size;
    for (; index + (kAtOnce - 1) * size < end; index += kAtOnce * size) {
      Words policy[kAtOnce] = {}, reference[kAtOnce] = {};
      for (int i = 0; i < kAtOnce; ++i) {
        if (Kind::kReadsPolicy) policy[i] = z.load(index + i * size, load_16);
        if (Kind::kReadsReference) reference[i] = r.load(index + i * size, load_16);
      }
      for (int i = 0; i < kAtOnce; ++i) write_vector(index + i * size, policy[i], reference[i]);
    }
#pragma unroll 1
    for (; kAtOnce > 1 && index < end; index += size) {
      Words policy = {}, reference = {};
      if (Kind::kReadsPolicy) policy = z.load(index, load_16);
      if (Kind::kReadsReference) reference = r.load(index, load_16);
      write_vector(index, policy, reference);
    }
    const int outer = part == 0 ? vectors.outer(Scope::rank()) : vectors.count;
    if (outer < vectors.count) {
      const int start = vectors.start(outer);
      Words policy = {}, reference = {};
      if (Kind::kReadsPolicy) policy = z.load_some(outer, start, vocabulary);
      if (Kind::kReadsReference) reference = r.load_some(outer, start, vocabulary);
      const Words words = gradient_of(kind, policy, reference);
      for (int i = 0; i < kPerVector; ++i) {
        const int entry = start + i;
        if (entry >= 0 && entry < vocabulary) gradient[entry] = Storage<G>::get(words.word, i);
      }
    }
    // The label's gradient overwrites what the loop has written there, so the same thread does it.
    const int64_t label = label_of(problem, row);
    if (!Kind::kHasLabel || label < 0 || label >= vocabulary) return;
    const int vector = vectors.of_entry(static_cast<int>(label));
    const bool in_part = vector >= begin && vector < end;
    if (in_part ? (vector - first) % size != Scope::rank() : vector != outer) return;
    const Real values[kPerVector] = {kind.label()};
    gradient[label] = Storage<G>::get(stored(values).word, 0);
  }

 private:
  __device__ __forceinline__ Side<T> side(const Logits& logits, int before) const {
    const T* start = start_of_row<T>(logits, row);
    return kShifted ? Side<T>(start, before) : Side<T>(start);
  }

  template <class Kind>
  static __device__ __forceinline__ Words gradient_of(const Kind& kind, const Words& policy,
                                                      const Words& reference) {
    Real z[kPerVector], r[kPerVector], result[kPerVector];
    Storage<T>::unpack(policy.word, z);
    Storage<T>::unpack(reference.word, r);
    for (int i = 0; i < kPerVector; ++i) result[i] = kind.gradient(z[i], r[i]);
    return stored(result);
  }

  // Numbers as they are stored, in the first kStoredBytes of the words.
  static __device__ __forceinline__ Words stored(const Real (&values)[kPerVector]) {
    Real padded[Storage<G>::kPerVector] = {};
    for (int i = 0; i < kPerVector; ++i) padded[i] = values[i];
    Words words;
    Storage<G>::pack(padded, words.word);
    return words;
  }

  static __device__ __forceinline__ void store(G* aligned, int index, const Words& words) {
    if constexpr (kStoredBytes == 16) {
      const uint4 all = {words.word[0], words.word[1], words.word[2], words.word[3]};
      __stcs(reinterpret_cast<uint4*>(aligned) + index, all);
    } else {
      static_assert(kStoredBytes == 8, "a vector is stored whole");
      const uint2 all = {words.word[0], words.word[1]};
      __stcs(reinterpret_cast<uint2*>(aligned) + index, all);
    }
  }
};

template <class T, class G, int kWarps, bool kShifted>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 2 : 4)
    token_stats_backward_kernel(const TokenStatsBackward work) {
  using Real = RealOf<T>;
  using Scope = Team<kWarps>;
  const uint32_t row = blockIdx.x * Scope::kTeams + Scope::index();
  if (row >= work.problem.rows) return;
  const GradientRow<T, G, kWarps, kShifted> gradient = {work, row, static_cast<int>(blockIdx.y),
                                                        static_cast<int>(gridDim.y)};
  const RowUpstream<Real> upstream = upstream_of<Real>(work, row);
  const Real g_m = upstream.policy_logp, g_k = upstream.forward_kl;
  // In whole rows a label outside the vocabulary has left NaN normalizers, and then the gradient is
  // NaN too, unless g_m and g_k are 0. In a tile a label outside belongs to another tile.
  const Normalizers<Real>& saved = static_cast<const Normalizers<Real>*>(work.normalizers)[row];
  const bool ignored = label_kind(work.problem, row) == LabelKind::kIgnored;
  if (ignored || (g_m == Real(0) && g_k == Real(0))) {
    gradient.write(Zero<T>());
  } else if (g_k == Real(0)) {
    gradient.write(PolicyOnly<T>(saved, g_m));
  } else if (g_k == g_m) {
    gradient.write(ReferenceOnly<T>(saved, g_m));
  } else if (g_k > Real(0) ? g_k < g_m : g_k > g_m) {
    gradient.write(Direct<T>(saved, g_m, g_k));
  } else {
    gradient.write(Mixed<T>(saved, g_m, g_k));
  }
}

template <class T, class G, int kWarps>
void launch_backward(const TokenStatsBackward& work, int parts, const Launch& launch) {
  constexpr int kTeams = Team<kWarps>::kTeams, kPerVector = Storage<T>::kPerVector;
  const Rows gradient = {work.gradient, work.gradient_rows, sizeof(G)};
  const auto aligned_alike = [&](const Logits& logits) {
    return same_alignment(gradient, {logits.data, logits.rows, sizeof(T)}, kPerVector);
  };
  const bool shifted =
      !aligned_alike(work.problem.policy) || !aligned_alike(work.problem.reference);
  launch_kernel("token_stats_backward_kernel",
                shifted ? token_stats_backward_kernel<T, G, kWarps, true>
                        : token_stats_backward_kernel<T, G, kWarps, false>,
                dim3(blocks_for(work.problem.rows, kTeams), parts), 0, launch, work);
}

template <class T, class G>
void launch_backward(const TokenStatsBackward& work, const Launch& launch) {
  if (one_warp_per_row<T>(work.problem)) {
    launch_backward<T, G, 1>(work, 1, launch);
  } else {
    launch_backward<T, G, kBlockWarps>(work, parts_of_row<T>(work.problem), launch);
  }
}

}  // namespace

void token_stats_backward(const TokenStatsBackward& work, const Launch& launch) {
  if (work.problem.rows == 0) return;
  check_sizes(work.problem);
  const OnDevice guard(launch.device);
  with_storage(work.problem.dtype, [&](auto storage) {
    using T = decltype(storage);
    if (work.gradient_dtype == work.problem.dtype) return launch_backward<T, T>(work, launch);
    if constexpr (std::is_same_v<T, float>) {
      if (work.gradient_dtype == DType::kBFloat16)
        return launch_backward<T, BFloat16>(work, launch);
      if (work.gradient_dtype == DType::kFloat16) return launch_backward<T, Float16>(work, launch);
    }
    throw std::runtime_error("token_stats_backward: no kernel of this gradient's dtype");
  });
}

}  // namespace tdpo::cuda
