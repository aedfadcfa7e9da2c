// token_stats over one row or one row pair: log-prob of an id, entropy, lse and the KL both ways
// out of one sweep; and one sweep back for any mix of them, with a coefficient for each.
#include "kl_sweep.h"

#if defined(FASTTAX_ISA)  // isa.h: once per instruction set
namespace fasttax {
namespace FASTTAX_ISA_NS {

template <FrameMode mode, bool careful, class T>
inline Sums policy_sweep(const T* x, int64_t V, const KlParams& k, const KlRow& r) {
  const Frame<mode> frame(k, r);
  Sums total;
  for (int64_t start = 0; start < V; start += kChunk) {
    const int64_t end = std::min(V, start + kChunk);
    VF mass{}, moment{}, top = splat(-kInf);
    for_vectors(x, x, start, end, [&](VF xv, VF, int64_t, int64_t n) {
      VF ax, d;
      frame(xv, xv, ax, d, n);
      top = max_keep_nan(ax, top);
      const VF ex = careful ? exp(ax) : exp_flushed(ax);
      mass += ex;
      moment = careful || n < kLanes ? moment + where_zero(ex, ex * ax) : fma(ex, ax, moment);
    });
    total.add_moments(x, x, start, end, frame, mass, moment, max_of(top));
    total.top = std::max(total.top, max_of(top));
    if (total.top > kFrameSlack) break;
  }
  return total;
}

template <class T>
inline Sums stats_sweep(const T* x, const T* y, int64_t V, const KlParams& k, const KlRow& r,
                        bool careful) {
  if (y) return sweep_row<kWantPolicyRef | kWantRefPolicy | kWantEntropy>(x, y, V, k, r, careful);
  if (k.cap > 0) return policy_sweep<FrameMode::kGeneral, true>(x, V, k, r);
  return careful ? policy_sweep<FrameMode::kShared, true>(x, V, k, r)
                 : policy_sweep<FrameMode::kShared, false>(x, V, k, r);
}

// Whether no entry is a number's log: the row's lse is then -inf, where the sums, taken around
// -inf, are NaN.
template <class T>
inline bool all_minus_infinity(const T* x, int64_t V, const KlRow& r) {
  if (r.mx != -kInf) return false;
  for (int64_t i = 0; i < V; ++i)
    if (to_float(x[i]) != -kInf) return false;
  return true;
}

// `out` receives the kTokenStats values of a token; y may be nullptr (no reference), id -1 (none).
template <class T>
inline void stats_row_forward(const T* x, const T* y, int64_t V, const KlParams& k, int64_t id,
                              StatsRow& row, float* out) {
  KlRow& r = row.kl;
  const T* other = y ? y : x;
  primed_maxima(x, other, V, k, r);
  bool careful = false, exact_frame = false;
  Sums t = stats_sweep(x, y, V, k, r, careful);
  Divergence forwards, backwards;
  for (;;) {
    if (t.top > kFrameSlack && !exact_frame) {
      exact_frame = true;
      maxima(x, other, V, k, r);
      t = stats_sweep(x, y, V, k, r, careful);
      continue;
    }
    if (y) {
      forwards = divergence(t, true);
      backwards = divergence(t, false);
    }
    const bool trusted =
        t.moment == t.moment && (!y || (t.trusted(forwards.value) && t.trusted(backwards.value)));
    if (careful || trusted) break;
    careful = true;
    t = stats_sweep(x, y, V, k, r, careful);
  }
  const double mass = t.mass, mean = t.moment / t.mass,
               entropy = std::max(0.0, std::log(mass) - mean);
  if (y && (forwards.recentre() || backwards.recentre())) {
    // each keeps the better of its two values; the frame is that of the smaller one, where digits
    // are scarce
    const bool first =
        forwards.recentre() && !(backwards.recentre() && backwards.value < forwards.value);
    r.shift = float(first ? forwards.gap : backwards.gap);
    t = stats_sweep(x, y, V, k, r, true);
    const Divergence f = divergence(t, true), b = divergence(t, false);
    if (!(f.size > forwards.size)) forwards.value = f.value;
    if (!(b.size > backwards.size)) backwards.value = b.value;
    forwards.log_ratio = f.log_ratio;
    forwards.gap = f.gap;
    backwards.gap = b.gap;
  }
  double ax = 0, ay = 0;
  // by the sweep's own arithmetic: what it rounds off the id's entry is in the sums too
  if (id >= 0) {
    const Frame<FrameMode::kGeneral> frame(k, r);
    VF framed, d, xv = splat(to_float(x[id])), yv = splat(to_float(other[id]));
    frame(xv, yv, framed, d, kLanes);
    ax = double(framed[0]);
    ay = double(frame.ay(xv, yv, kLanes)[0]);
  }
  const bool same = forwards.value == 0 && forwards.log_ratio == 0;  // equal rows get equal bits
  const double logp = ax - std::log(mass), ref_logp = ay - std::log(same ? mass : t.y);
  r.log_ratio = float(forwards.log_ratio);
  r.mean_gap = float(forwards.gap);
  r.ref_center = float(backwards.gap);
  r.inv_s = float(1 / mass);
  r.inv_s_ref = y ? float(1 / t.y) : 0.0f;
  row.mean = float(mean);
  // NaN passes through these two
  const auto at_most_zero = [](double v) { return v > 0 ? 0.0f : float(v); };
  const auto at_least_zero = [](double v) { return v < 0 ? 0.0f : float(v); };
  row.logp = out[kLogp] = id < 0 ? 0.0f : at_most_zero(logp);
  row.ref_logp = out[kRefLogp] = id < 0 || !y ? 0.0f : at_most_zero(ref_logp);
  out[kEntropy] = mean == mean ? float(entropy) : float(mean);
  out[kLse] = float(double(r.mx) * double(k.row_scale) + std::log(mass));
  if (all_minus_infinity(x, V, r)) out[kLse] = -kInf;
  out[kKlPolicyRef] = at_least_zero(forwards.value);
  out[kKlRefPolicy] = at_least_zero(backwards.value);
}

inline float smaller_kl(const KlRow& r) {
  return std::min(r.mean_gap - r.log_ratio, r.log_ratio - r.ref_center);
}

// d/dx and d/dy of sum_s g_s stat_s at one vector, with the coefficients of a token:
//   logp: 1[id] - p    lse: p    entropy: p (E_p[ax] - ax)    KL(p||q): p (d - E_p[d]), q - p
//   KL(q||p): p - q, q (E_q[d] - d)
// kSides: 1 the policy's gradient, 2 the reference's, 3 both. kBackwards: whether KL(q||p) has a
// coefficient.
template <FrameMode mode, int kSides, bool kBackwards>
struct StatsSlope {
  const KlParams k;
  const KlRow r;
  const Frame<mode> frame;
  const Difference<mode> difference;
  const float mean, logp, ref_logp, g_logp, g_ref_logp, g_entropy, g_lse, g_forwards, g_backwards;
  // a mask: where the reference gives an entry no mass, d is inf and 0 * d no number
  const VI forwards;

  StatsSlope(const KlParams& params, const StatsRow& row, const float* g, bool pair)
      : k(params),
        r(row.kl),
        frame(params, row.kl),
        difference(params, row.kl, smaller_kl(row.kl)),
        mean(row.mean),
        logp(row.logp),
        ref_logp(row.ref_logp),
        g_logp(g[kLogp]),
        g_ref_logp(g[kRefLogp]),
        g_entropy(g[kEntropy]),
        g_lse(g[kLse]),
        g_forwards(g[kKlPolicyRef]),
        g_backwards(g[kKlRefPolicy]),
        forwards(splat_i(pair && g[kKlPolicyRef] != 0 ? -1 : 0)) {}

  // `at_id` leaves the log-probs' own terms out of p and q, for `at` to add them without
  // cancellation
  __attribute__((always_inline)) inline void operator()(VF xv, VF yv, int64_t n, VF& for_x,
                                                        VF& for_y, bool at_id = false) const {
    VF ax, d;
    frame(xv, yv, ax, d, n);
    const VF p = exp_flushed(ax) * r.inv_s;
    VF q{}, p_minus_q{};
    if (kBackwards || (kSides & 2)) p_minus_q = difference(xv, yv, n, p, d, kSides & 2, q);
    if (kSides & 1) {
      VF c = fma(mean - ax, splat(g_entropy), splat(g_lse - (at_id ? 0.0f : g_logp)));
      c = fma(as_float(as_int(d - r.mean_gap) & forwards), splat(g_forwards), c);
      for_x = where_zero(p, p * c);
      if (kBackwards) for_x = fma(p_minus_q, splat(g_backwards), for_x);
      if (mode != FrameMode::kUnit) for_x *= k.row_slope;
      if (mode == FrameMode::kGeneral && k.cap > 0) for_x *= bend(xv, k.scale / k.cap);
    }
    if (kSides & 2) {
      VF c = splat(at_id ? 0.0f : -g_ref_logp);
      if (kBackwards) c = fma(r.ref_center - d, splat(g_backwards), c);
      for_y = where_zero(q, q * c) - as_float(as_int(p_minus_q * g_forwards) & forwards);
      if (mode != FrameMode::kUnit) for_y *= k.ref_row_slope;
      if (mode == FrameMode::kGeneral && k.ref_cap > 0) for_y *= bend(yv, k.ref_scale / k.ref_cap);
    }
  }

  // The entry of the id: d logp = 1 - p = -expm1(logp), which p in float would round away.
  template <class T>
  void at(int64_t id, const T* x, const T* y, T* dx, T* dy) const {
    const VF xv = splat(to_float(x[id])), yv = splat(to_float(y[id]));
    VF for_x{}, for_y{}, bend_x = splat(1.0f), bend_y = splat(1.0f);
    (*this)(xv, yv, kLanes, for_x, for_y, true);
    if (mode == FrameMode::kGeneral && k.cap > 0) bend_x = bend(xv, k.scale / k.cap);
    if (mode == FrameMode::kGeneral && k.ref_cap > 0) bend_y = bend(yv, k.ref_scale / k.ref_cap);
    if (kSides & 1) store(dx + id, for_x - bend_x * (std::expm1(logp) * g_logp * k.row_slope), 1);
    if (kSides & 2)
      store(dy + id, for_y - bend_y * (std::expm1(ref_logp) * g_ref_logp * k.ref_row_slope), 1);
  }
};

template <FrameMode mode, int kSides, bool kBackwards, class T>
inline void stats_row_backward(const T* x, const T* y, int64_t V, const KlParams& k, int64_t id,
                               const StatsRow& row, const float* g, T* dx, T* dy) {
  const T* other = y ? y : x;
  const StatsSlope<mode, kSides, kBackwards> slope(k, row, g, y != nullptr);
  write_gradients<kSides>(x, other, V, dx, dy, slope);
  if (id >= 0) slope.at(id, x, other, dx, dy);
}

template <FrameMode mode, int kSides, class T>
inline void stats_row_backward(const T* x, const T* y, int64_t V, const KlParams& k, int64_t id,
                               const StatsRow& row, const float* g, T* dx, T* dy) {
  if (y && g[kKlRefPolicy] != 0)
    return stats_row_backward<mode, kSides, true>(x, y, V, k, id, row, g, dx, dy);
  return stats_row_backward<mode, kSides, false>(x, y, V, k, id, row, g, dx, dy);
}

template <FrameMode mode, class T>
inline void stats_row_backward(const T* x, const T* y, int64_t V, const KlParams& k, int64_t id,
                               const StatsRow& row, const float* g, T* dx, T* dy) {
  if (dx && dy) return stats_row_backward<mode, 3>(x, y, V, k, id, row, g, dx, dy);
  if (dx) return stats_row_backward<mode, 1>(x, y, V, k, id, row, g, dx, dy);
  if (dy) return stats_row_backward<mode, 2>(x, y, V, k, id, row, g, dx, dy);
}

template <class T>
inline void stats_backward_typed(const T* x, const T* y, int64_t V, const KlParams& k, int64_t id,
                                 const StatsRow& row, const float* g, T* dx, T* dy) {
  const bool plain = y ? k.plain : k.cap == 0;
  if (plain && Frame<FrameMode::kUnit>::is_unit(k, row.kl))
    return stats_row_backward<FrameMode::kUnit>(x, y, V, k, id, row, g, dx, dy);
  if (plain) return stats_row_backward<FrameMode::kShared>(x, y, V, k, id, row, g, dx, dy);
  return stats_row_backward<FrameMode::kGeneral>(x, y, V, k, id, row, g, dx, dy);
}

inline void stats_forward(FloatType type, const void* x, const void* y, int64_t V,
                          const KlParams& k, int64_t id, StatsRow& row, float* out) {
  switch (type) {
    case FloatType::kBFloat16:
      return stats_row_forward(static_cast<const BFloat16*>(x), static_cast<const BFloat16*>(y), V,
                               k, id, row, out);
    case FloatType::kFloat16:
      return stats_row_forward(static_cast<const Float16*>(x), static_cast<const Float16*>(y), V, k,
                               id, row, out);
    default:
      return stats_row_forward(static_cast<const float*>(x), static_cast<const float*>(y), V, k, id,
                               row, out);
  }
}

template <class T>
inline void stats_backward_cast(const void* x, const void* y, int64_t V, const KlParams& k,
                                int64_t id, const StatsRow& row, const float* g, void* dx,
                                void* dy) {
  stats_backward_typed(static_cast<const T*>(x), static_cast<const T*>(y), V, k, id, row, g,
                       static_cast<T*>(dx), static_cast<T*>(dy));
}

inline void stats_backward(FloatType type, const void* x, const void* y, int64_t V,
                           const KlParams& k, int64_t id, const StatsRow& row, const float* g,
                           void* dx, void* dy) {
  switch (type) {
    case FloatType::kBFloat16: return stats_backward_cast<BFloat16>(x, y, V, k, id, row, g, dx, dy);
    case FloatType::kFloat16: return stats_backward_cast<Float16>(x, y, V, k, id, row, g, dx, dy);
    default: return stats_backward_cast<float>(x, y, V, k, id, row, g, dx, dy);
  }
}

}  // namespace FASTTAX_ISA_NS
}  // namespace fasttax
#endif
