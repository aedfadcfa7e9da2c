#pragma once

// Jensen-Shannon entry by entry, m = (1 - beta) p + beta q: its second sweep and its gradient
// (kl_curves.h). Of |u| up to 1 by the polynomials; beyond, by one exponential and one logarithm of
// m over the larger of p and q, so that no large u cancels.
//   x: (1 - beta) p (log p - log m - KL(p||m))     y: beta q (log q - log m - KL(q||m))
//
// What the row's S and Y are off by moves every u alike. To first order that leaves the value as it
// is, since J'(0) = 0, and the gradients too, whose mean is taken out of them. So the first sweep
// sums e^ax and e^ay plainly.

#include "../math/kl_slope.h"
#include "kl_device_frame.cuh"

namespace fasttax {

constexpr float kJsdUnit = 1.0f;   // up to which |u| the polynomials are used
constexpr float kJsdMost = 87.0f;  // e^-87 is a normal float; where |u| is larger p or q is 0

__device__ __forceinline__ float kl_log2(float v) {  // error 2^-21.4 near 1, 2^-22 of it elsewhere
#if defined(__CUDA_ARCH__)
  float l;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(l) : "f"(v));
  return l;
#else
  return log2f(v);
#endif
}

// u (c[0] + c[1] u + ...)
__device__ __forceinline__ float jsd_curve(const float (&c)[JsdCurves::kTerms], float u) {
  float sum = c[JsdCurves::kTerms - 1];
#pragma unroll
  for (int i = JsdCurves::kTerms - 2; i >= 0; --i) sum = fmaf(sum, u, c[i]);
  return sum * u;
}

// m over the larger of p and q, which is p unless u < 0: whole = 1 - its share + share e^-|u|.
struct JsdMix {
  bool below;  // u < 0
  float a;     // |u|, a number too where two -inf made it none
  float less;  // share e^-|u|
  float whole;

  __device__ __forceinline__ JsdMix(float u, const KlParams& k) {
    below = u < 0;
    a = fminf(fabsf(u), kJsdMost);
    less = (below ? k.beta_rest : k.beta) * kl_exp2(a * -kLog2e);
    whole = (below ? k.beta : k.beta_rest) + less;
  }
  __device__ __forceinline__ float log_whole() const { return kl_log2(whole) * kLn2; }
  // log(m/p) and log(m/q), of log_whole()
  __device__ __forceinline__ float log_m(float l) const { return l + (below ? a : 0.0f); }
  __device__ __forceinline__ float log_mq(float l) const { return l + (below ? 0.0f : a); }
};

// The second sweep's sums of a lane.
struct JsdLanes {
  float value = 0, log_m = 0;          // e^ax J(u), e^ax L(u)
  float far_value = 0, far_log_m = 0;  // p J(u), p L(u)

  __device__ __forceinline__ void near(const JsdCurves& curves, float ex, float u) {
    value = fmaf(ex, jsd_curve(curves.value, u) * u, value);
    log_m = fmaf(ex, jsd_curve(curves.log_m, u), log_m);
  }
  // Of any u: beyond 1 the terms of J cancel to a third at most. kPrecise: L(u) keeps the digits of
  // a small u, which in a row with a larger one beside it are not missed.
  template <bool kPrecise>
  __device__ __forceinline__ void any(const JsdCurves& curves, const KlParams& k, float p, float q,
                                      float u) {
    const bool close = fabsf(u) <= kJsdUnit;
    const JsdMix mix(u, k);
    const float l = mix.log_whole(), j = -fmaf(mix.whole, l, mix.less * mix.a),
                near_j = jsd_curve(curves.value, u) * u;
    far_value = fmaf(mix.below && !close ? q : p, close ? near_j : j, far_value);
    float log_m = mix.log_m(l);
    if (kPrecise && close) log_m = jsd_curve(curves.log_m, u);
    far_log_m = fmaf(p, log_m, far_log_m);
  }
};

// The gradient's factors of a row.
struct JsdSlope {
  const JsdCurves& curves;
  float to_x, mean_x, to_y, mean_y;  // dx = e^ax (to_x L(u) + mean_x), and so for y

  __device__ __forceinline__ JsdSlope(const JsdCurves& of, const KlParams& k, const KlRow& r,
                                      float gx, float gy)
      : curves(of) {
    const bool zero = k.beta == 0 || k.beta == 1;  // whose value is 0
    to_x = (zero ? 0.0f : -k.beta_rest) * gx * r.inv_s;
    mean_x = to_x * r.mean_gap;
    to_y = (zero ? 0.0f : -k.beta) * gy * r.inv_s_ref;
    mean_y = to_y * r.ref_center;
  }

  // kNear: |u| is at most 1; kPrecise: of others, as in JsdLanes::any
  template <bool kNear, bool kPrecise, bool kBoth>
  __device__ __forceinline__ KlSides<float> at(const KlParams& k, float ex, float ey,
                                               float u) const {
    float log_m, log_mq;
    if (kNear || (kPrecise && fabsf(u) <= kJsdUnit)) {
      log_m = jsd_curve(curves.log_m, u);
      log_mq = log_m + u;
    } else {
      const JsdMix mix(u, k);
      const float l = mix.log_whole();
      log_m = mix.log_m(l);
      log_mq = mix.log_mq(l);
    }
    KlSides<float> out{ex * fmaf(log_m, to_x, mean_x), 0};
    if (kBoth) out.y = ey * fmaf(log_mq, to_y, mean_y);
    return out;
  }
};

}  // namespace fasttax
