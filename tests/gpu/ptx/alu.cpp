// Arithmetic on floats: as PTX has it, rounded once, with a multiply-add's product unrounded.
#include <cfenv>
#include <cmath>

#include "lanes.h"

namespace ptx {
namespace {

template <class T>
T flushed(T v) {  // .ftz
  return std::fabs(v) < T(1.17549435e-38f) ? std::copysign(T(0), v) : v;
}
// the one that is a number; of zeros the negative one is the smaller
template <class T>
T least(T a, T b) {
  if (a == b) return std::signbit(a) ? a : b;
  return a < b || b != b ? a : b;
}
template <class T>
T most(T a, T b) {
  if (a == b) return std::signbit(a) ? b : a;
  return a > b || b != b ? a : b;
}
template <class T>
T least_or_nan(T a, T b) {
  return a != a ? a : b != b ? b : least(a, b);
}
template <class T>
T most_or_nan(T a, T b) {
  return a != a ? a : b != b ? b : most(a, b);
}
template <class F>
float rounded(int mode, F&& f) {  // in another direction than to nearest
  const int before = std::fegetround();
  std::fesetround(mode);
  const float out = f();
  std::fesetround(before);
  return out;
}
float fma_toward(int mode, float a, float b, float c) {
  return rounded(mode, [&] {
    volatile float x = a, y = b, z = c;
    volatile float out = std::fmaf(x, y, z);  // before the direction is set back
    return out;
  });
}
float add_toward(int mode, float a, float b) {
  return rounded(mode, [&] {
    volatile float x = a, y = b;
    volatile float out = x + y;
    return out;
  });
}
float saturated(float v) { return v > 0 ? std::min(v, 1.0f) : 0.0f; }

using F = float;
using D = double;

const Register floats({
    {"add.f32", binary<[](F a, F b) { return a + b; }, F, F, F>},
    {"add.f64", binary<[](D a, D b) { return a + b; }, D, D, D>},
    {"add.ftz.f32", binary<[](F a, F b) { return flushed(flushed(a) + flushed(b)); }, F, F, F>},
    {"add.rz.f32", binary<[](F a, F b) { return add_toward(FE_TOWARDZERO, a, b); }, F, F, F>},
    {"sub.f32", binary<[](F a, F b) { return a - b; }, F, F, F>},
    {"sub.f64", binary<[](D a, D b) { return a - b; }, D, D, D>},
    {"sub.ftz.f32", binary<[](F a, F b) { return flushed(flushed(a) - flushed(b)); }, F, F, F>},
    {"mul.f32", binary<[](F a, F b) { return a * b; }, F, F, F>},
    {"mul.f64", binary<[](D a, D b) { return a * b; }, D, D, D>},
    {"mul.ftz.f32", binary<[](F a, F b) { return flushed(flushed(a) * flushed(b)); }, F, F, F>},
    {"fma.f32", ternary<[](F a, F b, F c) { return std::fma(a, b, c); }, F, F, F, F>},
    {"fma.f64", ternary<[](D a, D b, D c) { return std::fma(a, b, c); }, D, D, D, D>},
    {"fma.ftz.f32",
     ternary<[](F a, F b, F c) { return flushed(std::fma(flushed(a), flushed(b), flushed(c))); }, F,
             F, F, F>},
    {"fma.rm.f32",
     ternary<[](F a, F b, F c) { return fma_toward(FE_DOWNWARD, a, b, c); }, F, F, F, F>},
    {"fma.rz.f32",
     ternary<[](F a, F b, F c) { return fma_toward(FE_TOWARDZERO, a, b, c); }, F, F, F, F>},
    {"div.f32", binary<[](F a, F b) { return a / b; }, F, F, F>},
    {"div.f64", binary<[](D a, D b) { return a / b; }, D, D, D>},
    {"min.f32", binary<least<F>, F, F, F>},
    {"min.f64", binary<least<D>, D, D, D>},
    {"min.NaN.f32", binary<least_or_nan<F>, F, F, F>},
    {"max.f32", binary<most<F>, F, F, F>},
    {"max.f64", binary<most<D>, D, D, D>},
    {"max.NaN.f32", binary<most_or_nan<F>, F, F, F>},
    {"abs.f32", unary<[](F a) { return std::fabs(a); }, F, F>},
    {"abs.ftz.f32", unary<[](F a) { return flushed(std::fabs(a)); }, F, F>},
    {"abs.f64", unary<[](D a) { return std::fabs(a); }, D, D>},
    {"neg.f32", unary<[](F a) { return -a; }, F, F>},
    {"neg.f64", unary<[](D a) { return -a; }, D, D>},
    {"copysign.f32", binary<[](F a, F b) { return std::copysign(b, a); }, F, F, F>},
    {"copysign.f64", binary<[](D a, D b) { return std::copysign(b, a); }, D, D, D>},
    {"sqrt.f32", unary<[](F a) { return std::sqrt(a); }, F, F>},
    {"sqrt.f64", unary<[](D a) { return std::sqrt(a); }, D, D>},
    {"rcp.f32", unary<[](F a) { return 1 / a; }, F, F>},
    {"rcp.f64", unary<[](D a) { return 1 / a; }, D, D>},
});

// The hardware's approximations are good to a unit or two; here they are rounded right.
const Register approximations({
    {"ex2.approx.f32", unary<[](F a) { return std::exp2(a); }, F, F>},
    {"ex2.approx.ftz.f32", unary<[](F a) { return flushed(std::exp2(flushed(a))); }, F, F>},
    {"lg2.approx.f32", unary<[](F a) { return std::log2(a); }, F, F>},
    {"lg2.approx.ftz.f32", unary<[](F a) { return std::log2(flushed(a)); }, F, F>},
    {"rcp.approx.f32", unary<[](F a) { return 1 / a; }, F, F>},
    {"rcp.approx.ftz.f32", unary<[](F a) { return flushed(1 / flushed(a)); }, F, F>},
    // the upper 32 bits alone, the lower ones 0
    {"rcp.approx.ftz.f64",
     unary<[](D a) { return std::bit_cast<D>(std::bit_cast<uint64_t>(1 / a) >> 32 << 32); }, D, D>},
    {"sqrt.approx.f32", unary<[](F a) { return std::sqrt(a); }, F, F>},
    {"sqrt.approx.ftz.f32", unary<[](F a) { return flushed(std::sqrt(flushed(a))); }, F, F>},
    {"rsqrt.approx.f32", unary<[](F a) { return 1 / std::sqrt(a); }, F, F>},
    {"rsqrt.approx.ftz.f32", unary<[](F a) { return flushed(1 / std::sqrt(flushed(a))); }, F, F>},
    {"tanh.approx.f32", unary<[](F a) { return std::tanh(a); }, F, F>},
    {"div.full.f32", binary<[](F a, F b) { return a / b; }, F, F, F>},
    {"div.full.ftz.f32",
     binary<[](F a, F b) { return flushed(flushed(a) / flushed(b)); }, F, F, F>},
    {"div.approx.f32", binary<[](F a, F b) { return a / b; }, F, F, F>},
    {"div.approx.ftz.f32",
     binary<[](F a, F b) { return flushed(flushed(a) / flushed(b)); }, F, F, F>},
});

#define COMPARE(T, type)                                                           \
  {"setp.eq." type, compare<[](T a, T b) { return a == b; }, T>},                  \
      {"setp.ne." type, compare<[](T a, T b) { return a < b || b < a; }, T>},      \
      {"setp.lt." type, compare<[](T a, T b) { return a < b; }, T>},               \
      {"setp.le." type, compare<[](T a, T b) { return a <= b; }, T>},              \
      {"setp.gt." type, compare<[](T a, T b) { return b < a; }, T>},               \
      {"setp.ge." type, compare<[](T a, T b) { return a >= b; }, T>},              \
      {"setp.equ." type, compare<[](T a, T b) { return !(a < b || b < a); }, T>},  \
      {"setp.neu." type, compare<[](T a, T b) { return a != b; }, T>},             \
      {"setp.ltu." type, compare<[](T a, T b) { return !(a >= b); }, T>},          \
      {"setp.leu." type, compare<[](T a, T b) { return !(b < a); }, T>},           \
      {"setp.gtu." type, compare<[](T a, T b) { return !(a <= b); }, T>},          \
      {"setp.geu." type, compare<[](T a, T b) { return !(a < b); }, T>},           \
      {"setp.num." type, compare<[](T a, T b) { return a == a && b == b; }, T>}, { \
    "setp.nan." type, compare<[](T a, T b) { return a != a || b != b; }, T>        \
  }

const Register comparisons({COMPARE(F, "f32"), COMPARE(D, "f64")});

// --- conversions

float of_bfloat(uint16_t v) { return std::bit_cast<float>(uint32_t(v) << 16); }
uint16_t to_bfloat(float v) {
  const uint32_t bits = std::bit_cast<uint32_t>(v);
  if (v != v) return 0x7fff;
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
float of_half(uint16_t v) { return float(std::bit_cast<_Float16>(v)); }
uint16_t to_half(float v) { return v != v ? 0x7fff : std::bit_cast<uint16_t>(_Float16(v)); }

template <auto f, auto widen, auto narrow>
uint16_t one_half(uint16_t a, uint16_t b) {
  return narrow(f(widen(a), widen(b)));
}
template <auto f, auto widen, auto narrow>
void halves(Warp& w, const Instruction& i, Mask mask) {
  binary<[](uint32_t a, uint32_t b) {
    const auto one = one_half<f, widen, narrow>;
    return uint32_t(one(uint16_t(a >> 16), uint16_t(b >> 16))) << 16 |
           one(uint16_t(a), uint16_t(b));
  },
         uint32_t, uint32_t, uint32_t>(w, i, mask);
}

template <class I, class T>
I to_integer(T v) {  // NaN is 0; beyond the type its end
  if (v != v) return 0;
  constexpr I low = std::numeric_limits<I>::min(), high = std::numeric_limits<I>::max();
  if (v <= T(low)) return low;
  if (v >= T(high)) return high;
  return I(v);
}

#define TO_INTEGER(T, type, I, integer)                                                       \
  {"cvt.rni." integer "." type,                                                               \
   unary<[](T v) { return to_integer<I>(std::nearbyint(v)); }, I, T>},                        \
      {"cvt.rzi." integer "." type,                                                           \
       unary<[](T v) { return to_integer<I>(std::trunc(v)); }, I, T>},                        \
      {"cvt.rmi." integer "." type,                                                           \
       unary<[](T v) { return to_integer<I>(std::floor(v)); }, I, T>},                        \
  {                                                                                           \
    "cvt.rpi." integer "." type, unary<[](T v) { return to_integer<I>(std::ceil(v)); }, I, T> \
  }
#define OF_INTEGER(I, integer)                                      \
  {"cvt.rn.f32." integer, unary<[](I v) { return F(v); }, F, I>}, { \
    "cvt.rn.f64." integer, unary<[](I v) { return D(v); }, D, I>    \
  }
#define WHOLE(T, type)                                                              \
  {"cvt.rni." type "." type, unary<[](T v) { return std::nearbyint(v); }, T, T>},   \
      {"cvt.rzi." type "." type, unary<[](T v) { return std::trunc(v); }, T, T>},   \
      {"cvt.rmi." type "." type, unary<[](T v) { return std::floor(v); }, T, T>}, { \
    "cvt.rpi." type "." type, unary<[](T v) { return std::ceil(v); }, T, T>         \
  }

const Register conversions({
    {"cvt.f64.f32", unary<[](F v) { return D(v); }, D, F>},
    {"cvt.rn.f32.f64", unary<[](D v) { return F(v); }, F, D>},
    {"cvt.sat.f32.f32", unary<saturated, F, F>},
    {"cvt.f32.bf16", unary<of_bfloat, F, uint16_t>},
    {"cvt.f32.f16", unary<of_half, F, uint16_t>},
    {"cvt.rn.bf16.f32", unary<to_bfloat, uint16_t, F>},
    {"cvt.rn.f16.f32", unary<to_half, uint16_t, F>},
    {"cvt.rn.f16.f64",
     unary<[](D v) { return std::bit_cast<uint16_t>(_Float16(v)); }, uint16_t, D>},
    {"cvt.rn.bf16x2.f32",
     binary<[](F a, F b) { return uint32_t(to_bfloat(a)) << 16 | to_bfloat(b); }, uint32_t, F, F>},
    {"cvt.rn.f16x2.f32",
     binary<[](F a, F b) { return uint32_t(to_half(a)) << 16 | to_half(b); }, uint32_t, F, F>},
    {"max.bf16x2", halves<most<F>, of_bfloat, to_bfloat>},
    {"min.bf16x2", halves<least<F>, of_bfloat, to_bfloat>},
    {"max.f16x2", halves<most<F>, of_half, to_half>},
    {"min.f16x2", halves<least<F>, of_half, to_half>},
    {"max.bf16", binary<one_half<most<F>, of_bfloat, to_bfloat>, uint16_t, uint16_t, uint16_t>},
    {"max.f16", binary<one_half<most<F>, of_half, to_half>, uint16_t, uint16_t, uint16_t>},
    {"cvt.rna.tf32.f32",
     unary<[](uint32_t v) { return (v + 0x1000) & ~uint32_t(0x1fff); }, uint32_t, uint32_t>},
    TO_INTEGER(F, "f32", int32_t, "s32"),
    TO_INTEGER(F, "f32", uint32_t, "u32"),
    TO_INTEGER(F, "f32", int64_t, "s64"),
    TO_INTEGER(F, "f32", uint64_t, "u64"),
    TO_INTEGER(D, "f64", int32_t, "s32"),
    TO_INTEGER(D, "f64", uint32_t, "u32"),
    TO_INTEGER(D, "f64", int64_t, "s64"),
    OF_INTEGER(int8_t, "s8"),
    OF_INTEGER(uint8_t, "u8"),
    OF_INTEGER(int16_t, "s16"),
    OF_INTEGER(uint16_t, "u16"),
    OF_INTEGER(int32_t, "s32"),
    OF_INTEGER(uint32_t, "u32"),
    OF_INTEGER(int64_t, "s64"),
    OF_INTEGER(uint64_t, "u64"),
    WHOLE(F, "f32"),
    WHOLE(D, "f64"),
});

}  // namespace
}  // namespace ptx
