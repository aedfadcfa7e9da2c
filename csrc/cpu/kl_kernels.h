// token_kl over one row pair. Forward is one sweep over both rows (jsd: two, the second in L2),
// backward another.
#include "kl_sweep.h"

#if defined(FASTTAX_ISA)  // isa.h: once per instruction set
namespace fasttax {
namespace FASTTAX_ISA_NS {

// log(m/p) with m = (1-beta) p + beta q and u = log p - log q, and eps = q/p - 1, without overflow
// on either side.
inline VF log_mix(VF u, float beta) {
  const VF e = exp(-abs(u));
  const VF inner = (u < 0.0f) ? log(splat(beta) + (1.0f - beta) * e) : log1p((e - 1.0f) * beta);
  return (u < 0.0f) ? inner - u : inner;
}

// the mixture is one of the two
inline bool jsd_is_zero(const KlParams& k) { return k.beta == 0 || k.beta == 1; }

struct Mix {
  double gap = 0, p_to_m = 0, q_to_m = 0;
};

template <FrameMode mode, class T>
inline Mix jsd_sweep(const T* x, const T* y, int64_t V, const KlParams& k, const KlRow& r) {
  const Frame<mode> frame(k, r);
  const float beta = k.beta;
  Mix total;
  for (int64_t start = 0; start < V; start += kChunk) {
    VF gap{}, pm{}, qm{};
    for_vectors(x, y, start, std::min(V, start + kChunk), [&](VF xv, VF yv, int64_t, int64_t n) {
      VF ax, d;
      frame(xv, yv, ax, d, n);
      const VF p = exp(ax) * r.inv_s, q = exp(frame.ay(xv, yv, n)) * r.inv_s_ref,
               u = d - r.log_ratio;
      const VI near = abs(u) <= 0.2f;
      const VF eps = kl_bregman_small(u) - u;  // e^-u - 1
      const VF l = log_mix(u, beta);
      // p where q is 0 (u = inf): l = log(1-beta).  q where p is 0 (u = -inf): log(m/q) = log(beta)
      const VF p_part = where_zero(p, -p * l);
      const VF q_part = where_zero(q, (p == 0.0f) ? q * -std::log(beta) : q * (-u - l));
      gap += near ? p * (beta * jsd_g_small(eps) - jsd_g_small(beta * eps))
                  : beta * q_part + (1.0f - beta) * p_part;
      pm += p_part;
      qm += q_part;
    });
    total.gap += sum(gap);
    total.p_to_m += sum(pm);
    total.q_to_m += sum(qm);
  }
  return total;
}

template <KlKind kind, class T>
inline float kl_row_forward(const T* x, const T* y, int64_t V, const KlParams& k, KlRow& r) {
  constexpr int want = kind == KlKind::kPolicyRef   ? kWantPolicyRef
                       : kind == KlKind::kRefPolicy ? kWantRefPolicy
                                                    : 0;
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
    const Divergence v = divergence(t, kind != KlKind::kRefPolicy);
    value = v.value;
    r.log_ratio = float(v.log_ratio);
    r.mean_gap = float(v.gap);
    if (!careful && (kind == KlKind::kJsd ? !(t.s > 0 && t.y > 0) : !t.trusted(value))) {
      careful = true;
      t = sweep_row<want>(x, y, V, k, r, careful);
      continue;
    }
    if (kind == KlKind::kJsd || r.shift != 0 || !v.recentre()) break;
    r.shift = float(v.gap);
    t = sweep_row<want>(x, y, V, k, r, careful);
  }
  r.inv_s = float(1 / t.s);
  r.inv_s_ref = float(1 / t.y);
  r.ref_center = 0;
  if (kind == KlKind::kJsd && jsd_is_zero(k)) value = (t.s + t.y) * 0;  // 0, or NaN for a NaN row
  if (kind == KlKind::kJsd && !jsd_is_zero(k)) {
    const Mix mix = k.plain ? jsd_sweep<FrameMode::kShared>(x, y, V, k, r)
                            : jsd_sweep<FrameMode::kGeneral>(x, y, V, k, r);
    value = mix.gap;
    r.mean_gap = float(mix.p_to_m);
    r.ref_center = float(mix.q_to_m);
  }
  return value < 0 ? 0.0f : float(value);  // NaN passes through
}

// The gradient at one vector. What it reads of the row are members, which stores to a gradient of
// floats can't alias.
template <FrameMode mode, KlKind kind, int kSides>
struct KlSlope {
  const KlParams k;
  const KlRow r;
  const Frame<mode> frame;
  const Difference<mode> difference;
  const float gx, gy;

  KlSlope(const KlParams& params, const KlRow& row, float upstream)
      : k(params),
        r(row),
        frame(params, row),
        difference(params, row, std::fabs(row.mean_gap - row.log_ratio)),
        gx(upstream * params.row_slope),
        gy(upstream * params.ref_row_slope) {}

  __attribute__((always_inline)) inline void operator()(VF xv, VF yv, int64_t n, VF& for_x,
                                                        VF& for_y) const {
    VF ax, d;
    frame(xv, yv, ax, d, n);
    const VF p = exp_flushed(ax) * r.inv_s;
    for_x = for_y = VF{};
    if (kind == KlKind::kPolicyRef && (kSides & 1)) for_x = where_zero(p, p * (d - r.mean_gap));
    if (kind == KlKind::kRefPolicy || (kind == KlKind::kPolicyRef && (kSides & 2))) {
      constexpr bool want_q = kind == KlKind::kRefPolicy && (kSides & 2);
      VF q{};
      const VF p_minus_q = difference(xv, yv, n, p, d, want_q, q);
      if (kind == KlKind::kPolicyRef) for_y = -p_minus_q;
      if (kind == KlKind::kRefPolicy) for_x = p_minus_q;
      if (want_q) for_y = where_zero(q, q * (r.mean_gap - d));
    }
    if (kind == KlKind::kJsd) {
      const VF q = exp(frame.ay(xv, yv, n)) * r.inv_s_ref, u = d - r.log_ratio;
      if (jsd_is_zero(k)) {
        for_x = p * 0.0f;
        for_y = q * 0.0f;
      } else {
        const VF l = log_mix(u, k.beta);
        for_x = where_zero(p, (1.0f - k.beta) * p * (-l - r.mean_gap));
        for_y = where_zero(
            q, k.beta * q * (((p == 0.0f) ? splat(-std::log(k.beta)) : -u - l) - r.ref_center));
      }
    }
    for_x *= gx;
    for_y *= gy;
    if (mode == FrameMode::kGeneral && k.cap > 0) for_x *= bend(xv, k.scale / k.cap);
    if (mode == FrameMode::kGeneral && k.ref_cap > 0) for_y *= bend(yv, k.ref_scale / k.ref_cap);
  }
};

template <FrameMode mode, KlKind kind, int kSides, class T>
inline void kl_row_backward(const T* x, const T* y, int64_t V, const KlParams& k, const KlRow& r,
                            float g, T* dx, T* dy) {
  write_gradients<kSides>(x, y, V, dx, dy, KlSlope<mode, kind, kSides>(k, r, g));
}

template <KlKind kind, class T>
inline void kl_row_backward(const T* x, const T* y, int64_t V, const KlParams& k, const KlRow& r,
                            float g, T* dx, T* dy) {
  if (dx && !dy && Frame<FrameMode::kUnit>::is_unit(k, r))
    return kl_row_backward<FrameMode::kUnit, kind, 1>(x, y, V, k, r, g, dx, dy);
  if (dx && !dy && k.plain)
    return kl_row_backward<FrameMode::kShared, kind, 1>(x, y, V, k, r, g, dx, dy);
  if (dx && !dy) return kl_row_backward<FrameMode::kGeneral, kind, 1>(x, y, V, k, r, g, dx, dy);
  if (dx && dy)
    return k.plain ? kl_row_backward<FrameMode::kShared, kind, 3>(x, y, V, k, r, g, dx, dy)
                   : kl_row_backward<FrameMode::kGeneral, kind, 3>(x, y, V, k, r, g, dx, dy);
  if (dy)
    return k.plain ? kl_row_backward<FrameMode::kShared, kind, 2>(x, y, V, k, r, g, dx, dy)
                   : kl_row_backward<FrameMode::kGeneral, kind, 2>(x, y, V, k, r, g, dx, dy);
}

template <KlKind kind>
inline float kl_forward_typed(FloatType type, const void* x, const void* y, int64_t V,
                              const KlParams& k, KlRow& r) {
  switch (type) {
    case FloatType::kBFloat16:
      return kl_row_forward<kind>(static_cast<const BFloat16*>(x), static_cast<const BFloat16*>(y),
                                  V, k, r);
    case FloatType::kFloat16:
      return kl_row_forward<kind>(static_cast<const Float16*>(x), static_cast<const Float16*>(y), V,
                                  k, r);
    default:
      return kl_row_forward<kind>(static_cast<const float*>(x), static_cast<const float*>(y), V, k,
                                  r);
  }
}

template <KlKind kind>
inline void kl_backward_typed(FloatType type, const void* x, const void* y, int64_t V,
                              const KlParams& k, const KlRow& r, float g, void* dx, void* dy) {
  switch (type) {
    case FloatType::kBFloat16:
      return kl_row_backward<kind>(static_cast<const BFloat16*>(x), static_cast<const BFloat16*>(y),
                                   V, k, r, g, static_cast<BFloat16*>(dx),
                                   static_cast<BFloat16*>(dy));
    case FloatType::kFloat16:
      return kl_row_backward<kind>(static_cast<const Float16*>(x), static_cast<const Float16*>(y),
                                   V, k, r, g, static_cast<Float16*>(dx),
                                   static_cast<Float16*>(dy));
    default:
      return kl_row_backward<kind>(static_cast<const float*>(x), static_cast<const float*>(y), V, k,
                                   r, g, static_cast<float*>(dx), static_cast<float*>(dy));
  }
}

inline float kl_forward(FloatType type, const void* x, const void* y, int64_t V, const KlParams& k,
                        KlRow& r) {
  switch (k.kind) {
    case KlKind::kPolicyRef: return kl_forward_typed<KlKind::kPolicyRef>(type, x, y, V, k, r);
    case KlKind::kRefPolicy: return kl_forward_typed<KlKind::kRefPolicy>(type, x, y, V, k, r);
    default: return kl_forward_typed<KlKind::kJsd>(type, x, y, V, k, r);
  }
}

inline void kl_backward(FloatType type, const void* x, const void* y, int64_t V, const KlParams& k,
                        const KlRow& r, float g, void* dx, void* dy) {
  switch (k.kind) {
    case KlKind::kPolicyRef:
      return kl_backward_typed<KlKind::kPolicyRef>(type, x, y, V, k, r, g, dx, dy);
    case KlKind::kRefPolicy:
      return kl_backward_typed<KlKind::kRefPolicy>(type, x, y, V, k, r, g, dx, dy);
    default: return kl_backward_typed<KlKind::kJsd>(type, x, y, V, k, r, g, dx, dy);
  }
}

}  // namespace FASTTAX_ISA_NS
}  // namespace fasttax
#endif
