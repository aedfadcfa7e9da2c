#pragma once

#include "kl.h"

// From a row pair's sums to its divergences: what every native forward does once a row.
namespace fasttax {

// How far above its frame an entry may stand: e^20 V is far below float's range, and exp is exact
// enough.
constexpr float kFrameSlack = 20.0f;
// a plain sum is good to about 1e-7 of its mass: 1e-5 of a KL this large
constexpr double kTrusted = 1e-2;
// mean of ax over some entries, above which the highest of them dominates them
constexpr double kDominated = -0.05;

struct KlSums {
  double s = 0, y = 0, g = 0;  // sum e^ax, sum e^ay, their difference
  double b = 0, a = 0;         // policy_ref: B and sum e^ax d
  double c = 0, back = 0;      // ref_policy: C and -sum e^ay d
  // entropy: sum e^ax again, in an order that the reference does not change, and sum e^ax ax
  double mass = 0, moment = 0;
  double far = 0;  // the part of s + y that was summed plainly

  // false for NaN
  FASTTAX_HD bool trusted(double kl) const { return kl * (s + y) >= kTrusted * far; }
};

// One of the two divergences out of a sweep's sums.
struct Divergence {
  double value = 0;
  double gap = 0;        // the mean of d: under p for policy_ref, under q for ref_policy
  double size = 0;       // of the terms whose difference `value` is
  double log_ratio = 0;  // log(S / Y)
  // Frames that do not fit (the rows' maxima lie apart, or a peak outside the primed part) make
  // both terms large and alike: moved onto the mean gap, the difference keeps its digits.
  bool cancels = false;

  FASTTAX_HD bool recentre() const { return cancels && gap != 0 && fabs(gap) < kFrameSlack; }
};

// Where one row's mass is far from the other's in this frame (|tau| > 1/2), B/S - h(tau) is a
// difference of large numbers and so is S + G: the plain form with sums of its own for each row is
// the accurate one.
FASTTAX_HD Divergence divergence(const KlSums& t, bool policy_ref) {
  Divergence v;
  const double tau = t.g / t.s;
  const bool centred = fabs(tau) <= 0.5;
  v.log_ratio = centred ? -log1p(tau) : log(t.s / t.y);
  if (policy_ref) {
    v.value = centred ? t.b / t.s - kl_defect(tau) : t.a / t.s - v.log_ratio;
    // not value + log_ratio: of a row with one peak it is that entry's d to the bit, and its
    // gradient 0
    v.gap = t.a / t.s;
    v.size = centred ? t.b / t.s : fabs(v.log_ratio);
  } else {
    v.value = centred ? t.c / t.y - kl_defect(-t.g / t.y) : t.back / t.y + v.log_ratio;
    v.gap = -t.back / t.y;
    v.size = centred ? t.c / t.y : fabs(v.log_ratio);
  }
  v.cancels = v.value < v.size / 16;
  return v;
}

}  // namespace fasttax
