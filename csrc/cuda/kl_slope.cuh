#pragma once

// Gradients, entry by entry, and a row's tile of them. With p = e^ax / S, q = e^ay / Y, u = log p -
// log q:
//   KL(p||q)  policy p (d - E_p[d]), reference q - p      KL(q||p)  policy p - q, reference q
//   (E_q[d] - d) jsd       policy (1 - beta) p (log p - log m - KL(p||m)), reference beta q (log q
//   - log m - KL(q||m)) logp      1[id] - p    lse  p    entropy  p (E_p[ax] - ax)

#include "kl_sums.cuh"

namespace fasttax {

// log(m/p), m = (1-beta) p + beta q, without overflow on either side
__device__ __forceinline__ float kl_log_mix(float u, float beta) {
  const float e = expf(-fabsf(u));
  return u < 0 ? logf(beta + (1 - beta) * e) - u : log1pf((e - 1) * beta);
}

struct KlMix {
  float gap, p_to_m, q_to_m;
};

// One entry of jsd's three sums: the Jensen gap, KL(p||m), KL(q||m).
__device__ __forceinline__ KlMix kl_mix_entry(const KlFrame& frame, float x, float y) {
  float ax, ay, d;
  frame.careful(x, y, ax, ay, d);
  const KlRow& r = frame.r;
  const float beta = frame.k.beta, p = kl_exp2(ax * kLog2e) * r.inv_s,
              q = kl_exp2(ay * kLog2e) * r.inv_s_ref, u = d - r.log_ratio;
  const float l = kl_log_mix(u, beta), eps = kl_bregman_small(u) - u;  // e^-u - 1
  // p where q is 0 (u = inf): l = log(1-beta).  q where p is 0 (u = -inf): log(m/q) = log(beta)
  const float p_part = p == 0 ? 0.0f : -p * l;
  const float q_part = q == 0 ? 0.0f : p == 0 ? q * -logf(beta) : q * (-u - l);
  const bool near = fabsf(u) <= 0.2f;
  return {near ? p * (beta * jsd_g_small(eps) - jsd_g_small(beta * eps))
               : beta * q_part + (1 - beta) * p_part,
          p_part, q_part};
}

// The gradient at one entry of a row; kBoth: of the reference too.
template <KlOp op, bool kBoth>
struct KlSlope {
  const KlFrame frame;
  float log_ratio, inv_s, inv_s_ref, gap, ref_center;
  float gx, gy;  // upstream times the tempered logits' slope
  float mean = 0, logp = 0, ref_logp = 0, g_logp = 0, g_ref_logp = 0, g_entropy = 0, g_lse = 0,
        g_forwards = 0,
        g_backwards = 0;  // token_stats
  bool close;

  __device__ __forceinline__ KlSlope(const KlParams& k, const StatsRow& row, const float* g,
                                     int64_t stride)
      : frame(k, row.kl),
        log_ratio(row.kl.log_ratio),
        inv_s(row.kl.inv_s),
        inv_s_ref(row.kl.inv_s_ref),
        gap(row.kl.mean_gap),
        ref_center(row.kl.ref_center) {
    constexpr bool stats = op == KlOp::kStats || op == KlOp::kAlone;
    gx = (stats ? 1.0f : g[0]) * k.row_slope;
    gy = (stats ? 1.0f : g[0]) * k.ref_row_slope;
    close = !(fabsf(gap - log_ratio) >= float(kTrusted));
    if constexpr (stats) {
      close = !(fminf(gap - log_ratio, log_ratio - ref_center) >= float(kTrusted));
      mean = row.mean, logp = row.logp, ref_logp = row.ref_logp;
      g_logp = g[kLogp * stride], g_ref_logp = g[kRefLogp * stride],
      g_entropy = g[kEntropy * stride], g_lse = g[kLse * stride];
      g_forwards = g[kKlPolicyRef * stride], g_backwards = g[kKlRefPolicy * stride];
    }
  }

  // p - q; by the series where rows are close, so that it does not cancel
  template <bool kClose>
  __device__ __forceinline__ float difference(float p, float q, float d) const {
    if (!kClose) return p - q;
    const float u = d - log_ratio;
    return fabsf(u) <= kSmallGap ? p * (u - kl_bregman_small(u)) : p - q;
  }

  // kFast: frame.fast; kClose: close. at_id leaves the log-probs' own terms out of p and q, for
  // `at` to add them without cancellation.
  template <bool kFast, bool kClose>
  __device__ __forceinline__ void operator()(float x, float y, float& dx, float& dy,
                                             bool at_id = false) const {
    float ax2, ay2, d, ax;
    const float raw_x = x, raw_y = y;
    if (kFast) {
      ax2 = frame.ax2(x), ay2 = frame.ay2(y), d = frame.gap(x, y), ax = frame.ax(x);
    } else {
      float ay;
      frame.careful(x, y, ax, ay, d);
      ax2 = ax * kLog2e, ay2 = ay * kLog2e;
    }
    const float p = kl_exp2(ax2) * inv_s;
    const auto q_of = [&] { return kl_exp2(ay2) * inv_s_ref; };
    dx = dy = 0;
    if constexpr (op == KlOp::kPolicyRef) {
      dx = p == 0 ? 0.0f : p * (d - gap);
      if (kBoth) dy = -difference<kClose>(p, q_of(), d);
    } else if constexpr (op == KlOp::kRefPolicy) {
      const float q = q_of();
      dx = difference<kClose>(p, q, d);
      if (kBoth) dy = q == 0 ? 0.0f : q * (gap - d);
    } else if constexpr (op == KlOp::kJsd) {
      const float beta = frame.k.beta, q = q_of(), u = d - log_ratio;
      if (beta == 0 || beta == 1) {
        dx = p * 0.0f, dy = q * 0.0f;  // 0, or NaN in a row that has one
      } else {
        const float l = kl_log_mix(u, beta);
        dx = p == 0 ? 0.0f : (1 - beta) * p * (-l - gap);
        if (kBoth) dy = q == 0 ? 0.0f : beta * q * ((p == 0 ? -logf(beta) : -u - l) - ref_center);
      }
    } else {
      constexpr bool pair = op == KlOp::kStats;
      float c = fmaf(mean - ax, g_entropy, g_lse - (at_id ? 0.0f : g_logp));
      // else d may be inf where nobody asks for it
      if (pair && g_forwards != 0) c = fmaf(d - gap, g_forwards, c);
      dx = p == 0 ? 0.0f : p * c;
      if (pair && (kBoth || g_backwards != 0)) {
        const float q = q_of(), apart = difference<kClose>(p, q, d);
        if (g_backwards != 0) dx = fmaf(apart, g_backwards, dx);
        if (kBoth) {
          c = at_id ? 0.0f : -g_ref_logp;
          if (g_backwards != 0) c = fmaf(ref_center - d, g_backwards, c);
          dy = q == 0 ? 0.0f : q * c;
          if (g_forwards != 0) dy = fmaf(-apart, g_forwards, dy);
        }
      }
    }
    dx *= gx;
    dy *= gy;
    if (!kFast && frame.k.cap > 0) dx *= bend(raw_x, frame.k.scale / frame.k.cap);
    if (!kFast && frame.k.ref_cap > 0) dy *= bend(raw_y, frame.k.ref_scale / frame.k.ref_cap);
  }

  // One entry by itself.
  __device__ __forceinline__ void any(float x, float y, float& dx, float& dy,
                                      bool at_id = false) const {
    if (close) operator()<false, true>(x, y, dx, dy, at_id);
    else operator()<false, false>(x, y, dx, dy, at_id);
  }

  // the derivative of a softcap
  __device__ __forceinline__ static float bend(float raw, float over_cap) {
    const float t = tanhf(raw * over_cap);
    return 1 - t * t;
  }

  // The entry of the id: d logp = 1 - p = -expm1(logp), which p in float would round away.
  __device__ __forceinline__ void at(float x, float y, float& dx, float& dy) const {
    any(x, y, dx, dy, true);
    const float bend_x = frame.k.cap > 0 ? bend(x, frame.k.scale / frame.k.cap) : 1.0f;
    const float bend_y = frame.k.ref_cap > 0 ? bend(y, frame.k.ref_scale / frame.k.ref_cap) : 1.0f;
    dx -= bend_x * (expm1f(logp) * g_logp * gx);
    dy -= bend_y * (expm1f(ref_logp) * g_ref_logp * gy);
  }
};

// Writes the gradients of entries [begin, end), a span; dx and dy may be null, and `dx` the
// policy's logits themselves.
template <KlOp op, bool kBoth, class Source, class T>
__device__ __forceinline__ void kl_span_gradient(const Source& row, const KlSlope<op, kBoth>& slope,
                                                 int64_t begin, int64_t end, T* dx, T* dy) {
  constexpr int n = KlVector<T>::kEntries, kRound = 32 * n;
  constexpr bool pair = op != KlOp::kAlone;
  const int lane = int(threadIdx.x) % 32;
  const bool aligned = (!dx || kl_aligned(dx)) && (!kBoth || !dy || kl_aligned(dy));
  const auto vectors = [&](auto fast, auto close) {
    [[maybe_unused]] constexpr int kAtOnce = decltype(fast)::value ? 2 : 1;
#pragma unroll kAtOnce
    for (int64_t i = begin + lane * n; i + n <= end; i += kRound) {
      float x[n], y[n] = {}, for_x[n], for_y[n];
      kl_widen(row.x_at(i), x);
      if (pair) kl_widen(row.y_at(i), y);
#pragma unroll
      for (int j = 0; j < n; ++j)
        slope.template operator()<decltype(fast)::value, decltype(close)::value>(
            x[j], pair ? y[j] : x[j], for_x[j], for_y[j]);
      if (dx) kl_store(dx + i, kl_narrow<T>(for_x), aligned);
      if (kBoth && dy) kl_store(dy + i, kl_narrow<T>(for_y), aligned);
    }
  };
  constexpr bool by_difference = kBoth || op == KlOp::kRefPolicy || op == KlOp::kStats;
  const auto any_close = [&](auto fast) {
    if constexpr (by_difference && op != KlOp::kJsd)
      if (!slope.close) return vectors(fast, std::false_type{});
    vectors(fast, std::true_type{});
  };
  if (slope.frame.fast) any_close(std::true_type{});
  else any_close(std::false_type{});
  for (int64_t i = end - (end - begin) % n + lane; i < end; i += 32) {
    float for_x, for_y;
    slope.any(row.x_one(i), pair ? row.y_one(i) : row.x_one(i), for_x, for_y);
    if (dx) dx[i] = kl_narrow<T>(for_x);
    if (kBoth && dy) dy[i] = kl_narrow<T>(for_y);
  }
}

template <class T>
__device__ inline void kl_span_zero(int64_t begin, int64_t end, T* dx, T* dy) {
  constexpr int n = KlVector<T>::kEntries;
  const int lane = int(threadIdx.x) % 32;
  T* const to[2] = {dx, dy};
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    if (!to[side]) continue;
    const bool aligned = kl_aligned(to[side]);
    for (int64_t i = begin + lane * n; i + n <= end; i += 32 * n)
      kl_store(to[side] + i, KlVector<T>{}, aligned);
    for (int64_t i = end - (end - begin) % n + lane; i < end; i += 32)
      to[side][i] = kl_narrow<T>(0.0f);
  }
}

}  // namespace fasttax
