#pragma once

// What a warp leaves of a span of entries, and how the spans' sums are joined at the row's end.

#include "../math/kl_slope.h"
#include "kl_device_frame.cuh"

namespace fasttax {

constexpr int kKlThreads = 256;
constexpr int kKlWarps = kKlThreads / 32;
// How many floats a span leaves.
FASTTAX_HD constexpr int kl_parts_count(KlOp op) {
  const int want = kl_op_wants(op),
            ways = ((want & kWantPolicyRef) != 0) + ((want & kWantRefPolicy) != 0);
  return (kl_has_ref(op) ? 2 + 2 * ways : 0) + ((want & kWantEntropy) != 0 ? 4 : 1) + 2;
}

// Where they lie: y, g, then b, a, then c, back, then s, or a SpanEntropy, which has it, then the
// frame (-inf on a side of which there is nothing).
template <KlOp op>
struct KlParts {
  static constexpr int kWant = kl_op_wants(op);
  static constexpr bool kPair = kl_has_ref(op);
  static constexpr bool kForwards = (kWant & kWantPolicyRef) != 0;
  static constexpr bool kBackwards = (kWant & kWantRefPolicy) != 0;
  static constexpr bool kEntropy = (kWant & kWantEntropy) != 0;
  static constexpr bool kPlain = kl_op_jsd(op);  // e^ax and e^ay, whatever d is (kl_jsd.cuh)
  static constexpr int kForth = kPair ? 2 : 0;
  static constexpr int kBack = kForth + 2 * kForwards;
  static constexpr int kMass = kBack + 2 * kBackwards;
  static constexpr int kFrame = kMass + (kEntropy ? 4 : 1);
  static constexpr int kCount = kl_parts_count(op);
  static_assert(kFrame + 2 == kCount, "a span's frame comes last");
  static constexpr int kSums = kMass + 1 + kEntropy;  // over the lanes
  static constexpr int kPadded = kSums <= 2 ? 2 : kSums <= 4 ? 4 : kSums <= 8 ? 8 : 16;
};
constexpr int kMostParts = 16;
constexpr int kSecondParts = 3;  // of a second sweep: KlThree

// sum e^ax and sum e^ax ax log2 e of a span, added up alike whatever the reference is; where the
// highest entry dominates them (kl_around_peak), around that one, the pivot, of which there are
// `peaks`.
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

// --- sums moved into one frame

// The frame of sums that are joined: that of the unit that stands highest on the leading side, or
// of the highest on the other side too where that is far above the first one's.
struct KlLead {
  float lead, other, other_top;
  int index;

  __device__ __forceinline__ void join(const KlLead& with) {
    other_top = fmaxf(other_top, with.other_top);
    if (with.lead > lead || (with.lead == lead && with.index < index)) {
      lead = with.lead;
      other = with.other;
      index = with.index;
    }
  }
};

// A span's sums as they are read from its floats, and the frame.
template <KlOp op>
struct KlPart {
  using P = KlParts<op>;
  static constexpr bool kRefLeads = P::kBackwards && !P::kForwards;
  KlSums sums;
  float mx, my;

  __device__ __forceinline__ static KlLead lead(const volatile float* part, int index) {
    const float x = part[P::kFrame], y = part[P::kFrame + 1];
    return kRefLeads ? KlLead{y, x, x, index} : KlLead{x, y, y, index};
  }
  __device__ __forceinline__ static KlSides<float> frame(const KlParams& k, const KlLead& of) {
    constexpr float kSlack = 4;
    const float scale = kRefLeads ? k.row_scale : k.ref_row_scale;
    const bool fits = (of.other_top - of.other) * scale <= kSlack;
    const float other = fits ? of.other : of.other_top;
    return kRefLeads ? KlSides<float>{other, of.lead} : KlSides<float>{of.lead, other};
  }

  __device__ __forceinline__ static KlPart read(const volatile float* part) {
    KlPart own;
    KlSums& t = own.sums;
    if (P::kPair) t.y = part[0], t.g = part[1], t.s = part[P::kMass];
    if (P::kForwards) t.b = part[P::kForth], t.a = part[P::kForth + 1];
    if (P::kBackwards) t.c = part[P::kBack], t.back = part[P::kBack + 1];
    if (P::kEntropy) {
      const SpanEntropy span = SpanEntropy::read(part + P::kMass);
      const double pivot = double(span.pivot) * double(kLn2),
                   around = double(span.peaks) + double(span.mass);
      const double scale = pivot == 0 ? 1.0 : exp(pivot);
      t.mass = scale * around;
      t.moment = scale * (double(span.moment) * double(kLn2) + pivot * around);
      t.s = t.mass;
    }
    own.mx = part[P::kFrame], own.my = part[P::kFrame + 1];
    return own;
  }
  __device__ __forceinline__ void write(float* part) const {
    const KlSums& t = sums;
    if (P::kPair) part[0] = float(t.y), part[1] = float(t.g), part[P::kMass] = float(t.s);
    if (P::kForwards) part[P::kForth] = float(t.b), part[P::kForth + 1] = float(t.a);
    if (P::kBackwards) part[P::kBack] = float(t.c), part[P::kBack + 1] = float(t.back);
    if (P::kEntropy) {  // a mass of 1 and little more in two floats
      const float peaks = float(t.mass);
      SpanEntropy{float(t.mass - double(peaks)), float(t.moment / double(kLn2)), 0, peaks}.write(
          part + P::kMass);
    }
    part[P::kFrame] = mx, part[P::kFrame + 1] = my;
  }

  __device__ __forceinline__ void move_to(const KlParams& k, const KlSides<float>& frame) {
    const bool no_x = mx == -kl_infinity(), no_y = my == -kl_infinity();
    if (!(no_x && no_y)) {  // sums of 0, or NaN
      double up_x = (double(frame.x) - double(mx)) * double(k.row_scale);
      double up_y =
          (double(frame.y) - double(my)) * double(P::kPair ? k.ref_row_scale : k.row_scale);
      if (no_x) up_x = up_y;  // a side of which there is nothing was in no frame
      if (no_y) up_y = up_x;
      sums.move(kl_move(up_x, up_y));
    }
    mx = frame.x, my = frame.y;
  }
};

// Of a span of several units the second and every other one: joins `part` with `next`. By one lane.
template <KlOp op>
__device__ void kl_join_parts(const KlParams& k, float* part, const float* next) {
  using Part = KlPart<op>;
  KlLead lead = Part::lead(part, 0);
  lead.join(Part::lead(next, 1));
  const KlSides<float> frame = Part::frame(k, lead);
  Part sum = Part::read(part), more = Part::read(next);
  sum.move_to(k, frame);
  more.move_to(k, frame);
  sum.sums += more.sums;
  sum.write(part);
}

// --- a row's sums out of its spans'

// in every lane, always in the same order
__device__ __forceinline__ double kl_warp_total(double v) {
#pragma unroll
  for (int bit = 16; bit > 0; bit /= 2) v += __shfl_xor_sync(kWholeWarp, v, bit);
  return v;
}

template <KlOp op>
__device__ __forceinline__ void kl_total(KlSums& t) {
  using P = KlParts<op>;
  if (P::kPair) {
    t.s = kl_warp_total(t.s), t.y = kl_warp_total(t.y), t.g = kl_warp_total(t.g);
    if (P::kForwards) t.b = kl_warp_total(t.b), t.a = kl_warp_total(t.a);
    if (P::kBackwards) t.c = kl_warp_total(t.c), t.back = kl_warp_total(t.back);
  }
  if (P::kEntropy) t.mass = kl_warp_total(t.mass), t.moment = kl_warp_total(t.moment);
}

}  // namespace fasttax
