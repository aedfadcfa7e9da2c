#if !defined(FASTTAX_MATH_EWC)  // read for each instruction set: macros.h
#define FASTTAX_MATH_EWC

#include "macros.h"

// EWC, element by element (Kirkpatrick et al. 2017, arXiv:1612.00796):
//   penalty = strength/2 * sum fisher * (theta - anchor)^2
// S is a scalar (float, double) or a SIMD vector with the arithmetic operators.
namespace fasttax {
namespace FASTTAX_MATH_NS {

template <class S>
FASTTAX_HD S ewc_pull(S theta, S anchor, S fisher) {  // d(sum/2)/d theta
  return fisher * (theta - anchor);
}

template <class S>
FASTTAX_HD S ewc_term(S theta, S anchor, S fisher) {  // fisher * (theta - anchor)^2
  const S delta = theta - anchor;
  return fisher * delta * delta;
}

// argmin_t  metric (t - theta)^2 / 2 + pull (t - anchor)^2 / 2,  metric > 0, pull = step * fisher
// >= 0 and inf for what a float cannot hold. Contracts towards the anchor whatever pull is, where
// an explicit step diverges as soon as pull > 2 metric. Two forms of one value: each leaves the end
// that it is close to exactly in place, theta at pull = 0 and the anchor at inf.
template <class S>
FASTTAX_HD S ewc_prox(S theta, S anchor, S metric, S pull, S one) {
  const S delta = theta - anchor, share = one / (metric + pull);
  return pull < metric ? theta - delta * (pull * share) : anchor + delta * (metric * share);
}

}  // namespace FASTTAX_MATH_NS
}  // namespace fasttax
#endif
