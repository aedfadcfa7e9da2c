// token_kl over one row pair. Forward is one sweep over both rows (kinds of two: the second in L2),
// backward another.
#include "../math/double_math.h"
#include "kl_sweep.h"

#if defined(FASTTAX_ISA)  // isa.h: once per instruction set
namespace fasttax {
namespace FASTTAX_ISA_NS {

// The second sweep's sums: an entry's terms are the kind's.
template <KlKind kind, FrameMode mode, class T>
inline void second_chunk(const T* x, const T* y, int64_t n, const Frame<mode>& frame,
                         KlThree<double>& total) {
  using F = KlFormula<kind>;
  const KlRow& r = frame.r;
  const KlLogs<float> logs(r);
  KlThree<VF> part = F::template none<VF>();
  for_vectors(x, y, n, frame.y_filler(), [&](VF xv, VF yv) {
    VF ax, d;
    frame(xv, yv, ax, d);
    const VF ay = frame.ay(xv, yv);
    const KlEntry<VF> entry{exp(ax) * r.inv_s, exp(ay) * r.inv_s_ref, d - r.log_ratio, ax + logs.x,
                            ay + logs.y};
    F::template join<VectorMath>(part, F::template terms<VectorMath>(entry, frame.k.beta));
  });
  for (int i = 0; i < kLanes; ++i)
    F::template join<DoubleMath>(
        total, {double(part.value[i]), double(part.first[i]), double(part.second[i])});
}

template <KlKind kind>
inline double second_value(const RowPair& rows, int64_t V, const KlParams& k, const KlSums& t,
                           KlRow& r) {
  if (KlFormula<kind>::is_zero(k.beta)) return (t.s + t.y) * 0;  // 0, or NaN for a NaN row
  KlThree<double> sums = KlFormula<kind>::template none<double>();
  with_mode<false>(k, r, [&](auto is) {
    constexpr FrameMode mode = decltype(is)::value;
    const Frame<mode> frame(k, r);
    for_chunks<mode>(rows, k, V, [&](auto* x, auto* y, int64_t n) {
      second_chunk<kind, mode>(x, y, n, frame, sums);
    });
  });
  const KlThree<double> out = KlFormula<kind>::finish(sums, k.beta);
  r.mean_gap = float(out.first);
  r.ref_center = float(out.second);
  return out.value;
}

template <KlKind kind>
inline float kl_row_forward(const RowPair& rows, int64_t V, const KlParams& k, KlRow& r) {
  constexpr int want = kl_wants(kind);
  bool careful = false;
  if constexpr (kl_two_sweeps(kind)) careful = KlFormula<kind>::kCareful;
  const KlSums t = sweep_row<want>(rows, V, k, r, careful);
  const Divergence v = divergence(t, want != kWantRefPolicy);
  double value = v.value;
  r.log_ratio = float(v.log_ratio);
  r.mean_gap = float(v.gap);
  r.inv_s = float(1 / t.s);
  r.inv_s_ref = float(1 / t.y);
  r.ref_center = 0;
  if constexpr (kl_two_sweeps(kind)) value = second_value<kind>(rows, V, k, t, r);
  return value < 0 ? 0.0f : float(value);  // NaN passes through
}

// The gradient at one vector.
template <FrameMode mode, KlKind kind, Sides sides>
struct KlSlope {
  Frame<mode> frame;
  KlLogs<float> logs;
  float gx, gy;
  bool close;

  KlSlope(const KlParams& k, const KlRow& row, float upstream)
      : frame(k, row),
        logs(row),
        gx(upstream * k.row_slope),
        gy(upstream * k.ref_row_slope),
        close(kl_close(row)) {}

  __attribute__((always_inline)) inline KlSides<VF> operator()(VF xv, VF yv) const {
    const KlRow& r = frame.r;
    VF ax, d;
    frame(xv, yv, ax, d);
    // the cheaper exponential's error is 1.4e-8 |ax| more: a part of a gradient by one sweep, but
    // not of one where p and q meet a third exponential
    const auto e_to = [](VF z) { return kl_two_sweeps(kind) ? exp(z) : exp_flushed(z); };
    const VF p = e_to(ax) * r.inv_s;
    const auto q_of = [&] { return e_to(frame.ay(xv, yv)) * r.inv_s_ref; };
    const auto logs_of = [&] { return KlSides<VF>{ax + logs.x, frame.ay(xv, yv) + logs.y}; };
    KlSides<VF> out = kl_slope<kind, VectorMath, sides == kBothSides>(p, d, close, q_of, logs_of, r,
                                                                      frame.k.beta);
    out.x *= gx;
    out.y *= gy;
    if constexpr (mode == FrameMode::kGeneral) kl_uncap<VectorMath>(out, xv, yv, frame.k);
    return out;
  }
};

template <KlKind kind>
inline void kl_row_backward(const RowPair& rows, int64_t V, const KlParams& k, const KlRow& r,
                            float g, void* dx, void* dy) {
  const auto write = [&](auto sides_are, auto mode_is) {
    constexpr Sides sides = decltype(sides_are)::value;
    constexpr FrameMode mode = decltype(mode_is)::value;
    write_gradients<mode, sides>(rows, V, k, dx, dy, KlSlope<mode, kind, sides>(k, r, g));
  };
  constexpr auto both = std::integral_constant<Sides, kBothSides>();
  // A logarithm is what two sweeps' kinds cost: neither kUnit nor one side alone is worth its code.
  if constexpr (kl_two_sweeps(kind)) {
    with_mode<false>(k, r, [&](auto mode) { write(both, mode); });
  } else {
    if (dy) return with_mode<false>(k, r, [&](auto mode) { write(both, mode); });
    with_mode<true>(k, r,
                    [&](auto mode) { write(std::integral_constant<Sides, kPolicyOnly>(), mode); });
  }
}

inline float kl_forward(FloatType type, const void* x, const void* y, int64_t V, const KlParams& k,
                        KlRow& r) {
  const RowPair rows(type, x, y, k);
  return with_kind(k.kind,
                   [&](auto kind) { return kl_row_forward<decltype(kind)::value>(rows, V, k, r); });
}

inline void kl_backward(FloatType type, const void* x, const void* y, int64_t V, const KlParams& k,
                        const KlRow& r, float g, void* dx, void* dy) {
  if (!dx && !dy) return;
  const RowPair rows(type, x, y, k);
  with_kind(k.kind,
            [&](auto kind) { kl_row_backward<decltype(kind)::value>(rows, V, k, r, g, dx, dy); });
}

}  // namespace FASTTAX_ISA_NS
}  // namespace fasttax
#endif
