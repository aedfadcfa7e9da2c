// Softcaps and the inf mask on vectors (math/kl_frame.h: cap()).
#include "../math/kl_frame.h"
#include "rows.h"

#if defined(FASTTAX_ISA)  // isa.h: once per instruction set
namespace fasttax {
namespace FASTTAX_ISA_NS {

// 2048 on AVX-512: no lane adds more than 128 terms before it is folded to double
constexpr int64_t kChunk = 128 * kLanes;

// The same cap on both rows, as Gemma has it: the policy's capped logit, and the capped logits'
// difference out of that and of the gap g of tanh's arguments,
//   tanh a - tanh(a - g) = g (1 - tanh^2 a) / (g coth g - g tanh a)
// for |g| <= kGap, so that one tanh does and the difference has its digits. Each lane goes by its
// own size: what a vector's other lanes are changes no bit of it.
struct JointCap {
  static constexpr float kGap = 0.6f;  // 18 of logits capped at 30
  float inside, cap;

  explicit JointCap(const KlParams& k) : inside(k.inside), cap(k.cap) {}
  // The inf mask goes by the raw logits too, so it stays with KlFrame's formula.
  static bool fits(const KlParams& k) { return k.joint_cap && !k.inf_mask; }

  // mid: every |a| is within tanh_mid's reach; close: every gap within kGap.
  template <bool mid, bool close>
  __attribute__((always_inline)) inline void apply(VF& x, VF& y) const {
    const VF a = x * inside, gap = (x - y) * inside;
    VF t = tanh_mid(a);
    x = t * cap;
    VF bend = fma(-x, t, splat(cap));  // cap (1 - tanh^2 a)
    if constexpr (!mid) {
      const TanhHigh high = tanh_high(a);
      t = (abs(a) <= kTanhMid) ? t : high.value;
      x = t * cap;
      bend = (abs(a) <= kTanhMid) ? bend : high.bend * cap;
    }
    // g coth g by minimax, 4e-8
    const VF z = gap * gap;
    VF p = fma(z, splat(1.9771825e-3f), splat(-2.2193687e-2f));
    p = fma(p, z, splat(3.3333164e-1f));
    const VF whole = fma(-gap, t, fma(p, z, splat(1.0f))), rough = reciprocal(whole);
    const VF share = fma(rough, fma(rough, -whole, splat(1.0f)), rough);
    const VF by_gap = gap * bend * share;
    if constexpr (close) {
      y = by_gap;
    } else {
      const VF apart = (t - tanh(y * inside)) * cap;
      y = (abs(gap) <= kGap) ? by_gap : apart;
    }
  }
};

template <class T>
inline VF load_some(const T* p, int64_t n) {
  if (n >= kLanes) return load(p);
  return load(p, n, 0.0f);
}

// The chunk after this one is fetched into L2: while this is summed out of L1 the processor's own
// streams pause. A softcap's token_kl of float32 5.3 -> 4.6 ms on Zen 4, into L1 4.9, in one burst
// 5.3.

// What cap(x, y) makes of the entries from i to n, a pair of vectors or a vector at a time.
template <class T, class Cap>
inline void cap_entries(const T* x, const T* y, int64_t i, int64_t n, float* to_x, float* to_y,
                        const Cap& cap) {
  const auto leave = [&](VF xv, VF yv) {
    cap(xv, yv);
    store(to_x + i, xv);
    store(to_y + i, yv);
    i += kLanes;
  };
  while (i + 2 * kLanes <= n) {
    VF xv[2], yv[2];
    fetch<kIntoL2>(x + i, 2 * kLanes * sizeof(T), kChunk * sizeof(T));
    fetch<kIntoL2>(y + i, 2 * kLanes * sizeof(T), kChunk * sizeof(T));
    load_pair(x + i, xv[0], xv[1]);
    load_pair(y + i, yv[0], yv[1]);
    for (int j = 0; j < 2; ++j) leave(xv[j], yv[j]);
  }
  while (i < n) leave(load_some(x + i, n - i), load_some(y + i, n - i));
}

// What the softcaps and the inf mask make of n entries, as floats in load_pair's order; whole
// vectors are written.
template <class T>
inline void cap_chunk(const T* x, const T* y, int64_t n, const KlParams& k, float* to_x,
                      float* to_y) {
  if (!JointCap::fits(k)) {
    const KlFrame<VectorMath, KlParams> frame(k, KlRow{});
    cap_entries(x, y, 0, n, to_x, to_y, [&](VF& xv, VF& yv) { frame.cap(xv, yv); });
    return;
  }
  const JointCap joint(k);
  constexpr int kGroup = 4;  // vectors that one branch decides on
  const float scale = std::fabs(joint.inside);
  int64_t i = 0;
  for (; i + kGroup * kLanes <= n; i += kGroup * kLanes) {
    VF xv[kGroup], yv[kGroup], size{}, difference{};
    fetch<kIntoL2>(x + i, kGroup * kLanes * sizeof(T), kChunk * sizeof(T));
    fetch<kIntoL2>(y + i, kGroup * kLanes * sizeof(T), kChunk * sizeof(T));
    for (int j = 0; j < kGroup; j += 2) {
      load_pair(x + i + j * kLanes, xv[j], xv[j + 1]);
      load_pair(y + i + j * kLanes, yv[j], yv[j + 1]);
    }
    for (int j = 0; j < kGroup; ++j) {
      size = max_size(xv[j], size);
      difference = max_size(xv[j] - yv[j], difference);
    }
    if (!all_le(size * scale, splat(kTanhMid))) {
      for (int j = 0; j < kGroup; ++j) joint.apply<false, false>(xv[j], yv[j]);
    } else if (!all_le(difference * scale, splat(JointCap::kGap))) {
      for (int j = 0; j < kGroup; ++j) joint.apply<true, false>(xv[j], yv[j]);
    } else {
      for (int j = 0; j < kGroup; ++j) joint.apply<true, true>(xv[j], yv[j]);
    }
    for (int j = 0; j < kGroup; ++j) {
      store(to_x + i + j * kLanes, xv[j]);
      store(to_y + i + j * kLanes, yv[j]);
    }
  }
  cap_entries(x, y, i, n, to_x, to_y, [&](VF& xv, VF& yv) { joint.apply<false, false>(xv, yv); });
}

}  // namespace FASTTAX_ISA_NS
}  // namespace fasttax
#endif
