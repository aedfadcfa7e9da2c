// One sweep over a row pair: every sum that a forward wants.
//  - Where four vectors have |d| <= 1/4 one exp and a polynomial do. Elsewhere two exps and plain
//  sums, good to 1e-7
//    of the mass summed so: a row that comes out below 1e-2 of that (or as NaN: -inf entries) is
//    run again with the series in every lane that needs it, and with 0 * inf = 0.
//  - Lanes are folded to double every 2048 cells, so the sums do not depend on V's size.
#include "kl_frame.h"

#if defined(FASTTAX_ISA)  // isa.h: once per instruction set
namespace fasttax {
namespace FASTTAX_ISA_NS {

constexpr int kWantPolicyRef = 1, kWantRefPolicy = 2, kWantEntropy = 4;

struct Sums : KlSums {
  float top = -kInf;  // highest entry above the frames

  // Of the entries [begin, end). Where their mean is near or above the frame, one of them has
  // nearly all of the mass, or stands above the frame: its ax in every term, or its 1 in every sum,
  // would cost the digits that the entropy lives on. There the sums are taken again around the
  // highest, which is counted apart.
  template <FrameMode mode, class T>
  void add_moments(const T* x, const T* y, int64_t begin, int64_t end, const Frame<mode>& frame,
                   VF mass_lanes, VF moment_lanes, float highest) {
    double around = sum(mass_lanes), off_peak = sum(moment_lanes), pivot = 0;
    if (off_peak > kDominated * around && highest <= kFrameSlack) {
      VF peak = splat(-kInf), peaks{};
      const auto each = [&](auto f) {
        for_vectors(x, y, begin, end, [&](VF xv, VF yv, int64_t, int64_t n) {
          VF ax, d;
          frame(xv, yv, ax, d, n);
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
        moment_lanes += where_zero(e, e * off);
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
inline Sums sweep(const T* x, const T* y, int64_t V, const KlParams& k, const KlRow& r) {
  const Frame<mode> frame(k, r);
  Sums total;
  for (int64_t start = 0; start < V; start += kChunk) {
    const int64_t end = std::min(V, start + kChunk);
    constexpr bool forwards = want & kWantPolicyRef, backwards = want & kWantRefPolicy,
                   entropy = want & kWantEntropy;
    VF S{}, G{}, B{}, C{}, top = splat(-kInf);
    // lanes summed plainly: e^ax, e^ay, e^ax d and -e^ay d
    VF plain_x{}, plain_y{}, plain_a{}, plain_c{};
    VF blend_x{}, blend_y{}, blend_g{}, blend_b{}, blend_a{}, blend_c{}, blend_back{};
    VF moment{};
    auto small = [&](VF ax, VF d) {  // every |d| <= 1/4
      const VF ex = exp_flushed(ax);
      VF f, f_back{};
      if (forwards && backwards) kl_bregman_small(d, f, f_back);
      else f = kl_bregman_small(d);
      if (!forwards && backwards) f_back = kl_bregman_small(-d);
      const VF change = ex * (f - d);
      S += ex;
      G += change;
      if (forwards) B = fma(ex, f, B);
      if (backwards) C = fma(ex + change, f_back, C);
      if (entropy) moment = fma(ex, ax, moment);
    };
    auto plain = [&](VF ax, VF d) {
      const VF ex = exp_flushed(ax), ey = exp_flushed(ax - d);
      plain_x += ex;
      plain_y += ey;
      if (forwards) plain_a = fma(ex, d, plain_a);
      if (backwards) plain_c = fma(ey, -d, plain_c);
      if (entropy) moment = fma(ex, ax, moment);
    };
    auto blend = [&](VF ax, VF ay, VF d) {
      const VF ex = exp(ax), ey = exp(ay);
      const VI near = abs(d) <= kSmallGap;
      const VF f = kl_bregman_small(d);
      const VF change = near ? ex * (f - d) : ey - ex;
      blend_x += ex;
      blend_y += ey;
      blend_g += change;
      if (forwards) {
        const VF pull = where_zero(ex, ex * d);
        blend_a += pull;
        blend_b += near ? ex * f : change + pull;
      }
      if (backwards) {
        const VF pull = where_zero(ey, ey * d);
        blend_back -= pull;
        blend_c += near ? ey * kl_bregman_small(-d) : -change - pull;
      }
      if (entropy) moment += where_zero(ex, ex * ax);
    };
    int64_t i = start;
    for (; i + 4 * kLanes <= end; i += 4 * kLanes) {
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
        for (int j = 0; j < 4; ++j) small(ax[j], d[j]);
      } else if (careful) {
        for (int j = 0; j < 4; ++j) {
          const VF ay = frame.ay(xv[j], yv[j]);
          top = max_keep_nan(ay, top);
          blend(ax[j], ay, d[j]);
        }
      } else {
        for (int j = 0; j < 4; ++j) plain(ax[j], d[j]);
        const VF ay = max_keep_nan(max_keep_nan(ax[0] - d[0], ax[1] - d[1]),
                                   max_keep_nan(ax[2] - d[2], ax[3] - d[3]));
        top = max_keep_nan(ay, top);
      }
    }
    for_vectors(x, y, i, end, [&](VF xv, VF yv, int64_t, int64_t n) {
      VF ax, d;
      frame(xv, yv, ax, d, n);
      const VF ay = frame.ay(xv, yv, n);
      top = max_keep_nan(max_keep_nan(ax, ay), top);
      blend(ax, ay, d);
    });
    const double near_x = sum(S), near_change = sum(G), far_x = sum(plain_x), far_y = sum(plain_y),
                 far_change = far_y - far_x;
    total.s += near_x + far_x + sum(blend_x);
    total.y += (near_x + near_change) + far_y + sum(blend_y);
    total.g += near_change + far_change + sum(blend_g);
    total.far += far_x + far_y;
    if (forwards) {
      const double bregman = sum(B), pull = sum(plain_a);
      total.b += bregman + (pull + far_change) + sum(blend_b);
      total.a += (bregman - near_change) + pull + sum(blend_a);
    }
    if (backwards) {
      const double bregman = sum(C), pull = sum(plain_c);
      total.c += bregman + (pull - far_change) + sum(blend_c);
      total.back += (bregman + near_change) + pull + sum(blend_back);
    }
    if (entropy)
      total.add_moments(x, y, start, end, frame, S + plain_x + blend_x, moment, max_of(top));
    total.top = std::max(total.top, max_of(top));
    if (total.top > kFrameSlack) break;
  }
  return total;
}

template <int want, class T>
inline Sums sweep_row(const T* x, const T* y, int64_t V, const KlParams& k, const KlRow& r,
                      bool careful) {
  if (Frame<FrameMode::kUnit>::is_unit(k, r))
    return careful ? sweep<FrameMode::kUnit, want, true>(x, y, V, k, r)
                   : sweep<FrameMode::kUnit, want, false>(x, y, V, k, r);
  return k.plain ? sweep<FrameMode::kShared, want, true>(x, y, V, k, r)
                 : sweep<FrameMode::kGeneral, want, true>(x, y, V, k, r);
}

// p - q for a gradient. In rows that are close the difference of the two would cancel: where |u| <=
// 1/4 it is p (1 - e^-u) by the series, and vectors with no other lane go without q's exp unless
// the caller wants q as well.
template <FrameMode mode>
struct Difference {
  const Frame<mode> frame;
  const float log_ratio, inv_s_ref;
  const bool close;

  Difference(const KlParams& k, const KlRow& r, double kl)
      : frame(k, r), log_ratio(r.log_ratio), inv_s_ref(r.inv_s_ref), close(!(kl >= kTrusted)) {}

  __attribute__((always_inline)) inline VF operator()(VF xv, VF yv, int64_t n, VF p, VF d,
                                                      bool want_q, VF& q) const {
    const VF u = d - log_ratio;
    if (!close) {
      q = exp_flushed(frame.ay(xv, yv, n)) * inv_s_ref;
      return p - q;
    }
    const VF series = p * (u - kl_bregman_small(u));
    if (!want_q && all_le(abs(u), splat(kSmallGap))) return series;
    q = exp_flushed(frame.ay(xv, yv, n)) * inv_s_ref;
    return (abs(u) <= kSmallGap) ? series : p - q;
  }
};

}  // namespace FASTTAX_ISA_NS
}  // namespace fasttax
#endif
