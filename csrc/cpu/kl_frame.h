// Frames: how the raw logits of a row pair become ax and d (math/kl.h). No max pass: the frame is
// primed from the first 2048 entries, and a row is run again with its true maxima only when some
// entry stands more than 20 above (10.3 ms against 16.9 at 512 x 49152).
#include "../math/kl_frame.h"
#include "../math/kl_row.h"
#include "rows.h"

#if defined(FASTTAX_ISA)  // isa.h: once per instruction set
namespace fasttax {
namespace FASTTAX_ISA_NS {

// 2048 on AVX-512: no lane adds more than 128 terms before it is folded to double
constexpr int64_t kChunk = 128 * kLanes;
constexpr float kInf = std::numeric_limits<float>::infinity();

// 0 * inf is 0 here
inline VF where_zero(VF weight, VF value) { return weight == 0.0f ? splat(0.0f) : value; }

inline VF bend(VF raw, float over_cap) {  // the derivative of a softcap
  const VF t = tanh(raw * over_cap);
  return 1.0f - t * t;
}

// How raw logits become ax and d. kUnit: one scale of 1 on both rows, no recentring, the common
// case in 3 operations; kShared: one scale on both; kGeneral: scales of their own, softcaps, the
// inf mask.
enum class FrameMode { kUnit, kShared, kGeneral };

template <FrameMode mode>
struct Frame {
  const KlParams& k;
  KlRow r;
  float ox, oy, c;  // d = ((x - ox) - (y - oy)) - c

  // Logits of like size: their difference is exact, so it comes first. Rows offset by hundreds:
  // centre each first.
  Frame(const KlParams& params, const KlRow& row) : k(params), r(row) {
    ox = alike(row) ? 0.0f : row.mx;
    oy = alike(row) ? 0.0f : row.my;
    c = alike(row) ? row.mx - row.my : 0.0f;
  }

  static bool alike(const KlRow& row) { return std::fabs(row.mx - row.my) <= 4.0f; }
  static bool is_unit(const KlParams& k, const KlRow& row) {
    return k.plain && k.row_scale == 1 && row.shift == 0 && alike(row);
  }

  VF capped(VF x, float scale, float cap) const { return tanh(x * (scale / cap)) * cap; }

  // `n` lanes hold entries; a softcap would turn the filler's -inf into -cap, so it is put back.
  void raw(VF& x, VF& y, int64_t n) const {
    if (mode != FrameMode::kGeneral) return;
    const VI gone = k.inf_mask ? ((x == -kInf) | (y == -kInf)) : VI{};
    if (k.cap > 0) x = capped(x, k.scale, k.cap);
    if (k.ref_cap > 0) y = capped(y, k.ref_scale, k.ref_cap);
    x = gone ? splat(-kInf) : x;
    y = gone ? splat(-kInf) : y;
    for (int64_t j = n; j < kLanes; ++j) x[j] = y[j] = -kInf;
  }

  void operator()(VF x, VF y, VF& ax, VF& d, int64_t n = kLanes) const {
    raw(x, y, n);
    ax = x - r.mx;
    if (mode == FrameMode::kUnit) {
      d = (x - y) - c;
      return;
    }
    ax *= k.row_scale;
    d = mode == FrameMode::kShared ? (((x - ox) - (y - oy)) - c) * k.row_scale - r.shift
                                   : ax - ((y - r.my) * k.ref_row_scale + r.shift);
  }

  // ax - d, also where one of the rows is -inf and d is no number
  VF ay(VF x, VF y, int64_t n = kLanes) const {
    raw(x, y, n);
    const VF centred = y - r.my;
    if (mode == FrameMode::kUnit) return centred;
    return centred * (mode == FrameMode::kShared ? k.row_scale : k.ref_row_scale) + r.shift;
  }
};

// Calls f(x, y, n) for each vector of [begin, end); a partial vector is filled with -inf.
template <class T, class F>
inline void for_vectors(const T* x, const T* y, int64_t begin, int64_t end, F&& f) {
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) f(load(x + i), load(y + i), i, kLanes);
  if (i < end) f(load(x + i, end - i, -kInf), load(y + i, end - i, -kInf), i, end - i);
}

// Writes the gradients that slope(x, y, n, d_x, d_y) gives for each vector. kSides: 1 the policy's,
// 2 the reference's, 3 both. From the end of the row to its beginning: what the sweep before has
// read last is in L2 still, where the row pair is larger than that.
template <int kSides, class T, class F>
inline void write_gradients(const T* x, const T* y, int64_t V, T* dx, T* dy, const F& slope) {
  constexpr int64_t kPair = 2 * kLanes;
  const int64_t pairs = V / kPair;
  for (int64_t i = pairs * kPair; i < V; i += kLanes) {
    const int64_t n = std::min<int64_t>(kLanes, V - i);
    VF for_x, for_y;
    slope(load(x + i, n, -kInf), load(y + i, n, -kInf), n, for_x, for_y);
    if (kSides & 1) store(dx + i, for_x, n);
    if (kSides & 2) store(dy + i, for_y, n);
  }
  for (int64_t i = (pairs - 1) * kPair; i >= 0; i -= kPair) {
    VF xv[2], yv[2], for_x[2], for_y[2];
    fetch(x + i, kPair * sizeof(T), kDownwards);
    fetch(y + i, kPair * sizeof(T), kDownwards);
    load_pair(x + i, xv[0], xv[1]);
    load_pair(y + i, yv[0], yv[1]);
    for (int j = 0; j < 2; ++j) slope(xv[j], yv[j], kLanes, for_x[j], for_y[j]);
    if (kSides & 1) store_pair(dx + i, for_x[0], for_x[1]);
    if (kSides & 2) store_pair(dy + i, for_y[0], for_y[1]);
  }
}

template <class T>
inline void maxima(const T* x, const T* y, int64_t end, const KlParams& k, KlRow& r) {
  VF mx = splat(-kInf), my = splat(-kInf);
  const Frame<FrameMode::kGeneral> frame(k, r);
  for_vectors(x, y, 0, end, [&](VF xv, VF yv, int64_t, int64_t n) {
    if (!k.plain) frame.raw(xv, yv, n);
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
