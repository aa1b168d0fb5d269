// One row backward, or a part of one, in the vectors of the instruction set whose file includes
// this: the gradient of the policy's logits. Every entry stands by itself.
//
// Roofline, per entry of S bytes: reads S or 2 S bytes, writes S, and takes one or two
// exponentials.
#include <cmath>

#include "../vocab_stats.h"
#include "masses.h"
#include "row_kernels.h"
#include "simd.h"

namespace tdpo::cpu::TDPO_INSTRUCTION_SET {
namespace {

// The gradient of the entries but the label's, in several kinds. Each reads what its algebra needs
// and nothing else.

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

// g_k (p - q) - g_m p, as a difference of masses: where g_m is not much smaller than g_k what p - q
// loses does not show beside g_m p.
template <class M>
struct Apart {
  using Real = typename M::Number;
  static constexpr bool kReadsPolicy = true, kReadsReference = true;
  M p, q;
  TDPO_INLINE Vector<Real> gradient(Vector<Real> z, Vector<Real> r) const { return p(z) - q(r); }
};
template <class M>
Apart(M, M) -> Apart<M>;

// The same where the divergence is all or most. With u = log p - log q and p - q = q (e^u - 1) it
// is q ((g_k - g_m) (e^u - 1) - g_m), which keeps the digits where p and q are close.
template <class M>
struct Close {
  using Real = typename M::Number;
  static constexpr bool kReadsPolicy = true, kReadsReference = true;
  M q;
  Real log_sum_gap, difference_factor, g_m;
  TDPO_INLINE Vector<Real> gradient(Vector<Real> z, Vector<Real> r) const {
    const Vector<Real> u = (z - r) - log_sum_gap;
    const Vector<Real> relative = u + u * u * excess_over_square<Real>(u);
    return q(r) * (relative * difference_factor - g_m);
  }
};
template <class M, class Real>
Close(M, Real, Real, Real) -> Close<M>;

// Either, entry by entry.
template <class Real>
struct Mixed {
  static constexpr bool kReadsPolicy = true, kReadsReference = true;
  Apart<Mass<Real>> apart;
  Close<Mass<Real>> close;
  TDPO_INLINE Vector<Real> gradient(Vector<Real> z, Vector<Real> r) const {
    const Vector<Real> u = magnitude<Real>((z - r) - close.log_sum_gap);
    return u < ExpConstants<Real>::kClose ? close.gradient(z, r) : apart.gradient(z, r);
  }
};

template <class T, class G, class Kind, class Real = typename Storage<T>::Accumulator>
TDPO_INLINE void write_gradient(G* gradient, const T* policy, const T* reference, int64_t count,
                                const Kind& kind) {
  const auto gradient_of = [&](const Two<Real>& z, const Two<Real>& r) -> Two<Real> {
    return {kind.gradient(z.first, r.first), kind.gradient(z.second, r.second)};
  };
  Two<Real> z{}, r{};
  int64_t at = 0;
  for (; at + kTwo<Real> <= count; at += kTwo<Real>) {
    if (Kind::kReadsPolicy) prefetch_ahead(policy + at);
    if (Kind::kReadsReference) prefetch_ahead(reference + at);
    if (Kind::kReadsPolicy) z = Storage<T>::load_two(policy + at);
    if (Kind::kReadsReference) r = Storage<T>::load_two(reference + at);
    store_two_of<T>(gradient + at, gradient_of(z, r));
  }
  if (const int64_t left = count - at; left > 0) {
    if (Kind::kReadsPolicy) z = load_some(policy + at, left);
    if (Kind::kReadsReference) r = load_some(reference + at, left);
    store_some_of<T>(gradient + at, gradient_of(z, r), left);
  }
}

template <class T, class Real = typename Storage<T>::Accumulator>
TDPO_INLINE bool all_close(const T* policy, const T* reference, Real log_sum_gap) {
  Bits<Real> apart{};
  for_each_vector(policy, reference, kGroup, [&](Vector<Real> z, Vector<Real> r) {
    const Vector<Real> u = magnitude<Real>((z - r) - log_sum_gap);
    // Also where u is NaN, as for a word that both exclude; a maximum might forget it.
    apart |= bit_cast<Bits<Real>>(~(u < ExpConstants<Real>::kClose));
  });
  return !any_bit(apart);
}

// Where p and q are close, group by group.
template <class T, class G, class CloseKind, class Real = typename Storage<T>::Accumulator>
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

// Up to here, g_k / g_m, a difference of masses has the digits.
template <class Real>
constexpr Real kMostOfMargin = 4;

// A caller's NaN may have any bits; Storage<BFloat16> wants those that the processor makes.
template <class Real>
Real with_plain_nan(Real x) {
  return x == x ? x : Real(NAN);
}

// T: of the logits; G: of the gradient.
template <class T, class G>
void backward(const RowBackward& row) {
  using Real = typename Storage<T>::Accumulator;
  const Normalizers<Real>& of = *static_cast<const Normalizers<Real>*>(row.normalizers);
  const Real g_m = with_plain_nan(*static_cast<const Real*>(row.grad_policy_logp));
  const Real g_k = with_plain_nan(*static_cast<const Real*>(row.grad_forward_kl));
  const T* policy = static_cast<const T*>(row.policy);
  const T* reference = static_cast<const T*>(row.reference);
  G* gradient = static_cast<G*>(row.gradient);
  // log p - log q has its digits only where the logits are not shifted far against each other.
  const bool gap_has_digits = std::fabs(of.log_sum_gap) < Real(2);
  Real label_gradient = g_k * of.label_gap + g_m * of.policy_rest;
  if (g_m == Real(0) && g_k == Real(0)) {
    std::memset(row.gradient, 0, static_cast<size_t>(row.vocabulary) * sizeof(G));
    return;
  }
  const auto write = [&](const auto& kind) {
    write_gradient(gradient, policy, reference, row.vocabulary, kind);
  };
  if (g_k == Real(0)) {
    label_gradient = g_m * of.policy_rest;
    const Mass<Real> p = {of.policy_max, of.policy_scale * -g_m};
    with_masses([&](const auto& p) { write(PolicyOnly{p}); }, p);
  } else if (g_k == g_m) {
    label_gradient = g_m * of.reference_rest;
    const Mass<Real> q = {of.reference_max, of.reference_scale * -g_m};
    with_masses([&](const auto& q) { write(ReferenceOnly{q}); }, q);
  } else if (!gap_has_digits || std::fabs(g_k) <= kMostOfMargin<Real> * std::fabs(g_m)) {
    const Mass<Real> p = {of.policy_max, (g_k - g_m) * of.policy_scale};
    const Mass<Real> q = {of.reference_max, g_k * of.reference_scale};
    with_masses([&](const auto& p, const auto& q) { write(Apart{p, q}); }, p, q);
  } else {
    const Mass<Real> q = {of.reference_max, of.reference_scale};
    const Apart<Mass<Real>> apart = {{of.policy_max, (g_k - g_m) * of.policy_scale},
                                     {of.reference_max, g_k * of.reference_scale}};
    const Mixed<Real> mixed = {apart, {q, of.log_sum_gap, g_k - g_m, g_m}};
    const auto write_groups = [&](const auto& q) {
      write_divergence_gradient(gradient, policy, reference, row.vocabulary,
                                Close{q, of.log_sum_gap, g_k - g_m, g_m}, mixed);
    };
    with_masses(write_groups, q);
  }
  if (row.label >= 0 && row.label < row.vocabulary) {
    const Vector<Real> own = broadcast<Real>(label_gradient);
    store_some_of<T>(gradient + row.label, Two<Real>{own, own}, 1);
  }
}

}  // namespace
}  // namespace tdpo::cpu::TDPO_INSTRUCTION_SET
