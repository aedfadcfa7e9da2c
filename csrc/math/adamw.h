#if !defined(FASTTAX_MATH_ADAMW)  // read for each instruction set: macros.h
#define FASTTAX_MATH_ADAMW

#include <cmath>

#include "adamw_types.h"
#include "ewc.h"

// AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), element by element, in the order of
// torch.optim.AdamW:
//   m <- m + (g - m) (1 - beta1)      v <- beta2 v + (1 - beta2) g^2      D = sqrt(v) / sqrt(1 -
//   beta2^t) + eps theta <- theta (1 - lr weight_decay) - lr / (1 - beta1^t) * m / D
// S is a scalar or a SIMD vector; the square root and what rounds a product are the backend's.
namespace fasttax {
namespace FASTTAX_MATH_NS {

template <class S>
FASTTAX_HD S adamw_first(S m, S grad, S one_minus_beta1) {
  return m + (grad - m) * one_minus_beta1;
}

template <class S>
FASTTAX_HD S adamw_second(S v, S grad, S beta2, S one_minus_beta2) {
  return v * beta2 + one_minus_beta2 * grad * grad;
}

template <class S>
FASTTAX_HD S adamw_metric(S root, S root_factor, S eps) {  // D
  return root * root_factor + eps;
}

// decayed = theta (1 - lr weight_decay), rounded
template <class S>
FASTTAX_HD S adamw_theta(S decayed, S m, S metric, S step) {
  return decayed - step * m / metric;
}

// The gradient that the moments see. kGrad: `fisher` may come from v before this step; adds to
// `term`, the penalty's.
template <AdamWMode mode, class S>
FASTTAX_HD S adamw_gradient(S grad, S theta, S anchor, S fisher, S v, bool from_second,
                            const AdamWStep<S>& k, S& term) {
  const S g = grad * k.grad_factor;
  if (mode != AdamWMode::kGrad) return g;
  const S pull = ewc_pull(theta, anchor, from_second ? S(v * k.fisher_factor) : fisher);
  term = pull * (theta - anchor);
  return g + pull * k.first * k.second;
}

// theta after the step. kProx: `fisher` may come from v after this step.
template <AdamWMode mode, class S>
FASTTAX_HD S adamw_moved(S theta, S decayed, S anchor, S fisher, S m, S v, S metric,
                         bool from_second, const AdamWStep<S>& k, S& term, S one) {
  const S moved = adamw_theta(decayed, m, metric, k.step);
  if (mode != AdamWMode::kProx) return moved;
  const S weight = from_second ? S(v * k.fisher_factor) : fisher;
  term = ewc_pull(theta, anchor, weight) * (theta - anchor);
  return ewc_prox(moved, anchor, metric, S(weight * k.first * k.second), one);
}

// One element's step in two halves: between them the backend takes the square root of v (or of its
// maximum), and rounds theta (1 - lr weight_decay). Returns the penalty's term, at theta before the
// step.
template <AdamWMode mode, class S, class Root, class Round>
FASTTAX_HD S adamw_element(S& theta, S anchor, S fisher, S grad, S& m, S& v, S& most, bool amsgrad,
                           bool from_second, const AdamWStep<S>& k, const Root& root,
                           const Round& round, S one) {
  S term = theta - theta;
  const S g = adamw_gradient<mode>(grad, theta, anchor, fisher, v, from_second, k, term);
  m = adamw_first(m, g, k.one_minus_beta1);
  v = adamw_second(v, g, k.beta2, k.one_minus_beta2);
  if (amsgrad) most = v > most ? v : most;
  const S metric = adamw_metric(S(root(amsgrad ? most : v)), k.root_factor, k.eps);
  theta = adamw_moved<mode>(theta, S(round(theta * k.decay)), anchor, fisher, m, v, metric,
                            from_second, k, term, one);
  return term;
}

// t: this step's number, from 1; lr and inv_grad_scale apart from the options because they may come
// from the device.
template <class S>
FASTTAX_HD AdamWStep<S> adamw_step(const AdamWOptions& x, AdamWMode mode, double lr,
                                   double inv_grad_scale, double t) {
  const double unbias2 = 1 - pow(x.beta2, t), before2 = 1 - pow(x.beta2, t - 1);
  // finite, so that its product with a Fisher of 0 is 0
  const double pull =
      mode == AdamWMode::kProx ? fmin(lr * x.strength, 0x1.fffffffffffffp1023) : x.strength;
  const EwcStep product = ewc_step(pull);
  const double moment = mode == AdamWMode::kProx ? 1 / unbias2 : before2 > 0 ? 1 / before2 : 0;
  return {S((x.maximize ? -1 : 1) * inv_grad_scale),
          S(1 - lr * x.weight_decay),
          S(1 - x.beta1),
          S(x.beta2),
          S(1 - x.beta2),
          S(lr / (1 - pow(x.beta1, t))),
          S(1 / std::sqrt(unbias2)),
          S(x.eps),
          sizeof(S) == 8 ? S(pull) : S(product.first),
          sizeof(S) == 8 ? S(1) : S(product.second),
          S(x.second_moment * moment)};
}

}  // namespace FASTTAX_MATH_NS
}  // namespace fasttax
#endif
