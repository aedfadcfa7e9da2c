// Walks over the rows of a token, a chunk at a time, and their frames (math/kl_frame.h).
#include "../math/kl_frame.h"
#include "../math/kl_row.h"
#include "../math/kl_slope.h"
#include "kl_cap.h"
#include "kl_kept.h"

#if defined(FASTTAX_ISA)  // isa.h: once per instruction set
namespace fasttax {
namespace FASTTAX_ISA_NS {

constexpr float kInf = std::numeric_limits<float>::infinity();

template <FrameMode mode>
struct Frame : KlFrame<VectorMath, KlParams> {
  // not inherited: clang makes an inherited constructor for the baseline
  Frame(const KlParams& k, const KlRow& row) : KlFrame(k, row) {}
  static constexpr FrameMode kMode = mode;
  void operator()(VF x, VF y, VF& ax, VF& d) const { KlFrame::place<mode>(x, y, ax, d); }
  VF ay(VF x, VF y) const { return KlFrame::ay<mode>(x, y); }
};

// A token's two rows. Kernels read float32 and bfloat16 as they lie; float16, and what a softcap or
// the inf mask changes, is staged as floats, a chunk at a time: kernels for these alone would be
// half of all code, and a softcap costs ten times what the buffers do.
struct RowPair {
  FloatType type;
  const void *x, *y;
  bool caps, narrow;  // narrow: bfloat16 read as it lies
  KlKept kept;
  bool staged = false;  // whether kept.x and kept.y hold the row

  RowPair(FloatType logits, const void* policy, const void* ref, const KlParams& k,
          const KlKept& rows = {})
      : type(logits),
        x(policy),
        y(ref),
        caps(k.cap > 0 || k.ref_cap > 0 || k.inf_mask),
        narrow(type == FloatType::kBFloat16 && k.plain),
        kept(rows) {}

  bool direct() const { return type == FloatType::kFloat && !caps; }
  template <class T>
  const T* policy() const {
    return static_cast<const T*>(x);
  }
  template <class T>
  const T* ref() const {
    return static_cast<const T*>(y);
  }
};

struct Buffers {
  alignas(64) float x[kChunk], y[kChunk];
};

// Logits as floats in load_pair's order, of what kernels don't read as it lies.
__attribute__((noinline)) inline void stage_chunk(const RowPair& rows, const KlParams& k,
                                                  int64_t start, int64_t n, float* to_x,
                                                  float* to_y) {
  typed(rows.type, rows.x, [&](auto* x) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(x)>>;
    const T* y = rows.ref<T>();
    if (rows.caps) return cap_chunk(x + start, y + start, n, k, to_x, to_y);
    cap_entries(x + start, y + start, 0, n, to_x, to_y, [](VF&, VF&) {});
  });
}

// f(x, y): pointers to the n entries from `start`, as floats or (but where the frame is general)
// bfloat16.
template <FrameMode mode, class F>
inline void with_chunk(const RowPair& rows, const KlParams& k, int64_t start, int64_t n,
                       Buffers& buffers, F&& f) {
  if constexpr (mode != FrameMode::kGeneral)
    if (rows.narrow) return f(rows.policy<BFloat16>() + start, rows.ref<BFloat16>() + start);
  if (rows.direct()) return f(rows.policy<float>() + start, rows.ref<float>() + start);
  float* const x_to = rows.kept.x ? rows.kept.x + start : buffers.x;
  float* const y_to = rows.kept.y ? rows.kept.y + start : buffers.y;
  if (!rows.staged) stage_chunk(rows, k, start, n, x_to, y_to);
  f(static_cast<const float*>(x_to), static_cast<const float*>(y_to));
}

// f(x, y, start, n) for each chunk.
template <FrameMode mode, class F>
inline void for_chunks(const RowPair& rows, const KlParams& k, int64_t V, F&& f) {
  Buffers buffers;
  for (int64_t start = 0; start < V; start += kChunk) {
    const int64_t n = std::min(kChunk, V - start);
    with_chunk<mode>(rows, k, start, n, buffers, [&](auto* x, auto* y) { f(x, y, start, n); });
  }
}

// f(x, y) for each vector of n entries, in load_pair's order; a partial one is filled with no
// entries: -inf, and for y what its frame says.
template <class T, class F>
inline void for_vectors(const T* x, const T* y, int64_t n, float y_filler, F&& f) {
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    VF xv[2], yv[2];
    load_pair(x + i, xv[0], xv[1]);
    load_pair(y + i, yv[0], yv[1]);
    f(xv[0], yv[0]);
    f(xv[1], yv[1]);
  }
  for (; i + kLanes <= n; i += kLanes) f(load(x + i), load(y + i));
  if (i < n) f(load(x + i, n - i, -kInf), load(y + i, n - i, y_filler));
}

// One entry of a row pair, in every lane, as a kernel of the general frame reads it. Not inlined: a
// capped logit that is subtracted in one operation with its product lacks the rounding that the
// staged ones have.
__attribute__((noinline)) inline KlSides<VF> entry_of(const RowPair& rows, const KlParams& k,
                                                      int64_t i) {
  KlSides<VF> z{};
  typed(rows.type, rows.x, [&](auto* x) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(x)>>;
    z = {splat(to_float(x[i])), splat(to_float(rows.ref<T>()[i]))};
  });
  if (!rows.caps) return z;
  if (JointCap::fits(k)) JointCap(k).apply<false, false>(z.x, z.y);
  else KlFrame<VectorMath, KlParams>(k, KlRow{}).cap(z.x, z.y);
  return z;
}

// Whose gradients are written. A reference's is made with the policy's beside it, for whom p is
// there anyway: code for it alone gains nothing.
enum Sides : int { kPolicyOnly, kBothSides };

// f(an integral_constant of the frame that a row needs); `unit`: whether kUnit is compiled.
template <bool unit, class F>
inline void with_mode(const KlParams& k, const KlRow& r, F&& f) {
  if constexpr (unit)
    if (KlFrame<VectorMath>::is_unit(k, r))
      return f(std::integral_constant<FrameMode, FrameMode::kUnit>());
  if (k.plain) f(std::integral_constant<FrameMode, FrameMode::kShared>());
  else f(std::integral_constant<FrameMode, FrameMode::kGeneral>());
}

// A chunk's gradients, which slope(x, y) gives for each vector, where they are asked for: with both
// sides either may be null. From its end to its beginning, as write_gradients. slope comes by
// value: its numbers are then none that the stores may change. D: T, or what floats that are in its
// load_pair's order were staged from.
template <Sides sides, class T, class D, class F>
inline void write_chunk(const T* x, const T* y, int64_t n, D* dx, D* dy, const F slope) {
  constexpr int64_t kTwo = 2 * kLanes;
  const bool for_x = sides == kPolicyOnly || dx, for_y = sides == kBothSides && dy;
  const int64_t whole = n / kTwo * kTwo;
  for (int64_t i = whole; i < n; i += kLanes) {
    const int64_t some = std::min<int64_t>(kLanes, n - i);
    // filled as for the sums: a vector's way may be chosen by all of its lanes
    const VF xv = load(x + i, some, -kInf), yv = load(y + i, some, slope.frame.y_filler());
    const KlSides<VF> d = slope(xv, yv);
    if (for_x) store(dx + i, d.x, some);
    if (for_y) store(dy + i, d.y, some);
  }
  for (int64_t i = whole - kTwo; i >= 0; i -= kTwo) {
    VF xv[2], yv[2];
    fetch(x + i, kTwo * sizeof(T), kDownwards);
    fetch(y + i, kTwo * sizeof(T), kDownwards);
    load_pair(x + i, xv[0], xv[1]);
    load_pair(y + i, yv[0], yv[1]);
    const KlSides<VF> first = slope(xv[0], yv[0]), second = slope(xv[1], yv[1]);
    if (for_x) store_pair(dx + i, first.x, second.x);
    if (for_y) store_pair(dy + i, first.y, second.y);
  }
}

template <class T>
inline T* moved(void* row, int64_t start) {
  return row ? static_cast<T*>(row) + start : nullptr;
}

// The row's gradients, from its end to its beginning: what the sweep before has read last is in L2
// still, where the row pair is larger than that. dx may be the policy's logits themselves.
template <FrameMode mode, Sides sides, class F>
inline void write_gradients(const RowPair& rows, int64_t V, const KlParams& k, void* dx, void* dy,
                            const F& slope) {
  Buffers in, out;
  for (int64_t start = (V - 1) / kChunk * kChunk; start >= 0; start -= kChunk) {
    const int64_t n = std::min(kChunk, V - start);
    with_chunk<mode>(rows, k, start, n, in, [&](auto* x, auto* y) {
      using T = std::remove_const_t<std::remove_pointer_t<decltype(x)>>;
      const auto write_as = [&](auto type) {
        using D = decltype(type);
        write_chunk<sides>(x, y, n, moved<D>(dx, start), moved<D>(dy, start), slope);
      };
      if constexpr (!std::is_same_v<T, float>) return write_as(T{});
      if (rows.type == FloatType::kFloat) return write_as(float{});
      if constexpr (mode == FrameMode::kGeneral)
        if (rows.type == FloatType::kBFloat16) return write_as(BFloat16{});
      // float16: a kernel of its own would gain less than it is long
      write_chunk<sides>(x, y, n, dx ? out.x : nullptr, dy ? out.y : nullptr, slope);
      if (dx) narrow_row(out.x, n, moved<Float16>(dx, start));
      if (dy) narrow_row(out.y, n, moved<Float16>(dy, start));
    });
  }
}

// The highest entries of a chunk, as a frame.
template <class T>
inline KlRow chunk_maxima(const T* x, const T* y, int64_t n, const KlParams& k) {
  VF mx = splat(-kInf), my = splat(-kInf);
  const float filler = KlFrame<VectorMath>(k, KlRow{}).y_filler();
  for_vectors(x, y, n, filler, [&](VF xv, VF yv) {
    mx = max_keep_nan(xv, mx);  // a NaN is passed over here and reaches the sums through exp
    my = max_keep_nan(kl_capped_y(xv, yv, k), my);
  });
  KlRow own{};
  own.mx = max_of(mx);
  own.my = max_of(my);
  return own;
}

}  // namespace FASTTAX_ISA_NS
}  // namespace fasttax
#endif
