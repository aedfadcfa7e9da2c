// token_stats over one row or one row pair: log-prob of an id, entropy, lse and the KL both ways
// out of one sweep; and one sweep back for any mix of them, with a coefficient for each.
#include "../math/kl_stats.h"
#include "kl_sweep.h"

#if defined(FASTTAX_ISA)  // isa.h: once per instruction set
namespace fasttax {
namespace FASTTAX_ISA_NS {

// `out` receives the kTokenStats values of a token; y may be nullptr (no reference), id -1 (none).
inline void stats_forward(FloatType type, const void* x, const void* y, int64_t V,
                          const KlParams& k, int64_t id, StatsRow& row, float* out) {
  KlRow& r = row.kl;
  RowPair rows(type, x, y ? y : x, k);
  KlSums t;
  Divergence forwards, backwards;
  if (y) {
    t = sweep_row<kWantPolicyRef | kWantRefPolicy | kWantEntropy>(rows, V, k, r);
    forwards = divergence(t, true);
    backwards = divergence(t, false);
  } else {
    t = sweep_row<kWantEntropy, false>(rows, V, k, r);
  }
  const double mass = t.mass, mean = t.moment / t.mass,
               entropy = std::max(0.0, std::log(mass) - mean);
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
