#if !defined(FASTTAX_MATH_KL_ROW)  // read for each instruction set: macros.h
#define FASTTAX_MATH_KL_ROW

#include <cmath>

#include "kl.h"
#include "kl_kinds.h"

// From a row pair's sums to its divergences: what every native forward does once a row.
namespace fasttax {
namespace FASTTAX_MATH_NS {

// How far above its frame an entry may stand: e^20 V is far below float's range, and exp is exact
// enough.
constexpr float kFrameSlack = 20.0f;
// How often a chunk's entries are summed at most: again in a frame of its own maxima, again
// carefully, and again around its mean gap. Every loop ends with this count, whatever a row holds.
constexpr int kMostSums = 4;
// The share of the mass so far from which a chunk's mean gap is worth a frame of its own.
constexpr double kWeighty = 1.0 / 8;
// A plain sum is good to about 1e-7 of its mass: 1e-5 of a divergence's sum this large.
constexpr double kTrusted = 1e-2;
// The mean of ax over some entries, above which the highest of them dominates them.
constexpr double kDominated = -0.05;

// The sums of a sweep, of the entries that are alike: |d| <= kl_near, one exponential and a series.
template <class M, int want>
struct KlNear {
  using S = typename M::S;
  S s{}, g{}, b{}, c{};  // e^ax, e^ay - e^ax, e^ax f(d), e^ay f(-d)

  FASTTAX_HD void add(S ex, S d) {
    S f, back;
    if constexpr ((want & kWantRefPolicy) != 0) kl_bregman_small(d, f, back);
    else f = kl_bregman_small(d);
    const S change = ex * (f - d);
    s += ex;
    g += change;
    if constexpr ((want & kWantPolicyRef) != 0) b = M::fma(ex, f, b);
    if constexpr ((want & kWantRefPolicy) != 0) c = M::fma(ex + change, back, c);
  }
  // of larger |d|, by rest = e^-d - 1 and f(d): e^-d f(-d) = d^2 - f(d) (1 + d)
  FASTTAX_HD void add(S ex, S d, S rest, S f) {
    s += ex;
    g = M::fma(ex, rest, g);
    if constexpr ((want & kWantPolicyRef) != 0) b = M::fma(ex, f, b);
    if constexpr ((want & kWantRefPolicy) != 0)
      c = M::fma(ex, M::fma(-f, d + constant<S>(1), d * d), c);
  }
};

// Of entries that are not, plainly: good to about 1e-7 of x + y (kTrusted).
template <class M, int want>
struct KlFar {
  using S = typename M::S;
  S x{}, y{}, a{}, c{};  // e^ax, e^ay, e^ax d, -e^ay d

  FASTTAX_HD void add(S ex, S ey, S d) {
    x += ex;
    y += ey;
    if constexpr ((want & kWantPolicyRef) != 0) a = M::fma(ex, d, a);
    if constexpr ((want & kWantRefPolicy) != 0) c = M::fma(ey, -d, c);
  }
};

// Of entries of any size, each summed by its own, with 0 * inf = 0.
template <class M, int want>
struct KlMixed {
  using S = typename M::S;
  S x{}, y{}, g{}, b{}, a{}, c{}, back{};  // as KlSums has them, x for s

  FASTTAX_HD void add(S ex, S ey, S d) {
    const auto near = M::abs(d) <= kl_near<S>();
    const S change = near ? ex * kl_rest(d) : ey - ex;
    x += ex;
    y += ey;
    g += change;
    if constexpr ((want & kWantPolicyRef) != 0) {
      const S pull = times(ex, d);
      a += pull;
      b += near ? ex * kl_excess(d) : change + pull;
    }
    if constexpr ((want & kWantRefPolicy) != 0) {
      const S pull = times(ey, d);
      back -= pull;
      c += near ? ey * kl_excess(S(-d)) : -change - pull;
    }
  }
};

// From one pair of frames to one that is higher by up_x and up_y: ax' = ax - up_x, ay' = ay - up_y
// and d' = d - delta.
struct KlMove {
  double up_x, delta, sx, sy;  // delta = up_x - up_y, sx = e^-up_x, sy = e^-up_y
  double rise, toward, away;   // sy - sx, sx f(-delta), sy f(delta)

  KlMove() = default;
  FASTTAX_HD KlMove(double x, double y)
      : up_x(x), delta(x - y), sx(std::exp(-x)), sy(std::exp(-y)) {
    const bool near = fabs(delta) < 1;
    rise = near ? sx * expm1(delta) : sy - sx;
    toward = near ? sx * kl_bregman(-delta) : rise - sx * delta;
    away = near ? sy * kl_bregman(delta) : sy * delta - rise;
  }
};

struct KlSums {
  double s = 0, y = 0, g = 0;  // sum e^ax, sum e^ay, their difference
  double b = 0, a = 0;         // policy_ref: B and sum e^ax d
  double c = 0, back = 0;      // ref_policy: C and -sum e^ay d
  // entropy: sum e^ax again, in an order that the reference does not change, and sum e^ax ax
  double mass = 0, moment = 0;
  double far = 0;  // the part of s + y that was summed plainly

  template <class M, int want>
  FASTTAX_HD void operator+=(const KlNear<M, want>& part) {
    const double near_s = M::total(part.s), near_g = M::total(part.g);
    s += near_s;
    y += near_s + near_g;
    g += near_g;
    if constexpr ((want & kWantPolicyRef) != 0) {
      const double bregman = M::total(part.b);
      b += bregman;
      a += bregman - near_g;
    }
    if constexpr ((want & kWantRefPolicy) != 0) {
      const double bregman = M::total(part.c);
      c += bregman;
      back += bregman + near_g;
    }
  }
  template <class M, int want>
  FASTTAX_HD void operator+=(const KlFar<M, want>& part) {
    const double far_x = M::total(part.x), far_y = M::total(part.y), change = far_y - far_x;
    s += far_x;
    y += far_y;
    g += change;
    far += far_x + far_y;
    if constexpr ((want & kWantPolicyRef) != 0) {
      const double pull = M::total(part.a);
      b += pull + change;
      a += pull;
    }
    if constexpr ((want & kWantRefPolicy) != 0) {
      const double pull = M::total(part.c);
      c += pull - change;
      back += pull;
    }
  }
  template <class M, int want>
  FASTTAX_HD void operator+=(const KlMixed<M, want>& part) {
    s += M::total(part.x);
    y += M::total(part.y);
    g += M::total(part.g);
    if constexpr ((want & kWantPolicyRef) != 0) {
      b += M::total(part.b);
      a += M::total(part.a);
    }
    if constexpr ((want & kWantRefPolicy) != 0) {
      c += M::total(part.c);
      back += M::total(part.back);
    }
  }

  // Whether what was summed plainly left B and C their digits; false for NaN.
  template <int want>
  FASTTAX_HD bool trusted() const {
    const double least = kTrusted * far;
    bool enough = s + y >= least;
    if constexpr ((want & kWantEntropy) != 0) enough &= moment == moment;
    if constexpr ((want & kWantPolicyRef) != 0) enough &= b >= least;
    if constexpr ((want & kWantRefPolicy) != 0) enough &= c >= least;
    return enough;
  }

  // The sums in frames that are higher by `up_x` and `up_y` out of those in the old ones.
  FASTTAX_HD void move(double up_x, double up_y) {
    // a side of which there is nothing yet was in no frame
    if (s == 0 && y == 0) return;
    if (s == 0) up_x = up_y;
    if (y == 0) up_y = up_x;
    move(KlMove(up_x, up_y));
  }
  //   B' = sx B + (sy - sx) G + sx S f(-delta)     C' = sy C + (sy - sx) G + sy Y f(delta)
  FASTTAX_HD void move(const KlMove& to) {
    b = to.sx * b + to.rise * g + to.toward * s;
    c = to.sy * c + to.rise * g + to.away * y;
    a = to.sx * (a - to.delta * s);
    back = to.sy * (back + to.delta * y);
    g = to.sy * g + to.rise * s;
    moment = to.sx * (moment - to.up_x * mass);
    mass *= to.sx;
    s *= to.sx;
    y *= to.sy;
    far *= to.sx > to.sy ? to.sx : to.sy;
  }
  // The same of sums over chunks that were added one after the other, each in the newest frame.
  void carry(double up_x, double up_y) {
    // Where the masses are apart, G and what hangs on it were rounded beside the larger one's,
    // while each of the two has its own digits.
    if (fabs(g) > 0.5 * s) {
      g = y - s;
      b = a + g;
      c = back - g;
    }
    const KlMove to(up_x, up_y);
    // infinite terms of a mass that is nothing in the new frame are nothing
    if (to.sx == 0) a = b = moment = 0;
    if (to.sy == 0) c = back = 0;
    move(to);
  }

  FASTTAX_HD void operator+=(const KlSums& other) {
    s += other.s;
    y += other.y;
    g += other.g;
    b += other.b;
    a += other.a;
    c += other.c;
    back += other.back;
    mass += other.mass;
    moment += other.moment;
    far += other.far;
  }
};

// One of the two divergences out of a sweep's sums.
struct Divergence {
  double value = 0;
  double gap = 0;        // the mean of d: under p for policy_ref, under q for ref_policy
  double size = 0;       // of the terms whose difference `value` is
  double log_ratio = 0;  // log(S / Y)
  // Frames that do not fit (the rows' maxima lie apart, or a peak outside the primed part) make
  // both terms large and alike: moved onto the mean gap, the difference keeps its digits.
  bool cancels = false;

  // Whether a frame moved onto the gap would make the terms four times smaller.
  FASTTAX_HD bool off_centre() const {
    return value < size / 4 && float(gap) != 0 && fabs(gap) < kFrameSlack;
  }
  FASTTAX_HD bool recentre() const { return cancels && float(gap) != 0 && fabs(gap) < kFrameSlack; }
};

// Where one row's mass is far from the other's in this frame (|tau| > 1/2), B/S - h(tau) is a
// difference of large numbers and so is S + G: the plain form with sums of its own for each row is
// the accurate one.
FASTTAX_HD Divergence divergence(const KlSums& t, bool policy_ref) {
  Divergence v;
  const double tau = t.g / t.s;
  const bool centred = fabs(tau) <= 0.5;
  v.log_ratio = centred ? -std::log1p(tau) : std::log(t.s / t.y);
  if (policy_ref) {
    v.value = centred ? t.b / t.s - kl_defect(tau) : t.a / t.s - v.log_ratio;
    // not value + log_ratio: of a row with one peak it is that entry's d to the bit, and its
    // gradient 0
    v.gap = t.a / t.s;
    v.size = centred ? t.b / t.s : fabs(v.log_ratio);
  } else {
    v.value = centred ? t.c / t.y - kl_defect(-t.g / t.y) : t.back / t.y + v.log_ratio;
    v.gap = -t.back / t.y;
    v.size = centred ? t.c / t.y : fabs(v.log_ratio);
  }
  v.cancels = v.value < v.size / 16;
  return v;
}

}  // namespace FASTTAX_MATH_NS
}  // namespace fasttax
#endif
