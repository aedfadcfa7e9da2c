#pragma once

// Raw logits turned into what math/kl.h sums: frames, and sums moved from one into another.

#include "../math/kl_frame.h"
#include "../math/kl_row.h"
#include "kl_cap.cuh"
#include "kl_entries.cuh"

namespace fasttax {

// e^-up, relative error 2^-22, 0 below 2^-126
__device__ __forceinline__ double kl_fall(double up) {
  const double t = -up * 1.4426950408889634, whole = rint(t);
  return double(kl_exp2(float(t - whole)) * kl_exp2(float(whole)));
}

// KlMove by single precision's exponentials: an error in sx moves a span's entries of both rows
// alike, and so does no harm to a divergence.
__device__ inline KlMove kl_move(double up_x, double up_y) {
  KlMove to;
  to.up_x = up_x;
  to.delta = up_x - up_y;
  to.sx = kl_fall(up_x);
  if (fabs(to.delta) <= double(kMidGap)) {
    const double toward = double(kl_bregman_mid(float(-to.delta)));
    to.toward = to.sx * toward;
    to.rise = to.sx * (toward + to.delta);
    to.sy = to.sx + to.rise;
    to.away = to.sy * double(kl_bregman_mid(float(to.delta)));
  } else {
    to.sy = kl_fall(up_y);
    to.rise = to.sy - to.sx;
    to.toward = to.rise - to.sx * to.delta;
    to.away = to.sy * to.delta - to.rise;
  }
  return to;
}

// How a row's entries are taken: raw logits in like frames, such logits under one softcap
// (kl_cap.cuh), or any.
enum class KlWay { kFast, kCapped, kCareful };
template <KlWay way>
using KlWayIs = std::integral_constant<KlWay, way>;

// How raw logits become ax and d: for rows that share one scale and lie in like frames as
// ax log2 e = (x - mx) s2 and d = (x - y) row_scale + minus_cs; careful() for all. Under one
// softcap x and y are what kl_cap.cuh made of the logits.
struct KlDeviceFrame : KlFrame<DeviceMath> {
  float s2, scale, minus_cs;
  bool fast;
  bool capped;  // fast, but under one softcap
  bool bare;    // ax2() of raw logits is the policy's, whatever the reference is

  __device__ __forceinline__ KlDeviceFrame(const KlArgs& a, const KlRow& row) : KlFrame(a.k, row) {
    fast = k.plain && alike(row);
    capped = k.joint_cap && !k.inf_mask && alike(row) && a.cap.reach > 0;
    bare = !(k.cap > 0) && !k.inf_mask;
    s2 = k.row_scale * kLog2e;
    scale = k.row_scale;
    minus_cs = (row.my - row.mx) * k.row_scale;
  }

  __device__ __forceinline__ KlWay way() const {
    return fast ? KlWay::kFast : capped ? KlWay::kCapped : KlWay::kCareful;
  }

  // d, and d plus another constant than minus_cs
  template <KlWay kWay>
  __device__ __forceinline__ float gap(float x, float y, float constant) const {
    if (kWay == KlWay::kCapped) return fmaf(y, 2 * k.cap * scale, constant);
    return fmaf(x - y, scale, constant);
  }
  template <KlWay kWay>
  __device__ __forceinline__ float gap(float x, float y) const {
    return gap<kWay>(x, y, minus_cs);
  }
  __device__ __forceinline__ float to_u() const { return minus_cs - r.log_ratio; }
  // not x s2 - mx s2: rounded at 1000, that is 4e-5 off; capped logits are not larger than the cap
  template <KlWay kWay>
  __device__ __forceinline__ float ax2(float x) const {
    if (kWay == KlWay::kCapped) return fmaf(x, -2 * k.cap * s2, (k.cap - r.mx) * s2);
    return (x - r.mx) * s2;
  }
  template <KlWay kWay>
  __device__ __forceinline__ float ay2(float of_ax2, float y) const {
    // on from ax, whose rounding p and q then share
    if (kWay == KlWay::kCapped) return fmaf(y, -2 * k.cap * s2, of_ax2 + (r.mx - r.my) * s2);
    return (y - r.my) * s2;
  }
  template <KlWay kWay>
  __device__ __forceinline__ float ax(float x) const {
    if (kWay == KlWay::kCapped) return ax2<kWay>(x) * kLn2;
    return (x - r.mx) * k.row_scale;
  }

  // x and y become what cap() makes of them
  __device__ __forceinline__ void careful(float& x, float& y, float& ax_out, float& ay_out,
                                          float& d) const {
    if (k.plain) {
      place<FrameMode::kShared>(x, y, ax_out, d);
    } else {
      cap(x, y);
      place<FrameMode::kGeneral>(x, y, ax_out, d);
    }
    ay_out = ay<FrameMode::kGeneral>(x, y);
  }
};

}  // namespace fasttax
