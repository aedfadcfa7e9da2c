#pragma once

#include <cmath>

#include "../math/kl.h"

// Polynomials whose coefficients depend on a call's options alone: made once a call on the host,
// constants to the kernels.
namespace fasttax {

// f(t) on |t| <= reach as to[0] + to[1] t + ..., interpolated at Chebyshev's nodes by Newton's
// divided differences; f is asked at 0 where the terms are odd in number.
template <int n, class F>
void fit_curve(float (&to)[n], double reach, const F& f) {
  double nodes[n], differences[n], sum[n] = {};
  for (int i = 0; i < n; ++i) {
    nodes[i] = reach * std::cos((i + 0.5) * 3.14159265358979323846 / n);
    differences[i] = f(nodes[i]);
  }
  for (int order = 1; order < n; ++order)
    for (int i = n - 1; i >= order; --i)
      differences[i] = (differences[i] - differences[i - 1]) / (nodes[i] - nodes[i - order]);
  for (int i = n - 1; i >= 0; --i) {  // sum = sum (t - nodes[i]) + differences[i]
    for (int power = n - 1; power > 0; --power) sum[power] = sum[power - 1] - nodes[i] * sum[power];
    sum[0] = differences[i] - nodes[i] * sum[0];
  }
  for (int power = 0; power < n; ++power) to[power] = float(sum[power]);
}

// Jensen-Shannon's two functions of u = log p - log q for |u| <= 1.
//   L(u) = log(m/p) = log(1 - beta + beta e^-u)
//   J(u) = beta g(e^-u - 1) - g(beta (e^-u - 1)) >= 0, g(t) = (1 + t) log1p(t) - t: JSD = sum p J
// Their singularities are pi away from the interval at least, so that 8 terms of L/u and J/u^2
// leave a relative error of 8e-8 at most.
struct JsdCurves {
  static constexpr int kTerms = 8;
  float log_m[kTerms];  // L(u) = u (log_m[0] + log_m[1] u + ...)
  float value[kTerms];  // J(u) = u^2 (value[0] + value[1] u + ...)

  JsdCurves() = default;
  explicit JsdCurves(double beta) {
    fit_curve(log_m, 1, [=](double u) { return std::log1p(beta * std::expm1(-u)) / u; });
    fit_curve(value, 1, [=](double u) {
      const double excess = std::expm1(-u);
      return (beta * jsd_g(excess) - jsd_g(beta * excess)) / (u * u);
    });
  }
};

// e^(2 scale d / cap) - 1 = d (few[0] + few[1] d + ...) of logits that are d apart.
struct CapCurves {
  static constexpr int kFew = 4, kAll = 6;
  static constexpr double kFewReach = 1.0 / 8, kReach = 0.5;  // of the exponent: errors of 3e-7
  float to_exp2 = 0;                                          // e^(2 scale x / cap) = 2^(to_exp2 x)
  float few_reach = 0, reach = 0;  // of d^2; reach 0: no curves, the cap is none of a model's
  float few[kFew] = {}, all[kAll] = {};

  CapCurves() = default;
  CapCurves(double scale, double cap) {
    // the 6th powers are floats; and a tanh's last digit is 2^-23 of the cap in the capped logit
    const double inside = 2 * scale / cap;
    if (!(cap > 0 && inside >= 0.02 && inside < 1e4)) return;
    to_exp2 = float(inside * 1.4426950408889634);
    fit(few, few_reach, kFewReach, inside);
    fit(all, reach, kReach, inside);
  }

 private:
  template <int n>
  static void fit(float (&to)[n], float& squared, double within, double inside) {
    fit_curve(to, within, [](double t) { return t == 0 ? 1 : std::expm1(t) / t; });
    double power = 1;
    for (int i = 0; i < n; ++i) to[i] = float(double(to[i]) * (power *= inside));
    squared = float(within / inside * (within / inside));
  }
};

}  // namespace fasttax
