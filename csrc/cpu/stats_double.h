#pragma once

// token_stats in float64: scalar, two passes, for gradcheck and for those who ask.
#include "../math/kl_stats.h"
#include "kl_double.h"

namespace fasttax {

using DoubleStatsRow = StatsRowOf<double>;

inline void stats_double_forward(const double* x, const double* y, int64_t V, const DoubleParams& k,
                                 int64_t id, DoubleStatsRow& saved, double* out) {
  const double* other = y ? y : x;
  saved = {};
  DoubleRow& row = saved.kl;
  row = double_frame(x, other, V, k);
  const DoubleFrame frame(k, row);
  const KlSums t = double_sums<kWantPolicyRef | kWantRefPolicy | kWantEntropy>(x, other, V, frame);
  const Divergence forwards = divergence(t, true), backwards = divergence(t, false);
  const auto at_least_zero = [](double v) { return v < 0 ? 0.0 : v; };
  row.log_ratio = forwards.log_ratio;
  row.mean_gap = forwards.gap;
  row.ref_center = backwards.gap;
  row.inv_s = 1 / t.s;
  row.inv_s_ref = 1 / t.y;
  saved.mean = t.moment / t.s;
  if (id >= 0) {
    const auto z = frame(x[id], other[id]);
    saved.logp = z.ax - std::log(t.s);
    if (y) saved.ref_logp = z.ay - std::log(t.y);
  }
  out[kLogp] = saved.logp;
  out[kRefLogp] = saved.ref_logp;
  out[kEntropy] = at_least_zero(std::log(t.s) - saved.mean);
  constexpr double inf = std::numeric_limits<double>::infinity();
  // Around -inf the sums are NaN.
  const bool none = row.mx == -inf && std::all_of(x, x + V, [](double v) { return v == -inf; });
  out[kLse] = none ? -inf : row.mx * k.row_scale + std::log(t.s);
  out[kKlPolicyRef] = at_least_zero(forwards.value);
  out[kKlRefPolicy] = at_least_zero(backwards.value);
}

inline void stats_double_backward(const double* x, const double* y, int64_t V,
                                  const DoubleParams& k, int64_t id, const DoubleStatsRow& saved,
                                  const double* g, double* dx, double* dy) {
  const double* other = y ? y : x;
  const DoubleRow& row = saved.kl;
  const DoubleFrame frame(k, row);
  const StatsSlope<DoubleMath> slope(saved, g, 1, y != nullptr);
  const bool close = stats_close(row);
  for (int64_t i = 0; i < V; ++i) {
    const auto z = frame(x[i], other[i]);
    const auto q_of = [&] { return std::exp(z.ay) * row.inv_s_ref; };
    auto d =
        slope.at<true, true>(std::exp(z.ax) * row.inv_s, z.ax, z.d, close, q_of, true, i == id);
    d.x *= k.row_slope;
    d.y *= k.ref_row_slope;
    kl_uncap<DoubleMath>(d, z.x, z.y, k);
    if (dx) dx[i] = d.x;
    if (dy && y) dy[i] = d.y;
  }
}

}  // namespace fasttax
