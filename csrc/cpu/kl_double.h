#pragma once

// The float64 path: the same formulas, scalar, two passes. It is there for gradcheck and for those
// who ask.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "../math/kl.h"

namespace fasttax {

struct DoubleParams {
  int64_t kind;
  bool inf_mask;
  double beta, scale, ref_scale, cap, ref_cap, inv_t, ref_inv_t;
};

struct DoublePair {
  double x, y, slope_x, slope_y;  // tempered logits and their derivatives by the raw ones

  DoublePair(double raw_x, double raw_y, const DoubleParams& k) {
    auto transform = [](double raw, double scale, double cap, double inv_t, double& slope) {
      const double t = cap > 0 ? std::tanh(raw * scale / cap) : 0;
      slope = scale * inv_t * (1 - t * t);
      return (cap > 0 ? cap * t : raw * scale) * inv_t;
    };
    x = transform(raw_x, k.scale, k.cap, k.inv_t, slope_x);
    y = transform(raw_y, k.ref_scale, k.ref_cap, k.ref_inv_t, slope_y);
    constexpr double inf = std::numeric_limits<double>::infinity();
    if (k.inf_mask && (raw_x == -inf || raw_y == -inf)) x = y = -inf;
  }
};

inline double weighted(double weight, double value) { return weight == 0 ? 0.0 : weight * value; }

// log(m/p) for the mixture m = (1-beta) p + beta q, u = log p - log q
inline double log_mix_double(double u, double beta) {
  const double e = std::exp(-std::fabs(u));
  return u < 0 ? std::log(beta + (1 - beta) * e) - u : std::log1p((e - 1) * beta);
}

// entries summed apart before they join the row's sums: the rounding grows with V / 64 + 64, not V
constexpr int64_t kDoubleFold = 64;

struct DoubleSums {
  double S, Y, G, A, B, C, D;

  void operator+=(const DoubleSums& part) {
    S += part.S;
    Y += part.Y;
    G += part.G;
    A += part.A;
    B += part.B;
    C += part.C;
    D += part.D;
  }
};

// kept: mx, my, S, log_ratio, KL or KL(p||m), KL(q||m), S + G
inline double kl_double_forward(const double* x, const double* y, int64_t V, const DoubleParams& k,
                                double* kept) {
  double mx = -std::numeric_limits<double>::infinity(), my = mx;
  for (int64_t i = 0; i < V; ++i) {
    const DoublePair z(x[i], y[i], k);
    mx = std::max(mx, z.x);
    my = std::max(my, z.y);
  }
  DoubleSums sums{};
  for (int64_t begin = 0; begin < V; begin += kDoubleFold) {
    DoubleSums part{};
    for (int64_t i = begin, end = std::min(V, begin + kDoubleFold); i < end; ++i) {
      const DoublePair z(x[i], y[i], k);
      const double ex = std::exp(z.x - mx), ey = std::exp(z.y - my), d = (z.x - z.y) - (mx - my);
      const bool near = std::fabs(d) <= 1;
      const double change = near ? ex * std::expm1(-d) : ey - ex;
      part.S += ex;
      part.Y += ey;
      part.G += change;
      part.A += weighted(ex, d);
      part.D += weighted(ey, d);
      part.B += near ? ex * kl_bregman(d) : change + weighted(ex, d);
      part.C += near ? ey * kl_bregman(-d) : -change - weighted(ey, d);
    }
    sums += part;
  }
  const auto [S, Y, G, A, B, C, D] = sums;
  const double tau = G / S;
  const bool centred = std::fabs(tau) <= 0.5, zero = k.kind == 2 && (k.beta == 0 || k.beta == 1);
  const double log_ratio = centred ? -std::log1p(tau) : std::log(S / Y);
  double value = (S + Y) * 0;
  if (k.kind == 0) value = centred ? B / S - kl_defect(tau) : A / S - log_ratio;
  if (k.kind == 1) value = centred ? C / Y - kl_defect(-G / Y) : log_ratio - D / Y;
  double center = value, ref_center = 0;
  if (k.kind == 2 && !zero) {
    value = center = ref_center = 0;
    for (int64_t begin = 0; begin < V; begin += kDoubleFold) {
      double part = 0, p_sum = 0, q_sum = 0;
      for (int64_t i = begin, end = std::min(V, begin + kDoubleFold); i < end; ++i) {
        const DoublePair z(x[i], y[i], k);
        const double p = std::exp(z.x - mx) / S, q = std::exp(z.y - my) / Y,
                     u = (z.x - z.y) - (mx - my) - log_ratio;
        const double eps = std::expm1(-u), l = log_mix_double(u, k.beta);
        const double p_part = weighted(p, -l),
                     q_part = weighted(q, p == 0 ? -std::log(k.beta) : -u - l);
        part += std::fabs(u) <= 1 ? p * (k.beta * jsd_g(eps) - jsd_g(k.beta * eps))
                                  : k.beta * q_part + (1 - k.beta) * p_part;
        p_sum += p_part;
        q_sum += q_part;
      }
      value += part;
      center += p_sum;
      ref_center += q_sum;
    }
  }
  const double row[8] = {mx, my, S, log_ratio, center, ref_center, Y, 0};
  std::copy(row, row + 8, kept);
  return value < 0 ? 0.0 : value;
}

inline void kl_double_backward(const double* x, const double* y, int64_t V, const DoubleParams& k,
                               const double* kept, double upstream, double* dx, double* dy) {
  const double mx = kept[0], my = kept[1], S = kept[2], log_ratio = kept[3], center = kept[4],
               ref_center = kept[5], Sy = kept[6];
  const bool zero = k.kind == 2 && (k.beta == 0 || k.beta == 1);
  for (int64_t i = 0; i < V; ++i) {
    const DoublePair z(x[i], y[i], k);
    const double p = std::exp(z.x - mx) / S, q = std::exp(z.y - my) / Sy,
                 u = (z.x - z.y) - (mx - my) - log_ratio;
    const double p_minus_q = std::fabs(u) <= 1 ? -p * std::expm1(-u) : p - q;
    double for_x, for_y;
    if (k.kind == 0) {
      for_x = weighted(p, u - center);
      for_y = -p_minus_q;
    } else if (k.kind == 1) {
      for_x = p_minus_q;
      for_y = weighted(q, -u - center);
    } else if (zero) {
      for_x = p * 0;
      for_y = q * 0;
    } else {
      const double l = log_mix_double(u, k.beta);
      for_x = (1 - k.beta) * weighted(p, -l - center);
      for_y = k.beta * weighted(q, (p == 0 ? -std::log(k.beta) : -u - l) - ref_center);
    }
    if (dx) dx[i] = upstream * weighted(for_x, z.slope_x);
    if (dy) dy[i] = upstream * weighted(for_y, z.slope_y);
  }
}

}  // namespace fasttax
