#if !defined(FASTTAX_MATH_KL_SLOPE)  // read for each instruction set: macros.h
#define FASTTAX_MATH_KL_SLOPE

#include <cmath>

#include "kl.h"
#include "kl_frame.h"
#include "kl_kinds.h"
#include "kl_row.h"

// Gradients of the divergences, entry by entry, and what a second sweep sums. With p = e^ax / S,
// q = e^ay / Y and u = log p - log q = d - L; d/d x is by the policy's tempered logits, d/d y by
// the reference's.
namespace fasttax {
namespace FASTTAX_MATH_NS {

// Whether M's values are finite where no weight is NaN, as under a softcap; else 0 times infinity
// is to be 0.
template <class M>
constexpr bool kl_finite = false;

template <class M>
FASTTAX_HD typename M::S kl_weighed(typename M::S weight, typename M::S value) {
  if constexpr (kl_finite<M>) return weight * value;
  else return times(weight, value);
}

template <class S>
struct KlSides {
  S x, y;
};

// Whether rows are so close that p - q would cancel.
template <class R>
FASTTAX_HD bool kl_close(const KlRowOf<R>& row) {
  const R kl = row.mean_gap - row.log_ratio;
  return !((kl < 0 ? -kl : kl) >= R(kTrusted));
}

// p - q. In rows that are close the difference of the two would cancel: where |u| is small it is
// p (1 - e^-u) by the series, and vectors with no other lane go without q's exponential unless the
// caller wants q as well: of rows that are close nearly all, by a series that reaches 1. q_of() is
// called where q is needed, and q is what it gave.
template <class M, class Q>
FASTTAX_HD typename M::S kl_apart(typename M::S p, typename M::S u, bool close, bool want_q,
                                  const Q& q_of, typename M::S& q) {
  using S = typename M::S;
  if (!close) {
    q = q_of();
    return p - q;
  }
  if constexpr (M::kVector) {
    const S series = p * (u - kl_bregman_unit(u));
    if (!want_q && M::all_le(M::abs(u), constant<S>(kUnitGap))) return series;
    q = q_of();
    return M::abs(u) <= kUnitGap ? series : p - q;
  }
  const S series = -(p * kl_rest(u));
  q = q_of();
  return M::abs(u) <= kl_near<S>() ? series : p - q;
}

// What a kind's gradient is, of the kinds that one sweep gives:
//   slope<for_y>(p, d, close, q_of, row)      for_y: whether the reference's side is wanted too
// and, of those with a second sweep, at beta (which is the kind's parameter, whatever it is
// called):
//   is_zero(beta)            no second sweep: the value is 0
//   terms(entry, beta)       an entry's part of three numbers
//   none(), join(to, part)   the parts of no entry; `part` counted in, in any order
//   finish(three, beta)      value, and what the row keeps as mean_gap and ref_center
//   slope(entry, row, beta)
//   kCareful                 whether S and Y must be to the last digits of a float
template <KlKind kind>
struct KlFormula;

// An entry as a second sweep sees it; the logs have their digits where p and q are 0.
template <class S>
struct KlEntry {
  S p, q, u, log_p, log_q;
};

// What makes log p of ax, and log q of ay.
template <class R>
struct KlLogs {
  R x, y;
  FASTTAX_HD explicit KlLogs(const KlRowOf<R>& row)
      : x(std::log(row.inv_s)), y(std::log(row.inv_s_ref)) {}
};

template <>
struct KlFormula<KlKind::kPolicyRef> {  // x: p (d - E_p[d])   y: q - p
  template <class M, bool for_y, class Q>
  FASTTAX_HD static KlSides<typename M::S> slope(typename M::S p, typename M::S d, bool close,
                                                 const Q& q_of, const KlRowOf<typename M::R>& row) {
    KlSides<typename M::S> out{kl_weighed<M>(p, d - row.mean_gap), {}};
    typename M::S q;
    if constexpr (for_y) out.y = -kl_apart<M>(p, d - row.log_ratio, close, false, q_of, q);
    return out;
  }
};

template <>
struct KlFormula<KlKind::kRefPolicy> {  // x: p - q   y: q (E_q[d] - d)
  template <class M, bool for_y, class Q>
  FASTTAX_HD static KlSides<typename M::S> slope(typename M::S p, typename M::S d, bool close,
                                                 const Q& q_of, const KlRowOf<typename M::R>& row) {
    typename M::S q;
    KlSides<typename M::S> out{kl_apart<M>(p, d - row.log_ratio, close, for_y, q_of, q), {}};
    if constexpr (for_y) out.y = kl_weighed<M>(q, row.mean_gap - d);
    return out;
  }
};

template <class S>
struct KlThree {  // an entry's part of a second sweep; all entries'; or what these finish as
  S value, first, second;
};

// Three sums, after a first sweep by the cheaper exponential.
struct KlAdded {
  static constexpr bool kCareful = false;
  template <class S>
  FASTTAX_HD static KlThree<S> none() {
    return {S{}, S{}, S{}};
  }
  template <class M>
  FASTTAX_HD static void join(KlThree<typename M::S>& to, const KlThree<typename M::S>& part) {
    to.value += part.value;
    to.first += part.first;
    to.second += part.second;
  }
};

// log(m/p) and log(m/q) of the mixture m = (1 - beta) p + beta q, each from log w = log(m / the
// larger of p and q) in (log(1/2), 0] or below, so that no large u cancels. Near 1 by Kahan's
// correction of log1p: one logarithm for all.
template <class M>
FASTTAX_HD KlSides<typename M::S> kl_log_mix(typename M::S u, typename M::R beta) {
  using S = typename M::S;
  using R = typename M::R;
  const R other = R(1) - beta;
  const S e = M::exp(-M::abs(u));
  const S less = e - R(1);
  const S zero = constant<S>(0), t = M::if_lt(u, zero, less * other, less * beta);
  const S w = M::if_lt(u, zero, beta + other * e, other + beta * e);
  const S l = M::log(w) + M::if_lt(constant<S>(0.5), w, (t - (w - R(1))) / w, zero);
  return {M::if_lt(u, zero, l - u, l), M::if_lt(u, zero, l, l + u)};
}

// Jensen-Shannon, beta KL(q||m) + (1 - beta) KL(p||m); at beta 0 and 1 the mixture is one of the
// two.
//   x: (1 - beta) p (log p - log m - KL(p||m))     y: beta q (log q - log m - KL(q||m))
template <>
struct KlFormula<KlKind::kJsd> : KlAdded {
  template <class R>
  FASTTAX_HD static bool is_zero(R beta) {
    return beta == 0 || beta == 1;
  }

  template <class M>
  FASTTAX_HD static KlThree<typename M::S> terms(const KlEntry<typename M::S>& entry,
                                                 typename M::R beta) {
    using S = typename M::S;
    using R = typename M::R;
    const S p = entry.p, q = entry.q, u = entry.u;
    const KlSides<S> mix = kl_log_mix<M>(u, beta);
    const S p_part = -times(p, mix.x), q_part = -times(q, mix.y);
    const S eps = kl_rest(u);
    const S near = p * (beta * jsd_g_near(eps) - jsd_g_near(S(beta * eps)));
    const S apart = beta * q_part + (R(1) - beta) * p_part;
    return {M::abs(u) <= jsd_near<S>() ? near : apart, p_part, q_part};
  }

  template <class R>
  FASTTAX_HD static KlThree<double> finish(const KlThree<double>& sums, R) {
    return sums;  // the gap, KL(p||m), KL(q||m)
  }

  template <class M>
  FASTTAX_HD static KlSides<typename M::S> slope(const KlEntry<typename M::S>& entry,
                                                 const KlRowOf<typename M::R>& row,
                                                 typename M::R beta) {
    using R = typename M::R;
    const KlSides<typename M::S> mix = kl_log_mix<M>(entry.u, beta);
    return {times(entry.p, (beta - R(1)) * (mix.x + row.mean_gap)),
            times(entry.q, -beta * (mix.y + row.ref_center))};
  }
};

// Renyi of order a = beta > 0, not 1: log(1 + M) / (a - 1) of M = sum p^a q^c - 1, c = 1 - a.
// Where the rows are close, an entry's part of M is p [e^(-c u) - 1 - c (e^-u - 1)], all of one
// sign; where they are apart, the weights p^a q^c are summed around the largest. The largest
// entry's logs are the same bits in both sweeps: where it is all there is, its gradient is 0.
//   x: a / (a - 1) (w - p)     y: q - w,     w = p^a q^c / (1 + M)
template <>
struct KlFormula<KlKind::kRenyi> {
  static constexpr bool kCareful = true;
  static constexpr float kNone = -3e38f, kMost = 3e38f;  // the log of a weight that is 0, infinite

  template <class R>
  FASTTAX_HD static bool is_zero(R) {
    return false;
  }

  template <class M>
  FASTTAX_HD static auto small(typename M::S t) {
    return M::abs(t) <= kl_near<typename M::S>();
  }

  template <class M>
  FASTTAX_HD static typename M::S log_weight(const KlEntry<typename M::S>& e, typename M::R a) {
    using S = typename M::S;
    using R = typename M::R;
    const S none = constant<S>(kNone), most = constant<S>(kMost);
    S log_w = a * e.log_p + (R(1) - a) * e.log_q;
    log_w = e.log_p == constant<S>(-HUGE_VAL) ? none : log_w;
    log_w = log_w < none ? none : log_w;
    return log_w > most ? most : log_w;
  }

  // value: M's part; first: the log of the largest weight; second: the weights over it.
  template <class M>
  FASTTAX_HD static KlThree<typename M::S> terms(const KlEntry<typename M::S>& e, typename M::R a) {
    using S = typename M::S;
    using R = typename M::R;
    const R c = R(1) - a;
    const S cu = c * e.u, au = a * e.u, log_w = log_weight<M>(e, a);
    // w - p and w - q by the series, which leave digits where a is near 1 or 0
    const S from_p = small<M>(cu) ? e.p * kl_rest(cu) : weight<M>(e.p, -cu, log_w) - e.p;
    const S by_p = from_p - c * (e.q - e.p), by_q = e.q * kl_rest(-au) - a * (e.p - e.q);
    const S near = e.p * (kl_excess(cu) - c * kl_excess(e.u));
    const S apart = small<M>(au) ? by_q : by_p;
    const S both = (small<M>(cu) & small<M>(e.u)) ? near : apart;
    const S value = e.log_p == constant<S>(-HUGE_VAL) ? -c * e.q : both;
    return {value, log_w, constant<S>(1)};
  }

  // w out of p and log w - log p, which has more digits than the logs in rows that are close; out
  // of its own logarithm where it is far above p, which may be 0 then.
  template <class M>
  FASTTAX_HD static typename M::S weight(typename M::S p, typename M::S rise, typename M::S log_w) {
    using S = typename M::S;
    const auto above = rise > constant<S>(8);
    const S one = constant<S>(1), most = constant<S>(80), power = above ? log_w : rise;
    return (above ? one : p) * M::exp(power > most ? most : power);  // beyond it rows are apart
  }

  template <class S>
  FASTTAX_HD static KlThree<S> none() {
    return {S{}, constant<S>(kNone), S{}};
  }

  template <class M>
  FASTTAX_HD static void join(KlThree<typename M::S>& to, const KlThree<typename M::S>& part) {
    using S = typename M::S;
    const auto above = to.first >= part.first;
    const S scale = M::exp(-M::abs(to.first - part.first));
    to.value += part.value;
    to.second = above ? to.second + part.second * scale : to.second * scale + part.second;
    to.first = above ? to.first : part.first;
  }

  // The row keeps log(1 + M) in two parts: the largest weight's log and the rest, or, of rows that
  // are close, 0 and all of it.
  template <class R>
  FASTTAX_HD static KlThree<double> finish(const KlThree<double>& all, R a) {
    const double order = double(a) - 1, rest = std::log(all.second), log_all = all.first + rest;
    const double nan = all.value + all.second;  // where either is: infinities have finite sums
    if (nan != nan) return {nan, nan, nan};
    if (all.first >= 1e38) return {HUGE_VAL / order, 0, HUGE_VAL};
    if (all.first <= -1e38) return {-HUGE_VAL / order, 0, -HUGE_VAL};
    if (!(std::fabs(log_all) <= 0.4)) return {log_all / order, rest, all.first};
    return {std::log1p(all.value) / order, std::log1p(all.value), 0};
  }

  // Where w is near p, w - p = p (e^-t - 1), t = log p - log w = c u + log(1 + M); where it is near
  // q, q - w = -q (e^-s - 1), s = log q - log w = log(1 + M) - a u. In rows that are close u has
  // more digits than the logs.
  template <class M>
  FASTTAX_HD static KlSides<typename M::S> slope(const KlEntry<typename M::S>& e,
                                                 const KlRowOf<typename M::R>& row,
                                                 typename M::R a) {
    using S = typename M::S;
    using R = typename M::R;
    const R rest = row.mean_gap, largest = row.ref_center;
    const S log_w = (log_weight<M>(e, a) - largest) - rest;
    S t = e.log_p - log_w, s = e.log_q - log_w, w{};
    if (largest == 0 && rest <= R(0.5) && rest >= R(-0.5)) {
      t = (R(1) - a) * e.u + rest;
      s = rest - a * e.u;
      w = e.log_p == constant<S>(-HUGE_VAL) ? w : weight<M>(e.p, -t, log_w);
    } else {
      w = M::exp(log_w);
    }
    const S under_q = small<M>(s) ? -(e.q * kl_rest(s)) : e.q - w;
    w = small<M>(s) ? e.q - under_q : w;
    const S over_p = small<M>(t) ? e.p * kl_rest(t) : w - e.p;
    return {a / (a - R(1)) * over_p, under_q};
  }
};

// d KL / d x and d KL / d y at one entry of a row, by its tempered logits.
// logs_of() gives log p and log q.
template <KlKind kind, class M, bool for_y, class Q, class L>
FASTTAX_HD KlSides<typename M::S> kl_slope(typename M::S p, typename M::S d, bool close,
                                           const Q& q_of, const L& logs_of,
                                           const KlRowOf<typename M::R>& row, typename M::R beta) {
  using F = KlFormula<kind>;
  if constexpr (kl_two_sweeps(kind)) {
    const typename M::S q = q_of();
    if (F::is_zero(beta)) return {p * 0, q * 0};  // 0, or NaN in a row that has one
    const KlSides<typename M::S> logs = logs_of();
    return F::template slope<M>({p, q, d - row.log_ratio, logs.x, logs.y}, row, beta);
  } else {
    return F::template slope<M, for_y>(p, d, close, q_of, row);
  }
}

// From the tempered logits' gradient to the raw ones', but for the softcaps' scales; x and y are
// what KlFrame::cap() left.
template <class M>
FASTTAX_HD void kl_uncap(KlSides<typename M::S>& d, typename M::S x, typename M::S y,
                         const KlParamsOf<typename M::R>& k) {
  if (k.cap > 0) d.x *= kl_bend<M>(x, k.cap);
  if (k.ref_cap > 0) d.y *= kl_bend<M>(kl_capped_y(x, y, k), k.ref_cap);
}

}  // namespace FASTTAX_MATH_NS
}  // namespace fasttax
#endif
