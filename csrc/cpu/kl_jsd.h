// Jensen-Shannon, an entry at a time (math/kl_jsd.h): on AVX-512 one exponential and two
// polynomials whose coefficients depend on the piece of u; else, in vectors whose rows are close,
// one exponential and two short series; and where neither reaches, three exponentials and a
// logarithm.
#include "../math/kl_jsd.h"
#include "kl_sweep.h"

#if defined(FASTTAX_ISA)  // isa.h: once per instruction set
namespace fasttax {
namespace FASTTAX_ISA_NS {

struct JsdEntry {
  VF p, q;
  VF to_p, to_q;  // log(m/p), log(m/q) of the mixture m
  VF value;       // the entry's part of the divergence
};

// The pieces that this thread used last.
inline const JsdPieces& jsd_pieces(float share) {
  static thread_local JsdPieces pieces;
  if (pieces.beta != double(share)) pieces = JsdPieces(double(share));
  return pieces;
}

struct JsdMath {
#if FASTTAX_ISA == 512
  static constexpr bool kByPieces = true;
#else
  static constexpr bool kByPieces = false;
#endif

  // One of the rows is the base, the one that has the larger share of the mixture m: then
  // log(m/base) keeps its digits. JSD does not ask which is which: with (p, q, beta) or
  // (q, p, 1 - beta) it is
  //   (1 - share) KL(base||m) + share KL(other||m),   share <= 1/2,   v = log base - log other
  bool swapped;  // the base is the reference
  float share;
  float from_other;  // v below which share * other is e times the base or more
  JsdSeries<float> series;
  const JsdPieces* pieces;

  JsdMath(float beta, float rest)
      : swapped(beta > 0.5f),
        share(swapped ? rest : beta),
        from_other(std::log(share) - 1),
        series(double(share)),
        pieces(kByPieces ? &jsd_pieces(share) : nullptr) {}

  // with_q: whether q and to_q are wanted.
  template <FrameMode mode>
  __attribute__((always_inline)) inline JsdEntry at(const Frame<mode>& frame, VF xv, VF yv,
                                                    bool with_q) const {
    const KlRow& r = frame.r;
    VF ax, d;
    frame(xv, yv, ax, d);
    const VF u = d - r.log_ratio;
#if FASTTAX_ISA == 512
    if (all_le(abs(u), splat(JsdPieces::kReach)))
      return by_pieces(r, ax, frame.ay(xv, yv), u, with_q);
    return apart_called(r, ax, frame.ay(xv, yv), u);
#else
    const VF ay = frame.ay(xv, yv);
    if (all_le(abs(u), splat(kSmallGap))) return close(r, ax, ay, u);
    return apart(r, ax, ay, u);
#endif
  }

#if FASTTAX_ISA == 512
  __attribute__((always_inline)) inline JsdEntry by_pieces(const KlRow& r, VF ax, VF ay, VF u,
                                                           bool with_q) const {
    const VF v = swapped ? -u : u;
    const VF shifted = v + kRound, w = v - (shifted - kRound);
    const VI piece = as_int(shifted);
    const VF to_base = at_pieces(pieces->log_m, piece, w);
    const VF value = at_pieces(pieces->value, piece, w);
    const VF p = exp_flushed(ax) * r.inv_s;
    if (swapped) {
      const VF q = exp_flushed(ay) * r.inv_s_ref;
      return {p, q, to_base + v, to_base, q * value};
    }
    VF q{};
    if (with_q) q = exp_flushed(ay) * r.inv_s_ref;
    return {p, q, to_base, to_base + v, p * value};
  }
  __attribute__((always_inline)) inline static VF at_pieces(
      const float (&terms)[JsdPieces::kTerms][JsdPieces::kPieces], VI piece, VF w) {
    VF sum = pick(terms[JsdPieces::kTerms - 1], piece);
    for (int n = JsdPieces::kTerms - 2; n >= 0; --n) sum = fma(sum, w, pick(terms[n], piece));
    return sum;
  }

  // A call, so that what it needs takes no registers where it is not needed.
  __attribute__((noinline)) JsdEntry apart_called(const KlRow& r, VF ax, VF ay, VF u) const {
    return apart(r, ax, ay, u);
  }
#endif

  // every |u| <= 1/4
  __attribute__((always_inline)) inline JsdEntry close(const KlRow& r, VF ax, VF ay, VF u) const {
    const VF v = swapped ? -u : u;
    const VF base = exp_flushed(swapped ? ay : ax) * (swapped ? r.inv_s_ref : r.inv_s);
    const VF to_base = at_v(series.log_m, v) * v;
    const VF other = fma(base, kl_bregman_small(v) - v, base);
    const VF value = at_v(series.value, v) * (base * (v * v));
    return sided(base, other, to_base, to_base + v, value);
  }

  __attribute__((always_inline)) inline JsdEntry apart(const KlRow& r, VF ax, VF ay, VF u) const {
    // Of an entry that neither row has, u is no number and both are 0.
    const VF p = exp_flushed(ax) * r.inv_s, q = exp_flushed(ay) * r.inv_s_ref;
    const VF base = swapped ? q : p, other = swapped ? p : q;
    // each comparison where it chooses: one that is kept, GCC 12 takes apart lane by lane
    const VF v = swapped ? -u : u;
    // From the base, or, where the mixture is mostly the other one, from that: the logarithm of the
    // smaller of the two ratios would cancel.
    const VF size = min_keep_nan(abs(v), splat(kMostGap));
    const VF gap = (v < from_other) ? size : min_keep_nan(v, size);
    const ExpRest of = exp_rest(gap);
    const VF by_base = fma(of.rest, splat(share), splat(1.0f));
    const VF lost = fma(of.rest, splat(share), 1.0f - by_base);
    const VF by_other = fma(of.e, splat(1 - share), splat(share));
    const VF m = (v < from_other) ? by_other : by_base;
    const VF more = (v < from_other) ? splat(0.0f) : lost * reciprocal(m);
    const VF log_m = log_normal(m, splat(0.0f), more);
    const VF log_apart = log_m + gap;
    const VF to_base = (v < from_other) ? log_apart : log_m;
    const VF to_other = (v < from_other) ? log_m : log_apart;
    const VF near = (abs(v) <= kSmallGap) ? v : splat(0.0f);
    const VF by_series = at_v(series.value, near) * (base * (near * near));
    const VF plainly = -fma(base * (1 - share), to_base, other * share * to_other);
    return sided(base, other, to_base, to_other, (abs(v) <= kSmallGap) ? by_series : plainly);
  }

  __attribute__((always_inline)) inline JsdEntry sided(VF base, VF other, VF to_base, VF to_other,
                                                       VF value) const {
    if (swapped) return {other, base, to_other, to_base, value};
    return {base, other, to_base, to_other, value};
  }

  __attribute__((always_inline)) inline static VF at_v(
      const float (&terms)[JsdSeries<float>::kTerms], VF v) {
    VF sum = splat(terms[JsdSeries<float>::kTerms - 1]);
    for (int n = JsdSeries<float>::kTerms - 2; n >= 0; --n) sum = fma(sum, v, splat(terms[n]));
    return sum;
  }
};

}  // namespace FASTTAX_ISA_NS
}  // namespace fasttax
#endif
