// Backward of one row, or of a part of one: the gradient of the policy's logits,
//
//   dz = g_m (onehot(y) - p) + g_k (p - q),     p = softmax(z), q = softmax(r).
//
// Reads [vocabulary] logits z and r of type T, only the side that the kind of gradient needs; a
// label y that may lie outside; the Normalizers<Real> that forward has saved; and the upstream
// gradients g_m (of log p(y)) and g_k (of KL(q || p)). Writes [vocabulary] entries of type G, which
// may lie over z or over r if G is T: entries are read before their gradient is written.
//
//   choose the kind of gradient from g_m and g_k
//   for each group or each two vectors of entries:
//     p, q or both, each one exponential, from the saved maxima and scales
//     write the gradient of these entries as if none were the label
//   write the label's own gradient over it
//
// Roofline, per entry of S bytes: reads S or 2 S bytes, writes S; one or two exponentials, or one
// and a polynomial. With AVX2, 16 entries of both sides take 63 instructions in float32 and 79 in
// bfloat16; an AMD Zen 3 core takes 0.40 and 0.52 ns for each entry in cache, and 0.39 and 0.21 ns
// to read and write it in memory. So float32 is bound by memory, and bfloat16 by arithmetic
// (docs/kernels.md has the table).
//
// Decomposition: every entry stands by itself, since forward has saved all that a row needs. One
// thread has the row or the part.
#include <cmath>

#include "../vocab_stats.h"
#include "masses.h"
#include "row_kernels.h"
#include "simd.h"

namespace tdpo::cpu::TDPO_INSTRUCTION_SET {
namespace {

// The kinds of gradient of all entries but the label's. Each reads only the logits that its formula
// needs. csrc/cuda/token_stats_backward.cu has PolicyOnly, ReferenceOnly, Direct and Mixed too. It
// has no Close, chooses Direct only for g_k between 0 and g_m, and has Zero where this file calls
// memset.

template <class M>
struct PolicyOnly {  // g_k = 0: -g_m p
  using Real = typename M::Number;
  static constexpr bool kReadsPolicy = true, kReadsReference = false;
  M p;
  TDPO_INLINE Vector<Real> gradient(Vector<Real> z, Vector<Real>) const { return p(z); }
};
template <class M>
PolicyOnly(M) -> PolicyOnly<M>;

template <class M>
struct ReferenceOnly {  // g_k = g_m: -g_m p + g_m (p - q) = -g_m q
  using Real = typename M::Number;
  static constexpr bool kReadsPolicy = false, kReadsReference = true;
  M q;
  TDPO_INLINE Vector<Real> gradient(Vector<Real>, Vector<Real> r) const { return q(r); }
};
template <class M>
ReferenceOnly(M) -> ReferenceOnly<M>;

// (g_k - g_m) p - g_k q as it stands. Where p and q are close the subtraction loses digits of
// g_k (p - q); beside g_m p that does not matter, as long as g_m is not much smaller than g_k.
template <class M>
struct Direct {
  using Real = typename M::Number;
  static constexpr bool kReadsPolicy = true, kReadsReference = true;
  M p, q;
  TDPO_INLINE Vector<Real> gradient(Vector<Real> z, Vector<Real> r) const { return p(z) - q(r); }
};
template <class M>
Direct(M, M) -> Direct<M>;

// The same where p and q are close, with all digits. With u = log p - log q, p - q = q (e^u - 1),
// and the gradient is q (g_p (e^u - 1) - g_m), g_p = g_k - g_m.
template <class M>
struct Close {
  using Real = typename M::Number;
  static constexpr bool kReadsPolicy = true, kReadsReference = true;
  M q;
  Real log_sum_gap, g_p, g_m;
  TDPO_INLINE Vector<Real> gradient(Vector<Real> z, Vector<Real> r) const {
    const Vector<Real> u = (z - r) - log_sum_gap;
    const Vector<Real> relative = u + u * u * excess_over_square<Real>(u);
    return q(r) * (relative * g_p - g_m);
  }
};
template <class M, class Real>
Close(M, Real, Real, Real) -> Close<M>;

// Close for the entries whose u is small, Direct for the others.
template <class Real>
struct Mixed {
  static constexpr bool kReadsPolicy = true, kReadsReference = true;
  Direct<Mass<Real>> direct;
  Close<Mass<Real>> close;
  TDPO_INLINE Vector<Real> gradient(Vector<Real> z, Vector<Real> r) const {
    const Vector<Real> u = magnitude<Real>((z - r) - close.log_sum_gap);
    return u < ExpConstants<Real>::kClose ? close.gradient(z, r) : direct.gradient(z, r);
  }
};

template <class T, class G, class Kind, class Real = RealOf<T>>
TDPO_INLINE void write_gradient(G* gradient, const T* policy, const T* reference, int64_t count,
                                const Kind& kind) {
  const auto gradient_of = [&](const TwoVectors<Real>& z,
                               const TwoVectors<Real>& r) -> TwoVectors<Real> {
    return {kind.gradient(z.first, r.first), kind.gradient(z.second, r.second)};
  };
  TwoVectors<Real> z{}, r{};
  int64_t at = 0;
  for (; at + kPerTwoVectors<Real> <= count; at += kPerTwoVectors<Real>) {
    if (Kind::kReadsPolicy) prefetch_ahead(policy + at, kPerTwoVectors<Real>);
    if (Kind::kReadsReference) prefetch_ahead(reference + at, kPerTwoVectors<Real>);
    if (Kind::kReadsPolicy) z = Storage<T>::unpack(policy + at);
    if (Kind::kReadsReference) r = Storage<T>::unpack(reference + at);
    pack_from<T>(gradient + at, gradient_of(z, r));
  }
  if (const int64_t left = count - at; left > 0) {
    if (Kind::kReadsPolicy) z = unpack_some(policy + at, left);
    if (Kind::kReadsReference) r = unpack_some(reference + at, left);
    pack_some_from<T>(gradient + at, gradient_of(z, r), left);
  }
}

template <class T, class Real = RealOf<T>>
TDPO_INLINE bool all_close(const T* policy, const T* reference, Real log_sum_gap) {
  Bits<Real> not_close{};
  for_each_vector(policy, reference, kGroup, [&](Vector<Real> z, Vector<Real> r) {
    const Vector<Real> u = magnitude<Real>((z - r) - log_sum_gap);
    // Also sets the bits where u is NaN, as for an entry that both sides exclude with -inf.
    not_close |= bit_cast<Bits<Real>>(~(u < ExpConstants<Real>::kClose));
  });
  return !any_bit(not_close);
}

// Group by group: Close where all entries of the group are close, else Mixed.
template <class T, class G, class CloseKind, class Real = RealOf<T>>
void write_divergence_gradient(G* gradient, const T* policy, const T* reference, int64_t count,
                               const CloseKind& close, const Mixed<Real>& mixed) {
  int64_t at = 0;
  for (; at + kGroup <= count; at += kGroup) {
    const T* z = policy + at;
    const T* r = reference + at;
    if (all_close(z, r, close.log_sum_gap)) {
      write_gradient(gradient + at, z, r, kGroup, close);
    } else {
      write_gradient(gradient + at, z, r, kGroup, mixed);
    }
  }
  write_gradient(gradient + at, policy + at, reference + at, count - at, mixed);
}

// Direct has enough digits as long as |g_k| is at most this many times |g_m|. Rows whose gap has no
// digits take it as well, since Close would need them.
template <class Real>
constexpr Real kLargestRatioOfDirect = 4;

// The processor's own NaN for any NaN: rounded_to_bfloat16 would turn some of a caller's NaNs into
// infinity.
template <class Real>
Real with_plain_nan(Real x) {
  return x == x ? x : Real(NAN);
}

// T: type of the logits; G: type of the gradient.
template <class T, class G>
void backward(const RowBackward& row) {
  using Real = RealOf<T>;
  const Normalizers<Real>& saved = *static_cast<const Normalizers<Real>*>(row.normalizers);
  const Real g_m = with_plain_nan(*static_cast<const Real*>(row.grad_policy_logp));
  const Real g_k = with_plain_nan(*static_cast<const Real*>(row.grad_forward_kl));
  const T* policy = static_cast<const T*>(row.policy);
  const T* reference = static_cast<const T*>(row.reference);
  G* gradient = static_cast<G*>(row.gradient);
  // u = log p - log q has its digits only where the logits are not shifted far against each other.
  const bool gap_has_digits = std::fabs(saved.log_sum_gap) < Real(2);
  Real label_gradient = g_k * saved.label_gap + g_m * saved.policy_rest;
  if (g_m == Real(0) && g_k == Real(0)) {
    std::memset(row.gradient, 0, static_cast<size_t>(row.vocabulary) * sizeof(G));
    return;
  }
  const auto write = [&](const auto& kind) {
    write_gradient(gradient, policy, reference, row.vocabulary, kind);
  };
  if (g_k == Real(0)) {
    label_gradient = g_m * saved.policy_rest;
    const Mass<Real> p = {saved.policy_max, saved.policy_scale * -g_m};
    with_masses([&](const auto& p) { write(PolicyOnly{p}); }, p);
  } else if (g_k == g_m) {
    label_gradient = g_m * saved.reference_rest;
    const Mass<Real> q = {saved.reference_max, saved.reference_scale * -g_m};
    with_masses([&](const auto& q) { write(ReferenceOnly{q}); }, q);
  } else if (!gap_has_digits || std::fabs(g_k) <= kLargestRatioOfDirect<Real> * std::fabs(g_m)) {
    const Mass<Real> p = {saved.policy_max, (g_k - g_m) * saved.policy_scale};
    const Mass<Real> q = {saved.reference_max, g_k * saved.reference_scale};
    with_masses([&](const auto& p, const auto& q) { write(Direct{p, q}); }, p, q);
  } else {
    const Mass<Real> q = {saved.reference_max, saved.reference_scale};
    const Direct<Mass<Real>> direct = {{saved.policy_max, (g_k - g_m) * saved.policy_scale},
                                       {saved.reference_max, g_k * saved.reference_scale}};
    const Mixed<Real> mixed = {direct, {q, saved.log_sum_gap, g_k - g_m, g_m}};
    const auto write_groups = [&](const auto& q) {
      write_divergence_gradient(gradient, policy, reference, row.vocabulary,
                                Close{q, saved.log_sum_gap, g_k - g_m, g_m}, mixed);
    };
    with_masses(write_groups, q);
  }
  if (row.label >= 0 && row.label < row.vocabulary) {
    const Vector<Real> all_lanes = broadcast<Real>(label_gradient);
    pack_some_from<T>(gradient + row.label, TwoVectors<Real>{all_lanes, all_lanes}, 1);
  }
}

}  // namespace
}  // namespace tdpo::cpu::TDPO_INSTRUCTION_SET
