// Jensen-Shannon, an entry at a time: three exponentials and a logarithm (two, of one side's
// gradient), or, in vectors whose rows are close, one exponential and two short series
// (math/kl_jsd.h).
#include "../math/kl_jsd.h"
#include "kl_sweep.h"

#if defined(FASTTAX_ISA)  // isa.h: once per instruction set
namespace fasttax {
namespace FASTTAX_ISA_NS {

// One of the rows is the base, the one that has the larger share of the mixture m: then log(m/base)
// keeps its digits. JSD does not ask which is which: with (p, q, beta) or (q, p, 1 - beta) it is
//   (1 - share) KL(base||m) + share KL(other||m),   share <= 1/2,   v = log base - log other
struct JsdEntry {
  VF base, other;
  VF to_base, to_other;  // log(m/base), log(m/other)
  VF v;
  bool close;  // every |v| <= 1/4
};

struct JsdMath {
  bool swapped;  // the base is the reference
  float share;
  float from_other;  // v below which share * other is e times the base or more
  JsdSeries<float> series;

  JsdMath(float beta, float rest)
      : swapped(beta > 0.5f),
        share(swapped ? rest : beta),
        from_other(std::log(share) - 1),
        series(double(share)) {}

  // with_other: whether more is wanted than the base's part.
  template <FrameMode mode>
  __attribute__((always_inline)) inline JsdEntry at(const Frame<mode>& frame, VF xv, VF yv,
                                                    bool with_other) const {
    const KlRow& r = frame.r;
    JsdEntry z;
    VF ax, d;
    frame(xv, yv, ax, d);
    const float inv_base = swapped ? r.inv_s_ref : r.inv_s;
    const VF u = d - r.log_ratio, ay = frame.ay(xv, yv), base_at = swapped ? ay : ax;
    z.v = swapped ? -u : u;
    z.close = all_le(abs(z.v), splat(kSmallGap));
    if (z.close) {
      z.base = exp_flushed(base_at) * inv_base;
      z.to_base = at_v(series.log_m, z.v) * z.v;
      z.other = fma(z.base, kl_bregman_small(z.v) - z.v, z.base);
      z.to_other = z.to_base + z.v;
      return z;
    }
    // Of an entry that neither row has, v is no number and both are 0.
    z.base = exp_flushed(base_at) * inv_base;
    z.other = VF{};
    if (with_other) z.other = exp_flushed(swapped ? ax : ay) * (swapped ? r.inv_s : r.inv_s_ref);
    // From the base, or, where the mixture is mostly the other one, from that: the logarithm of the
    // smaller of the two ratios would cancel.
    const VF size = min_keep_nan(abs(z.v), splat(kMostGap));
    const VF gap = (z.v < from_other) ? size : min_keep_nan(z.v, size);
    const ExpRest of = exp_rest(gap);
    const VF by_base = fma(of.rest, splat(share), splat(1.0f));
    const VF lost = fma(of.rest, splat(share), 1.0f - by_base);
    const VF by_other = fma(of.e, splat(1 - share), splat(share));
    const VF m = (z.v < from_other) ? by_other : by_base;
    const VF more = (z.v < from_other) ? splat(0.0f) : lost * reciprocal(m);
    const VF log_m = log_normal(m, splat(0.0f), more);
    const VF apart = log_m + gap;
    z.to_base = (z.v < from_other) ? apart : log_m;
    z.to_other = (z.v < from_other) ? log_m : apart;
    return z;
  }

  __attribute__((always_inline)) inline static VF at_v(
      const float (&terms)[JsdSeries<float>::kTerms], VF v) {
    VF sum = splat(terms[JsdSeries<float>::kTerms - 1]);
    for (int n = JsdSeries<float>::kTerms - 2; n >= 0; --n) sum = fma(sum, v, splat(terms[n]));
    return sum;
  }

  // The entries' part of the divergence.
  __attribute__((always_inline)) inline VF value(const JsdEntry& z) const {
    // each comparison where it chooses: one that is kept, GCC 12 takes apart lane by lane
    const VF size = abs(z.v);
    VF v = z.v;
    if (!z.close) v = (size <= kSmallGap) ? v : splat(0.0f);
    const VF j = at_v(series.value, v) * (z.base * (v * v));
    if (z.close) return j;
    const VF apart = -fma(z.base * (1 - share), z.to_base, z.other * share * z.to_other);
    return (size <= kSmallGap) ? j : apart;
  }
};

}  // namespace FASTTAX_ISA_NS
}  // namespace fasttax
#endif
