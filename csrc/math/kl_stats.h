#if !defined(FASTTAX_MATH_KL_STATS)  // read for each instruction set: macros.h
#define FASTTAX_MATH_KL_STATS

#include <cmath>

#include "kl_frame.h"
#include "kl_row.h"
#include "kl_slope.h"

// token_stats: what it gives of a token, what it saves, and its gradient entry by entry.
namespace fasttax {
namespace FASTTAX_MATH_NS {

// Whether the rows are close (kl_close), by the smaller of the two divergences.
template <class R>
FASTTAX_HD bool stats_close(const KlRowOf<R>& row) {
  const R forwards = row.mean_gap - row.log_ratio, backwards = row.log_ratio - row.ref_center;
  return !((forwards < backwards ? forwards : backwards) >= R(kTrusted));
}

// d/dx and d/dy of sum_s g_s stat_s at an entry, by its tempered logits:
//   logp  1[id] - p     lse  p     entropy  p (E_p[ax] - ax)
//   KL(p||q)  x: p (d - E_p[d]), y: q - p     KL(q||p)  x: p - q, y: q (E_q[d] - d)
template <class M>
struct StatsSlope {
  using S = typename M::S;
  using R = typename M::R;
  KlRowOf<R> row;
  R mean, logp, ref_logp;
  R g_logp, g_ref_logp, g_entropy, g_lse, g_forwards, g_backwards;

  FASTTAX_HD StatsSlope(const StatsRowOf<R>& saved, const R* g, int64_t stride, bool pair)
      : row(saved.kl),
        mean(saved.mean),
        logp(saved.logp),
        ref_logp(saved.ref_logp),
        g_logp(g[kLogp * stride]),
        g_ref_logp(g[kRefLogp * stride]),
        g_entropy(g[kEntropy * stride]),
        g_lse(g[kLse * stride]),
        g_forwards(pair ? g[kKlPolicyRef * stride] : R(0)),
        g_backwards(pair ? g[kKlRefPolicy * stride] : R(0)) {}

  // backwards: whether KL(q||p) may have a coefficient. at_id: of the id's entry, where d logp = 1
  // - p is taken as -expm1(logp), for p in float rounds to 1.
  template <bool for_x, bool for_y, class Q>
  FASTTAX_HD KlSides<S> at(S p, S ax, S d, bool close, const Q& q_of, bool backwards,
                           bool at_id) const {
    KlSides<S> out{};
    S q{}, apart{};
    const bool forwards = g_forwards != 0;  // else d may be inf where nobody asks for it
    if (for_y || backwards) apart = kl_apart<M>(p, d - row.log_ratio, close, for_y, q_of, q);
    if constexpr (for_x) {
      S c = M::fma(mean - ax, M::splat(g_entropy), M::splat(g_lse - (at_id ? R(0) : g_logp)));
      c = M::fma(M::only(forwards, d - row.mean_gap), M::splat(g_forwards), c);
      out.x = times(p, c);
      if (backwards) out.x = M::fma(M::only(g_backwards != 0, apart), M::splat(g_backwards), out.x);
      if (at_id) out.x -= std::expm1(logp) * g_logp;
    }
    if constexpr (for_y) {
      S c = M::splat(at_id ? R(0) : -g_ref_logp);
      if (backwards)
        c = M::fma(M::only(g_backwards != 0, row.ref_center - d), M::splat(g_backwards), c);
      out.y = times(q, c) - M::only(forwards, apart * g_forwards);
      if (at_id) out.y -= std::expm1(ref_logp) * g_ref_logp;
      // the reference may have no mass, and q be no number, where nobody asks for it
      out.y = M::only(forwards || g_backwards != 0 || g_ref_logp != 0, out.y);
    }
    return out;
  }
};

}  // namespace FASTTAX_MATH_NS
}  // namespace fasttax
#endif
