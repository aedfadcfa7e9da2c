#pragma once

#include <cfloat>
#include <cmath>

#include "constant.h"
#include "kl.h"
#include "macros.h"

// Estimates of KL(policy || ref) from log-probs of the tokens that were sampled: the values and
// slopes of fasttax/reference/weigh.py, for a token whose mask is true. R is float or double.
namespace fasttax {

// An output is a row of the tokens' values by its number, or one of these.
constexpr int kK1 = -1, kK2 = -2, kK3 = -3;

template <class R>
FASTTAX_HD bool weigh_lost(R lp, R lq) {  // impossible on both sides: the log-ratio is 0
  return lp == -INFINITY && lq == -INFINITY;
}

template <class R>
FASTTAX_HD R weigh_gap(R lp, R lq) {
  return weigh_lost(lp, lq) ? R(0) : lp - lq;
}

template <class R>
struct Estimate {
  R logp, ref_logp, old_logp, r, ratio, clip, top;
  bool weighed;  // by the importance ratio: there is an old_logp

  // most: the log-ratio up to which e^x is taken; its_exp: e^most
  FASTTAX_HD Estimate(R policy, R ref, R old, bool has_old, double most, double its_exp)
      : logp(policy),
        ref_logp(ref),
        old_logp(old),
        r(weigh_gap(ref, policy)),
        ratio(1),
        clip(R(most)),
        top(R(its_exp)),
        weighed(has_old) {
    if (!weighed) return;
    const R x = weigh_gap(logp, old_logp);
    ratio = x > clip ? top * (1 + (x - clip)) : std::exp(x);
    // what has no weight counts nothing, nor does an infinite slope of it
    if (ratio == 0) r = 0;
  }

  FASTTAX_HD R unweighed(int kind) const {
    if (kind == kK1) return -r;
    if (kind == kK2) return r * r / 2;
    if (std::fabs(r) <= R(kSmallGap)) return kl_excess(-r);
    if (std::fabs(r) < R(0.5)) return std::expm1(r) - r;
    // beyond the clip e^r goes on along its tangent, in a form that is inf at inf
    if (r > clip) return (top - 1) * (r - clip) + (top - 1 - clip);
    return std::exp(r) - 1 - r;
  }

  FASTTAX_HD R value(int kind) const { return ratio * unweighed(kind); }

  // The derivative of value(kind) by a log-prob: 0 the policy's, 1 the reference's, 2 that of the
  // policy that sampled.
  FASTTAX_HD R slope(int kind, int by) const {
    R by_r = 0, by_old = 0;
    if (!weigh_lost(ref_logp, logp) && ratio != 0) by_r = ratio * by_gap(kind);
    if (weighed && !weigh_lost(logp, old_logp))
      by_old = times(ratio > top ? top : ratio, unweighed(kind));
    if (by == 1) return by_r;
    return by == 0 ? by_old - by_r : -by_old;
  }

  // That of KL(policy || ref), which grad="reverse_kl" has in the place of slope(kind, 0); finite.
  FASTTAX_HD R reverse_slope() const {
    const R slope = ratio * -r, most = sizeof(R) == 8 ? R(DBL_MAX) : R(FLT_MAX);
    if (logp == -INFINITY) return 0;
    if (slope > most) return most;
    return slope < -most ? -most : slope;
  }

 private:
  FASTTAX_HD R by_gap(int kind) const {
    if (kind == kK1) return R(-1);
    if (kind == kK2) return r;
    return std::expm1(r > clip ? clip : r);
  }
};

}  // namespace fasttax
