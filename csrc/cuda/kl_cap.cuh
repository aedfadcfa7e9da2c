#pragma once

// Logits under one softcap of both rows, as the sweeps take them. With e = e^(2 scale x / cap) and
// r = 1 / (1 + e) the tanh is 1 - 2 r. Of the pair x, y the sweeps hold
//   r_x     g = r_y - r_x = (tanh x - tanh y) / 2
// which give ax and d in an fma each, and the cap's slope as 4 r (1 - r). Of logits that are near,
//   e_x - e_y = e_y expm1(2 scale (x - y) / cap)     g = (e_x - e_y) / ((1 + e_x) (1 + e_y))
// by a polynomial, one exponential and one division: a small d keeps its digits.

#include "kl_elements.cuh"

namespace fasttax {

// Beyond 2^60 the quotient is nothing to 1, and the product of two is still a float.
constexpr float kCapMost = 60.0f;

struct KlCap {
  const CapCurves& c;

  __device__ __forceinline__ float raised(float x) const {
    return kl_exp2(kl_min_or_nan(x * c.to_exp2, kCapMost));
  }

  // kFew: |x - y| within c.few_reach; kAll: within c.reach; kAny.
  enum Reach { kFew, kAll, kAny };

  template <Reach kReach>
  __device__ __forceinline__ void pair(float& x, float& y) const {
    constexpr int n = kReach == kFew ? CapCurves::kFew : CapCurves::kAll;
    const float dx = x - y;
    float rest = kReach == kFew ? c.few[n - 1] : c.all[n - 1];
#pragma unroll
    for (int i = n - 2; i >= 0; --i) rest = fmaf(rest, dx, kReach == kFew ? c.few[i] : c.all[i]);
    const float e = raised(y), one_y = 1 + e;
    float change = e * (rest * dx), one_x = one_y + change;
    if (kReach == kAny) {
      const float e_x = raised(x);
      const bool near = dx * dx <= c.reach;
      change = near ? change : e_x - e;
      one_x = near ? one_x : 1 + e_x;
    }
    const float over = kl_inverse(one_x * one_y);
    x = over * one_y;
    y = over * change;
  }
  template <Reach kReach, int n>
  __device__ __forceinline__ void all(float (&x)[n], float (&y)[n]) const {
#pragma unroll
    for (int j = 0; j < n; ++j) pair<kReach>(x[j], y[j]);
  }

  // The sum of (x - y)^2: at least the largest one.
  template <int n>
  __device__ __forceinline__ static float apart(const float (&x)[n], const float (&y)[n]) {
    float sum = 0;
#pragma unroll
    for (int j = 0; j < n; ++j) sum = fmaf(x[j] - y[j], x[j] - y[j], sum);
    return sum;
  }

  // Some entries; which of them are together moves their last digits alone.
  template <int n>
  __device__ __forceinline__ void all(float (&x)[n], float (&y)[n]) const {
    const float sum = apart(x, y);
    if (sum <= c.few_reach) all<kFew>(x, y);
    else if (sum <= c.reach) all<kAll>(x, y);
    else all<kAny>(x, y);
  }

  // Each row by itself: g is off by some 2^-23, cap 2^-22 of d. What is rounded to bfloat16 next
  // does not show that: its logits are equal or 2^-8 of them apart.
  template <int n>
  __device__ __forceinline__ void apiece(float (&x)[n], float (&y)[n]) const {
#pragma unroll
    for (int j = 0; j < n; ++j) {
      x[j] = kl_inverse(1 + kl_exp2(x[j] * c.to_exp2));
      y[j] = kl_inverse(1 + kl_exp2(y[j] * c.to_exp2)) - x[j];
    }
  }

  // The slope by the capped logit times the cap's, 1 - tanh^2.
  __device__ __forceinline__ static float through(float r, float slope) {
    return slope * r * fmaf(r, -4.0f, 4.0f);
  }
};

}  // namespace fasttax
