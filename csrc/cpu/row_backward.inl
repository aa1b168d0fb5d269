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

// The gradient of the entries but the label's, in three kinds. Each reads what its algebra needs
// and nothing else.

template <class Real>
struct PolicyOnly {  // g_k = 0: -g_m p
  static constexpr bool kReadsPolicy = true, kReadsReference = false;
  Normalizers<Real> of;
  Real g_m;
  TDPO_INLINE Vector<Real> gradient(Vector<Real> z, Vector<Real>) const {
    return exp_of<Real>(z - of.policy_max) * of.policy_scale * -g_m;
  }
  Real label_gradient() const { return g_m * of.policy_rest; }
};

template <class Real>
struct ReferenceOnly {  // g_k = g_m: -g_m p + g_m (p - q) = -g_m q
  static constexpr bool kReadsPolicy = false, kReadsReference = true;
  Normalizers<Real> of;
  Real g_m;
  TDPO_INLINE Vector<Real> gradient(Vector<Real>, Vector<Real> r) const {
    return exp_of<Real>(r - of.reference_max) * of.reference_scale * -g_m;
  }
  Real label_gradient() const { return g_m * of.reference_rest; }
};

// g_k (p - q) - g_m p. Where p and q are close, p - q = q (e^u - 1) with u = log p - log q keeps
// its digits, provided that u has them: with logits shifted far against each other it has not.
template <class Real>
struct Both {
  static constexpr bool kReadsPolicy = true, kReadsReference = true;
  Normalizers<Real> of;
  Real g_m, g_k, close_squared;
  Both(const Normalizers<Real>& of, Real g_m, Real g_k)
      : of(of),
        g_m(g_m),
        g_k(g_k),
        close_squared(std::fabs(of.log_sum_gap) < Real(2) ? CloseGap<Real>::squared : Real(0)) {}
  TDPO_INLINE Vector<Real> gradient(Vector<Real> z, Vector<Real> r) const {
    const Vector<Real> p = exp_of<Real>(z - of.policy_max) * of.policy_scale;
    const Vector<Real> q = exp_of<Real>(r - of.reference_max) * of.reference_scale;
    const Vector<Real> u = (z - r) - of.log_sum_gap;
    const Vector<Real> u_squared = u * u;
    const Vector<Real> close = q * (u + u_squared * excess_over_square<Real>(u));
    return (u_squared < close_squared ? close : p - q) * g_k - p * g_m;
  }
  Real label_gradient() const { return g_k * of.label_gap + g_m * of.policy_rest; }
};

template <class T, class Kind, class Real = typename Storage<T>::Accumulator>
TDPO_INLINE void write_gradient(const RowBackward& row, const Kind& kind) {
  const T* policy = static_cast<const T*>(row.policy);
  const T* reference = static_cast<const T*>(row.reference);
  T* gradient = static_cast<T*>(row.gradient);
  const auto gradient_of = [&](const Two<Real>& z, const Two<Real>& r) -> Two<Real> {
    return {kind.gradient(z.first, r.first), kind.gradient(z.second, r.second)};
  };
  Two<Real> z{}, r{};
  int64_t at = 0;
  for (; at + kTwo<Real> <= row.vocabulary; at += kTwo<Real>) {
    if (Kind::kReadsPolicy) z = Storage<T>::load_two(policy + at);
    if (Kind::kReadsReference) r = Storage<T>::load_two(reference + at);
    Storage<T>::store_two(gradient + at, gradient_of(z, r));
  }
  if (const int64_t left = row.vocabulary - at; left > 0) {
    if (Kind::kReadsPolicy) z = load_some(policy + at, left);
    if (Kind::kReadsReference) r = load_some(reference + at, left);
    store_some(gradient + at, gradient_of(z, r), left);
  }
  if (row.label >= 0 && row.label < row.vocabulary) {
    const Vector<Real> own = broadcast<Real>(kind.label_gradient());
    store_some<T>(gradient + row.label, {own, own}, 1);
  }
}

template <class T>
void backward(const RowBackward& row) {
  using Real = typename Storage<T>::Accumulator;
  const Normalizers<Real>& of = *static_cast<const Normalizers<Real>*>(row.normalizers);
  const Real g_m = *static_cast<const Real*>(row.grad_policy_logp);
  const Real g_k = *static_cast<const Real*>(row.grad_forward_kl);
  if (g_m == Real(0) && g_k == Real(0)) {
    std::memset(row.gradient, 0, static_cast<size_t>(row.vocabulary) * sizeof(T));
  } else if (g_k == Real(0)) {
    write_gradient<T>(row, PolicyOnly<Real>{of, g_m});
  } else if (g_k == g_m) {
    write_gradient<T>(row, ReferenceOnly<Real>{of, g_m});
  } else {
    write_gradient<T>(row, Both<Real>(of, g_m, g_k));
  }
}

}  // namespace
}  // namespace tdpo::cpu::TDPO_INSTRUCTION_SET
