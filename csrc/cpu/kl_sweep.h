// One sweep over a row pair: every sum that a forward wants (math/kl_row.h).
//  - Where four vectors have |d| <= 1/4 one exp and a polynomial do. Elsewhere two exps and plain
//    sums, good to 1e-7 of the mass summed so: a row that comes out below 1e-2 of that (or as NaN:
//    -inf entries) is run again with the series in every lane that needs it, and with 0 * inf = 0.
//  - Lanes are folded to double every 2048 cells, so the sums do not depend on V's size.
#include "kl_rows.h"

#if defined(FASTTAX_ISA)  // isa.h: once per instruction set
namespace fasttax {
namespace FASTTAX_ISA_NS {

struct Sums : KlSums {
  float top = -kInf;  // highest entry above the frames

  // Of a chunk. Where its entries' mean is near or above the frame, one of them has nearly all of
  // the mass, or stands above the frame: its ax in every term, or its 1 in every sum, would cost
  // the digits that the entropy lives on. There the sums are taken again around the highest, which
  // is counted apart.
  template <FrameMode mode, class T>
  void add_moments(const T* x, const T* y, int64_t n, const Frame<mode>& frame, VF mass_lanes,
                   VF moment_lanes, float highest) {
    double around = sum(mass_lanes), off_peak = sum(moment_lanes), pivot = 0;
    if (off_peak > kDominated * around && highest <= kFrameSlack) {
      VF peak = splat(-kInf), peaks{};
      const auto each = [&](auto f) {
        for_vectors(x, y, n, frame.y_filler(), [&](VF xv, VF yv) {
          VF ax, d;
          frame(xv, yv, ax, d);
          f(ax);
        });
      };
      each([&](VF ax) { peak = max_keep_nan(ax, peak); });
      pivot = double(max_of(peak));
      mass_lanes = moment_lanes = VF{};
      each([&](VF ax) {
        const VF off = ax - float(pivot), e = (off == 0.0f) ? splat(0.0f) : exp(off);
        peaks += (off == 0.0f) ? splat(1.0f) : splat(0.0f);
        mass_lanes += e;
        moment_lanes += times(e, off);
      });
      around = sum(peaks) + sum(mass_lanes);
      off_peak = sum(moment_lanes);
    }
    const double scale = std::exp(pivot);
    mass += scale * around;
    moment += scale * (off_peak + pivot * around);
  }
};

template <FrameMode mode, int want, bool careful, class T>
inline void sweep_chunk(const T* x, const T* y, int64_t n, const Frame<mode>& frame, Sums& total) {
  constexpr bool entropy = (want & kWantEntropy) != 0;
  KlNear<VectorMath, want> near;
  KlFar<VectorMath, want> far;
  KlMixed<VectorMath, want> mixed;
  VF moment{}, top = splat(-kInf);
  const auto alike = [&](VF ax, VF d) {  // every |d| <= 1/4
    const VF ex = exp_flushed(ax);
    near.add(ex, d);
    if (entropy) moment = fma(ex, ax, moment);
  };
  // ay by itself: from ax and d it has the rounding of ax, large where y peaks
  const auto plain = [&](VF ax, VF ay, VF d) {
    const VF ex = exp_flushed(ax);
    far.add(ex, exp_flushed(ay), d);
    if (entropy) moment = fma(ex, ax, moment);
  };
  const auto mix = [&](VF ax, VF ay, VF d) {
    const VF ex = exp(ax);
    mixed.add(ex, exp(ay), d);
    if (entropy) moment += times(ex, ax);
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
    if (all_le(widest, splat(kSmallGap)) &&
        (!careful || all_le((d[0] + d[1]) + (d[2] + d[3]), splat(kInf)))) {
      // max may lose a NaN; ax is NaN with it, or the row comes back
      for (int j = 0; j < 4; ++j) alike(ax[j], d[j]);
    } else if (careful) {
      for (int j = 0; j < 4; ++j) {
        const VF ay = frame.ay(xv[j], yv[j]);
        top = max_keep_nan(ay, top);
        mix(ax[j], ay, d[j]);
      }
    } else {
      VF ay[4];
      for (int j = 0; j < 4; ++j) ay[j] = frame.ay(xv[j], yv[j]);
      for (int j = 0; j < 4; ++j) plain(ax[j], ay[j], d[j]);
      const VF high = max_keep_nan(max_keep_nan(ay[0], ay[1]), max_keep_nan(ay[2], ay[3]));
      top = max_keep_nan(high, top);
    }
  }
  for_vectors(x + i, y + i, n - i, frame.y_filler(), [&](VF xv, VF yv) {
    VF ax, d;
    frame(xv, yv, ax, d);
    const VF ay = frame.ay(xv, yv);
    top = max_keep_nan(max_keep_nan(ax, ay), top);
    mix(ax, ay, d);
  });
  total += near;
  total += far;
  total += mixed;
  if (entropy) total.add_moments(x, y, n, frame, near.s + far.x + mixed.x, moment, max_of(top));
  total.top = std::max(total.top, max_of(top));
}

template <FrameMode mode, int want, bool careful>
inline Sums sweep(const RowPair& rows, int64_t V, const KlParams& k, const KlRow& r) {
  const Frame<mode> frame(k, r);
  Sums total;
  for_chunks<mode>(rows, k, V, [&](auto* x, auto* y, int64_t n) {
    sweep_chunk<mode, want, careful>(x, y, n, frame, total);
    return !(total.top > kFrameSlack);
  });
  return total;
}

template <int want>
inline Sums sweep_row(const RowPair& rows, int64_t V, const KlParams& k, const KlRow& r,
                      bool careful) {
  if (!careful && Frame<FrameMode::kUnit>::is_unit(k, r))
    return sweep<FrameMode::kUnit, want, false>(rows, V, k, r);
  if (k.plain) return sweep<FrameMode::kShared, want, true>(rows, V, k, r);
  return sweep<FrameMode::kGeneral, want, true>(rows, V, k, r);
}

}  // namespace FASTTAX_ISA_NS
}  // namespace fasttax
#endif
