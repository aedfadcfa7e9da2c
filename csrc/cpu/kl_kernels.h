// token_kl over one row pair. Forward is one sweep over both rows (kinds of two: the second in L2),
// backward another. Both at once, the gradient's sweep reads what the forward kept (kl_kept.h).
#include "../math/double_math.h"
#include "kl_jsd.h"

#if defined(FASTTAX_ISA)  // isa.h: once per instruction set
namespace fasttax {
namespace FASTTAX_ISA_NS {

template <KlKind kind>
inline void join_lanes(const KlThree<VF>& part, KlThree<double>& total) {
  for (int i = 0; i < kLanes; ++i)
    KlFormula<kind>::template join<DoubleMath>(
        total, {double(part.value[i]), double(part.first[i]), double(part.second[i])});
}

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
  join_lanes<kind>(part, total);
}

// keep: whether every entry's p and log(m/p) are left in `weight` and `value`, in load_pair's
// order, for the policy's gradient. Else there may be the reference's as well, which needs
// KL(q||m).
template <bool keep, FrameMode mode, class T>
inline void jsd_chunk(const T* x, const T* y, int64_t n, const Frame<mode>& frame,
                      const JsdMath& jsd, float* weight, float* value, KlThree<double>& total) {
  // four lanes for each that adds: a lane's roundings grow with its terms
  KlThree<VF> parts[4] = {};
  int64_t turn = 0, at = 0;
  for_vectors(x, y, n, frame.y_filler(), [&](VF xv, VF yv) {
    const JsdEntry z = jsd.at(frame, xv, yv, !keep);
    KlThree<VF>& part = parts[turn++ % 4];
    part.value += z.value;
    part.first -= z.p * z.to_p;
    if constexpr (!keep) part.second -= z.q * z.to_q;
    if constexpr (keep) {
      VF p = z.p;
      if constexpr (mode == FrameMode::kGeneral)
        if (frame.k.cap > 0) p *= kl_bend<VectorMath>(xv, frame.k.cap);
      store(weight + at, p);
      store(value + at, z.to_p);
      at += kLanes;
    }
  });
  for (const auto& part : parts) join_lanes<KlKind::kJsd>(part, total);
}

// f(frame, x, y, start, n) for each chunk; `unit`: whether kUnit is compiled.
template <bool unit, class F>
inline void for_framed_chunks(const RowPair& rows, int64_t V, const KlParams& k, const KlRow& r,
                              F&& f) {
  with_mode<unit>(k, r, [&](auto is) {
    constexpr FrameMode mode = decltype(is)::value;
    const Frame<mode> frame(k, r);
    for_chunks<mode>(rows, k, V,
                     [&](auto* x, auto* y, int64_t start, int64_t n) { f(frame, x, y, start, n); });
  });
}

inline KlThree<double> jsd_sums(const RowPair& rows, int64_t V, const KlParams& k, const KlSums& t,
                                const KlRow& r) {
  KlThree<double> sums{};
  const JsdMath jsd(k.beta, k.beta_rest);
  const KlKept& kept = rows.kept;
  for_framed_chunks<true>(
      rows, V, k, r, [&](const auto& frame, auto* x, auto* y, int64_t start, int64_t n) {
        if (kept.weight)
          jsd_chunk<true>(x, y, n, frame, jsd, kept.weight + start, kept.value + start, sums);
        else jsd_chunk<false>(x, y, n, frame, jsd, nullptr, nullptr, sums);
      });
  // The means' weights sum to 1 but for the rounding of 1/S, which a gradient would be left with
  // where one entry has nearly all of the mass.
  sums.first /= t.s * r.inv_s;
  sums.second /= t.y * r.inv_s_ref;
  return sums;
}

template <KlKind kind>
inline double second_value(const RowPair& rows, int64_t V, const KlParams& k, const KlSums& t,
                           KlRow& r) {
  if (KlFormula<kind>::is_zero(k.beta)) return (t.s + t.y) * 0;  // 0, or NaN for a NaN row
  KlThree<double> sums = KlFormula<kind>::template none<double>();
  if constexpr (kind == KlKind::kJsd) {
    sums = jsd_sums(rows, V, k, t, r);
  } else {
    for_framed_chunks<false>(rows, V, k, r,
                             [&](const auto& frame, auto* x, auto* y, int64_t, int64_t n) {
                               second_chunk<kind>(x, y, n, frame, sums);
                             });
  }
  const KlThree<double> out = KlFormula<kind>::finish(sums, k.beta);
  const double nan = (t.s + t.y) * 0;  // of a row that has one, in whichever term
  r.mean_gap = float(out.first + nan);
  r.ref_center = float(out.second + nan);
  return out.value + nan;
}

struct RowValue {
  float kl;
  double mean_gap;  // E_p[d] in the row's frame, as the row keeps it but not rounded
};

template <KlKind kind>
inline RowValue kl_row_forward(RowPair& rows, int64_t V, const KlParams& k, KlRow& r) {
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
  return {value < 0 ? 0.0f : float(value), v.gap};  // NaN passes through
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

template <FrameMode mode, Sides sides>
struct KlSlope<mode, KlKind::kJsd, sides> {
  Frame<mode> frame;
  JsdMath jsd;
  float gx, gy;

  // At beta 0 and 1 the divergence is 0, whatever mixture is taken.
  KlSlope(const KlParams& k, const KlRow& row, float upstream)
      : frame(k, row), jsd(is_zero(k) ? 0.5f : k.beta, is_zero(k) ? 0.5f : k.beta_rest) {
    if (is_zero(k)) upstream = 0;
    gx = -upstream * k.beta_rest * k.row_slope;
    gy = -upstream * k.beta * k.ref_row_slope;
  }
  static bool is_zero(const KlParams& k) { return KlFormula<KlKind::kJsd>::is_zero(k.beta); }

  __attribute__((always_inline)) inline KlSides<VF> operator()(VF xv, VF yv) const {
    const JsdEntry z = jsd.at(frame, xv, yv, sides == kBothSides);
    KlSides<VF> weight{z.p, z.q};  // as jsd_chunk leaves it
    if constexpr (mode == FrameMode::kGeneral) kl_uncap<VectorMath>(weight, xv, yv, frame.k);
    KlSides<VF> out{weight.x * (z.to_p + frame.r.mean_gap) * gx, {}};
    if (sides == kBothSides) out.y = weight.y * (z.to_q + frame.r.ref_center) * gy;
    return out;
  }
};

// A chunk of the policy's gradient out of what the forward kept, weight * (value + off) * scale.
template <class T>
inline void write_kept(const float* weight, const float* value, int64_t n, float off, float scale,
                       T* dx) {
  const auto at = [&](int64_t i) { return times(load(weight + i), load(value + i) + off) * scale; };
  constexpr int64_t kTwo = 2 * kLanes;
  const int64_t whole = n / kTwo * kTwo;
  for (int64_t i = whole; i < n; i += kLanes)
    store(dx + i, at(i), std::min<int64_t>(kLanes, n - i));
  for (int64_t i = whole - kTwo; i >= 0; i -= kTwo) store_pair(dx + i, at(i), at(i + kLanes));
}

template <KlKind kind, class T>
inline void kept_gradient(const KlKept& kept, int64_t V, const KlParams& k, const KlRow& r,
                          double mean_gap, float upstream, T* dx) {
  // of a row of NaN, where a weight is 0, too
  const float gx = std::isnan(r.mean_gap) ? r.mean_gap : upstream * k.row_slope;
  if constexpr (kind == KlKind::kJsd)
    return write_kept(kept.weight, kept.value, V, r.mean_gap, -gx * k.beta_rest, dx);
  for (int64_t start = (V - 1) / kChunk * kChunk; start >= 0; start -= kChunk) {
    // From the chunk's frame to the row's; a chunk without mass was in none. In double, so that the
    // log-ratio of a token that has all of the mass is its mean to the bit.
    const KlRow& own = kept.frames[start / kChunk];
    const double down_x = (double(own.mx) - double(r.mx)) * k.row_scale,
                 down_y = (double(own.my) - double(r.my)) * k.ref_row_scale;
    const float off = float(down_x - down_y - mean_gap),
                scale = float(std::exp(std::min(down_x, 0.0))) * r.inv_s * gx;
    write_kept(kept.weight + start, kept.value + start, std::min(kChunk, V - start), off, scale,
               dx + start);
  }
}

template <KlKind kind>
inline void kl_row_backward(const RowPair& rows, int64_t V, const KlParams& k, const KlRow& r,
                            float g, void* dx, void* dy) {
  const auto write = [&](auto sides_are, auto mode_is) {
    constexpr Sides sides = decltype(sides_are)::value;
    constexpr FrameMode mode = decltype(mode_is)::value;
    write_gradients<mode, sides>(rows, V, k, dx, dy, KlSlope<mode, kind, sides>(k, r, g));
  };
  constexpr auto both = std::integral_constant<Sides, kBothSides>();
  // Renyi's powers cost more than a side or a frame of their own would save.
  if constexpr (kind == KlKind::kRenyi)
    return with_mode<false>(k, r, [&](auto mode) { write(both, mode); });
  if (dy) return with_mode<false>(k, r, [&](auto mode) { write(both, mode); });
  with_mode<true>(k, r,
                  [&](auto mode) { write(std::integral_constant<Sides, kPolicyOnly>(), mode); });
}

inline float kl_forward(FloatType type, const void* x, const void* y, int64_t V, const KlParams& k,
                        const KlKept& kept, KlRow& r) {
  RowPair rows(type, x, y, k, kept);
  return with_kind(
      k.kind, [&](auto kind) { return kl_row_forward<decltype(kind)::value>(rows, V, k, r).kl; });
}

inline void kl_backward(FloatType type, const void* x, const void* y, int64_t V, const KlParams& k,
                        const KlRow& r, float g, void* dx, void* dy) {
  if (!dx && !dy) return;
  const RowPair rows(type, x, y, k);
  with_kind(k.kind,
            [&](auto kind) { kl_row_backward<decltype(kind)::value>(rows, V, k, r, g, dx, dy); });
}

// Both at once, for a token whose weight g is known.
inline float kl_gradient(FloatType type, const void* x, const void* y, int64_t V, const KlParams& k,
                         const KlKept& kept, float g, void* dx, void* dy) {
  RowPair rows(type, x, y, k, kept);
  KlRow r;
  return with_kind(k.kind, [&](auto kind_is) {
    constexpr KlKind kind = decltype(kind_is)::value;
    const RowValue value = kl_row_forward<kind>(rows, V, k, r);
    if constexpr (kind == KlKind::kJsd || kind == KlKind::kPolicyRef) {
      if (kept.weight && !(kind == KlKind::kJsd && KlFormula<KlKind::kJsd>::is_zero(k.beta))) {
        typed(type, dx, [&](auto* unused) {
          using T = std::remove_const_t<std::remove_pointer_t<decltype(unused)>>;
          kept_gradient<kind>(kept, V, k, r, value.mean_gap, g, static_cast<T*>(dx));
        });
        return value.kl;
      }
    }
    if (dx || dy) kl_row_backward<kind>(rows, V, k, r, g, dx, dy);
    return value.kl;
  });
}

}  // namespace FASTTAX_ISA_NS
}  // namespace fasttax
#endif
