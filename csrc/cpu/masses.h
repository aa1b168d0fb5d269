// The mass of an entry times a factor, which is what gradients are made of: factor e^(x - max).
#pragma once

#include <cmath>

#include "simd.h"

namespace tdpo::cpu::TDPO_INSTRUCTION_SET {

// For any numbers.
template <class Real>
struct Mass {
  using Number = Real;
  Real max, factor;
  TDPO_INLINE Vector<Real> operator()(Vector<Real> x) const {
    return exp_of<Real>(x - max) * factor;
  }
};

// The same in fewer instructions: `max` is part of the rounder, the factor of the polynomial.
template <class Real>
class QuickMass {
  using C = ExpConstants<Real>;
  static constexpr int kTerms = ScaledExp<Real>::kTerms;
  Real lowest, rounder, coefficients[kTerms];

 public:
  using Number = Real;

  // Whether the rounder is exact, and no coefficient becomes infinite or subnormal. False for NaN.
  static bool serves(const Mass<Real>& mass) {
    const Real size = std::fabs(mass.factor);
    return std::fabs(mass.max) < kExactSteps<Real> &&
           (size == Real(0) || (size > Real(1e-30) && size < Real(1e8)));
  }

  explicit QuickMass(const Mass<Real>& mass) {
    static constexpr ScaledExp<Real> kPower(0);
    const Steps<Real> steps(mass.max);
    lowest = Real(steps.nats() + C::kLowest);
    rounder = steps.rounder(C::kFullExponent);
    const Real factor = mass.factor * Real(std::exp(steps.nats() - mass.max));
    for (int term = 0; term < kTerms; ++term)
      coefficients[term] = kPower.coefficients[term] * factor;
  }

  TDPO_INLINE Vector<Real> operator()(Vector<Real> x) const {
    return exp_with<Real>(x, lowest, rounder, coefficients);
  }
};

// Calls body with the masses: all quick if QuickMass serves for each.
template <class Body, class... Real>
void with_masses(const Body& body, const Mass<Real>&... masses) {
  if ((QuickMass<Real>::serves(masses) && ...)) {
    body(QuickMass<Real>(masses)...);
  } else {
    body(masses...);
  }
}

}  // namespace tdpo::cpu::TDPO_INSTRUCTION_SET
