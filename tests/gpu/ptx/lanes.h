#pragma once

// Handlers of instructions that take lane by lane: a function of values makes one, and what is
// unknown of an operand is unknown of the result.

#include <bit>

#include "machine.h"

namespace ptx {

template <class T>
using Held = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;  // how a register holds it

template <class T>
inline T take(Held<T> bits) {
  if constexpr (sizeof(T) == sizeof(bits)) return std::bit_cast<T>(bits);
  else if constexpr (sizeof(T) == 2) return std::bit_cast<T>(uint16_t(bits));
  else return std::bit_cast<T>(uint8_t(bits));
}
template <class T>
inline Held<T> hold(T value) {
  if constexpr (sizeof(T) == 8) return std::bit_cast<uint64_t>(value);
  // a narrow signed result fills its register with its sign
  else if constexpr (std::is_signed_v<T> && std::is_integral_v<T> && sizeof(T) < 4)
    return uint32_t(int32_t(value));
  else if constexpr (sizeof(T) == 4) return std::bit_cast<uint32_t>(value);
  else if constexpr (sizeof(T) == 2) return std::bit_cast<uint16_t>(value);
  else return std::bit_cast<uint8_t>(value);
}

template <auto f, class D, class A>
void unary(Warp& w, const Instruction& i, Mask mask) {
  const auto* a = w.row<Held<A>>(i.slots[1]);
  auto* d = w.row<Held<D>>(i.slots[0]);
  w.know(i.slots[0], mask, w.known[i.slots[1]]);
  if (mask == kWhole) {
#pragma GCC ivdep
    for (int l = 0; l < kLanes; ++l) d[l] = hold<D>(f(take<A>(a[l])));
  } else {
    each_lane(mask, [&](int l) { d[l] = hold<D>(f(take<A>(a[l]))); });
  }
}

template <auto f, class D, class A, class B>
void binary(Warp& w, const Instruction& i, Mask mask) {
  const auto* a = w.row<Held<A>>(i.slots[1]);
  const auto* b = w.row<Held<B>>(i.slots[2]);
  auto* d = w.row<Held<D>>(i.slots[0]);
  w.know(i.slots[0], mask, w.known[i.slots[1]] & w.known[i.slots[2]]);
  if (mask == kWhole) {
#pragma GCC ivdep
    for (int l = 0; l < kLanes; ++l) d[l] = hold<D>(f(take<A>(a[l]), take<B>(b[l])));
  } else {
    each_lane(mask, [&](int l) { d[l] = hold<D>(f(take<A>(a[l]), take<B>(b[l]))); });
  }
}

template <auto f, class D, class A, class B, class C>
void ternary(Warp& w, const Instruction& i, Mask mask) {
  const auto* a = w.row<Held<A>>(i.slots[1]);
  const auto* b = w.row<Held<B>>(i.slots[2]);
  const auto* c = w.row<Held<C>>(i.slots[3]);
  auto* d = w.row<Held<D>>(i.slots[0]);
  w.know(i.slots[0], mask, w.known[i.slots[1]] & w.known[i.slots[2]] & w.known[i.slots[3]]);
  if (mask == kWhole) {
#pragma GCC ivdep
    for (int l = 0; l < kLanes; ++l) d[l] = hold<D>(f(take<A>(a[l]), take<B>(b[l]), take<C>(c[l])));
  } else {
    each_lane(mask, [&](int l) { d[l] = hold<D>(f(take<A>(a[l]), take<B>(b[l]), take<C>(c[l]))); });
  }
}

// To a predicate, a bit a lane.
template <auto f, class A>
void compare(Warp& w, const Instruction& i, Mask mask) {
  const auto* a = w.row<Held<A>>(i.slots[1]);
  const auto* b = w.row<Held<A>>(i.slots[2]);
  Mask is = 0;
  for (int l = 0; l < kLanes; ++l) is |= Mask(f(take<A>(a[l]), take<A>(b[l]))) << l;
  Mask& d = w.predicate(i.slots[0]);
  d = (d & ~mask) | (is & mask);
  w.know(i.slots[0], mask, w.known[i.slots[1]] & w.known[i.slots[2]]);
}

}  // namespace ptx
