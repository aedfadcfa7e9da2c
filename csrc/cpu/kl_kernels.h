// token_kl over one row pair. Forward is one sweep over both rows (kinds of two: the second in L2),
// backward another.
#include "kl_sweep.h"

#if defined(FASTTAX_ISA)  // isa.h: once per instruction set
namespace fasttax {
namespace FASTTAX_ISA_NS {

// The second sweep's sums: an entry's terms are the kind's.
template <KlKind kind, FrameMode mode, class T>
inline KlThree<double> second_sweep(const T* x, const T* y, int64_t V, const KlParams& k,
                                    const KlRow& r) {
  const Frame<mode> frame(k, r);
  const float beta = k.beta;
  KlThree<double> total{};
  for (int64_t start = 0; start < V; start += kChunk) {
    KlThree<VF> part{};
    for_vectors(x, y, start, std::min(V, start + kChunk), [&](VF xv, VF yv, int64_t, int64_t n) {
      VF ax, d;
      frame(xv, yv, ax, d, n);
      const VF p = exp(ax) * r.inv_s, q = exp(frame.ay(xv, yv, n)) * r.inv_s_ref;
      const KlThree<VF> terms =
          KlFormula<kind>::template terms<VectorMath>(p, q, d - r.log_ratio, beta);
      part.value += terms.value;
      part.first += terms.first;
      part.second += terms.second;
    });
    total.value += sum(part.value);
    total.first += sum(part.first);
    total.second += sum(part.second);
  }
  return total;
}

template <KlKind kind, class T>
inline double second_value(const T* x, const T* y, int64_t V, const KlParams& k, const Sums& t,
                           KlRow& r) {
  if (KlFormula<kind>::is_zero(k.beta)) return (t.s + t.y) * 0;  // 0, or NaN for a NaN row
  KlThree<double> sums;
  with_mode<false>(k.plain, k, r, [&](auto mode) {
    sums = second_sweep<kind, decltype(mode)::value>(x, y, V, k, r);
  });
  const KlThree<double> out = KlFormula<kind>::finish(sums, k.beta);
  r.mean_gap = float(out.first);
  r.ref_center = float(out.second);
  return out.value;
}

template <KlKind kind, class T>
inline float kl_row_forward(const T* x, const T* y, int64_t V, const KlParams& k, KlRow& r) {
  constexpr int want = kl_wants(kind);
  constexpr bool two_sweeps = kl_two_sweeps(kind);
  primed_maxima(x, y, V, k, r);
  bool careful = false, exact_frame = false;
  Sums t = sweep_row<want>(x, y, V, k, r, careful);
  double value = 0;
  for (;;) {
    if (t.top > kFrameSlack && !exact_frame) {
      exact_frame = true;
      maxima(x, y, V, k, r);
      t = sweep_row<want>(x, y, V, k, r, careful);
      continue;
    }
    const Divergence v = divergence(t, want != kWantRefPolicy);
    value = v.value;
    r.log_ratio = float(v.log_ratio);
    r.mean_gap = float(v.gap);
    if (!careful && (two_sweeps ? !(t.s > 0 && t.y > 0) : !t.trusted(value))) {
      careful = true;
      t = sweep_row<want>(x, y, V, k, r, careful);
      continue;
    }
    if (two_sweeps || r.shift != 0 || !v.recentre()) break;
    r.shift = float(v.gap);
    t = sweep_row<want>(x, y, V, k, r, careful);
  }
  r.inv_s = float(1 / t.s);
  r.inv_s_ref = float(1 / t.y);
  r.ref_center = 0;
  if constexpr (two_sweeps) value = second_value<kind>(x, y, V, k, t, r);
  return value < 0 ? 0.0f : float(value);  // NaN passes through
}

// The gradient at one vector.
template <FrameMode mode, KlKind kind, Sides sides>
struct KlSlope {
  Frame<mode> frame;
  float gx, gy;
  bool close;

  KlSlope(const KlParams& k, const KlRow& row, float upstream)
      : frame(k, row),
        gx(upstream * k.row_slope),
        gy(upstream * k.ref_row_slope),
        close(kl_close(row)) {}

  __attribute__((always_inline)) inline KlSides<VF> operator()(VF xv, VF yv, int64_t n) const {
    const KlRow& r = frame.r;
    VF ax, d;
    frame(xv, yv, ax, d, n);
    const VF p = exp_flushed(ax) * r.inv_s;
    const auto q_of = [&] { return exp_flushed(frame.ay(xv, yv, n)) * r.inv_s_ref; };
    KlSides<VF> out =
        kl_slope<kind, VectorMath, sides == kBothSides>(p, d, close, q_of, r, frame.k.beta);
    out.x *= gx;
    out.y *= gy;
    if constexpr (mode == FrameMode::kGeneral) kl_to_raw<VectorMath>(out, xv, yv, frame.k);
    return out;
  }
};

template <KlKind kind, class T>
inline void kl_row_backward(const T* x, const T* y, int64_t V, const KlParams& k, const KlRow& r,
                            float g, T* dx, T* dy) {
  constexpr bool two_sweeps = kl_two_sweeps(kind);
  // Logarithms are what two sweeps' kinds cost: neither kUnit nor one side alone is worth its code.
  const auto write = [&](auto sides, auto mode) {
    const KlSlope<decltype(mode)::value, kind, decltype(sides)::value> slope(k, r, g);
    write_gradients<decltype(sides)::value>(x, y, V, dx, dy, slope);
  };
  with_sides(dy, [&](auto sides) {
    constexpr bool unit = !two_sweeps && decltype(sides)::value == kPolicyOnly;
    with_mode<unit>(k.plain, k, r, [&](auto mode) { write(sides, mode); });
  });
}

inline float kl_forward(FloatType type, const void* x, const void* y, int64_t V, const KlParams& k,
                        KlRow& r) {
  float value = 0;
  typed(type, x, [&](auto* row) {
    using T = std::remove_pointer_t<decltype(row)>;
    value = with_kind(k.kind, [&](auto kind) {
      return kl_row_forward<decltype(kind)::value>(row, static_cast<const T*>(y), V, k, r);
    });
  });
  return value;
}

inline void kl_backward(FloatType type, const void* x, const void* y, int64_t V, const KlParams& k,
                        const KlRow& r, float g, void* dx, void* dy) {
  if (!dx && !dy) return;
  typed(type, x, [&](auto* row) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(row)>>;
    with_kind(k.kind, [&](auto kind) {
      kl_row_backward<decltype(kind)::value>(row, static_cast<const T*>(y), V, k, r, g,
                                             static_cast<T*>(dx), static_cast<T*>(dy));
    });
  });
}

}  // namespace FASTTAX_ISA_NS
}  // namespace fasttax
#endif
