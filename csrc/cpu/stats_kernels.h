// token_stats over one row or one row pair: log-prob of an id, entropy, lse and the KL both ways
// out of one sweep; and one sweep back for any mix of them, with a coefficient for each.
#include "../math/kl_stats.h"
#include "kl_sweep.h"

#if defined(FASTTAX_ISA)  // isa.h: once per instruction set
namespace fasttax {
namespace FASTTAX_ISA_NS {

template <FrameMode mode, bool careful>
inline Sums policy_sweep(const RowPair& rows, int64_t V, const KlParams& k, const KlRow& r) {
  const Frame<mode> frame(k, r);
  Sums total;
  for_chunks<mode>(rows, k, V, [&](auto* x, auto*, int64_t n) {
    VF mass{}, moment{}, top = splat(-kInf);
    const auto add = [&](VF xv, bool guarded) {
      VF ax, d;
      frame(xv, xv, ax, d);
      top = max_keep_nan(ax, top);
      const VF ex = careful ? exp(ax) : exp_flushed(ax);
      mass += ex;
      moment = guarded ? moment + times(ex, ax) : fma(ex, ax, moment);
    };
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) add(load(x + i), careful);
    if (i < n) add(load(x + i, n - i, -kInf), true);
    total.add_moments(x, x, n, frame, mass, moment, max_of(top));
    total.top = std::max(total.top, max_of(top));
    return !(total.top > kFrameSlack);
  });
  return total;
}

inline Sums stats_sweep(const RowPair& rows, bool pair, int64_t V, const KlParams& k,
                        const KlRow& r, bool careful) {
  constexpr int all = kWantPolicyRef | kWantRefPolicy | kWantEntropy;
  if (pair) return sweep_row<all>(rows, V, k, r, careful);
  if (!k.plain) return policy_sweep<FrameMode::kGeneral, true>(rows, V, k, r);
  if (careful) return policy_sweep<FrameMode::kShared, true>(rows, V, k, r);
  return policy_sweep<FrameMode::kShared, false>(rows, V, k, r);
}

// Whether no entry is a number's log: the row's lse is then -inf, where the sums, taken around
// -inf, are NaN.
inline bool all_minus_infinity(const RowPair& rows, int64_t V, const KlRow& r) {
  if (r.mx != -kInf) return false;
  bool all = true;
  typed(rows.type, rows.x, [&](auto* x) {
    for (int64_t i = 0; all && i < V; ++i) all = to_float(x[i]) == -kInf;
  });
  return all;
}

// `out` receives the kTokenStats values of a token; y may be nullptr (no reference), id -1 (none).
inline void stats_forward(FloatType type, const void* x, const void* y, int64_t V,
                          const KlParams& k, int64_t id, StatsRow& row, float* out) {
  KlRow& r = row.kl;
  const RowPair rows(type, x, y ? y : x, k);
  primed_maxima(rows, V, k, r);
  bool careful = false, exact_frame = false;
  Sums t;
  Divergence forwards, backwards;
  for (int sweeps = 0; sweeps < kMostSweeps; ++sweeps) {
    t = stats_sweep(rows, y != nullptr, V, k, r, careful);
    if (t.top > kFrameSlack && !exact_frame) {
      exact_frame = true;
      maxima(rows, V, k, r);
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
  }
  const double mass = t.mass, mean = t.moment / t.mass,
               entropy = std::max(0.0, std::log(mass) - mean);
  if (y && (forwards.recentre() || backwards.recentre())) {
    // each keeps the better of its two values; the frame is that of the smaller one, where digits
    // are scarce
    const bool first =
        forwards.recentre() && !(backwards.recentre() && backwards.value < forwards.value);
    r.shift = float(first ? forwards.gap : backwards.gap);
    t = stats_sweep(rows, y != nullptr, V, k, r, true);
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
    const KlSides<VF> z = entry_of(rows, k, id);
    VF framed, d;
    frame(z.x, z.y, framed, d);
    ax = double(framed[0]);
    ay = double(frame.ay(z.x, z.y)[0]);
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
  if (all_minus_infinity(rows, V, r)) out[kLse] = -kInf;
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

  __attribute__((always_inline)) inline KlSides<VF> operator()(VF xv, VF yv,
                                                               bool at_id = false) const {
    VF ax, d;
    frame(xv, yv, ax, d);
    const auto q_of = [&] { return exp_flushed(frame.ay(xv, yv)) * frame.r.inv_s_ref; };
    const VF p = exp_flushed(ax) * frame.r.inv_s;
    KlSides<VF> out =
        slope.template at<true, sides == kBothSides>(p, ax, d, close, q_of, kBackwards, at_id);
    if constexpr (mode != FrameMode::kUnit) {
      out.x *= frame.k.row_slope;
      out.y *= frame.k.ref_row_slope;
    }
    if constexpr (mode == FrameMode::kGeneral) kl_uncap<VectorMath>(out, xv, yv, frame.k);
    return out;
  }
};

inline void stats_backward(FloatType type, const void* x, const void* y, int64_t V,
                           const KlParams& k, int64_t id, const StatsRow& row, const float* g,
                           void* dx, void* dy) {
  if (!dx && !dy) return;
  const RowPair rows(type, x, y ? y : x, k);
  const auto write = [&](auto mode_is, auto sides_are, auto backwards) {
    constexpr FrameMode mode = decltype(mode_is)::value;
    constexpr Sides sides = decltype(sides_are)::value;
    const StatsVector<mode, sides, decltype(backwards)::value> slope(k, row, g, y != nullptr);
    write_gradients<mode, sides>(rows, V, k, dx, dy, slope);
  };
  constexpr auto policy = std::integral_constant<Sides, kPolicyOnly>();
  constexpr auto both = std::integral_constant<Sides, kBothSides>();
  if (dy) {
    with_mode<false>(k, row.kl, [&](auto mode) { write(mode, both, std::true_type()); });
  } else if (y && g[kKlRefPolicy] != 0) {
    with_mode<true>(k, row.kl, [&](auto mode) { write(mode, policy, std::true_type()); });
  } else {
    with_mode<true>(k, row.kl, [&](auto mode) { write(mode, policy, std::false_type()); });
  }
  if (id < 0) return;
  const KlSides<VF> z = entry_of(rows, k, id);
  KlSides<VF> d{};
  with_mode<false>(k, row.kl, [&](auto mode) {
    d = StatsVector<decltype(mode)::value, kBothSides, true>(k, row, g, y != nullptr)(z.x, z.y,
                                                                                      true);
  });
  typed(type, x, [&](auto* unused) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(unused)>>;
    if (dx) store(moved<T>(dx, id), d.x, 1);
    if (dy) store(moved<T>(dy, id), d.y, 1);
  });
}

}  // namespace FASTTAX_ISA_NS
}  // namespace fasttax
#endif
