#if !defined(FASTTAX_MATH_KL)  // read for each instruction set: macros.h
#define FASTTAX_MATH_KL

#include <cmath>

#include "constant.h"
#include "macros.h"

// Token-level KL in one frame. With ax = x - mx, ay = y - my (tempered logits in frames near their
// maxima), d = ax - ay and f(d) = e^-d - 1 + d >= 0, the sums
//   S = sum e^ax     G = sum (e^ay - e^ax)     B = sum e^ax f(d)     C = sum e^ay f(-d)
// give, with tau = G/S and h(t) = t - log1p(t) >= 0,
//   KL(p||q) = B/S - h(tau)     KL(q||p) = C/(S+G) - h(-tau/(1+tau))     log(S/(S+G)) = -log1p(tau)
// Every term of B and C is a Bregman divergence: no difference of large numbers is taken, a small
// KL keeps its digits, and equal rows give exactly 0. S is a scalar or a SIMD vector.
namespace fasttax {
namespace FASTTAX_MATH_NS {

constexpr float kSmallGap = 0.25f;  // |d| up to which the series below is used

template <class S>
FASTTAX_HD S kl_bregman_small(S d) {  // f(d) for |d| <= 1/4, relative error <= 1.3e-8
  S p = constant<S>(-1.0 / 5040);
  p = p * d + constant<S>(1.0 / 720);
  p = p * d + constant<S>(-1.0 / 120);
  p = p * d + constant<S>(1.0 / 24);
  p = p * d + constant<S>(-1.0 / 6);
  p = p * d + constant<S>(0.5);
  return d * d * p;
}

// f(d) and f(-d) for |d| <= 1/4: their even and odd parts
template <class S>
FASTTAX_HD void kl_bregman_small(S d, S& f, S& back) {
  const S z = d * d;
  S even = constant<S>(1.0 / 720), odd = constant<S>(1.0 / 5040);
  even = even * z + constant<S>(1.0 / 24);
  odd = odd * z + constant<S>(1.0 / 120);
  even = even * z + constant<S>(0.5);
  odd = (odd * z + constant<S>(1.0 / 6)) * d;
  f = z * (even - odd);
  back = z * (even + odd);
}

// Up to which |d| the polynomials below are used: minimax ones for f(d) / d^2.
constexpr float kMidGap = 2.0f, kUnitGap = 1.0f;

template <class S>
FASTTAX_HD S kl_bregman_mid(S d) {  // f(d) for |d| <= 2, relative error <= 1e-7
  S p = constant<S>(-2.556994883e-8);
  p = p * d + constant<S>(2.967222660e-7);
  p = p * d + constant<S>(-2.759976727e-6);
  p = p * d + constant<S>(2.472887503e-5);
  p = p * d + constant<S>(-1.983913873e-4);
  p = p * d + constant<S>(1.388989283e-3);
  p = p * d + constant<S>(-8.333361243e-3);
  p = p * d + constant<S>(4.166661907e-2);
  p = p * d + constant<S>(-1.666666578e-1);
  p = p * d + constant<S>(5.000000035e-1);
  return d * d * p;
}

template <class S>
FASTTAX_HD S kl_bregman_unit(S d) {  // f(d) for |d| <= 1, relative error <= 2e-7
  S p = constant<S>(2.496081175e-5);
  p = p * d + constant<S>(-2.032548412e-4);
  p = p * d + constant<S>(1.389133537e-3);
  p = p * d + constant<S>(-8.330930478e-3);
  p = p * d + constant<S>(4.166651558e-2);
  p = p * d + constant<S>(-1.666669619e-1);
  p = p * d + constant<S>(5.000000099e-1);
  return d * d * p;
}

FASTTAX_HD double kl_bregman(double d) {
  return fabs(d) < 1e-2 ? kl_bregman_small(d) : expm1(-d) + d;
}

// Up to which |d| an entry is summed by its f(d), and f and q/p - 1 = e^-u - 1 there.
template <class S>
FASTTAX_HD constexpr auto kl_near() {
  if constexpr (std::is_same<S, double>::value) return 1.0;
  else return kSmallGap;
}

template <class S>
FASTTAX_HD S kl_excess(S d) {
  if constexpr (std::is_same<S, double>::value) return kl_bregman(d);
  else return kl_bregman_small(d);
}

template <class S>
FASTTAX_HD S kl_rest(S u) {
  if constexpr (std::is_same<S, double>::value) return expm1(-u);
  else return kl_bregman_small(u) - u;
}

FASTTAX_HD double kl_defect(double t) {  // h(t) = t - log1p(t)
  if (fabs(t) > 0.1) return t - std::log1p(t);
  double p = 0, power = t * t;
  for (int k = 2; k < 18; ++k, power *= -t) p += power / k;
  return p;
}

// Generalised Jensen-Shannon, m = beta q + (1 - beta) p, as a sum of non-negative terms: with
// eps = q/p - 1 and g(t) = (1+t) log1p(t) - t,
//   beta KL(q||m) + (1 - beta) KL(p||m) = sum p [beta g(eps) - g(beta eps)]
template <class S>
FASTTAX_HD S jsd_g_small(S t) {  // g(t) for |t| <= 1/4: sum_{k>=2} (-t)^k / (k (k-1))
  S p = constant<S>(1.0 / 132);
  p = p * -t + constant<S>(1.0 / 110);
  p = p * -t + constant<S>(1.0 / 90);
  p = p * -t + constant<S>(1.0 / 72);
  p = p * -t + constant<S>(1.0 / 56);
  p = p * -t + constant<S>(1.0 / 42);
  p = p * -t + constant<S>(1.0 / 30);
  p = p * -t + constant<S>(1.0 / 20);
  p = p * -t + constant<S>(1.0 / 12);
  p = p * -t + constant<S>(1.0 / 6);
  p = p * -t + constant<S>(0.5);
  return t * t * p;
}

FASTTAX_HD double jsd_g(double t) {
  if (fabs(t) < 0.05) return jsd_g_small(t);
  return t <= -1 ? 1.0 : (1 + t) * std::log1p(t) - t;
}

// Up to which |u| an entry of jsd is summed by g(eps), and g there.
template <class S>
FASTTAX_HD constexpr auto jsd_near() {
  if constexpr (std::is_same<S, double>::value) return 1.0;
  else return 0.2f;
}

template <class S>
FASTTAX_HD S jsd_g_near(S t) {
  if constexpr (std::is_same<S, double>::value) return jsd_g(t);
  else return jsd_g_small(t);
}

}  // namespace FASTTAX_MATH_NS
}  // namespace fasttax
#endif
