// One sweep over a row pair: every sum that a forward wants (math/kl_row.h), a chunk at a time,
// each in the frame that fits it; the sums so far move there in closed form. No entry is read from
// memory again: what is summed again is a chunk that lies in L1.
//  - A frame is the maxima of the first entries. A chunk with an entry more than 20 above it is
//    summed again in a frame of its own maxima, one that holds most of the mass so far and has a
//    mean gap larger than its spread is summed again around that.
//  - Where four vectors have |d| <= 1/4, 1 or 2 one exp and a polynomial do. Beyond, two exps and
//  plain sums, good to 1e-7 of the mass summed so: where that
//    is not enough, or a sum is NaN (-inf entries), the chunk is summed again and the row's rest
//    then with every lane by its own size, and with 0 * inf = 0.
//  - Lanes are folded to double every 2048 cells, so the sums do not depend on V's size.
#include "kl_rows.h"

#if defined(FASTTAX_ISA)  // isa.h: once per instruction set
namespace fasttax {
namespace FASTTAX_ISA_NS {

struct ChunkSums : KlSums {
  float top = -kInf;  // highest entry above the frames
};

// keep: whether what the policy's gradient is made of is left in `kept`, from `start` on.
template <bool careful, FrameMode mode, int want, bool keep, class T>
inline ChunkSums sum_chunk(const T* x, const T* y, int64_t n, const Frame<mode>& frame,
                           const KlKept& kept, int64_t start) {
  constexpr bool entropy = (want & kWantEntropy) != 0;
  float *weight = nullptr, *value = nullptr;
  if constexpr (keep) weight = kept.weight + start;
  if constexpr (keep) value = kept.value + start;
  const float cap = frame.k.cap > 0 ? frame.k.cap : kInf;
  const auto leave = [&](int64_t i, VF ex, VF xv, VF d) {
    if constexpr (!keep) return;
    store(weight + i, ex * kl_bend<VectorMath>(xv, cap));
    store(value + i, d);
  };
  KlNear<VectorMath, want> near;
  KlFar<VectorMath, want> far;
  KlMixed<VectorMath, want> mixed;
  VF moment{}, top = splat(-kInf);
  // Where near vectors and others alternate, a branch that is mispredicted costs more than the
  // other path's instructions: a chunk goes over to that once.
  float reach = kSmallGap;
  const auto mix = [&](VF ax, VF ay, VF d) {
    const VF ex = exp(ax);
    mixed.add(ex, exp(ay), d);
    if (entropy) moment += times(ex, ax);
    return ex;
  };
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    VF ax[4], d[4];
    VF xv[4], yv[4];
    fetch(x + i, 4 * kLanes * sizeof(T), kUpwards);
    fetch(y + i, 4 * kLanes * sizeof(T), kUpwards);
    for (int j = 0; j < 4; j += 2) {
      load_pair(x + i + j * kLanes, xv[j], xv[j + 1]);
      load_pair(y + i + j * kLanes, yv[j], yv[j + 1]);
    }
    for (int j = 0; j < 4; ++j) frame(xv[j], yv[j], ax[j], d[j]);
    top = max_keep_nan(max_keep_nan(max_keep_nan(ax[0], ax[1]), max_keep_nan(ax[2], ax[3])), top);
    const VF widest =
        max_keep_nan(max_keep_nan(abs(d[0]), abs(d[1])), max_keep_nan(abs(d[2]), abs(d[3])));
    // max may lose a NaN; ax is NaN with it, or the chunk comes back
    const bool numbers = !careful || all_le((d[0] + d[1]) + (d[2] + d[3]), splat(kInf));
    if (numbers && reach <= kSmallGap && all_le(widest, splat(kSmallGap))) {
      for (int j = 0; j < 4; ++j) {
        const VF ex = exp_flushed(ax[j]);
        near.add(ex, d[j]);
        if (entropy) moment = fma(ex, ax[j], moment);
        leave(i + j * kLanes, ex, xv[j], d[j]);
      }
    } else if (numbers && reach <= kUnitGap && all_le(widest, splat(kUnitGap))) {
      reach = kUnitGap;
      for (int j = 0; j < 4; ++j) {
        const VF ex = exp_flushed(ax[j]), f = kl_bregman_unit(d[j]);
        near.add(ex, d[j], f - d[j], f);
        if (entropy) moment = fma(ex, ax[j], moment);
        leave(i + j * kLanes, ex, xv[j], d[j]);
      }
    } else if (numbers && all_le(widest, splat(kMidGap))) {
      reach = kMidGap;
      for (int j = 0; j < 4; ++j) {
        const VF ex = exp_flushed(ax[j]), f = kl_bregman_mid(d[j]);
        near.add(ex, d[j], f - d[j], f);
        if (entropy) moment = fma(ex, ax[j], moment);
        leave(i + j * kLanes, ex, xv[j], d[j]);
      }
    } else {
      // ay by itself: from ax and d it has the rounding of ax, large where y peaks
      VF ay[4];
      for (int j = 0; j < 4; ++j) ay[j] = frame.ay(xv[j], yv[j]);
      const VF high = max_keep_nan(max_keep_nan(ay[0], ay[1]), max_keep_nan(ay[2], ay[3]));
      top = max_keep_nan(high, top);
      if (careful) {
        for (int j = 0; j < 4; ++j) leave(i + j * kLanes, mix(ax[j], ay[j], d[j]), xv[j], d[j]);
      } else {
        for (int j = 0; j < 4; ++j) {
          const VF ex = exp_flushed(ax[j]);
          far.add(ex, exp_flushed(ay[j]), d[j]);
          if (entropy) moment = fma(ex, ax[j], moment);
          leave(i + j * kLanes, ex, xv[j], d[j]);
        }
      }
    }
  }
  for_vectors(x + i, y + i, n - i, frame.y_filler(), [&](VF xv, VF yv) {
    VF ax, d;
    frame(xv, yv, ax, d);
    const VF ay = frame.ay(xv, yv);
    top = max_keep_nan(max_keep_nan(ax, ay), top);
    leave(i, mix(ax, ay, d), xv, d);
    i += kLanes;
  });
  ChunkSums part;
  part += near;
  part += far;
  part += mixed;
  if (entropy) {
    part.mass = sum(near.s + far.x + mixed.x);
    part.moment = sum(moment);
  }
  part.top = max_of(top);
  return part;
}

// Of the policy alone: mass and moment.
template <FrameMode mode, class T>
inline ChunkSums sum_policy(const T* x, int64_t n, const Frame<mode>& frame, bool careful) {
  VF mass{}, moment{}, top = splat(-kInf);
  const auto add = [&](VF xv, bool guarded) {
    VF ax, d;
    frame(xv, xv, ax, d);
    top = max_keep_nan(ax, top);
    const VF ex = guarded ? exp(ax) : exp_flushed(ax);
    mass += ex;
    moment = guarded ? moment + times(ex, ax) : fma(ex, ax, moment);
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) add(load(x + i), careful);
  if (i < n) add(load(x + i, n - i, -kInf), true);
  ChunkSums part;
  part.s = part.y = part.mass = sum(mass);
  part.moment = sum(moment);
  part.top = max_of(top);
  return part;
}

// Where the mean of a chunk's entries is near or above the frame, one of them has nearly all of the
// mass, or stands above the frame: its ax in every term, or its 1 in every sum, would cost the
// digits that the entropy lives on. There mass and moment are summed around the highest, which is
// counted apart.
template <FrameMode mode, class T>
inline void sum_around_peak(const T* x, int64_t n, const Frame<mode>& frame, ChunkSums& part) {
  const auto each = [&](auto f) {
    for_vectors(x, x, n, -kInf, [&](VF xv, VF) {
      VF ax, d;
      frame(xv, xv, ax, d);
      f(ax);
    });
  };
  VF peak = splat(-kInf), peaks{}, mass{}, moment{};
  each([&](VF ax) { peak = max_keep_nan(ax, peak); });
  const double pivot = double(max_of(peak));
  each([&](VF ax) {
    const VF off = ax - float(pivot), e = (off == 0.0f) ? splat(0.0f) : exp(off);
    peaks += (off == 0.0f) ? splat(1.0f) : splat(0.0f);
    mass += e;
    moment += times(e, off);
  });
  const double scale = std::exp(pivot), around = sum(peaks) + sum(mass);
  part.mass = scale * around;
  part.moment = scale * (sum(moment) + pivot * around);
}

// f(frame) in the mode that a chunk of T needs.
template <class T, class F>
inline auto in_frame(const KlParams& k, const KlRow& r, F&& f) {
  if constexpr (std::is_same_v<T, float>)
    if (!k.plain) return f(Frame<FrameMode::kGeneral>(k, r));
  if (KlFrame<VectorMath>::is_unit(k, r)) return f(Frame<FrameMode::kUnit>(k, r));
  return f(Frame<FrameMode::kShared>(k, r));
}

static_assert(kChunk >= kLeastChunk, "`frames` holds one for each chunk");

// A row pair's sums, and the frame that they end in. `pair`: whether there is a reference; want is
// kWantEntropy where there is none.
template <int want, bool pair = true>
struct RowSweep {
  const KlParams& k;
  const KlKept& kept;
  KlRow& r;
  KlSums total;
  bool careful;
  bool seen_x = false, seen_y = false;  // whether an entry of either row has had mass

  RowSweep(const KlParams& params, const KlKept& rows, KlRow& row, bool from_the_start)
      : k(params), kept(rows), r(row), careful(from_the_start) {
    r = KlRow{};
  }

  // The frame becomes (mx, my).
  void retarget(float mx, float my) {
    double up_x = (double(mx) - double(r.mx)) * k.row_scale,
           up_y = (double(my) - double(r.my)) * k.ref_row_scale;
    // a row of which there is nothing yet was in no frame
    if (!seen_x) up_x = up_y;
    if (!seen_y) up_y = up_x;
    if (seen_x || seen_y) total.carry(up_x, up_y);
    r.mx = mx;
    r.my = my;
  }

  template <class T>
  void add(const T* x, const T* y, int64_t start, int64_t n) {
    if (!seen_x || !seen_y) {
      const KlRow own = chunk_maxima(x, y, n, k);
      retarget(!seen_x && own.mx > -kInf ? own.mx : r.mx,
               !seen_y && own.my > -kInf ? own.my : r.my);
    }
    ChunkSums part;
    bool raised = false, centred = false;
    for (int sums = 0; sums < kMostSums; ++sums) {
      part = in_frame<T>(k, r, [&](const auto& frame) {
        constexpr FrameMode mode = std::remove_reference_t<decltype(frame)>::kMode;
        if constexpr (!pair) return sum_policy(x, n, frame, careful);
        else if constexpr (mode == FrameMode::kGeneral && want == kWantPolicyRef)
          if (kept.frames) return sum_with<mode, true>(x, y, n, frame, start);
        if constexpr (pair) return sum_with<mode, false>(x, y, n, frame, start);
      });
      if (part.top > kFrameSlack && !raised) {
        raised = true;
        const KlRow own = chunk_maxima(x, y, n, k);
        retarget(std::max(r.mx, own.mx), std::max(r.my, own.my));
        continue;
      }
      if (!careful && !trusted(part)) {
        careful = true;
        continue;
      }
      if (centred || !centre(part)) break;
      centred = true;
    }
    if constexpr ((want & kWantEntropy) != 0) {
      if (part.moment > kDominated * part.mass && part.top <= kFrameSlack)
        in_frame<T>(k, r, [&](const auto& frame) { sum_around_peak(x, n, frame, part); });
    }
    seen_x |= part.s != 0;
    seen_y |= part.y != 0;
    total += part;
    if (kept.frames) kept.frames[start / kChunk] = r;
  }

  template <FrameMode mode, bool keep, class T>
  ChunkSums sum_with(const T* x, const T* y, int64_t n, const Frame<mode>& frame, int64_t start) {
    if (careful) return sum_chunk<true, mode, want, keep>(x, y, n, frame, kept, start);
    return sum_chunk<false, mode, want, keep>(x, y, n, frame, kept, start);
  }

  bool trusted(const ChunkSums& part) const {
    KlSums all = total;
    all += part;
    return all.template trusted<want>();
  }

  // Moves the frame onto the chunk's mean gap, where that hides the spread and the chunk has a good
  // part of the mass that would suffer from it.
  bool centre(const ChunkSums& part) {
    constexpr bool forwards = (want & kWantPolicyRef) != 0,
                   backwards = (want & kWantRefPolicy) != 0;
    const bool weighs =
        (forwards && part.s > kWeighty * total.s) || (backwards && part.y > kWeighty * total.y);
    if (!weighs) return false;
    Divergence best;
    for (const bool policy_ref : {true, false}) {
      if (!(policy_ref ? forwards : backwards)) continue;
      const Divergence v = divergence(part, policy_ref);
      if (v.off_centre() && (best.size == 0 || v.value < best.value)) best = v;
    }
    const float my = float(double(r.my) - best.gap / k.ref_row_scale);
    if (best.size == 0 || my == r.my) return false;
    retarget(r.mx, my);
    return true;
  }
};

template <int want, bool pair = true>
inline KlSums sweep_row(RowPair& rows, int64_t V, const KlParams& k, KlRow& r,
                        bool careful = false) {
  RowSweep<want, pair> sweep(k, rows.kept, r, careful);
  for_chunks<FrameMode::kShared>(
      rows, k, V, [&](auto* x, auto* y, int64_t start, int64_t n) { sweep.add(x, y, start, n); });
  rows.staged = rows.kept.x != nullptr;
  return sweep.total;
}

}  // namespace FASTTAX_ISA_NS
}  // namespace fasttax
#endif
