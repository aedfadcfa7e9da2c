#pragma once

// Gradients (math/kl_slope.h, math/kl_stats.h), entry by entry, and a row's tile of them.

#include "../math/kl_slope.h"
#include "../math/kl_stats.h"
#include "kl_jsd.cuh"
#include "kl_sums.cuh"

namespace fasttax {

struct KlRefOf {  // q, where a slope asks for it
  float ay2, inv_s_ref;
  FASTTAX_HD float operator()() const { return kl_exp2(ay2) * inv_s_ref; }
};

struct KlLogsOf {  // log p and log q, where a slope asks for them
  float ax, ay2;
  const KlRow& row;
  FASTTAX_HD KlSides<float> operator()() const {
    const KlLogs<float> logs(row);
    return {ax + logs.x, ay2 * kLn2 + logs.y};
  }
};

struct CappedMath : DeviceMath {};
template <>
inline constexpr bool scalar::kl_finite<CappedMath> = true;

// The gradient at one entry of a row; kBoth: of the reference too.
template <KlOp op, bool kBoth>
struct KlSlope {
  struct Nothing {
    __device__ __forceinline__ Nothing(const StatsRow&, const float*, int64_t, bool) {}
  };

  const KlDeviceFrame frame;
  const KlCap cap;
  struct NoMixture {
    __device__ __forceinline__ NoMixture(const JsdCurves&, const KlParams&, const KlRow&, float,
                                         float) {}
  };

  std::conditional_t<kl_is_kind(op), Nothing, StatsSlope<DeviceMath>> stats;
  float gx, gy;  // upstream times the tempered logits' slope
  std::conditional_t<kl_op_jsd(op), JsdSlope, NoMixture> jsd;
  bool close;

  __device__ __forceinline__ KlSlope(const KlArgs& a, const StatsRow& row, const float* g,
                                     int64_t stride)
      : frame(a, row.kl),
        cap{a.cap},
        stats(row, g, stride, kl_has_ref(op)),
        gx((kl_is_kind(op) ? g[0] : 1.0f) * a.k.row_slope),
        gy((kl_is_kind(op) ? g[0] : 1.0f) * a.k.ref_row_slope),
        jsd(a.jsd, a.k, row.kl, gx, gy),
        close(kl_is_kind(op) ? kl_close(row.kl) : stats_close(row.kl)) {}

  __device__ __forceinline__ KlWay way() const {
    const KlWay way = frame.way();
    return way == KlWay::kCapped && !kl_op_capped(op) ? KlWay::kCareful : way;
  }

  // kWay: way(), of kCapped after KlCap; kClose: close, of jsd whether |u| is at most 1. at_id:
  // of the id's entry.
  template <KlWay kWay, bool kClose>
  __device__ __forceinline__ void at(float x, float y, float& dx, float& dy, bool at_id) const {
    float ax2, ay2, d, ax;
    if (kWay == KlWay::kCareful) {
      float ay;
      frame.careful(x, y, ax, ay, d);
      ax2 = ax * kLog2e, ay2 = ay * kLog2e;
    } else {
      ax2 = frame.ax2<kWay>(x), ay2 = frame.ay2<kWay>(ax2, y), ax = frame.ax<kWay>(x);
      d = frame.gap<kWay>(x, y);
    }
    const float ex = kl_exp2(ax2), p = ex * frame.r.inv_s;
    const KlRefOf q_of{ay2, frame.r.inv_s_ref};
    KlSides<float> out;
    if constexpr (kl_op_jsd(op)) {
      out = jsd.template at<kClose, kWay == KlWay::kCareful, kBoth>(
          frame.k, ex, kBoth ? kl_exp2(ay2) : 0.0f, u_of<kWay>(x, y, d));
    } else if constexpr (kl_is_kind(op)) {
      const KlLogsOf logs_of{ax, ay2, frame.r};
      using M = std::conditional_t<kWay == KlWay::kCapped, CappedMath, DeviceMath>;
      out = kl_slope<kl_kind(op), M, kBoth>(p, d, kClose, q_of, logs_of, frame.r, frame.k.beta);
    } else {
      const bool backwards = kl_has_ref(op) && stats.g_backwards != 0;
      out = stats.template at<true, kBoth>(p, ax, d, kClose, q_of, backwards, at_id);
    }
    if (!kl_op_jsd(op)) {  // whose factors have them
      out.x *= gx;
      out.y *= gy;
    }
    if (kWay == KlWay::kCapped) {
      out.x = KlCap::through(x, out.x);
      if (kBoth) out.y = KlCap::through(x + y, out.y);
    } else if (kWay == KlWay::kCareful) {
      kl_uncap<DeviceMath>(out, x, y, frame.k);
    }
    dx = out.x;
    dy = out.y;
  }

  // One entry by itself.
  __device__ __forceinline__ void any(float x, float y, float& dx, float& dy, bool at_id) const {
    if (!kl_op_jsd(op) && close) at<KlWay::kCareful, true>(x, y, dx, dy, at_id);
    else at<KlWay::kCareful, false>(x, y, dx, dy, at_id);
  }

  // jsd: of d where kCareful
  template <KlWay kWay>
  __device__ __forceinline__ float u_of(float x, float y, float d) const {
    if (kWay == KlWay::kCareful) return d - frame.r.log_ratio;
    return frame.gap<kWay>(x, y, frame.to_u());
  }

  // jsd: whether |u| is at most 1 in all of them
  template <KlWay kWay, int n>
  __device__ __forceinline__ bool near(const float (&x)[n], const float (&y)[n]) const {
    float widest = 0;
#pragma unroll
    for (int j = 0; j < n; ++j) {
      widest = kl_max_or_nan(widest, fabsf(u_of<kWay>(x[j], y[j], 0)));
    }
    return kWay != KlWay::kCareful && widest <= kJsdUnit;
  }
};

// Writes the gradients of entries [begin, end), a span; `dx` may be the policy's logits themselves.
template <KlOp op, bool kBoth, class Source, class T>
__device__ __forceinline__ void kl_span_gradient(const Source& row, const KlSlope<op, kBoth>& slope,
                                                 int64_t begin, int64_t end, const KlTarget<T>& dx,
                                                 const KlTarget<T>& dy) {
  constexpr int n = KlVector<T>::kEntries, kRound = 32 * n;
  constexpr bool pair = kl_has_ref(op);
  const int lane = int(threadIdx.x) % 32;
  const auto vectors = [&](auto way, auto close) {
    constexpr KlWay kWay = decltype(way)::value;
    // All are loaded before the first is stored, for a store may be to what is loaded.
    constexpr int kAtOnce = kWay == KlWay::kFast ? 2 : 1;
#pragma unroll 1
    for (int64_t i = begin + lane * n; i + n <= end; i += kAtOnce * kRound) {
      KlVector<T> of_x[kAtOnce], of_y[kAtOnce];
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        if (i + k * kRound + n > end) continue;
        of_x[k] = row.x.at(i + k * kRound);
        if (pair) of_y[k] = row.y.at(i + k * kRound);
      }
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const int64_t first = i + k * kRound;
        if (first + n > end) continue;
        float x[n], y[n] = {}, for_x[n], for_y[n];
        kl_widen(of_x[k], x);
        if (pair) kl_widen(of_y[k], y);
        if constexpr (kWay == KlWay::kCapped) {
          if constexpr (std::is_same<T, __nv_bfloat16>::value) slope.cap.apiece(x, y);
          else slope.cap.all(x, y);
        }
        const auto each = [&](auto alike) {
#pragma unroll
          for (int j = 0; j < n; ++j)
            slope.template at<kWay, decltype(alike)::value>(x[j], pair ? y[j] : x[j], for_x[j],
                                                            for_y[j], false);
        };
        if constexpr (!kl_op_jsd(op)) each(close);
        else if (slope.template near<kWay>(x, y)) each(std::true_type{});
        else each(std::false_type{});
        const bool whole = first - lane * n + kRound <= end;
        dx.vector(first, for_x, whole);
        if (kBoth) dy.vector(first, for_y, whole);
      }
    }
  };
  constexpr bool by_difference =
      !kl_op_two_sweeps(op) && (kBoth || (kl_op_wants(op) & kWantRefPolicy) != 0);
  const auto any_close = [&](auto way) {
    if constexpr (by_difference)
      if (!slope.close) return vectors(way, std::false_type{});
    vectors(way, std::true_type{});
  };
  const KlWay way = slope.way();
  if (way == KlWay::kFast) any_close(KlWayIs<KlWay::kFast>());
  else if (kl_op_capped(op) && way == KlWay::kCapped) any_close(KlWayIs<KlWay::kCapped>());
  else any_close(KlWayIs<KlWay::kCareful>());
  for (int64_t i = end - (end - begin) % n + lane; i < end; i += 32) {
    float for_x, for_y;
    slope.any(row.x.one(i), pair ? row.y.one(i) : row.x.one(i), for_x, for_y, false);
    dx.one(i, for_x);
    if (kBoth) dy.one(i, for_y);
  }
}

template <class T>
__device__ inline void kl_span_zero(int64_t begin, int64_t end, const KlTarget<T>& dx,
                                    const KlTarget<T>& dy) {
  constexpr int n = KlVector<T>::kEntries;
  const int lane = int(threadIdx.x) % 32;
  const float zeros[n] = {};
  for (int64_t i = begin + lane * n; i + n <= end; i += 32 * n) {
    const bool whole = i - lane * n + 32 * n <= end;
    dx.vector(i, zeros, whole);
    dy.vector(i, zeros, whole);
  }
  for (int64_t i = end - (end - begin) % n + lane; i < end; i += 32) {
    dx.one(i, 0);
    dy.one(i, 0);
  }
}

}  // namespace fasttax
