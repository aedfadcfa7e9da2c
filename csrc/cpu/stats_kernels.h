// token_stats over one row or one row pair: log-prob of an id, entropy, lse and the KL both ways
// out of one sweep; and one sweep back for any mix of them, with a coefficient for each.
#include "../math/kl_stats.h"
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
      moment = careful || n < kLanes ? moment + times(ex, ax) : fma(ex, ax, moment);
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

// The gradient at one vector. kBackwards: whether KL(q||p) has a coefficient.
template <FrameMode mode, Sides sides, bool kBackwards>
struct StatsVector {
  Frame<mode> frame;
  StatsSlope<VectorMath> slope;
  bool close;

  StatsVector(const KlParams& k, const StatsRow& row, const float* g, bool pair)
      : frame(k, row.kl), slope(row, g, 1, pair), close(stats_close(row.kl)) {}

  __attribute__((always_inline)) inline KlSides<VF> operator()(VF xv, VF yv, int64_t n,
                                                               bool at_id = false) const {
    VF ax, d;
    frame(xv, yv, ax, d, n);
    const auto q_of = [&] { return exp_flushed(frame.ay(xv, yv, n)) * frame.r.inv_s_ref; };
    const VF p = exp_flushed(ax) * frame.r.inv_s;
    KlSides<VF> out =
        slope.template at<true, sides == kBothSides>(p, ax, d, close, q_of, kBackwards, at_id);
    if constexpr (mode != FrameMode::kUnit) {
      out.x *= frame.k.row_slope;
      out.y *= frame.k.ref_row_slope;
    }
    if constexpr (mode == FrameMode::kGeneral) kl_to_raw<VectorMath>(out, xv, yv, frame.k);
    return out;
  }
};

template <class T>
inline void stats_row_backward(const T* x, const T* y, int64_t V, const KlParams& k, int64_t id,
                               const StatsRow& row, const float* g, T* dx, T* dy) {
  const T* other = y ? y : x;
  const auto write = [&](auto mode, auto sides, auto backwards) {
    constexpr Sides both = decltype(sides)::value;
    const StatsVector<decltype(mode)::value, both, decltype(backwards)::value> slope(k, row, g,
                                                                                     y != nullptr);
    write_gradients<both>(x, other, V, dx, dy, slope);
    if (id < 0) return;
    const KlSides<VF> d = slope(splat(to_float(x[id])), splat(to_float(other[id])), kLanes, true);
    if (dx) store(dx + id, d.x, 1);
    if constexpr (both == kBothSides) store(dy + id, d.y, 1);
  };
  const bool plain = y ? k.plain : k.cap == 0;
  with_mode<true>(plain, k, row.kl, [&](auto mode) {
    if (dy) return write(mode, std::integral_constant<Sides, kBothSides>(), std::true_type());
    const auto policy = std::integral_constant<Sides, kPolicyOnly>();
    if (y && g[kKlRefPolicy] != 0) write(mode, policy, std::true_type());
    else write(mode, policy, std::false_type());
  });
}

inline void stats_forward(FloatType type, const void* x, const void* y, int64_t V,
                          const KlParams& k, int64_t id, StatsRow& row, float* out) {
  typed(type, x, [&](auto* policy) {
    stats_row_forward(policy, static_cast<decltype(policy)>(y), V, k, id, row, out);
  });
}

inline void stats_backward(FloatType type, const void* x, const void* y, int64_t V,
                           const KlParams& k, int64_t id, const StatsRow& row, const float* g,
                           void* dx, void* dy) {
  if (!dx && !dy) return;
  typed(type, x, [&](auto* policy) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(policy)>>;
    stats_row_backward(policy, static_cast<const T*>(y), V, k, id, row, g, static_cast<T*>(dx),
                       static_cast<T*>(dy));
  });
}

}  // namespace FASTTAX_ISA_NS
}  // namespace fasttax
#endif
