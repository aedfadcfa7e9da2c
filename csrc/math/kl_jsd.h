#pragma once

#include <cmath>

#include "macros.h"

// Jensen-Shannon as functions of u = log p - log q, which depend on beta alone. With w = 1 - beta,
//   L(u) = log(m/p) = log(w + beta e^-u)             the cumulants of a Bernoulli(beta)
//   J(u) = beta e^-u log(q/m) + w log(p/m) + first-order terms that sum to 0 over a row
//        = w [beta (e^-u - 1) - L(u)] + beta e^-u [w (e^u - 1) - L(u) - u]
//        = -L(u) e^L(u) - beta u e^-u  >= 0
// so that JSD = sum p J(u), a sum of non-negative terms.
namespace fasttax {

// The power series, for rows that are close.
template <class R>
struct JsdSeries {
  static constexpr int kTerms = 6;
  R log_m[kTerms];  // L(u) = u (log_m[0] + log_m[1] u + ...)
  R value[kTerms];  // J(u) = u^2 (value[0] + value[1] u + ...)

  // |u| <= 1/4: the first terms left out are below 1e-8 and 5e-8 of the whole.
  explicit JsdSeries(double beta) {
    const double w = 1 - beta, z = beta * w, skew = w - beta;
    const double cumulants[9] = {0,
                                 beta,
                                 z,
                                 z * skew,
                                 z * (1 - 6 * z),
                                 z * skew * (1 - 12 * z),
                                 z * (1 - 30 * z + 120 * z * z),
                                 z * skew * (1 - 60 * z + 360 * z * z)};
    double factorial[9] = {1};
    for (int n = 1; n < 9; ++n) factorial[n] = n * factorial[n - 1];
    const auto sign = [](int n) { return n % 2 ? -1.0 : 1.0; };
    for (int n = 1; n <= kTerms; ++n) log_m[n - 1] = R(sign(n) * cumulants[n] / factorial[n]);
    for (int n = 2; n <= kTerms + 1; ++n) {
      double term = w * sign(n) * (beta - cumulants[n]) / factorial[n];
      for (int j = 2; j <= n; ++j)  // e^-u times the other side's series
        term += beta * (w - sign(j) * cumulants[j]) / factorial[j] * sign(n - j) / factorial[n - j];
      value[n - 2] = R(term);
    }
  }
};

// Both functions on |u| <= kReach, in pieces of length 1: around n = round(u), which is row n mod
// 32,
//   f(u) = f[0] + (u - n) (f[1] + (u - n) (f[2] + ...))
// by interpolation at Chebyshev's points; the pole at i pi, 6 half pieces away, leaves errors of
// 1e-8 of the whole, coefficients in float32 1e-7 (J near 1/2: 4e-7). The piece around 0 has no
// constant, and J's no slope, so that both functions keep their digits there.
struct JsdPieces {
  static constexpr int kPieces = 32, kTerms = 8;
  static constexpr float kReach = 15.49f;  // 15.5 is rounded to 16, whose row is that of -16
  alignas(64) float log_m[kTerms][kPieces];
  alignas(64) float value[kTerms][kPieces];
  double beta = -1;  // which the pieces are of, up to 1/2

  JsdPieces() = default;
  explicit JsdPieces(double of) : beta(of) {
    const auto log_mixture = [&](double u) { return std::log1p(beta * std::expm1(-u)); };
    const auto part = [&](double u) {
      const double log_m = log_mixture(u);
      return -log_m * std::exp(log_m) - beta * u * std::exp(-u);
    };
    for (int n = -kPieces / 2; n < kPieces / 2; ++n) {
      interpolate(log_mixture, n, n == 0 ? 1 : 0, log_m);
      interpolate(part, n, n == 0 ? 2 : 0, value);
    }
  }

 private:
  // Newton's divided differences of f(c + w) / w^zeros, expanded into powers of w.
  template <class F>
  static void interpolate(const F& f, int c, int zeros, float (&terms)[kTerms][kPieces]) {
    const int points = kTerms - zeros;
    double w[kTerms], divided[kTerms], powers[kTerms] = {};
    for (int i = 0; i < points; ++i) {
      w[i] = 0.5 * std::cos((2 * i + 1) * 3.14159265358979323846 / (2 * points));
      divided[i] = f(c + w[i]) / std::pow(w[i], zeros);
    }
    for (int order = 1; order < points; ++order)
      for (int i = points - 1; i >= order; --i)
        divided[i] = (divided[i] - divided[i - 1]) / (w[i] - w[i - order]);
    for (int i = points - 1; i >= 0; --i) {
      for (int n = points - 1; n > 0; --n) powers[n] = powers[n - 1] - w[i] * powers[n];
      powers[0] = divided[i] - w[i] * powers[0];
    }
    for (int n = 0; n < kTerms; ++n)
      terms[n][c & (kPieces - 1)] = n < zeros ? 0.0f : float(powers[n - zeros]);
  }
};

}  // namespace fasttax
