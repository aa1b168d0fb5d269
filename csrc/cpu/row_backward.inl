// One row backward, or a part of one, in the vectors of the instruction set whose file includes
// this: the gradient of the policy's logits. Every entry stands by itself.
//
// Roofline, per entry of S bytes: reads S or 2 S bytes, writes S, and takes one or two
// exponentials.
#include <cmath>

#include "../vocab_stats.h"
#include "row_kernels.h"
#include "simd.h"

namespace tdpo::cpu::TDPO_INSTRUCTION_SET {
namespace {

// The gradient of the entries but the label's, in several kinds. Each reads what its algebra needs
// and nothing else.

template <class Real>
struct PolicyOnly {  // g_k = 0: -g_m p
  static constexpr bool kReadsPolicy = true, kReadsReference = false;
  Normalizers<Real> of;
  Real g_m;
  TDPO_INLINE Vector<Real> gradient(Vector<Real> z, Vector<Real>) const {
    return exp_of<Real>(z - of.policy_max) * (of.policy_scale * -g_m);
  }
};

template <class Real>
struct ReferenceOnly {  // g_k = g_m: -g_m p + g_m (p - q) = -g_m q
  static constexpr bool kReadsPolicy = false, kReadsReference = true;
  Normalizers<Real> of;
  Real g_m;
  TDPO_INLINE Vector<Real> gradient(Vector<Real>, Vector<Real> r) const {
    return exp_of<Real>(r - of.reference_max) * (of.reference_scale * -g_m);
  }
};

// g_k (p - q) - g_m p, as a difference of masses: where g_m is not much smaller than g_k what p - q
// loses does not show beside g_m p.
template <class Real>
struct Apart {
  static constexpr bool kReadsPolicy = true, kReadsReference = true;
  static constexpr Real kMostOfMargin = 4;  // g_k / g_m
  Real policy_max, reference_max, policy_factor, reference_factor;
  Apart(const Normalizers<Real>& of, Real g_m, Real g_k)
      : policy_max(of.policy_max),
        reference_max(of.reference_max),
        policy_factor((g_k - g_m) * of.policy_scale),
        reference_factor(g_k * of.reference_scale) {}
  TDPO_INLINE Vector<Real> gradient(Vector<Real> z, Vector<Real> r) const {
    return exp_of<Real>(z - policy_max) * policy_factor -
           exp_of<Real>(r - reference_max) * reference_factor;
  }
};

// The same where the divergence is all or most. With u = log p - log q and p - q = q (e^u - 1) it
// is q ((g_k - g_m) (e^u - 1) - g_m), which keeps the digits where p and q are close.
template <class Real>
struct Close {
  static constexpr bool kReadsPolicy = true, kReadsReference = true;
  Real reference_max, log_sum_gap, difference_factor, reference_factor;
  Close(const Normalizers<Real>& of, Real g_m, Real g_k)
      : reference_max(of.reference_max),
        log_sum_gap(of.log_sum_gap),
        difference_factor((g_k - g_m) * of.reference_scale),
        reference_factor(g_m * of.reference_scale) {}
  TDPO_INLINE Vector<Real> gradient(Vector<Real> z, Vector<Real> r) const {
    const Vector<Real> u = (z - r) - log_sum_gap;
    const Vector<Real> relative = u + u * u * excess_over_square<Real>(u);
    return exp_of<Real>(r - reference_max) * (relative * difference_factor - reference_factor);
  }
};

// Either, entry by entry.
template <class Real>
struct Mixed {
  static constexpr bool kReadsPolicy = true, kReadsReference = true;
  Apart<Real> apart;
  Close<Real> close;
  TDPO_INLINE Vector<Real> gradient(Vector<Real> z, Vector<Real> r) const {
    const Vector<Real> u = magnitude<Real>((z - r) - close.log_sum_gap);
    return u < ExpConstants<Real>::kClose ? close.gradient(z, r) : apart.gradient(z, r);
  }
};

template <class T, class Kind, class Real = typename Storage<T>::Accumulator>
TDPO_INLINE void write_gradient(T* gradient, const T* policy, const T* reference, int64_t count,
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
    Storage<T>::store_two(gradient + at, gradient_of(z, r));
  }
  if (const int64_t left = count - at; left > 0) {
    if (Kind::kReadsPolicy) z = load_some(policy + at, left);
    if (Kind::kReadsReference) r = load_some(reference + at, left);
    store_some(gradient + at, gradient_of(z, r), left);
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
template <class T, class Real = typename Storage<T>::Accumulator>
void write_divergence_gradient(T* gradient, const T* policy, const T* reference, int64_t count,
                               const Mixed<Real>& mixed) {
  int64_t at = 0;
  for (; at + kGroup <= count; at += kGroup) {
    const T* z = policy + at;
    const T* r = reference + at;
    if (all_close(z, r, mixed.close.log_sum_gap)) {
      write_gradient(gradient + at, z, r, kGroup, mixed.close);
    } else {
      write_gradient(gradient + at, z, r, kGroup, mixed);
    }
  }
  write_gradient(gradient + at, policy + at, reference + at, count - at, mixed);
}

template <class T>
void backward(const RowBackward& row) {
  using Real = typename Storage<T>::Accumulator;
  const Normalizers<Real>& of = *static_cast<const Normalizers<Real>*>(row.normalizers);
  const Real g_m = *static_cast<const Real*>(row.grad_policy_logp);
  const Real g_k = *static_cast<const Real*>(row.grad_forward_kl);
  const T* policy = static_cast<const T*>(row.policy);
  const T* reference = static_cast<const T*>(row.reference);
  T* gradient = static_cast<T*>(row.gradient);
  // log p - log q has its digits only where the logits are not shifted far against each other.
  const bool gap_has_digits = std::fabs(of.log_sum_gap) < Real(2);
  Real label_gradient = g_k * of.label_gap + g_m * of.policy_rest;
  if (g_m == Real(0) && g_k == Real(0)) {
    std::memset(row.gradient, 0, static_cast<size_t>(row.vocabulary) * sizeof(T));
    return;
  }
  if (g_k == Real(0)) {
    label_gradient = g_m * of.policy_rest;
    write_gradient(gradient, policy, reference, row.vocabulary, PolicyOnly<Real>{of, g_m});
  } else if (g_k == g_m) {
    write_gradient(gradient, policy, reference, row.vocabulary, ReferenceOnly<Real>{of, g_m});
    label_gradient = g_m * of.reference_rest;
  } else if (!gap_has_digits || std::fabs(g_k) <= Apart<Real>::kMostOfMargin * std::fabs(g_m)) {
    write_gradient(gradient, policy, reference, row.vocabulary, Apart<Real>(of, g_m, g_k));
  } else {
    const Mixed<Real> mixed = {{of, g_m, g_k}, {of, g_m, g_k}};
    write_divergence_gradient(gradient, policy, reference, row.vocabulary, mixed);
  }
  if (row.label >= 0 && row.label < row.vocabulary) {
    const Vector<Real> own = broadcast<Real>(label_gradient);
    store_some<T>(gradient + row.label, {own, own}, 1);
  }
}

}  // namespace
}  // namespace tdpo::cpu::TDPO_INSTRUCTION_SET
