#pragma once

// token_kl and token_stats as a textbook writes them: log_softmax of either row and sums over it.
// In double the truth; in float what a composition of PyTorch's ops does, the yardstick for an
// error.

#include <algorithm>
#include <cmath>
#include <vector>

#include "cuda/kl.h"
#include "math/kl_frame.h"
#include "math/kl_stats.h"

struct Options {
  double beta = 0.5, scale = 1, ref_scale = 1, cap = 0, ref_cap = 0, temperature = 1,
         ref_temperature = 1;
  bool inf_mask = false;

  fasttax::KlParams params(fasttax::KlOp op) const {
    const fasttax::KlKind kind =
        fasttax::kl_is_kind(op) ? fasttax::kl_kind(op) : fasttax::KlKind::kPolicyRef;
    return fasttax::kl_params<float>({int64_t(kind), beta, scale, ref_scale, cap, ref_cap,
                                      1 / temperature, 1 / ref_temperature, inf_mask});
  }
};

template <class S>
struct Row {  // one side
  std::vector<S> logp, slope;
  S lse = 0;

  Row(const std::vector<double>& raw, double scale, double cap, double temperature)
      : logp(raw.size()), slope(raw.size()) {
    S most = -INFINITY, total = 0;
    for (size_t i = 0; i < raw.size(); ++i) {
      const S t = cap > 0 ? std::tanh(S(raw[i]) * S(scale) / S(cap)) : S(0);
      logp[i] = (cap > 0 ? S(cap) * t : S(raw[i]) * S(scale)) / S(temperature);
      if (raw[i] == -INFINITY) logp[i] = cap > 0 ? S(-cap / temperature) : S(-INFINITY);
      slope[i] = S(scale / temperature) * (1 - t * t);
      most = std::max(most, logp[i]);
    }
    for (const S v : logp) total += std::exp(v - most);
    lse = most == -INFINITY &&
                  std::all_of(logp.begin(), logp.end(), [](S v) { return v == -INFINITY; })
              ? -INFINITY
              : most + std::log(total);
    for (S& v : logp) v = (v - most) - std::log(total);
  }
};

template <class S>
struct Textbook {
  S values[fasttax::kTokenStats] = {};  // one KL, or token_stats' values
  std::vector<S> dx, dy;

  Textbook(fasttax::KlOp op, std::vector<double> x, std::vector<double> y, const Options& o,
           const float* g, int64_t id)
      : dx(x.size()), dy(x.size()) {
    using fasttax::kl_op;
    using fasttax::KlKind;
    using fasttax::KlOp;
    if (o.inf_mask && op != KlOp::kAlone)
      for (size_t i = 0; i < x.size(); ++i)
        if (x[i] == -INFINITY || y[i] == -INFINITY) x[i] = y[i] = -INFINITY;
    const Row<S> p_row(x, o.scale, o.cap, o.temperature),
        q_row(y, o.ref_scale, o.ref_cap, o.ref_temperature);
    const std::vector<S>&lp = p_row.logp, &lq = q_row.logp;
    const auto times = [](S weight, S v) { return weight == 0 ? S(0) : weight * v; };
    const S beta = S(o.beta);
    const auto log_mix = [&](size_t i) {
      const S a = lp[i] + std::log1p(-beta), b = lq[i] + std::log(beta), hi = std::max(a, b),
              lo = std::min(a, b);
      return hi == -INFINITY ? hi : hi + std::log1p(std::exp(lo - hi));
    };
    S forwards = 0, backwards = 0, p_m = 0, q_m = 0, entropy = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      const S p = std::exp(lp[i]), q = std::exp(lq[i]);
      forwards += times(p, lp[i] - lq[i]);
      backwards += times(q, lq[i] - lp[i]);
      entropy -= times(p, lp[i]);
      if (op == kl_op(KlKind::kJsd))
        p_m += times(p, lp[i] - log_mix(i)), q_m += times(q, lq[i] - log_mix(i));
    }
    const bool stats = op == KlOp::kStats || op == KlOp::kAlone, pair = op != KlOp::kAlone;
    if (stats) {
      const S all[] = {id < 0 ? S(0) : lp[size_t(id)],
                       id < 0 || !pair ? S(0) : lq[size_t(id)],
                       entropy,
                       p_row.lse,
                       pair ? forwards : S(0),
                       pair ? backwards : S(0)};
      std::copy(all, all + fasttax::kTokenStats, values);
    } else {
      values[0] = op == kl_op(KlKind::kPolicyRef)   ? forwards
                  : op == kl_op(KlKind::kRefPolicy) ? backwards
                                                    : beta * q_m + (1 - beta) * p_m;
    }
    if (op == kl_op(KlKind::kRenyi)) renyi(lp, lq, S(o.beta), S(g[0]));
    for (size_t i = 0; i < x.size(); ++i) {
      const S p = std::exp(lp[i]), q = std::exp(lq[i]);
      const S f_x = times(p, (lp[i] - lq[i]) - forwards), f_y = q - p, b_x = p - q,
              b_y = times(q, (lq[i] - lp[i]) - backwards);
      if (op == kl_op(KlKind::kPolicyRef)) dx[i] = g[0] * f_x, dy[i] = g[0] * f_y;
      if (op == kl_op(KlKind::kRefPolicy)) dx[i] = g[0] * b_x, dy[i] = g[0] * b_y;
      if (op == kl_op(KlKind::kJsd))
        dx[i] = g[0] * (1 - beta) * times(p, lp[i] - log_mix(i) - p_m),
        dy[i] = g[0] * beta * times(q, lq[i] - log_mix(i) - q_m);
      if (stats) {
        const bool here = int64_t(i) == id;
        dx[i] = S(g[fasttax::kLogp]) * (here     ? -std::expm1(lp[i])
                                        : id < 0 ? S(0)
                                                 : -p) +
                S(g[fasttax::kLse]) * p - S(g[fasttax::kEntropy]) * times(p, lp[i] + entropy);
        if (pair) dx[i] += S(g[fasttax::kKlPolicyRef]) * f_x + S(g[fasttax::kKlRefPolicy]) * b_x;
        if (pair)
          dy[i] = S(g[fasttax::kRefLogp]) * (here     ? -std::expm1(lq[i])
                                             : id < 0 ? S(0)
                                                      : -q) +
                  S(g[fasttax::kKlPolicyRef]) * f_y + S(g[fasttax::kKlRefPolicy]) * b_y;
      }
      dx[i] *= p_row.slope[i];
      dy[i] *= q_row.slope[i];
    }
  }

  // log sum p^a q^(1-a) / (a - 1), and its gradients by the log-probs' rows
  void renyi(const std::vector<S>& lp, const std::vector<S>& lq, S a, S g) {
    std::vector<S> weight(lp.size());
    S most = -INFINITY, total = 0;
    for (size_t i = 0; i < lp.size(); ++i) {
      weight[i] = lp[i] == -INFINITY ? lp[i] : a * lp[i] + (1 - a) * lq[i];
      most = std::max(most, weight[i]);
    }
    for (const S v : weight) total += std::exp(v - most);
    const S all = most + std::log(total);
    values[0] = all / (a - 1);
    for (size_t i = 0; i < lp.size(); ++i) {
      const S w = std::exp(weight[i] - all);
      dx[i] = g * a / (a - 1) * (w - std::exp(lp[i]));
      dy[i] = g * (std::exp(lq[i]) - w);
    }
  }
};
