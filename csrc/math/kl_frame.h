#if !defined(FASTTAX_MATH_KL_FRAME)  // read for each instruction set: macros.h
#define FASTTAX_MATH_KL_FRAME

#include <cmath>
#include <type_traits>

#include "constant.h"
#include "kl_types.h"
#include "macros.h"

// From raw logits to ax and d, which kl.h sums: temperature, scale, softcap and frame. M is a
// backend's functions (macros.h), M::S what they work on, M::R a lane of it.
namespace fasttax {
namespace FASTTAX_MATH_NS {

template <class M>
FASTTAX_HD typename M::S kl_capped(typename M::S raw, typename M::R inside, typename M::R cap) {
  return M::tanh(raw * inside) * cap;
}

// Up to which gap of the tanhs' arguments their difference is by the series: 0.1^6 * 17/315 < 6e-8.
constexpr float kCapGap = 0.1f;

// tanh a - tanh b = tanh(a - b) (1 - tanh a tanh b), of `delta` = a - b within kCapGap.
template <class S>
FASTTAX_HD S kl_tanh_gap(S delta, S tanh_a, S tanh_b) {
  const S z = delta * delta;
  const S series = (z * constant<S>(2.0 / 15) + constant<S>(-1.0 / 3)) * z * delta + delta;
  return series * (constant<S>(1) - tanh_a * tanh_b);
}

// d capped / d raw, over the scale: 1 - tanh^2, from the capped logits, which may be -inf.
template <class M>
FASTTAX_HD typename M::S kl_bend(typename M::S capped, typename M::R cap) {
  using R = typename M::R;
  const typename M::S t = capped * (R(1) / cap), bend = R(1) - t * t;
  return bend > 0 ? bend : constant<typename M::S>(0);
}

// The reference's capped logits, of what cap() left of both rows.
template <class S, class R>
FASTTAX_HD S kl_capped_y(S x, S y, const KlParamsOf<R>& k) {
  return k.joint_cap ? x - y : y;
}

// How a row pair's logits become ax and d. kUnit: one scale of 1 on both rows, the common case in
// 3 operations; kShared: one scale on both; kGeneral: scales of their own, softcaps,
// the inf mask.
enum class FrameMode { kUnit, kShared, kGeneral };

// Held: whether a call's numbers are copied (where a kernel's stores would else make it read them
// again) or referred to.
template <class M, class Held = const KlParamsOf<typename M::R>&>
struct KlFrame {
  using S = typename M::S;
  using R = typename M::R;

  Held k;
  KlRowOf<R> r;
  R ox, oy, c;  // d = ((x - ox) - (y - oy)) - c

  // Logits of like size: their difference is exact, so it comes first. Rows offset by hundreds:
  // centre each first.
  FASTTAX_HD KlFrame(const KlParamsOf<R>& params, const KlRowOf<R>& row) : k(params), r(row) {
    ox = alike(row) ? R(0) : row.mx;
    oy = alike(row) ? R(0) : row.my;
    c = alike(row) ? row.mx - row.my : R(0);
  }

  FASTTAX_HD static bool alike(const KlRowOf<R>& row) {
    const R apart = row.mx - row.my;
    return apart <= R(4) && apart >= R(-4);
  }
  FASTTAX_HD static bool is_unit(const KlParamsOf<R>& k, const KlRowOf<R>& row) {
    return k.plain && k.row_scale == 1 && alike(row);
  }

  // What the softcaps and the inf mask make of raw logits. Under a joint cap y becomes the capped
  // rows' difference: rounded at 30 each, two capped logits leave 1e-3 of one that is 1e-3.
  FASTTAX_HD void cap(S& x, S& y) const {
    const S none = M::splat(-R(HUGE_VAL)), raw_x = x, raw_y = y;
    if (k.joint_cap) {
      cap_jointly(x, y);
    } else {
      if (k.cap > 0) x = kl_capped<M>(x, k.inside, k.cap);
      if (k.ref_cap > 0) y = kl_capped<M>(y, k.ref_inside, k.ref_cap);
    }
    if (!k.inf_mask) return;
    const S filler = M::splat(y_filler());
    x = M::if_le(raw_x, none, none, M::if_le(raw_y, none, none, x));
    y = M::if_le(raw_x, none, filler, M::if_le(raw_y, none, filler, y));
  }
  FASTTAX_HD void cap_jointly(S& x, S& y) const {
    const S delta = (x - y) * k.inside, a = M::tanh(x * k.inside), b = M::tanh(y * k.inside);
    x = a * k.cap;
    y = M::if_le(M::abs(delta), constant<S>(kCapGap), kl_tanh_gap(delta, a, b) * k.cap,
                 x - b * k.cap);
  }
  // With an x of -inf: no entry on either side.
  FASTTAX_HD R y_filler() const { return k.joint_cap ? R(0) : -R(HUGE_VAL); }

  // ax and d of logits that have been through cap() where the mode is general.
  template <FrameMode mode>
  FASTTAX_HD void place(S x, S y, S& ax, S& d) const {
    ax = x - r.mx;
    if constexpr (mode == FrameMode::kUnit) {
      d = (x - y) - c;
      return;
    }
    ax *= k.row_scale;
    if constexpr (mode == FrameMode::kShared)
      d = M::product(((x - ox) - (y - oy)) - c, M::splat(k.row_scale));
    else if (k.joint_cap && alike(r)) d = M::product(y - c, M::splat(k.row_scale));
    // rounded once in so many words: a compiler may do so in one kernel and not in the next, whose
    // bits have to be the same
    else d = M::fma(r.my - kl_capped_y(x, y, k), M::splat(k.ref_row_scale), ax);
  }

  // ax - d, also where one of the rows is -inf and d is no number.
  template <FrameMode mode>
  FASTTAX_HD S ay(S x, S y) const {
    if constexpr (mode == FrameMode::kGeneral) y = kl_capped_y(x, y, k);
    const S centred = y - r.my;
    if constexpr (mode == FrameMode::kUnit) return centred;
    return centred * (mode == FrameMode::kShared ? k.row_scale : k.ref_row_scale);
  }
};

}  // namespace FASTTAX_MATH_NS
}  // namespace fasttax
#endif
