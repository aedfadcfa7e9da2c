// Walks over the rows of a token, and their frames (math/kl_frame.h). No max pass: the frame is
// primed from the first 2048 entries, and a row is run again with its true maxima only when some
// entry stands more than 20 above (10.3 ms against 16.9 at 512 x 49152).
#include "../math/kl_frame.h"
#include "../math/kl_row.h"
#include "../math/kl_slope.h"
#include "rows.h"

#if defined(FASTTAX_ISA)  // isa.h: once per instruction set
namespace fasttax {
namespace FASTTAX_ISA_NS {

// 2048 on AVX-512: no lane adds more than 128 terms before it is folded to double
// 2048 on AVX-512: no lane adds more than 128 terms before it is folded to double
constexpr int64_t kChunk = 128 * kLanes;
constexpr float kInf = std::numeric_limits<float>::infinity();

template <FrameMode mode>
struct Frame : KlFrame<VectorMath, KlParams> {
  using KlFrame::KlFrame;

  // `n` lanes hold entries; a softcap would turn the filler's -inf into -cap, so it is put back.
  void cap(VF& x, VF& y, int64_t n) const {
    if constexpr (mode != FrameMode::kGeneral) return;
    KlFrame::cap(x, y);
    for (int64_t j = n; j < kLanes; ++j) x[j] = y[j] = -kInf;
  }
  void operator()(VF x, VF y, VF& ax, VF& d, int64_t n = kLanes) const {
    cap(x, y, n);
    KlFrame::place<mode>(x, y, ax, d);
  }
  VF ay(VF x, VF y, int64_t n = kLanes) const {
    cap(x, y, n);
    return KlFrame::ay<mode>(y);
  }
};

// Calls f(x, y, n) for each vector of [begin, end); a partial vector is filled with -inf.
template <class T, class F>
inline void for_vectors(const T* x, const T* y, int64_t begin, int64_t end, F&& f) {
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) f(load(x + i), load(y + i), i, kLanes);
  if (i < end) f(load(x + i, end - i, -kInf), load(y + i, end - i, -kInf), i, end - i);
}

enum Sides : int { kPolicyOnly, kBothSides };

// f(an integral_constant of the sides that gradients are asked of). A reference's gradient is made
// with the policy's beside it, for whom p is there anyway: code for it alone gains nothing.
template <class F>
inline void with_sides(const void* dy, F&& f) {
  if (dy) f(std::integral_constant<Sides, kBothSides>());
  else f(std::integral_constant<Sides, kPolicyOnly>());
}

// f(an integral_constant of the frame that a row needs); `unit`: whether kUnit is compiled.
template <bool unit, class F>
inline void with_mode(bool plain, const KlParams& k, const KlRow& r, F&& f) {
  if constexpr (unit)
    if (plain && KlFrame<VectorMath>::is_unit(k, r))
      return f(std::integral_constant<FrameMode, FrameMode::kUnit>());
  if (plain) f(std::integral_constant<FrameMode, FrameMode::kShared>());
  else f(std::integral_constant<FrameMode, FrameMode::kGeneral>());
}

// Writes the gradients that slope(x, y, n) gives for each vector, where they are asked for: dx may
// be null with both sides. From the end of the row to its beginning: what the sweep before has read
// last is in L2 still, where the row pair is larger than that. slope comes by value: its numbers
// are then none that the stores may change.
template <Sides sides, class T, class F>
inline void write_gradients(const T* x, const T* y, int64_t V, T* dx, T* dy, const F slope) {
  constexpr int64_t kTwo = 2 * kLanes;
  const bool for_x = sides == kPolicyOnly || dx;
  const int64_t whole = V / kTwo * kTwo;
  for (int64_t i = whole; i < V; i += kLanes) {
    const int64_t n = std::min<int64_t>(kLanes, V - i);
    const KlSides<VF> d = slope(load(x + i, n, -kInf), load(y + i, n, -kInf), n);
    if (for_x) store(dx + i, d.x, n);
    if constexpr (sides == kBothSides) store(dy + i, d.y, n);
  }
  for (int64_t i = whole - kTwo; i >= 0; i -= kTwo) {
    VF xv[2], yv[2];
    fetch(x + i, kTwo * sizeof(T), kDownwards);
    fetch(y + i, kTwo * sizeof(T), kDownwards);
    load_pair(x + i, xv[0], xv[1]);
    load_pair(y + i, yv[0], yv[1]);
    const KlSides<VF> first = slope(xv[0], yv[0], kLanes), second = slope(xv[1], yv[1], kLanes);
    if (for_x) store_pair(dx + i, first.x, second.x);
    if constexpr (sides == kBothSides) store_pair(dy + i, first.y, second.y);
  }
}

template <class T>
inline void maxima(const T* x, const T* y, int64_t end, const KlParams& k, KlRow& r) {
  VF mx = splat(-kInf), my = splat(-kInf);
  const Frame<FrameMode::kGeneral> frame(k, r);
  for_vectors(x, y, 0, end, [&](VF xv, VF yv, int64_t, int64_t n) {
    if (!k.plain) frame.cap(xv, yv, n);
    mx = max_keep_nan(xv, mx);  // a NaN entry is passed over here and reaches the sums through exp
    my = max_keep_nan(yv, my);
  });
  r.mx = max_of(mx);
  r.my = max_of(my);
  r.shift = 0;
}

// Frames from the first entries; from all of them where those are -inf.
template <class T>
inline void primed_maxima(const T* x, const T* y, int64_t V, const KlParams& k, KlRow& r) {
  maxima(x, y, std::min(V, kChunk), k, r);
  if (!(r.mx > -kInf && r.my > -kInf)) maxima(x, y, V, k, r);
}

}  // namespace FASTTAX_ISA_NS
}  // namespace fasttax
#endif
