// The mass of an entry, times a factor: what gradients are made of.
#pragma once

#include <cmath>

#include "simd.h"

namespace tdpo::cpu::TDPO_INSTRUCTION_SET {

// factor e^(x - largest), for any numbers at all.
template <class Real>
struct Mass {
  using Number = Real;
  Real largest, factor;
  TDPO_INLINE Vector<Real> operator()(Vector<Real> x) const {
    return exp_of<Real>(x - largest) * factor;
  }
};

// The same in fewer instructions: `largest` stands in the rounder, the factor in the polynomial.
template <class Real>
class QuickMass {
  using C = ExpConstants<Real>;
  static constexpr int kTerms = ScaledExp<Real>::kTerms;
  Real lowest, rounder, coefficients[kTerms];

 public:
  using Number = Real;

  // Where a rounder is exact, and coefficients are neither infinite nor subnormal; not for NaN.
  static bool serves(const Mass<Real>& mass) {
    const Real size = std::fabs(mass.factor);
    return std::fabs(mass.largest) < kExactSteps<Real> &&
           (size == Real(0) || (size > Real(1e-30) && size < Real(1e8)));
  }

  explicit QuickMass(const Mass<Real>& mass) {
    static constexpr ScaledExp<Real> kPower(0);
    const Steps<Real> steps(mass.largest);
    lowest = Real(steps.nats() + C::kLowest);
    rounder = steps.rounder(C::kFullExponent);
    const Real factor = mass.factor * Real(std::exp(steps.nats() - mass.largest));
    for (int term = 0; term < kTerms; ++term)
      coefficients[term] = kPower.coefficients[term] * factor;
  }

  TDPO_INLINE Vector<Real> operator()(Vector<Real> x) const {
    return exp_with<Real>(x, lowest, rounder, coefficients);
  }
};

// Calls body with the masses, quick ones where they serve.
template <class Body, class... Real>
void with_masses(const Body& body, const Mass<Real>&... masses) {
  if ((QuickMass<Real>::serves(masses) && ...)) {
    body(QuickMass<Real>(masses)...);
  } else {
    body(masses...);
  }
}

}  // namespace tdpo::cpu::TDPO_INSTRUCTION_SET
