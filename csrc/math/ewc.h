#pragma once

#include "macros.h"

// EWC, element by element (Kirkpatrick et al. 2017, arXiv:1612.00796):
//   penalty = strength/2 * sum fisher * (theta - anchor)^2
// S is a scalar (float, double) or a SIMD vector with the arithmetic operators.
namespace fasttax {

template <class S>
FASTTAX_HD S ewc_pull(S theta, S anchor, S fisher) {  // d(sum/2)/d theta
  return fisher * (theta - anchor);
}

template <class S>
FASTTAX_HD S ewc_term(S theta, S anchor, S fisher) {  // fisher * (theta - anchor)^2
  const S delta = theta - anchor;
  return fisher * delta * delta;
}

// argmin_t  (t - theta)^2 / 2 + step * fisher * (t - anchor)^2 / 2.  Contracts towards the anchor for
// every step >= 0, where an explicit step diverges as soon as step * fisher > 2.
template <class S>
FASTTAX_HD S ewc_prox(S theta, S anchor, S fisher, S step, S one) {
  return anchor + (theta - anchor) / (one + step * fisher);
}

}  // namespace fasttax
