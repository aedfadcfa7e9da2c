#pragma once

// token_stats in float64: scalar, two passes, for gradcheck and for those who ask.
#include "kl_double.h"

namespace fasttax {

// As many as StatsRow has floats; here: mx, my, S, Y, log_ratio, KL(p||q), KL(q||p), E_p[ax], logp,
// ref_logp
constexpr int64_t kStatsKept = 11;

inline void stats_double_forward(const double* x, const double* y, int64_t V, const DoubleParams& k,
                                 int64_t id, double* kept, double* out) {
  const double* other = y ? y : x;
  double row[8];
  DoubleParams one_way = k;
  one_way.kind = 1;
  out[kKlRefPolicy] = kl_double_forward(x, other, V, one_way, row);
  one_way.kind = 0;
  out[kKlPolicyRef] = kl_double_forward(x, other, V, one_way, row);
  const double mx = row[0], my = row[1], S = row[2], log_ratio = row[3], Y = row[6];
  double moment = 0;
  for (int64_t begin = 0; begin < V; begin += kDoubleFold) {
    double part = 0;
    for (int64_t i = begin, end = std::min(V, begin + kDoubleFold); i < end; ++i) {
      const double ax = DoublePair(x[i], other[i], k).x - mx;
      part += weighted(std::exp(ax), ax);
    }
    moment += part;
  }
  const double mean = moment / S, entropy = std::log(S) - mean;
  out[kEntropy] = entropy < 0 ? 0 : entropy;
  constexpr double inf = std::numeric_limits<double>::infinity();
  // around -inf the sums are NaN
  const bool none = std::all_of(x, x + V, [](double v) { return v == -inf; });
  out[kLse] = none && mx == -inf ? -inf : mx + std::log(S);
  out[kLogp] = out[kRefLogp] = 0;
  if (id >= 0) {
    const DoublePair z(x[id], other[id], k);
    out[kLogp] = (z.x - mx) - std::log(S);
    if (y) out[kRefLogp] = (z.y - my) - std::log(Y);
  }
  const double keep[kStatsKept] = {mx,
                                   my,
                                   S,
                                   Y,
                                   log_ratio,
                                   out[kKlPolicyRef],
                                   out[kKlRefPolicy],
                                   mean,
                                   out[kLogp],
                                   out[kRefLogp],
                                   0};
  std::copy(keep, keep + kStatsKept, kept);
}

inline void stats_double_backward(const double* x, const double* y, int64_t V,
                                  const DoubleParams& k, int64_t id, const double* kept,
                                  const double* g, double* dx, double* dy) {
  const double* other = y ? y : x;
  const double mx = kept[0], my = kept[1], S = kept[2], Y = kept[3], log_ratio = kept[4],
               forwards = kept[5], backwards = kept[6];
  const double mean = kept[7], logp = kept[8], ref_logp = kept[9];
  for (int64_t i = 0; i < V; ++i) {
    const DoublePair z(x[i], other[i], k);
    const double ax = z.x - mx, p = std::exp(ax) / S, q = std::exp(z.y - my) / Y,
                 u = (z.x - z.y) - (mx - my) - log_ratio;
    const double p_minus_q = std::fabs(u) <= 1 ? -p * std::expm1(-u) : p - q;
    double for_x = weighted(g[kEntropy], weighted(p, mean - ax)) + p * g[kLse], for_y = 0;
    for_x += weighted(g[kLogp], i == id ? -std::expm1(logp) : -p);
    if (y) {
      for_x += weighted(g[kKlPolicyRef], weighted(p, u - forwards)) +
               weighted(g[kKlRefPolicy], p_minus_q);
      for_y = weighted(g[kKlRefPolicy], weighted(q, -u - backwards)) -
              weighted(g[kKlPolicyRef], p_minus_q);
      for_y += weighted(g[kRefLogp], i == id ? -std::expm1(ref_logp) : -q);
    }
    if (dx) dx[i] = weighted(for_x, z.slope_x);
    if (dy) dy[i] = weighted(for_y, z.slope_y);
  }
}

}  // namespace fasttax
