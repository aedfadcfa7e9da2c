#pragma once

// The sums of math/kl_row.h over a span of entries by one warp. Spans are cut by V alone, a lane's
// entries and the order of every addition by the span alone: what a row gives does not depend on
// the blocks that share it, on its place in memory, or on the batch around it.
//
// Three ways to sum a vector, by how many lanes hold an entry with |d| > 1/4: none: one exp and the
// series; few: each entry by its own size; many: two exps and plain sums, 13 instructions an entry
// against 27. Plain sums are good to 1e-7 of their mass: a row that comes out below 1e-2 of that is
// summed again, each entry by its own size and with 0 * inf = 0.

#include "kl_elements.cuh"

namespace fasttax {

constexpr int kKlThreads = 256;
constexpr int kKlWarps = kKlThreads / 32;
constexpr int kSpan = 1024;  // entries of one warp in a row of up to 2^19; a multiple of it beyond
constexpr int kMaxSpans = 512;
// vectors of either row whose loads a lane starts before it needs the first: 128 bytes
constexpr int kBatch = 4;
constexpr int kPrime = 1024;  // entries that a row's first frame is taken from
constexpr int kFewLanes = 16;

__host__ __device__ inline int64_t kl_span(int64_t v) {
  return (v + int64_t(kSpan) * kMaxSpans - 1) / (int64_t(kSpan) * kMaxSpans) * kSpan;
}
__host__ __device__ inline int kl_spans(int64_t v) {
  return int((v + kl_span(v) - 1) / kl_span(v));
}

// How many floats a span leaves.
FASTTAX_HD constexpr int kl_parts_count(KlOp op) {
  const int want = kl_op_wants(op),
            ways = ((want & kWantPolicyRef) != 0) + ((want & kWantRefPolicy) != 0);
  return (kl_has_ref(op) ? 4 + 2 * ways : 0) + ((want & kWantEntropy) != 0 ? 4 : 0);
}

// That, the next power of two, and where its SpanEntropy lies among them.
template <KlOp op>
struct KlParts {
  static constexpr int kWant = kl_op_wants(op);
  static constexpr bool kPair = kl_has_ref(op);
  static constexpr bool kForwards = (kWant & kWantPolicyRef) != 0;
  static constexpr bool kBackwards = (kWant & kWantRefPolicy) != 0;
  static constexpr bool kEntropy = (kWant & kWantEntropy) != 0;
  static constexpr int kCount = kl_parts_count(op);
  static constexpr int kMass = kCount - 4 * kEntropy;
  static constexpr int kPadded = kCount <= 4 ? 4 : kCount <= 8 ? 8 : 16;
};
constexpr int kSecondParts = 3;  // of a second sweep: KlThree

// sum e^ax and sum e^ax ax log2 e of a span; where the highest entry dominates them
// (kl_around_peak), around that one, the pivot, of which there are `peaks`.
struct SpanEntropy {
  float mass, moment, pivot, peaks;

  __device__ __forceinline__ static SpanEntropy read(const volatile float* part) {
    return {part[0], part[1], part[2], part[3]};
  }
  __device__ __forceinline__ void write(float* part) const {
    part[0] = mass;
    part[1] = moment;
    part[2] = pivot;
    part[3] = peaks;
  }
};

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

template <KlOp op>
struct KlLanes {
  using P = KlParts<op>;
  KlNear<DeviceMath, P::kWant> near;
  KlFar<DeviceMath, P::kWant> far;
  float mass = 0, moment = 0;  // e^ax and e^ax ax log2 e of all

  __device__ __forceinline__ void entropy(float ex, float ax2) {
    mass += ex;
    moment = fmaf(ex, ax2, moment);
  }

  __device__ __forceinline__ void pack(float (&v)[P::kPadded]) const {
    int i = 0;
    if (P::kPair) v[i++] = near.s, v[i++] = near.g, v[i++] = far.x, v[i++] = far.y;
    if (P::kForwards) v[i++] = near.b, v[i++] = far.a;
    if (P::kBackwards) v[i++] = near.c, v[i++] = far.c;
    if (P::kEntropy) v[i++] = mass, v[i++] = moment;
#pragma unroll
    for (; i < P::kPadded; ++i) v[i] = 0;
  }
};

template <KlOp op>
__device__ __forceinline__ void kl_careful_entry(const KlDeviceFrame& frame, float x, float y,
                                                 KlLanes<op>& lanes) {
  float ax, ay, d;
  frame.careful(x, y, ax, ay, d);
  const float ex = kl_exp2(ax * kLog2e);
  if (KlParts<op>::kPair) {
    if (fabsf(d) <= kSmallGap) lanes.near.add(ex, d);
    else lanes.far.add_careful(ex, kl_exp2(ay * kLog2e), d);
  }
  if (KlParts<op>::kEntropy && ex != 0) lanes.entropy(ex, ax * kLog2e);  // NaN != 0
}

template <KlOp op, class T>
__device__ __forceinline__ void kl_fast_vector(const KlDeviceFrame& frame,
                                               const KlVector<T>& x_bits, const KlVector<T>& y_bits,
                                               KlLanes<op>& lanes) {
  constexpr int n = KlVector<T>::kEntries;
  float x[n], y[n];
  kl_widen(x_bits, x);
  if constexpr (!KlParts<op>::kPair) {
#pragma unroll
    for (int j = 0; j < n; ++j) {
      const float ax2 = frame.ax2(x[j]);
      lanes.entropy(kl_exp2(ax2), ax2);
    }
  } else {
    kl_widen(y_bits, y);
    float d[n], widest = 0;
#pragma unroll
    for (int j = 0; j < n; ++j) {
      d[j] = frame.gap(x[j], y[j]);
      x[j] = frame.ax2(x[j]);
      widest = fmaxf(widest, fabsf(d[j]));  // loses a NaN; the sums do not
    }
    const auto each = [&](auto add) {
#pragma unroll
      for (int j = 0; j < n; ++j) {
        const float ex = kl_exp2(x[j]);
        add(ex, y[j], d[j]);
        if (KlParts<op>::kEntropy) lanes.entropy(ex, x[j]);
      }
    };
    // e^ay by itself: from ax and d it has the rounding of ax, large where y peaks
    const auto plain = [&](float ex, float raw_y, float gap) {
      lanes.far.add(ex, kl_exp2(frame.ay2(raw_y)), gap);
    };
    const unsigned wide = __ballot_sync(kWholeWarp, !(widest <= kSmallGap));
    if (wide == 0) {
      each([&](float ex, float, float gap) { lanes.near.add(ex, gap); });
    } else if (__popc(wide) > kFewLanes) {
      each(plain);
    } else {
      each([&](float ex, float raw_y, float gap) {
        if (fabsf(gap) <= kSmallGap) lanes.near.add(ex, gap);
        else plain(ex, raw_y, gap);
      });
    }
  }
}

// Mass and moment of a span around its highest entry, which is counted apart: where that entry
// holds nearly all of the mass or stands above the frame, its ax in every term, or its 1 in every
// sum, would cost the digits that the entropy lives on (KlSums).
template <KlOp op, class Source>
__device__ void kl_around_peak(const Source& row, const KlDeviceFrame& frame, int64_t begin,
                               int64_t end, float* part) {
  const int lane = int(threadIdx.x) % 32;
  const auto ax_at = [&](int64_t i) {
    float x = row.x_one(i), y = KlParts<op>::kPair ? row.y_one(i) : x, ay, d, ax;
    frame.careful(x, y, ax, ay, d);
    return ax;
  };
  float peak = -kl_infinity();
  for (int64_t i = begin + lane; i < end; i += 32) peak = fmaxf(peak, ax_at(i));
#pragma unroll
  for (int bit = 16; bit > 0; bit /= 2) peak = fmaxf(peak, __shfl_xor_sync(kWholeWarp, peak, bit));
  SpanEntropy own{0, 0, peak, 0};
  for (int64_t i = begin + lane; i < end; i += 32) {
    const float off = (ax_at(i) - peak) * kLog2e, e = kl_exp2(off);
    if (off == 0) {
      own.peaks += 1;
    } else if (e != 0) {
      own.mass += e;
      own.moment = fmaf(e, off, own.moment);
    }
  }
#pragma unroll
  for (int bit = 16; bit > 0; bit /= 2) {
    own.mass += __shfl_xor_sync(kWholeWarp, own.mass, bit);
    own.moment += __shfl_xor_sync(kWholeWarp, own.moment, bit);
    own.peaks += __shfl_xor_sync(kWholeWarp, own.peaks, bit);
  }
  if (lane == 0) own.write(part);
}

template <KlOp op, class Source>
__device__ void kl_span_sums(const Source& row, const KlDeviceFrame& frame, bool careful,
                             int64_t begin, int64_t end, float* part) {
  using T = typename Source::Entry;
  using P = KlParts<op>;
  constexpr int n = KlVector<T>::kEntries, kRound = 32 * n;
  const int lane = int(threadIdx.x) % 32;
  KlLanes<op> lanes;
  int64_t i = begin;
  if (careful) {
#pragma unroll 1
    for (; i + kRound <= end; i += kRound) {
      float x[n], y[n] = {};
      kl_widen(row.x_at(i + lane * n), x);
      if (P::kPair) kl_widen(row.y_at(i + lane * n), y);
#pragma unroll
      for (int j = 0; j < n; ++j) kl_careful_entry(frame, x[j], P::kPair ? y[j] : x[j], lanes);
    }
  } else {
#pragma unroll 1
    for (; i + kBatch * kRound <= end; i += kBatch * kRound) {
      KlVector<T> x[kBatch], y[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        x[j] = row.x_at(i + j * kRound + lane * n);
        if (P::kPair) y[j] = row.y_at(i + j * kRound + lane * n);
      }
#pragma unroll
      for (int j = 0; j < kBatch; ++j) kl_fast_vector(frame, x[j], y[j], lanes);
    }
  }
#pragma unroll 1
  for (i += lane; i < end; i += 32)
    kl_careful_entry(frame, row.x_one(i), P::kPair ? row.y_one(i) : row.x_one(i), lanes);
  float v[P::kPadded];
  lanes.pack(v);
  constexpr int kStride = 32 / P::kPadded;
  const float sum = kl_warp_sums<P::kPadded>(v);
  if (lane % kStride == 0 && lane / kStride < P::kCount) part[lane / kStride] = sum;
  if (P::kEntropy) {
    const float mass = __shfl_sync(kWholeWarp, sum, P::kMass * kStride),
                moment = __shfl_sync(kWholeWarp, sum, (P::kMass + 1) * kStride) * kLn2;
    if (moment > float(kDominated) * mass && mass <= 3e38f) {
      __syncwarp();  // the lanes that wrote these floats are not those that do so now
      kl_around_peak<op>(row, frame, begin, end, part + P::kMass);
    }
  }
}

// --- a row's sums out of its spans'

// in every lane, always in the same order
__device__ __forceinline__ double kl_warp_total(double v) {
#pragma unroll
  for (int bit = 16; bit > 0; bit /= 2) v += __shfl_xor_sync(kWholeWarp, v, bit);
  return v;
}

template <KlOp op>
__device__ __forceinline__ void kl_add_part(const volatile float* part, KlSums& t) {
  using P = KlParts<op>;
  if constexpr (P::kPair) {
    KlNear<DeviceMath, P::kWant> near;
    KlFar<DeviceMath, P::kWant> far;
    near.s = part[0], near.g = part[1], far.x = part[2], far.y = part[3];
    if (P::kForwards) near.b = part[4], far.a = part[5];
    if (P::kBackwards) near.c = part[4 + 2 * P::kForwards], far.c = part[5 + 2 * P::kForwards];
    t += near;
    t += far;
  }
  if constexpr (P::kEntropy) {
    const SpanEntropy span = SpanEntropy::read(part + P::kMass);
    const double pivot = span.pivot, around = double(span.peaks) + double(span.mass);
    const double off = double(span.moment) * double(kLn2), scale = pivot == 0 ? 1.0 : exp(pivot);
    t.mass += scale * around;
    t.moment += scale * (off + pivot * around);
  }
}

template <KlOp op>
__device__ __forceinline__ void kl_total(KlSums& t) {
  using P = KlParts<op>;
  if (P::kPair) {
    t.s = kl_warp_total(t.s), t.y = kl_warp_total(t.y), t.g = kl_warp_total(t.g),
    t.far = kl_warp_total(t.far);
    if (P::kForwards) t.b = kl_warp_total(t.b), t.a = kl_warp_total(t.a);
    if (P::kBackwards) t.c = kl_warp_total(t.c), t.back = kl_warp_total(t.back);
  }
  if (P::kEntropy) t.mass = kl_warp_total(t.mass), t.moment = kl_warp_total(t.moment);
}

}  // namespace fasttax
