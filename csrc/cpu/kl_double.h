#pragma once

// The float64 path: the same formulas, scalar. It is there for gradcheck and for those who ask.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "../math/double_math.h"
#include "../math/kl_frame.h"
#include "../math/kl_row.h"
#include "../math/kl_slope.h"

namespace fasttax {

using DoubleParams = KlParamsOf<double>;
using DoubleRow = KlRowOf<double>;

struct DoubleFrame : KlFrame<DoubleMath> {
  using KlFrame::KlFrame;

  struct Entry {
    double x, y;  // capped
    double ax, ay, d;
  };
  Entry operator()(double x, double y) const {
    Entry z{x, y, 0, 0, 0};
    if (k.plain) {
      place<FrameMode::kShared>(z.x, z.y, z.ax, z.d);
    } else {
      cap(z.x, z.y);
      place<FrameMode::kGeneral>(z.x, z.y, z.ax, z.d);
    }
    z.ay = ay<FrameMode::kGeneral>(z.x, z.y);
    return z;
  }
};

// Entries summed apart before they join the row's sums: the rounding grows with V / 64 + 64, not V.
constexpr int64_t kDoubleFold = 64;

// f(begin, end) for each run of entries that is summed apart.
template <class F>
inline void for_folds(int64_t V, F&& f) {
  for (int64_t begin = 0; begin < V; begin += kDoubleFold)
    f(begin, std::min(V, begin + kDoubleFold));
}

// The frame of a row pair, by its maxima.
inline DoubleRow double_frame(const double* x, const double* y, int64_t V, const DoubleParams& k) {
  DoubleRow row{};
  row.mx = row.my = -std::numeric_limits<double>::infinity();
  const DoubleFrame frame(k, row);
  for (int64_t i = 0; i < V; ++i) {
    double a = x[i], b = y[i];
    frame.cap(a, b);
    row.mx = std::max(row.mx, a);
    row.my = std::max(row.my, kl_capped_y(a, b, k));
  }
  return row;
}

template <int want>
inline KlSums double_sums(const double* x, const double* y, int64_t V, const DoubleFrame& frame) {
  KlSums total;
  for_folds(V, [&](int64_t begin, int64_t end) {
    KlMixed<DoubleMath, want> part;
    double moment = 0;
    for (int64_t i = begin; i < end; ++i) {
      const auto z = frame(x[i], y[i]);
      const double ex = std::exp(z.ax);
      part.add(ex, std::exp(z.ay), z.d);
      if ((want & kWantEntropy) != 0) moment += times(ex, z.ax);
    }
    total += part;
    total.moment += moment;
  });
  total.mass = total.s;
  return total;
}

template <KlKind kind>
inline double double_second_sweep(const double* x, const double* y, int64_t V,
                                  const DoubleParams& k, DoubleRow& row) {
  using F = KlFormula<kind>;
  const DoubleFrame frame(k, row);
  const KlLogs<double> logs(row);
  KlThree<double> sums = F::template none<double>();
  for_folds(V, [&](int64_t begin, int64_t end) {
    KlThree<double> part = F::template none<double>();
    for (int64_t i = begin; i < end; ++i) {
      const auto z = frame(x[i], y[i]);
      const KlEntry<double> entry{std::exp(z.ax) * row.inv_s, std::exp(z.ay) * row.inv_s_ref,
                                  z.d - row.log_ratio, z.ax + logs.x, z.ay + logs.y};
      F::template join<DoubleMath>(part, F::template terms<DoubleMath>(entry, k.beta));
    }
    F::template join<DoubleMath>(sums, part);
  });
  const KlThree<double> out = KlFormula<kind>::finish(sums, k.beta);
  row.mean_gap = out.first;
  row.ref_center = out.second;
  return out.value;
}

inline double kl_double_forward(const double* x, const double* y, int64_t V, const DoubleParams& k,
                                DoubleRow& row) {
  row = double_frame(x, y, V, k);
  const double value = with_kind(k.kind, [&](auto kind_is) -> double {
    constexpr KlKind kind = decltype(kind_is)::value;
    constexpr int want = kl_wants(kind);
    const KlSums t = double_sums<want>(x, y, V, DoubleFrame(k, row));
    const Divergence v = divergence(t, want != kWantRefPolicy);
    row.log_ratio = v.log_ratio;
    row.mean_gap = v.gap;
    row.inv_s = 1 / t.s;
    row.inv_s_ref = 1 / t.y;
    if constexpr (!kl_two_sweeps(kind)) return v.value;
    else if (KlFormula<kind>::is_zero(k.beta)) return (t.s + t.y) * 0;
    else return double_second_sweep<kind>(x, y, V, k, row);
  });
  return value < 0 ? 0.0 : value;  // NaN passes through
}

inline void kl_double_backward(const double* x, const double* y, int64_t V, const DoubleParams& k,
                               const DoubleRow& row, double upstream, double* dx, double* dy) {
  const DoubleFrame frame(k, row);
  const KlLogs<double> logs(row);
  const bool close = kl_close(row);
  with_kind(k.kind, [&](auto kind) {
    for (int64_t i = 0; i < V; ++i) {
      const auto z = frame(x[i], y[i]);
      const auto q_of = [&] { return std::exp(z.ay) * row.inv_s_ref; };
      const auto logs_of = [&] { return KlSides<double>{z.ax + logs.x, z.ay + logs.y}; };
      auto d = kl_slope<decltype(kind)::value, DoubleMath, true>(std::exp(z.ax) * row.inv_s, z.d,
                                                                 close, q_of, logs_of, row, k.beta);
      d.x *= upstream * k.row_slope;
      d.y *= upstream * k.ref_row_slope;
      kl_uncap<DoubleMath>(d, z.x, z.y, k);
      if (dx) dx[i] = d.x;
      if (dy) dy[i] = d.y;
    }
  });
}

}  // namespace fasttax
