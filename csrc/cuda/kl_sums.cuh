#pragma once

// The sums of math/kl_row.h over a span of entries by one warp. Spans are cut by V alone, a lane's
// entries and the order of every addition by the span alone: what a row gives does not depend on
// the blocks that share it, on its place in memory, or on the batch around it.
//
// A span's 1024 entries of either row lie in registers: its frame is their maxima, and what is
// summed again is summed from there, so that memory is read once. A span leaves its sums and its
// frame; at the row's end all are moved into one frame in closed form (KlMove).
//
// Every lane's terms are accurate by themselves, and no sum is distrusted. By the largest |d| of a
// vector of 256 entries: up to 1/4 one exp and the series; up to 2 one exp and a polynomial;
// beyond, each entry by a polynomial up to 1 and by two exps else, where (e^ay - e^ax) + e^ax d
// keeps all but a sixth. A span is summed again where 0 * inf made a NaN of its sums, and where the
// offset of its frame hides all but 1/16 of B: then in the frame moved onto its mean gap.

#include "kl_span.cuh"

namespace fasttax {

// How often a span's entries are summed at most: again where 0 * inf made a NaN, and again around
// their mean gap.
constexpr int kMostSpanSums = 3;
constexpr float kHidden = 15.0f / 16;  // the part of B that a frame's offset may make up

// --- a lane's sums

template <KlOp op>
struct KlLanes {
  using P = KlParts<op>;
  KlNear<DeviceMath, P::kWant> near;
  KlMixed<DeviceMath, P::kWant> mixed;
  float mass = 0, moment = 0;  // e^ax and e^ax ax log2 e of all

  // the same additions whatever the reference is
  template <bool kGuarded>
  __device__ __forceinline__ void entropy(float ex, float ax2) {
    mass += ex;
    moment = fmaf(ex, kGuarded ? fmaxf(ax2, -200.0f) : ax2, moment);  // 0 * inf is 0
  }
  __device__ __forceinline__ void middle(float ex, float d) {
    const float f = kl_bregman_mid(d);
    near.add(ex, d, f - d, f);
  }
  __device__ __forceinline__ void plain(float ex, float ey) {
    mixed.x += ex;
    mixed.y += ey;
  }
  // Of any d: by the polynomial, or by terms that beyond 1 cancel to a sixth at most. kGuarded: 0 *
  // inf is 0.
  template <bool kGuarded>
  __device__ __forceinline__ void any(float ex, float ey, float d) {
    const bool close = fabsf(d) <= kUnitGap;
    const float f = kl_bregman_unit(d);
    const float pull = kGuarded ? times(ex, d) : ex * d, bregman = ex * f;
    const float change = close ? bregman - pull : ey - ex;
    mixed.x += ex;
    mixed.y += ey;
    mixed.g += change;
    if (P::kForwards) {
      mixed.a += pull;
      mixed.b += close ? bregman : change + pull;
    }
    if (P::kBackwards) {
      const float back = kGuarded ? times(ey, d) : ey * d;
      mixed.back -= back;
      mixed.c += close ? ex * fmaf(-f, d + 1, d * d) : -change - back;
    }
  }

  __device__ __forceinline__ void pack(float (&v)[P::kPadded]) const {
    if (P::kPair) {
      v[0] = near.s + near.g + mixed.y;
      v[1] = P::kPlain ? mixed.y - mixed.x : near.g + mixed.g;
      if (P::kForwards) {
        v[P::kForth] = near.b + mixed.b;
        v[P::kForth + 1] = near.b - near.g + mixed.a;
      }
      if (P::kBackwards) {
        v[P::kBack] = near.c + mixed.c;
        v[P::kBack + 1] = near.c + near.g + mixed.back;
      }
    }
    v[P::kMass] = P::kEntropy ? mass : near.s + mixed.x;
    if (P::kEntropy) v[P::kMass + 1] = moment;
#pragma unroll
    for (int i = P::kSums; i < P::kPadded; ++i) v[i] = 0;
  }
};

template <KlOp op>
__device__ __forceinline__ void kl_general_entry(const KlDeviceFrame& frame, float x, float y,
                                                 bool there, KlLanes<op>& lanes) {
  float ax, ay, d, ax2 = frame.ax2<KlWay::kFast>(x);
  frame.careful(x, y, ax, ay, d);
  if (!frame.bare) ax2 = ax * kLog2e;
  if (!there) ax2 = ay = -kl_infinity();  // which under a softcap no -inf makes of it
  const float ex = kl_exp2(ax2);
  if (KlParts<op>::kPlain) lanes.plain(ex, kl_exp2(ay * kLog2e));
  else if (KlParts<op>::kPair) lanes.template any<true>(ex, kl_exp2(ay * kLog2e), d);
  if (KlParts<op>::kEntropy) lanes.template entropy<true>(ex, ax2);
}

// What of a span sets how its vectors are summed.
struct KlSpanWay {
  const KlDeviceFrame& frame;
  const KlCap cap;
  float few = 0;      // of capped logits the sum of (x - y)^2 up to which every |d| is small
  bool wide = false;  // a vector of the span had a |d| beyond 2: the next ones are not looked at

  // |d| <= |x - y| scale + |minus_cs|, for a cap draws logits together
  __device__ __forceinline__ void look_for_near() {
    const float room = fmaxf(kSmallGap - fabsf(frame.minus_cs), 0.0f) / frame.scale;
    few = fminf(cap.c.few_reach, room * room);
  }
};

template <KlOp op, KlWay kWay, int n>
__device__ __forceinline__ void kl_fast_vector(float (&x)[n], float (&y)[n], KlSpanWay& way,
                                               KlLanes<op>& lanes) {
  using P = KlParts<op>;
  const KlDeviceFrame& frame = way.frame;
  float d[n];
  const auto place = [&] {  // x becomes ax log2 e
#pragma unroll
    for (int j = 0; j < n; ++j) {
      if (P::kPair) d[j] = frame.gap<kWay>(x[j], y[j]);
      x[j] = frame.ax2<kWay>(x[j]);
    }
  };
  // by itself: from ax and d it has the rounding of ax, large where y peaks
  const auto ey = [&](int j) { return kl_exp2(frame.ay2<kWay>(x[j], y[j])); };
  const auto each = [&](auto add) {
#pragma unroll
    for (int j = 0; j < n; ++j) {
      const float ex = kl_exp2(x[j]);
      add(ex, j);
      if (P::kEntropy) lanes.template entropy<!P::kPair>(ex, x[j]);
    }
  };
  const auto near = [&] { each([&](float ex, int j) { lanes.near.add(ex, d[j]); }); };
  const auto plain = [&] { each([&](float ex, int j) { lanes.plain(ex, ey(j)); }); };
  const auto all_within = [&](float widest, float reach) {
    return __ballot_sync(kWholeWarp, !(widest <= reach)) == 0;
  };
  if constexpr (kWay == KlWay::kCapped) {
    const float apart = KlCap::apart(x, y);
    if (all_within(apart, P::kPlain ? way.cap.c.few_reach : way.few)) {
      way.cap.template all<KlCap::kFew>(x, y);
      place();
      if constexpr (P::kPlain) return plain();
      else return near();
    }
    if (all_within(apart, way.cap.c.few_reach)) way.cap.template all<KlCap::kFew>(x, y);
    else if (all_within(apart, way.cap.c.reach)) way.cap.template all<KlCap::kAll>(x, y);
    else way.cap.template all<KlCap::kAny>(x, y);
  }
  place();
  if constexpr (!P::kPair) return each([](float, int) {});
  if constexpr (P::kPlain) return plain();
  if (!way.wide) {
    float widest = 0;
#pragma unroll
    for (int j = 0; j < n; ++j) widest = kl_max_or_nan(widest, fabsf(d[j]));
    if (all_within(widest, kSmallGap)) return near();
    if (all_within(widest, kMidGap)) return each([&](float ex, int j) { lanes.middle(ex, d[j]); });
    way.wide = true;
  }
  each([&](float ex, int j) { lanes.template any<false>(ex, ey(j), d[j]); });
}

// Mass and moment of a span around its highest entry, which is counted apart: where that entry
// holds nearly all of the mass its 1 in every sum would cost the digits that the entropy lives on.
template <KlOp op, class T>
__device__ __forceinline__ SpanEntropy kl_around_peak(KlSpanEntries<T>& span,
                                                      const KlDeviceFrame& frame) {
  constexpr int n = KlVector<T>::kEntries;
  const auto each = [&](auto f) {
    span.template in_turn<KlParts<op>::kPair>([&](int j, float (&x)[n], float (&y)[n]) {
#pragma unroll
      for (int i = 0; i < n; ++i) {
        float ax, ay, d;
        if (frame.bare) {
          f(frame.ax2<KlWay::kFast>(x[i]));
        } else {
          frame.careful(x[i], y[i], ax, ay, d);
          f(span.has(j, i) ? ax * kLog2e : -kl_infinity());
        }
      }
    });
  };
  float peak = -kl_infinity();
  each([&](float ax2) { peak = fmaxf(peak, ax2); });
  peak = kl_warp_max(peak);
  SpanEntropy own{0, 0, peak, 0};
  each([&](float ax2) {
    const float off = ax2 - peak, e = off == 0 ? 0.0f : kl_exp2(off);
    own.peaks += off == 0;
    own.mass += e;
    own.moment = fmaf(e, fmaxf(off, -200.0f), own.moment);
  });
#pragma unroll
  for (int bit = 16; bit > 0; bit /= 2) {
    own.mass += __shfl_xor_sync(kWholeWarp, own.mass, bit);
    own.moment += __shfl_xor_sync(kWholeWarp, own.moment, bit);
    own.peaks += __shfl_xor_sync(kWholeWarp, own.peaks, bit);
  }
  return own;
}

// Whether B / S is mostly h(tau), tau = g / s: what the frame's offset adds to it.
__device__ __forceinline__ bool kl_hidden(float b, float g, float s) {
  const float room = kHidden * b;
  if (!(g * g > 2 * room * fminf(s, s + g))) return false;  // h(tau) <= tau^2 / 2 min(1, 1 + tau)
  if (fabsf(g) <= s / 4) return g * g > room * (2 * s + g * (4.0f / 3));  // h within 1 %
  const float tau = g / s;
  return (tau - log1pf(tau)) * s > room;
}

// Of `count` entries from `begin`, up to kSpan, to part_of(): an address is made when it is written
// to, for while sums are taken there is no register to hold it.
template <KlOp op, class Source, class PartOf>
__device__ __forceinline__ void kl_unit_sums(const Source& row, const KlArgs& a, int64_t begin,
                                             int count, const PartOf& part_of) {
  const KlParams& k = a.k;
  using T = typename Source::Entry;
  using P = KlParts<op>;
  constexpr int n = KlVector<T>::kEntries, kStride = 32 / P::kPadded;
  // Of float32 a span is half of all registers, which leaves none for some capped entries at once.
  constexpr bool kCaps = kl_op_capped(op) && sizeof(T) == 2;
  const int lane = int(threadIdx.x) % 32;
  KlSpanEntries<T> span;
  span.template load<P::kPair>(row, begin, count);
  KlRow r{};
  {
    const KlSides<float> top = span.template maxima<P::kPair>(k);
    if (top.x > -kl_infinity()) r.mx = top.x;
    if (top.y > -kl_infinity()) r.my = top.y;
  }
  float sum = 0;
  const auto total = [&](int i) { return __shfl_sync(kWholeWarp, sum, i * kStride); };
  bool guarded = false, centred = false;
#pragma unroll 1
  for (int sums = 0; sums < kMostSpanSums; ++sums) {
    const KlDeviceFrame frame(a, r);
    const bool whole = !guarded && count == kSpan,
               fast = whole && (P::kPair ? frame.fast : frame.bare),
               capped = kCaps && whole && frame.capped;
    KlLanes<op> lanes;
    KlSpanWay way{frame, {a.cap}};
    span.forget();
    if (fast) {
#pragma unroll
      for (int j = 0; j < KlSpanEntries<T>::kVectors; ++j) {
        float x[n], y[n];
        kl_widen(span.x[j], x);
        kl_widen(P::kPair ? span.y[j] : span.x[j], y);
        kl_fast_vector<op, KlWay::kFast>(x, y, way, lanes);
      }
    } else if (capped) {
      constexpr int kHalf = KlSpanEntries<T>::kVectors / 2;
      way.look_for_near();
#pragma unroll 1
      for (int half = 0; half < 2; ++half) {  // the code of one half: registers have no index
#pragma unroll
        for (int j = 0; j < kHalf; ++j) {
          float x[n], y[n];
          kl_widen(kl_either(half, span.x[j], span.x[j + kHalf]), x);
          kl_widen(kl_either(half, span.y[j], span.y[j + kHalf]), y);
          kl_fast_vector<op, KlWay::kCapped>(x, y, way, lanes);
        }
      }
    } else {
      span.template in_turn<P::kPair>([&](int j, const float (&x)[n], const float (&y)[n]) {
#pragma unroll
        for (int i = 0; i < n; ++i) kl_general_entry(frame, x[i], y[i], span.has(j, i), lanes);
      });
    }
    float v[P::kPadded];
    lanes.pack(v);
    sum = kl_warp_sums<P::kPadded>(v);
    if constexpr (P::kForwards || P::kBackwards) {
      const float y = total(0), g = total(1), s = total(P::kMass);
      const float b = P::kForwards ? total(P::kForth) : 0, c = P::kBackwards ? total(P::kBack) : 0;
      if ((fast || capped) && b + c != b + c) {
        guarded = true;
        continue;
      }
      float gap = 0;
      if (P::kBackwards && kl_hidden(c, -g, y)) gap = -total(P::kBack + 1) / y;
      if (P::kForwards && kl_hidden(b, g, s)) gap = total(P::kForth + 1) / s;
      if (centred || gap == 0 || !(fabsf(gap) < kFrameSlack)) break;
      r.my -= gap / k.ref_row_scale;
      centred = true;
    } else {
      break;
    }
  }
  float* const part = part_of();
  if (lane % kStride == 0 && lane / kStride < P::kSums) part[lane / kStride] = sum;
  const bool no_x = total(P::kMass) == 0, no_y = P::kPair ? total(0) == 0 : no_x;
  if (lane == 0) {
    part[P::kFrame] = no_x ? -kl_infinity() : r.mx;
    part[P::kFrame + 1] = no_y ? -kl_infinity() : r.my;
  }
  if constexpr (P::kEntropy) {
    SpanEntropy own{total(P::kMass), total(P::kMass + 1), 0, 0};
    if (own.moment * kLn2 > float(kDominated) * own.mass) {
      const KlDeviceFrame frame(a, r);
      own = kl_around_peak<op>(span, frame);
    }
    __syncwarp();  // the lanes that wrote these floats are not the one that does so now
    if (lane == 0) own.write(part + P::kMass);
  }
}

// Of span `index` of a row, to part_of(). kOnChip: a span is one unit. scratch_of(): kMostParts
// floats of this warp.
template <KlOp op, bool kOnChip, class Source, class PartOf, class ScratchOf>
__device__ __forceinline__ void kl_span_sums(const Source& row, const KlArgs& a, int index,
                                             const PartOf& part_of, const ScratchOf& scratch_of) {
  const int64_t v = a.v;
  const int units = kOnChip ? 1 : a.span / kSpan;
#pragma unroll 1
  for (int i = 0; i < units; ++i) {
    const int64_t begin = (int64_t(index) * units + i) * kSpan;
    if (begin >= v) return;
    kl_unit_sums<op>(row, a, begin, int(v - begin < kSpan ? v - begin : kSpan),
                     [&] { return i == 0 ? part_of() : scratch_of(); });
    if (i == 0) continue;
    __syncwarp();
    if (threadIdx.x % 32 == 0) kl_join_parts<op>(a.k, part_of(), scratch_of());
    __syncwarp();
  }
}

}  // namespace fasttax
