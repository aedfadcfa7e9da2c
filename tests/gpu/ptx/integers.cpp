// Integers, bits, selections and predicates.
#include <algorithm>

#include "lanes.h"

namespace ptx {
namespace {

using U = uint32_t;
using L = uint64_t;

template <class T>
using Wide = std::conditional_t<sizeof(T) == 8, __int128,
                                std::conditional_t<sizeof(T) == 4, int64_t, int32_t>>;
template <class T>
using Bits = std::make_unsigned_t<T>;

template <class T>
T plus(T a, T b) {
  return T(Bits<T>(Bits<T>(a) + Bits<T>(b)));
}
template <class T>
T minus(T a, T b) {
  return T(Bits<T>(Bits<T>(a) - Bits<T>(b)));
}
template <class T>
T times(T a, T b) {
  return T(Bits<T>(uint64_t(Bits<T>(a)) * uint64_t(Bits<T>(b))));
}
template <class T>
T high(T a, T b) {
  using W = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
  return T(W(a) * W(b) >> 8 * sizeof(T));
}
template <class T>
T over(T a, T b) {
  if (b == 0) return T(-1);
  if (std::is_signed_v<T> && b == T(-1)) return minus<T>(0, a);
  return T(a / b);
}
template <class T>
T rest(T a, T b) {
  if (b == 0) return a;
  if (std::is_signed_v<T> && b == T(-1)) return 0;
  return T(a % b);
}
template <class T>
T left(T a, U by) {
  return by >= 8 * sizeof(T) ? T(0) : T(Bits<T>(a) << by);
}
template <class T>
T right(T a, U by) {
  return by >= 8 * sizeof(T) ? T(std::is_signed_v<T> && a < 0 ? -1 : 0) : T(a >> by);
}
template <class T>
T field(T a, U at, U length) {  // bfe
  at &= 255, length &= 255;
  if (length == 0) return 0;
  const U bits = 8 * sizeof(T), last = std::min(at + length - 1, bits - 1);
  const bool ones = std::is_signed_v<T> && (Bits<T>(a) >> last & 1);
  T out = 0;
  for (U k = 0; k < bits; ++k) {
    const bool bit = k < length && at + k < bits ? Bits<T>(a) >> (at + k) & 1 : ones;
    out = T(out | T(Bits<T>(bit) << k));
  }
  return out;
}
template <class T>
void insert(Warp& w, const Instruction& i, Mask mask) {  // bfi d, a, b, at, length
  T* d = w.row<T>(i.slots[0]);
  const T *a = w.row<T>(i.slots[1]), *b = w.row<T>(i.slots[2]);
  const U *at = w.row<U>(i.slots[3]), *length = w.row<U>(i.slots[4]);
  Mask known = mask;
  for (int k = 1; k < 5; ++k) known &= w.known[i.slots[k]];
  w.know(i.slots[0], mask, known);
  each_lane(mask, [&](int l) {
    const U from = at[l] & 255, n = length[l] & 255, bits = 8 * sizeof(T);
    const T ones = n >= bits ? ~T(0) : (T(1) << n) - 1, where = from >= bits ? 0 : ones << from;
    d[l] = (b[l] & ~where) | (from >= bits ? 0 : a[l] << from & where);
  });
}
U permuted(U a, U b, U how) {  // prmt, its default mode
  const L both = L(b) << 32 | a;
  U out = 0;
  for (int k = 0; k < 4; ++k) {
    const U pick = how >> 4 * k & 15;
    U byte = U(both >> 8 * (pick & 7)) & 255;
    if (pick & 8) byte = byte & 128 ? 255 : 0;
    out |= byte << 8 * k;
  }
  return out;
}
void logic(Warp& w, const Instruction& i, Mask mask) {  // lop3
  U* d = w.row<U>(i.slots[0]);
  const U *a = w.row<U>(i.slots[1]), *b = w.row<U>(i.slots[2]), *c = w.row<U>(i.slots[3]);
  w.know(i.slots[0], mask, w.known[i.slots[1]] & w.known[i.slots[2]] & w.known[i.slots[3]]);
  each_lane(mask, [&](int l) {
    U out = 0;
    for (int k = 0; k < 8; ++k)
      if (i.immediate >> k & 1)
        out |= (k & 4 ? a[l] : ~a[l]) & (k & 2 ? b[l] : ~b[l]) & (k & 1 ? c[l] : ~c[l]);
    d[l] = out;
  });
}

#define INTEGER(T, type)                                                                       \
  {"add." type, binary<plus<T>, T, T, T>}, {"sub." type, binary<minus<T>, T, T, T>},           \
      {"mul.lo." type, binary<times<T>, T, T, T>}, {"mul.hi." type, binary<high<T>, T, T, T>}, \
      {"mad.lo." type,                                                                         \
       ternary<[](T a, T b, T c) { return plus<T>(times<T>(a, b), c); }, T, T, T, T>},         \
      {"div." type, binary<over<T>, T, T, T>}, {"rem." type, binary<rest<T>, T, T, T>},        \
      {"min." type, binary<[](T a, T b) { return std::min(a, b); }, T, T, T>},                 \
      {"max." type, binary<[](T a, T b) { return std::max(a, b); }, T, T, T>},                 \
      {"abs." type, unary<[](T a) { return a < T(0) ? minus<T>(0, a) : a; }, T, T>},           \
      {"neg." type, unary<[](T a) { return minus<T>(0, a); }, T, T>},                          \
      {"shr." type, binary<right<T>, T, T, U>},                                                \
      {"setp.eq." type, compare<[](T a, T b) { return a == b; }, T>},                          \
      {"setp.ne." type, compare<[](T a, T b) { return a != b; }, T>},                          \
      {"setp.lt." type, compare<[](T a, T b) { return a < b; }, T>},                           \
      {"setp.le." type, compare<[](T a, T b) { return a <= b; }, T>},                          \
      {"setp.gt." type, compare<[](T a, T b) { return b < a; }, T>}, {                         \
    "setp.ge." type, compare<[](T a, T b) { return a >= b; }, T>                               \
  }
#define WIDE(T, W, type)                                                                         \
  {"mul.wide." type, binary<[](T a, T b) { return W(W(a) * W(b)); }, W, T, T>}, {                \
    "mad.wide." type, ternary<[](T a, T b, W c) { return plus<W>(W(a) * W(b), c); }, W, T, T, W> \
  }
#define BITS(T, type)                                                    \
  {"and." type, binary<[](T a, T b) { return T(a & b); }, T, T, T>},     \
      {"or." type, binary<[](T a, T b) { return T(a | b); }, T, T, T>},  \
      {"xor." type, binary<[](T a, T b) { return T(a ^ b); }, T, T, T>}, \
      {"not." type, unary<[](T a) { return T(~a); }, T, T>},             \
      {"shl." type, binary<left<T>, T, T, U>}, {                         \
    "mov." type, unary<[](T a) { return a; }, T, T>                      \
  }
#define CONVERT(T, to)                                                         \
  {"cvt." to ".s8", unary<[](int8_t v) { return T(v); }, T, int8_t>},          \
      {"cvt." to ".u8", unary<[](uint8_t v) { return T(v); }, T, uint8_t>},    \
      {"cvt." to ".s16", unary<[](int16_t v) { return T(v); }, T, int16_t>},   \
      {"cvt." to ".u16", unary<[](uint16_t v) { return T(v); }, T, uint16_t>}, \
      {"cvt." to ".s32", unary<[](int32_t v) { return T(v); }, T, int32_t>},   \
      {"cvt." to ".u32", unary<[](uint32_t v) { return T(v); }, T, uint32_t>}, \
      {"cvt." to ".s64", unary<[](int64_t v) { return T(v); }, T, int64_t>}, { \
    "cvt." to ".u64", unary<[](uint64_t v) { return T(v); }, T, uint64_t>      \
  }

const Register integers({
    INTEGER(int16_t, "s16"),
    INTEGER(uint16_t, "u16"),
    INTEGER(int32_t, "s32"),
    INTEGER(uint32_t, "u32"),
    INTEGER(int64_t, "s64"),
    INTEGER(uint64_t, "u64"),
    WIDE(int16_t, int32_t, "s16"),
    WIDE(uint16_t, uint32_t, "u16"),
    WIDE(int32_t, int64_t, "s32"),
    WIDE(uint32_t, uint64_t, "u32"),
    BITS(uint16_t, "b16"),
    BITS(uint32_t, "b32"),
    BITS(uint64_t, "b64"),
});
const Register widths({
    CONVERT(int8_t, "s8"),
    CONVERT(uint8_t, "u8"),
    CONVERT(int16_t, "s16"),
    CONVERT(uint16_t, "u16"),
    CONVERT(int32_t, "s32"),
    CONVERT(uint32_t, "u32"),
    CONVERT(int64_t, "s64"),
    CONVERT(uint64_t, "u64"),
});
const Register bits({
    {"popc.b32", unary<[](U a) { return U(__builtin_popcount(a)); }, U, U>},
    {"popc.b64", unary<[](L a) { return U(__builtin_popcountll(a)); }, U, L>},
    {"clz.b32", unary<[](U a) { return U(std::countl_zero(a)); }, U, U>},
    {"clz.b64", unary<[](L a) { return U(std::countl_zero(a)); }, U, L>},
    {"prmt.b32", ternary<permuted, U, U, U, U>},
    {"bfe.u32", ternary<field<uint32_t>, U, U, U, U>},
    {"bfe.s32", ternary<field<int32_t>, int32_t, int32_t, U, U>},
    {"bfe.u64", ternary<field<uint64_t>, L, L, U, U>},
    {"bfi.b32", insert<U>},
    {"bfi.b64", insert<L>},
    {"lop3.b32", logic},
    {"shf.l.wrap.b32",
     ternary<[](U a, U b, U by) { return U((L(b) << 32 | a) << (by & 31) >> 32); }, U, U, U, U>},
    {"shf.r.wrap.b32",
     ternary<[](U a, U b, U by) { return U((L(b) << 32 | a) >> (by & 31)); }, U, U, U, U>},
    // of registers that hold several values
    {"split.b64",
     [](Warp& w, const Instruction& i, Mask mask) {
       const L* a = w.row<L>(i.slots[2]);
       U *low = w.row<U>(i.slots[0]), *high = w.row<U>(i.slots[1]);
       L copy[kLanes];
       std::copy_n(a, kLanes, copy);
       const Mask known = w.known[i.slots[2]];
       w.know(i.slots[0], mask, known), w.know(i.slots[1], mask, known);
       each_lane(mask, [&](int l) { low[l] = U(copy[l]), high[l] = U(copy[l] >> 32); });
     }},
    {"split.b32",
     [](Warp& w, const Instruction& i, Mask mask) {
       const U* a = w.row<U>(i.slots[2]);
       U *low = w.row<U>(i.slots[0]), *high = w.row<U>(i.slots[1]);
       const Mask known = w.known[i.slots[2]];
       w.know(i.slots[0], mask, known), w.know(i.slots[1], mask, known);
       each_lane(mask, [&](int l) {
         const U v = a[l];
         low[l] = v & 0xffff, high[l] = v >> 16;
       });
     }},
    {"join.b64", binary<[](U low, U high) { return L(high) << 32 | low; }, L, U, U>},
    {"join.b32", binary<[](U low, U high) { return high << 16 | (low & 0xffff); }, U, U, U>},
});

// --- selections and predicates

template <class T>
void select(Warp& w, const Instruction& i, Mask mask) {  // what is not taken may be unknown
  const T *a = w.row<T>(i.slots[1]), *b = w.row<T>(i.slots[2]);
  T* d = w.row<T>(i.slots[0]);
  const Mask p = w.predicate(i.slots[3]);
  w.know(i.slots[0], mask,
         w.known[i.slots[3]] & ((p & w.known[i.slots[1]]) | (~p & w.known[i.slots[2]])));
  if (mask == kWhole) {
#pragma GCC ivdep
    for (int l = 0; l < kLanes; ++l) d[l] = p >> l & 1 ? a[l] : b[l];
  } else {
    each_lane(mask, [&](int l) { d[l] = p >> l & 1 ? a[l] : b[l]; });
  }
}

// f of whole predicates; sure(a, b, known a, known b): the lanes whose result is known
template <auto f, auto sure>
void predicates(Warp& w, const Instruction& i, Mask mask) {
  const Mask a = w.predicate(i.slots[1]), b = w.predicate(i.slots[2]);
  const Mask known = sure(a, b, w.known[i.slots[1]], w.known[i.slots[2]]);
  Mask& d = w.predicate(i.slots[0]);
  d = (d & ~mask) | (f(a, b) & mask);
  w.know(i.slots[0], mask, known);
}

const Register selections({
    {"selp.b16", select<U>},
    {"selp.b32", select<U>},
    {"selp.b64", select<L>},
    {"and.pred", predicates<[](Mask a, Mask b) { return a & b; },
                            [](Mask a, Mask b, Mask ka, Mask kb) {
                              return (ka & kb) | (ka & ~a) | (kb & ~b);
                            }>},
    {"or.pred",
     predicates<[](Mask a, Mask b) { return a | b; },
                [](Mask a, Mask b, Mask ka, Mask kb) { return (ka & kb) | (ka & a) | (kb & b); }>},
    {"xor.pred", predicates<[](Mask a, Mask b) { return a ^ b; },
                            [](Mask, Mask, Mask ka, Mask kb) { return ka & kb; }>},
    // of one operand, given twice
    {"not.pred",
     predicates<[](Mask a, Mask) { return ~a; }, [](Mask, Mask, Mask ka, Mask) { return ka; }>},
    {"mov.pred",
     predicates<[](Mask a, Mask) { return a; }, [](Mask, Mask, Mask ka, Mask) { return ka; }>},
});

}  // namespace
}  // namespace ptx
