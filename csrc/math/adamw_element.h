#pragma once

#include "adamw.h"

// One element of fasttax.AdamWEWC's step in two halves: between them the backend takes the square root of v (or of its
// maximum), and rounds theta (1 - lr weight_decay). S is a scalar or a SIMD vector.
namespace fasttax {

// The gradient that the moments see. kGrad: `fisher` may come from v before this step; adds to `term`, the penalty's.
template <AdamWMode mode, class S>
FASTTAX_HD S adamw_gradient(S grad, S theta, S anchor, S fisher, S v, bool from_second, const AdamWStep<S>& k, S& term) {
  const S g = grad * k.grad_factor;
  if (mode != AdamWMode::kGrad) return g;
  const S pull = ewc_pull(theta, anchor, from_second ? S(v * k.fisher_factor) : fisher);
  term = pull * (theta - anchor);
  return g + pull * k.first * k.second;
}

// theta after the step. kProx: `fisher` may come from v after this step.
template <AdamWMode mode, class S>
FASTTAX_HD S adamw_moved(S theta, S decayed, S anchor, S fisher, S m, S v, S metric, bool from_second, const AdamWStep<S>& k, S& term,
                         S one) {
  const S moved = adamw_theta(decayed, m, metric, k.step);
  if (mode != AdamWMode::kProx) return moved;
  const S weight = from_second ? S(v * k.fisher_factor) : fisher;
  term = ewc_pull(theta, anchor, weight) * (theta - anchor);
  return ewc_prox(moved, anchor, metric, S(weight * k.first * k.second), one);
}

}  // namespace fasttax
