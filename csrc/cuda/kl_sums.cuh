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

#include "kl_parts.cuh"

namespace fasttax {

// How often a span's entries are summed at most: again where 0 * inf made a NaN, and again around
// their mean gap.
constexpr int kMostSpanSums = 3;
constexpr float kHidden = 15.0f / 16;  // the part of B that a frame's offset may make up

// v[i] summed over the warp, in lane i * 32 / K and the ones after it: K + log2(32 / K) shuffles
// for K sums.
template <int half, int bit, int K>
__device__ __forceinline__ void kl_fold(float (&v)[K]) {
  if constexpr (half > 0) {
    const bool upper = threadIdx.x & bit;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float send = upper ? v[i] : v[i + half], keep = upper ? v[i + half] : v[i];
      v[i] = keep + __shfl_xor_sync(kWholeWarp, send, bit);
    }
  } else {
    v[0] += __shfl_xor_sync(kWholeWarp, v[0], bit);
  }
  if constexpr (bit > 1) kl_fold<half / 2, bit / 2>(v);
}

template <int K>
__device__ __forceinline__ float kl_warp_sums(float (&v)[K]) {
  kl_fold<K / 2, 16>(v);
  return v[0];
}

__device__ __forceinline__ float kl_warp_max(float v) {
#pragma unroll
  for (int bit = 16; bit > 0; bit /= 2) v = fmaxf(v, __shfl_xor_sync(kWholeWarp, v, bit));
  return v;
}

template <class T, int n>
__device__ __forceinline__ KlVector<T> kl_highest(const KlVector<T> (&of)[n]) {
  KlVector<T> most = of[0];
#pragma unroll
  for (int j = 1; j < n; ++j)
#pragma unroll
    for (int w = 0; w < 4; ++w) most.word(w) = kl_higher<T>(most.word(w), of[j].word(w));
  return most;
}

template <class T>
__device__ __forceinline__ KlVector<T> kl_either(int second, const KlVector<T>& a,
                                                 const KlVector<T>& b) {
  KlVector<T> one;
#pragma unroll
  for (int w = 0; w < 4; ++w) one.word(w) = second ? b.word(w) : a.word(w);
  return one;
}

// Of every lane's entries the highest, of x and of y.
template <class T>
__device__ __forceinline__ KlSides<float> kl_warp_max(const KlVector<T>& x, const KlVector<T>& y) {
  if constexpr (std::is_same<T, float>::value) {
    float wide_x[4], wide_y[4];
    kl_widen(x, wide_x);
    kl_widen(y, wide_y);
    return {kl_warp_max(fmaxf(fmaxf(wide_x[0], wide_x[1]), fmaxf(wide_x[2], wide_x[3]))),
            kl_warp_max(fmaxf(fmaxf(wide_y[0], wide_y[1]), fmaxf(wide_y[2], wide_y[3])))};
  } else {  // both in one word
    const uint32_t of_x = kl_higher<T>(kl_higher<T>(x.word(0), x.word(1)),
                                       kl_higher<T>(x.word(2), x.word(3))),
                   of_y = kl_higher<T>(kl_higher<T>(y.word(0), y.word(1)),
                                       kl_higher<T>(y.word(2), y.word(3)));
    uint32_t most =
        kl_higher<T>((of_x & 0xffffu) | (of_y << 16), (of_x >> 16) | (of_y & 0xffff0000u));
#pragma unroll
    for (int bit = 16; bit > 0; bit /= 2)
      most = kl_higher<T>(most, __shfl_xor_sync(kWholeWarp, most, bit));
    KlVector<T> both{};
    both.word(0) = most;
    float wide[KlVector<T>::kEntries];
    kl_widen(both, wide);
    return {wide[0], wide[1]};
  }
}

// --- a span in registers

template <class T>
struct KlSpanEntries {
  static constexpr int kEntries = KlVector<T>::kEntries;
  static constexpr int kRound = 32 * kEntries;
  static constexpr int kVectors = kSpan / kRound;
  KlVector<T> x[kVectors], y[kVectors];
  int left;  // entries from this lane's first one to the end

  // `count` entries from `begin`, filled up with -inf
  template <bool kPair, class Source>
  __device__ __forceinline__ void load(const Source& row, int64_t begin, int count) {
    const int first = int(threadIdx.x % 32) * kEntries;
    const int64_t own = begin + first;
    left = count - first;
    if (count == kSpan) {
      const auto beyond_x = row.x.load_span(x, own);
      typename Source::Beyond beyond_y{};
      if (kPair) beyond_y = row.y.load_span(y, own);
      row.x.settle_span(x, own, beyond_x);
      if (kPair) row.y.settle_span(y, own, beyond_y);
      return;
    }
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      float to_x[kEntries], to_y[kEntries];
#pragma unroll
      for (int i = 0; i < kEntries; ++i) {
        to_x[i] = has(j, i) ? row.x.one(own + (j * kRound + i)) : -kl_infinity();
        to_y[i] = kPair && has(j, i) ? row.y.one(own + (j * kRound + i)) : -kl_infinity();
      }
      x[j] = kl_narrow<T>(to_x);
      y[j] = kl_narrow<T>(to_y);
    }
  }

  // Whether there is an entry i in vector j, and whether any lane has one there.
  __device__ __forceinline__ bool has(int j, int i) const { return j * kRound + i < left; }
  __device__ __forceinline__ bool has(int j) const {
    return j * kRound < left + int(threadIdx.x % 32) * kEntries;
  }

  // f(j, x, y) for each vector that has entries, one at a time in x[0] and y[0]: registers have no
  // index, and the code of what is rare is held short.
  template <bool kPair, class F>
  __device__ __forceinline__ void in_turn(const F& f) {
#pragma unroll 1
    for (int j = 0; j < kVectors; ++j) {
      if (has(j)) {
        float wide_x[kEntries], wide_y[kEntries];
        kl_widen(x[0], wide_x);
        kl_widen(kPair ? y[0] : x[0], wide_y);
        f(j, wide_x, wide_y);
      }
      const KlVector<T> first_x = x[0], first_y = y[0];
#pragma unroll
      for (int i = 0; i + 1 < kVectors; ++i) x[i] = x[i + 1], y[i] = y[i + 1];
      x[kVectors - 1] = first_x, y[kVectors - 1] = first_y;
    }
  }

  // Keeps the compiler from carrying what it makes of the entries from one use to the next: twice
  // the registers.
  __device__ __forceinline__ void forget() {
#pragma unroll
    for (int j = 0; j < kVectors; ++j)
#pragma unroll
      for (int w = 0; w < 4; ++w) FASTTAX_OPAQUE(x[j].word(w), y[j].word(w));
  }

  // Their maxima, NaN passed over; -inf where there is none.
  template <bool kPair>
  __device__ __forceinline__ KlSides<float> maxima(const KlParams& k) const {
    KlSides<float> most{-kl_infinity(), -kl_infinity()};
    if (kPair && k.inf_mask) {
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
        float wide_x[kEntries], wide_y[kEntries];
        kl_widen(x[j], wide_x);
        kl_widen(y[j], wide_y);
#pragma unroll
        for (int i = 0; i < kEntries; ++i) {
          if (wide_x[i] == -kl_infinity() || wide_y[i] == -kl_infinity()) continue;
          most.x = fmaxf(most.x, wide_x[i]);
          most.y = fmaxf(most.y, wide_y[i]);
        }
      }
      most.x = kl_warp_max(most.x);
      most.y = kl_warp_max(most.y);
    } else if constexpr (kPair) {
      most = kl_warp_max(kl_highest(x), kl_highest(y));
    } else {
      most.x = kl_warp_max(kl_highest(x), kl_highest(x)).x;
    }
    // the caps rise with the logits
    if (k.cap > 0 && !(k.inf_mask && most.x == -kl_infinity()))
      most.x = kl_capped<DeviceMath>(most.x, k.scale, k.cap);
    if (kPair && k.ref_cap > 0 && !(k.inf_mask && most.y == -kl_infinity()))
      most.y = kl_capped<DeviceMath>(most.y, k.ref_scale, k.ref_cap);
    if (!kPair) most.y = most.x;
    return most;
  }
};

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
  float d[n], ay2[n];
  // x becomes ax log2 e; e^ay by itself: from ax and d it has the rounding of ax, large where y
  // peaks
  const auto place = [&] {
#pragma unroll
    for (int j = 0; j < n; ++j) {
      if (P::kPair) d[j] = frame.gap<kWay>(x[j], y[j]), ay2[j] = frame.ay2<kWay>(x[j], y[j]);
      x[j] = frame.ax2<kWay>(x[j]);
    }
  };
  const auto each = [&](auto add) {
#pragma unroll
    for (int j = 0; j < n; ++j) {
      const float ex = kl_exp2(x[j]);
      add(ex, j);
      if (P::kEntropy) lanes.template entropy<!P::kPair>(ex, x[j]);
    }
  };
  const auto near = [&] { each([&](float ex, int j) { lanes.near.add(ex, d[j]); }); };
  const auto plain = [&] { each([&](float ex, int j) { lanes.plain(ex, kl_exp2(ay2[j])); }); };
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
  each([&](float ex, int j) { lanes.template any<false>(ex, kl_exp2(ay2[j]), d[j]); });
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

// Of `count` entries from `begin`, up to kSpan, to `part`.
template <KlOp op, class Source>
__device__ __forceinline__ void kl_unit_sums(const Source& row, const KlArgs& a, int64_t begin,
                                             int count, float* part) {
  const KlParams& k = a.k;
  using T = typename Source::Entry;
  using P = KlParts<op>;
  constexpr int n = KlVector<T>::kEntries, kStride = 32 / P::kPadded;
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
               capped = kl_op_capped(op) && whole && frame.capped;
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

// Of span `index` of a row of v. kOnChip: a span is one unit. `scratch`: kMostParts floats of this
// warp.
template <KlOp op, bool kOnChip, class Source>
__device__ __forceinline__ void kl_span_sums(const Source& row, const KlArgs& a, int index,
                                             float* part, float* scratch) {
  const int64_t v = a.v;
  const int units = kOnChip ? 1 : int(kl_span(v) / kSpan);
#pragma unroll 1
  for (int i = 0; i < units; ++i) {
    const int64_t begin = (int64_t(index) * units + i) * kSpan;
    if (begin >= v) return;
    kl_unit_sums<op>(row, a, begin, int(v - begin < kSpan ? v - begin : kSpan),
                     i == 0 ? part : scratch);
    if (i == 0) continue;
    __syncwarp();
    if (threadIdx.x % 32 == 0) kl_join_parts<op>(a.k, part, scratch);
    __syncwarp();
  }
}

}  // namespace fasttax
