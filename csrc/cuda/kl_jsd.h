#pragma once

#include <cmath>

#include "../math/kl.h"

// Jensen-Shannon's two functions of u = log p - log q for |u| <= 1, as polynomials whose
// coefficients depend on beta alone: made once a call on the host, constants to the kernels.
//   L(u) = log(m/p) = log(1 - beta + beta e^-u)
//   J(u) = beta g(e^-u - 1) - g(beta (e^-u - 1)) >= 0, g(t) = (1 + t) log1p(t) - t: JSD = sum p J
namespace fasttax {

// Interpolated at Chebyshev's nodes: L's and J's singularities are pi away from the interval at
// least, so that 8 terms of L/u and J/u^2 leave a relative error of 8e-8 at most.
struct JsdCurves {
  static constexpr int kTerms = 8;
  float log_m[kTerms];  // L(u) = u (log_m[0] + log_m[1] u + ...)
  float value[kTerms];  // J(u) = u^2 (value[0] + value[1] u + ...)

  JsdCurves() = default;
  explicit JsdCurves(double beta) {
    fit(log_m, [=](double u) { return std::log1p(beta * std::expm1(-u)) / u; });
    fit(value, [=](double u) {
      const double excess = std::expm1(-u);
      return (beta * jsd_g(excess) - jsd_g(beta * excess)) / (u * u);
    });
  }

 private:
  template <class F>
  static void fit(float (&to)[kTerms], const F& f) {  // Newton's divided differences
    double nodes[kTerms], differences[kTerms], sum[kTerms] = {};
    for (int i = 0; i < kTerms; ++i) {  // their number is even: none is 0
      nodes[i] = std::cos((i + 0.5) * 3.14159265358979323846 / kTerms);
      differences[i] = f(nodes[i]);
    }
    for (int order = 1; order < kTerms; ++order)
      for (int i = kTerms - 1; i >= order; --i)
        differences[i] = (differences[i] - differences[i - 1]) / (nodes[i] - nodes[i - order]);
    for (int i = kTerms - 1; i >= 0; --i) {  // sum = sum (u - nodes[i]) + differences[i]
      for (int power = kTerms - 1; power > 0; --power)
        sum[power] = sum[power - 1] - nodes[i] * sum[power];
      sum[0] = differences[i] - nodes[i] * sum[0];
    }
    for (int power = 0; power < kTerms; ++power) to[power] = float(sum[power]);
  }
};

}  // namespace fasttax
