// token_kl over one row pair. Forward is one sweep over both rows (jsd: two, the second in L2), backward another.
//  - No max pass: the frame is primed from the first 2048 entries, and a row is run again with its true maxima
//    only when some entry stands more than 40 above (10.3 ms against 16.9 at 512 x 49152).
//  - Where four vectors have |d| <= 1/4 one exp and a polynomial do. Elsewhere two exps and plain sums, good to 1e-7
//    of the row's mass: a row that comes out below 1e-2 (or as NaN: -inf entries) is run again with the series in
//    every lane that needs it, and with 0 * inf = 0.
//  - Lanes are folded to double every 2048 cells, so the sums do not depend on V's size.
namespace fasttax {

template <>
struct Const<FASTTAX_ISA_NS::VF> {
  static inline FASTTAX_ISA_NS::VF of(double a) { return FASTTAX_ISA_NS::splat(float(a)); }
};

namespace FASTTAX_ISA_NS {

constexpr int64_t kChunk = 128 * kLanes;  // 2048 on AVX-512: no lane adds more than 128 terms before it is folded to double
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kFrameSlack = 20.0f;  // e^20 * V stays far below float's range, and exp() is exact enough there

inline VF where_zero(VF weight, VF value) { return weight == 0.0f ? splat(0.0f) : value; }  // 0 * inf is 0 here

// How raw logits become ax and d. kUnit: one scale of 1 on both rows, no recentring, the common case in 3 operations;
// kShared: one scale on both; kGeneral: scales of their own, softcaps, the inf mask.
enum class FrameMode { kUnit, kShared, kGeneral };

template <FrameMode mode>
struct Frame {
  const KlParams& k;
  KlRow r;
  float ox, oy, c;  // d = ((x - ox) - (y - oy)) - c

  // Logits of like size: their difference is exact, so it comes first. Rows offset by hundreds: centre each first.
  Frame(const KlParams& params, const KlRow& row) : k(params), r(row) {
    ox = alike(row) ? 0.0f : row.mx;
    oy = alike(row) ? 0.0f : row.my;
    c = alike(row) ? row.mx - row.my : 0.0f;
  }

  static bool alike(const KlRow& row) { return std::fabs(row.mx - row.my) <= 4.0f; }
  static bool is_unit(const KlParams& k, const KlRow& row) { return k.plain && k.row_scale == 1 && row.shift == 0 && alike(row); }

  VF capped(VF x, float scale, float cap) const { return tanh(x * (scale / cap)) * cap; }

  // `n` lanes hold entries; a softcap would turn the filler's -inf into -cap, so it is put back.
  void raw(VF& x, VF& y, int64_t n) const {
    if (mode != FrameMode::kGeneral) return;
    const VI gone = k.inf_mask ? ((x == -kInf) | (y == -kInf)) : VI{};
    if (k.cap > 0) x = capped(x, k.scale, k.cap);
    if (k.ref_cap > 0) y = capped(y, k.ref_scale, k.ref_cap);
    x = gone ? splat(-kInf) : x;
    y = gone ? splat(-kInf) : y;
    for (int64_t j = n; j < kLanes; ++j) x[j] = y[j] = -kInf;
  }

  void operator()(VF x, VF y, VF& ax, VF& d, int64_t n = kLanes) const {
    raw(x, y, n);
    ax = x - r.mx;
    if (mode == FrameMode::kUnit) {
      d = (x - y) - c;
      return;
    }
    ax *= k.row_scale;
    d = mode == FrameMode::kShared ? (((x - ox) - (y - oy)) - c) * k.row_scale - r.shift : ax - ((y - r.my) * k.ref_row_scale + r.shift);
  }

  // ax - d, also where one of the rows is -inf and d is no number
  VF ay(VF x, VF y, int64_t n = kLanes) const {
    raw(x, y, n);
    const VF centred = y - r.my;
    if (mode == FrameMode::kUnit) return centred;
    return centred * (mode == FrameMode::kShared ? k.row_scale : k.ref_row_scale) + r.shift;
  }
};

// Calls f(x, y, n) for each vector of [begin, end); a partial vector is filled with -inf.
template <class T, class F>
inline void for_vectors(const T* x, const T* y, int64_t begin, int64_t end, F&& f) {
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) f(load(x + i), load(y + i), i, kLanes);
  if (i < end) f(load(x + i, end - i, -kInf), load(y + i, end - i, -kInf), i, end - i);
}

template <class T>
inline void maxima(const T* x, const T* y, int64_t end, const KlParams& k, KlRow& r) {
  VF mx = splat(-kInf), my = splat(-kInf);
  const Frame<FrameMode::kGeneral> frame(k, r);
  for_vectors(x, y, 0, end, [&](VF xv, VF yv, int64_t, int64_t n) {
    if (!k.plain) frame.raw(xv, yv, n);
    mx = max_keep_nan(xv, mx);  // a NaN entry is passed over here and reaches the sums through exp
    my = max_keep_nan(yv, my);
  });
  r.mx = max_of(mx);
  r.my = max_of(my);
  r.shift = 0;
}

struct Sums {
  double s = 0, y = 0, g = 0;  // sum e^ax, sum e^ay, their difference
  double b = 0, a = 0;         // B and sum e^ax d; for ref_policy C and -sum e^ay d
  float top = -kInf;           // highest entry above the frames
};

template <FrameMode mode, KlKind kind, bool careful, class T>
inline Sums sweep(const T* x, const T* y, int64_t V, const KlParams& k, const KlRow& r) {
  const Frame<mode> frame(k, r);
  Sums total;
  for (int64_t start = 0; start < V; start += kChunk) {
    const int64_t end = std::min(V, start + kChunk);
    VF S{}, G{}, B{}, top = splat(-kInf);  // B is B or C, by kind
    VF plain_x{}, plain_y{}, plain_a{};    // lanes summed plainly: e^ax, e^ay, and e^ax d (ref_policy: -e^ay d)
    VF blend_x{}, blend_y{}, blend_g{}, blend_b{}, blend_a{};
    auto small = [&](VF ax, VF d) {  // every |d| <= 1/4
      const VF ex = exp(ax), f = kl_bregman_small(d), change = ex * (f - d);
      S += ex;
      G += change;
      if (kind == KlKind::kPolicyRef) B = fma(ex, f, B);
      if (kind == KlKind::kRefPolicy) B = fma(ex + change, kl_bregman_small(-d), B);
    };
    auto plain = [&](VF ax, VF d) {
      const VF ex = exp(ax), ey = exp(ax - d);
      plain_x += ex;
      plain_y += ey;
      if (kind == KlKind::kPolicyRef) plain_a = fma(ex, d, plain_a);
      if (kind == KlKind::kRefPolicy) plain_a = fma(ey, -d, plain_a);
    };
    auto blend = [&](VF ax, VF ay, VF d) {
      const VF ex = exp(ax), ey = exp(ay);
      const VI near = abs(d) <= kSmallGap;
      const VF f = kl_bregman_small(d);
      const VF change = near ? ex * (f - d) : ey - ex;
      blend_x += ex;
      blend_y += ey;
      blend_g += change;
      if (kind == KlKind::kPolicyRef) {
        const VF pull = where_zero(ex, ex * d);
        blend_a += pull;
        blend_b += near ? ex * f : change + pull;
      }
      if (kind == KlKind::kRefPolicy) {
        const VF pull = where_zero(ey, ey * d);
        blend_a -= pull;
        blend_b += near ? ey * kl_bregman_small(-d) : -change - pull;
      }
    };
    int64_t i = start;
    for (; i + 4 * kLanes <= end; i += 4 * kLanes) {
      VF ax[4], d[4];
      for (int j = 0; j < 4; ++j) frame(load(x + i + j * kLanes), load(y + i + j * kLanes), ax[j], d[j]);
      top = max_keep_nan(max_keep_nan(max_keep_nan(ax[0], ax[1]), max_keep_nan(ax[2], ax[3])), top);
      const VF widest = max_keep_nan(max_keep_nan(abs(d[0]), abs(d[1])), max_keep_nan(abs(d[2]), abs(d[3])));
      if (all_le(widest, splat(kSmallGap)) && (!careful || all_le((d[0] + d[1]) + (d[2] + d[3]), splat(kInf)))) {
        for (int j = 0; j < 4; ++j) small(ax[j], d[j]);  // max may lose a NaN; ax is NaN with it, or the row comes back
      } else if (careful) {
        for (int j = 0; j < 4; ++j) {
          const VF ay = frame.ay(load(x + i + j * kLanes), load(y + i + j * kLanes));
          top = max_keep_nan(ay, top);
          blend(ax[j], ay, d[j]);
        }
      } else {
        for (int j = 0; j < 4; ++j) plain(ax[j], d[j]);
        const VF ay = max_keep_nan(max_keep_nan(ax[0] - d[0], ax[1] - d[1]), max_keep_nan(ax[2] - d[2], ax[3] - d[3]));
        top = max_keep_nan(ay, top);
      }
    }
    for_vectors(x, y, i, end, [&](VF xv, VF yv, int64_t, int64_t n) {
      VF ax, d;
      frame(xv, yv, ax, d, n);
      const VF ay = frame.ay(xv, yv, n);
      top = max_keep_nan(max_keep_nan(ax, ay), top);
      blend(ax, ay, d);
    });
    const double mass = sum(S), change = sum(G), bregman = sum(B);
    const double plain_mass = sum(plain_x), plain_mass_y = sum(plain_y), plain_change = plain_mass_y - plain_mass, pull = sum(plain_a);
    total.s += mass + plain_mass + sum(blend_x);
    total.y += (mass + change) + plain_mass_y + sum(blend_y);
    total.g += change + plain_change + sum(blend_g);
    total.b += bregman + (kind == KlKind::kPolicyRef ? pull + plain_change : pull - plain_change) + sum(blend_b);
    total.a += (kind == KlKind::kPolicyRef ? bregman - change : bregman + change) + pull + sum(blend_a);
    total.top = std::max(total.top, max_of(top));
    if (total.top > kFrameSlack) break;
  }
  return total;
}

template <KlKind kind, class T>
inline Sums sweep_row(const T* x, const T* y, int64_t V, const KlParams& k, const KlRow& r, bool careful) {
  if (Frame<FrameMode::kUnit>::is_unit(k, r))
    return careful ? sweep<FrameMode::kUnit, kind, true>(x, y, V, k, r) : sweep<FrameMode::kUnit, kind, false>(x, y, V, k, r);
  return k.plain ? sweep<FrameMode::kShared, kind, true>(x, y, V, k, r) : sweep<FrameMode::kGeneral, kind, true>(x, y, V, k, r);
}

// log(m/p) with m = (1-beta) p + beta q and u = log p - log q, and eps = q/p - 1, without overflow on either side.
inline VF log_mix(VF u, float beta) {
  const VF e = exp(-abs(u));
  const VF inner = (u < 0.0f) ? log(splat(beta) + (1.0f - beta) * e) : log1p((e - 1.0f) * beta);
  return (u < 0.0f) ? inner - u : inner;
}

inline bool jsd_is_zero(const KlParams& k) { return k.beta == 0 || k.beta == 1; }  // the mixture is one of the two

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
      const VF p = exp(ax) * r.inv_s, q = exp(frame.ay(xv, yv, n)) * r.inv_s_ref, u = d - r.log_ratio;
      const VI near = abs(u) <= 0.2f;
      const VF eps = kl_bregman_small(u) - u;  // e^-u - 1
      const VF l = log_mix(u, beta);
      // p where q is 0 (u = inf): l = log(1-beta).  q where p is 0 (u = -inf): log(m/q) = log(beta)
      const VF p_part = where_zero(p, -p * l);
      const VF q_part = where_zero(q, (p == 0.0f) ? q * -std::log(beta) : q * (-u - l));
      gap += near ? p * (beta * jsd_g_small(eps) - jsd_g_small(beta * eps)) : beta * q_part + (1.0f - beta) * p_part;
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
  constexpr double kTrusted = 1e-2;  // a plain sum is good to about 1e-7: 1e-5 of a KL this large
  maxima(x, y, std::min(V, kChunk), k, r);
  if (!(r.mx > -kInf && r.my > -kInf)) maxima(x, y, V, k, r);
  bool careful = false, exact_frame = false;
  Sums t = sweep_row<kind>(x, y, V, k, r, careful);
  double value = 0;
  for (;;) {
    if (t.top > kFrameSlack && !exact_frame) {
      exact_frame = true;
      maxima(x, y, V, k, r);
      t = sweep_row<kind>(x, y, V, k, r, careful);
      continue;
    }
    // Where one row's mass is far from the other's in this frame (|tau| > 1/2), B/S - h(tau) is a difference of large
    // numbers and so is S + G: the plain form with sums of its own for each row is the accurate one.
    const double tau = t.g / t.s, back = -t.g / t.y;
    const bool centred = std::fabs(tau) <= 0.5;
    const double log_ratio = centred ? -std::log1p(tau) : std::log(t.s / t.y);
    const double bregman = kind == KlKind::kRefPolicy ? t.b / t.y : t.b / t.s;
    if (kind == KlKind::kRefPolicy) value = centred ? bregman - kl_defect(back) : t.a / t.y + log_ratio;
    else value = centred ? bregman - kl_defect(tau) : t.a / t.s - log_ratio;
    r.log_ratio = float(log_ratio);
    const double gap = kind == KlKind::kRefPolicy ? log_ratio - value : value + log_ratio;
    r.mean_gap = float(gap);
    if (!careful && (kind == KlKind::kJsd ? !(t.s > 0 && t.y > 0) : !(value >= kTrusted))) {
      careful = true;
      t = sweep_row<kind>(x, y, V, k, r, careful);
      continue;
    }
    // Frames that do not fit (the rows' maxima lie apart, or a peak outside the primed part) make both terms
    // large and alike: move the frame onto the mean gap, once, and the difference keeps its digits.
    const bool cancels = centred ? value < bregman / 16 : value < 0.25;
    if (kind == KlKind::kJsd || r.shift != 0 || gap == 0 || !cancels || !(std::fabs(gap) < kFrameSlack)) break;
    r.shift = float(gap);
    t = sweep_row<kind>(x, y, V, k, r, careful);
  }
  r.inv_s = float(1 / t.s);
  r.inv_s_ref = float(1 / t.y);
  r.ref_center = 0;
  if (kind == KlKind::kJsd && jsd_is_zero(k)) value = (t.s + t.y) * 0;  // 0, or NaN for a NaN row
  if (kind == KlKind::kJsd && !jsd_is_zero(k)) {
    const Mix mix = k.plain ? jsd_sweep<FrameMode::kShared>(x, y, V, k, r) : jsd_sweep<FrameMode::kGeneral>(x, y, V, k, r);
    value = mix.gap;
    r.mean_gap = float(mix.p_to_m);
    r.ref_center = float(mix.q_to_m);
  }
  return value < 0 ? 0.0f : float(value);  // NaN passes through
}

// kSides: 1 the policy's gradient, 2 the reference's, 3 both
template <FrameMode mode, KlKind kind, int kSides, class T>
inline void kl_row_backward(const T* x, const T* y, int64_t V, const KlParams& k, const KlRow& r, float upstream, T* dx, T* dy) {
  const Frame<mode> frame(k, r);
  const float gx = upstream * k.row_slope, gy = upstream * k.ref_row_slope, beta = k.beta;
  for_vectors(x, y, 0, V, [&](VF xv, VF yv, int64_t i, int64_t n) {
    VF ax, d;
    frame(xv, yv, ax, d, n);
    const VF p = exp(ax) * r.inv_s;
    VF for_x{}, for_y{};
    if (kind == KlKind::kPolicyRef && (kSides & 1)) for_x = where_zero(p, p * (d - r.mean_gap));
    if (kind != KlKind::kPolicyRef || (kSides & 2)) {
      const VF q = exp(frame.ay(xv, yv, n)) * r.inv_s_ref, u = d - r.log_ratio;
      const VF p_minus_q = (abs(u) <= kSmallGap) ? p * (u - kl_bregman_small(u)) : p - q;
      if (kind == KlKind::kPolicyRef) for_y = -p_minus_q;
      if (kind == KlKind::kRefPolicy) {
        for_x = p_minus_q;
        for_y = where_zero(q, q * (r.mean_gap - d));
      }
      if (kind == KlKind::kJsd && jsd_is_zero(k)) {
        for_x = p * 0.0f;
        for_y = q * 0.0f;
      }
      if (kind == KlKind::kJsd && !jsd_is_zero(k)) {
        const VF l = log_mix(u, beta);
        for_x = where_zero(p, (1.0f - beta) * p * (-l - r.mean_gap));
        for_y = where_zero(q, beta * q * (((p == 0.0f) ? splat(-std::log(beta)) : -u - l) - r.ref_center));
      }
    }
    for_x *= gx;
    for_y *= gy;
    if (mode == FrameMode::kGeneral && k.cap > 0) {
      const VF t = tanh(xv * (k.scale / k.cap));
      for_x *= 1.0f - t * t;
    }
    if (mode == FrameMode::kGeneral && k.ref_cap > 0) {
      const VF t = tanh(yv * (k.ref_scale / k.ref_cap));
      for_y *= 1.0f - t * t;
    }
    if (n == kLanes) {
      if (kSides & 1) store(dx + i, for_x);
      if (kSides & 2) store(dy + i, for_y);
    } else {
      if (kSides & 1) store(dx + i, for_x, n);
      if (kSides & 2) store(dy + i, for_y, n);
    }
  });
}

template <KlKind kind, class T>
inline void kl_row_backward(const T* x, const T* y, int64_t V, const KlParams& k, const KlRow& r, float g, T* dx, T* dy) {
  if (dx && !dy && Frame<FrameMode::kUnit>::is_unit(k, r)) return kl_row_backward<FrameMode::kUnit, kind, 1>(x, y, V, k, r, g, dx, dy);
  if (dx && !dy && k.plain) return kl_row_backward<FrameMode::kShared, kind, 1>(x, y, V, k, r, g, dx, dy);
  if (dx && !dy) return kl_row_backward<FrameMode::kGeneral, kind, 1>(x, y, V, k, r, g, dx, dy);
  if (dx && dy)
    return k.plain ? kl_row_backward<FrameMode::kShared, kind, 3>(x, y, V, k, r, g, dx, dy)
                   : kl_row_backward<FrameMode::kGeneral, kind, 3>(x, y, V, k, r, g, dx, dy);
  if (dy)
    return k.plain ? kl_row_backward<FrameMode::kShared, kind, 2>(x, y, V, k, r, g, dx, dy)
                   : kl_row_backward<FrameMode::kGeneral, kind, 2>(x, y, V, k, r, g, dx, dy);
}

template <KlKind kind>
inline float kl_forward_typed(LogitType type, const void* x, const void* y, int64_t V, const KlParams& k, KlRow& r) {
  switch (type) {
    case LogitType::kBFloat16: return kl_row_forward<kind>(static_cast<const BFloat16*>(x), static_cast<const BFloat16*>(y), V, k, r);
    case LogitType::kFloat16: return kl_row_forward<kind>(static_cast<const Float16*>(x), static_cast<const Float16*>(y), V, k, r);
    default: return kl_row_forward<kind>(static_cast<const float*>(x), static_cast<const float*>(y), V, k, r);
  }
}

template <KlKind kind>
inline void kl_backward_typed(LogitType type, const void* x, const void* y, int64_t V, const KlParams& k, const KlRow& r, float g, void* dx,
                              void* dy) {
  switch (type) {
    case LogitType::kBFloat16:
      return kl_row_backward<kind>(static_cast<const BFloat16*>(x), static_cast<const BFloat16*>(y), V, k, r, g, static_cast<BFloat16*>(dx),
                                   static_cast<BFloat16*>(dy));
    case LogitType::kFloat16:
      return kl_row_backward<kind>(static_cast<const Float16*>(x), static_cast<const Float16*>(y), V, k, r, g, static_cast<Float16*>(dx),
                                   static_cast<Float16*>(dy));
    default:
      return kl_row_backward<kind>(static_cast<const float*>(x), static_cast<const float*>(y), V, k, r, g, static_cast<float*>(dx),
                                   static_cast<float*>(dy));
  }
}

inline float kl_forward(LogitType type, const void* x, const void* y, int64_t V, const KlParams& k, KlRow& r) {
  switch (k.kind) {
    case KlKind::kPolicyRef: return kl_forward_typed<KlKind::kPolicyRef>(type, x, y, V, k, r);
    case KlKind::kRefPolicy: return kl_forward_typed<KlKind::kRefPolicy>(type, x, y, V, k, r);
    default: return kl_forward_typed<KlKind::kJsd>(type, x, y, V, k, r);
  }
}

inline void kl_backward(LogitType type, const void* x, const void* y, int64_t V, const KlParams& k, const KlRow& r, float g, void* dx,
                        void* dy) {
  switch (k.kind) {
    case KlKind::kPolicyRef: return kl_backward_typed<KlKind::kPolicyRef>(type, x, y, V, k, r, g, dx, dy);
    case KlKind::kRefPolicy: return kl_backward_typed<KlKind::kRefPolicy>(type, x, y, V, k, r, g, dx, dy);
    default: return kl_backward_typed<KlKind::kJsd>(type, x, y, V, k, r, g, dx, dy);
  }
}

}  // namespace FASTTAX_ISA_NS
}  // namespace fasttax
