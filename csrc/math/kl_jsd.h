#pragma once

#include "macros.h"

// Jensen-Shannon where the rows are close: the mixture's log and an entry's part of the divergence
// as power series of u = log p - log q, whose coefficients depend on beta alone. With w = 1 - beta,
//   L(u) = log(m/p) = log(w + beta e^-u)             the cumulants of a Bernoulli(beta)
//   J(u) = beta e^-u log(q/m) + w log(p/m) + first-order terms that sum to 0 over a row
//        = w [beta (e^-u - 1) - L(u)] + beta e^-u [w (e^u - 1) - L(u) - u]  >= 0
// so that JSD = sum p J(u), a sum of non-negative terms.
namespace fasttax {

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

}  // namespace fasttax
