// Loads, stores, atomics and copies into shared memory.
#include "lanes.h"
#include "place.h"

namespace ptx {
namespace {

Launch& of(Warp& w) { return *w.launch; }

void addresses_of(Warp& w, const Instruction& i, int32_t slot, Mask mask, uint64_t* out) {
  must_know(w, i, mask, slot, "an address");
  const uint64_t* a = w.row<uint64_t>(slot);
  for (int l = 0; l < kLanes; ++l) out[l] = a[l] + uint64_t(i.immediate);
}

// T: an entry as memory has it; n of them an access
template <class T, int n, Space space>
void load(Warp& w, const Instruction& i, Mask mask) {
  constexpr uint32_t bytes = sizeof(T) * n;
  uint64_t addresses[kLanes];
  addresses_of(w, i, i.slots[n], mask, addresses);
  Mask known = mask;
  bool global = false;
  each_lane(mask, [&](int l) {
    T values[n] = {};
    Place at;
    if (resolve(w, i, l, addresses[l], bytes, false, space, at)) {
      if (!must_be_written(w, i, l, at, bytes)) known &= ~(Mask(1) << l);
      touch(w, i, l, at, bytes, false);
      memcpy(values, at.data, bytes);
      global |= at.global;
    }
    for (int k = 0; k < n; ++k) {
      using R = std::conditional_t<std::is_signed_v<T> && sizeof(T) < 4, int32_t, Held<T>>;
      w.row<Held<T>>(i.slots[k])[l] = Held<T>(R(values[k]));
    }
  });
  for (int k = 0; k < n; ++k) w.know(i.slots[k], mask, known);
  if (global) count(of(w).loads[size_t(of(w).place(i))], w.cta->loads, addresses, mask, bytes);
}

template <class T, int n, Space space>
void store(Warp& w, const Instruction& i, Mask mask) {
  constexpr uint32_t bytes = sizeof(T) * n;
  uint64_t addresses[kLanes];
  addresses_of(w, i, i.slots[0], mask, addresses);
  Mask known = mask;
  for (int k = 0; k < n; ++k) known &= w.known[i.slots[1 + k]];
  bool global = false;
  each_lane(mask, [&](int l) {
    T values[n];
    for (int k = 0; k < n; ++k) values[k] = T(w.row<Held<T>>(i.slots[1 + k])[l]);
    Place at;
    if (!resolve(w, i, l, addresses[l], bytes, true, space, at)) return;
    const bool sure = known >> l & 1;
    if (at.global && !sure)
      of(w).fault("uninitialised register", w, i, l, "stored in global memory");
    touch(w, i, l, at, bytes, true, memcmp(at.data, values, bytes) == 0);
    memcpy(at.data, values, bytes);
    mark(at, bytes, sure || at.global);
    global |= at.global;
    w.fenced &= ~(Mask(1) << l);  // this is behind the fence
  });
  if (global) count(of(w).stores[size_t(of(w).place(i))], w.cta->stores, addresses, mask, bytes);
}

template <class T, int n>
void load_param(Warp& w, const Instruction& i, Mask mask) {
  const uint64_t* a = w.row<uint64_t>(i.slots[n]);
  must_know(w, i, mask, i.slots[n], "an address");
  each_lane(mask, [&](int l) {
    T values[n] = {};
    const uint64_t at = a[l] + uint64_t(i.immediate);
    if (at + sizeof values > of(w).args.param_bytes || at % sizeof values)
      of(w).fault("out of bounds", w, i, l, text("byte %ld of the arguments", long(at)));
    else memcpy(values, of(w).args.params + at, sizeof values);
    for (int k = 0; k < n; ++k) {
      using R = std::conditional_t<std::is_signed_v<T> && sizeof(T) < 4, int32_t, Held<T>>;
      w.row<Held<T>>(i.slots[k])[l] = Held<T>(R(values[k]));
    }
  });
  for (int k = 0; k < n; ++k) w.know(i.slots[k], mask, mask);
}

// --- atomics

// An atomic behind a fence hands on what its block has written, and takes what others handed on.
void hand_over(Warp& w, int lane, uint64_t address) {
  auto& there = of(w).released[address];
  for (const auto& [block, released] : there) {
    if (block == w.cta->number) continue;
    Released& mine = w.cta->known[block];
    mine.phase = std::max(mine.phase, released.phase);
    mine.threads.insert(released.threads.begin(), released.threads.end());
  }
  if (!(w.fenced >> lane & 1)) return;
  Released& mine = there[w.cta->number];
  mine.phase = std::max(mine.phase, w.phase);
  mine.threads.insert(w.thread(lane));
}

template <auto f, class T, Space space, bool returns>
void atomic(Warp& w, const Instruction& i, Mask mask) {
  uint64_t addresses[kLanes];
  const int at_address = returns;
  addresses_of(w, i, i.slots[at_address], mask, addresses);
  must_know(w, i, mask, i.slots[at_address + 1], "an atomic's operand");
  bool global = false;
  each_lane(mask, [&](int l) {
    Place at;
    T old{};
    if (resolve(w, i, l, addresses[l], sizeof(T), true, space, at)) {
      must_be_written(w, i, l, at, sizeof(T));
      memcpy(&old, at.data, sizeof(T));
      const T value = f(old, take<T>(w.row<Held<T>>(i.slots[at_address + 1])[l]));
      memcpy(at.data, &value, sizeof(T));
      hand_over(w, l, addresses[l]);
      global |= at.global;
    }
    if (returns) w.row<Held<T>>(i.slots[0])[l] = hold<T>(old);
  });
  if (returns) w.know(i.slots[0], mask, mask);
  if (global)
    count(of(w).stores[size_t(of(w).place(i))], w.cta->stores, addresses, mask, sizeof(T));
}

void fence(Warp& w, const Instruction&, Mask mask) { w.fenced |= mask; }

// --- cp.async: what it brings is there when it has been waited for

void finish(Warp& w, const Instruction& i, const Copy& copy) {
  Place at;
  if (!resolve(w, i, copy.lane, copy.to, copy.bytes + copy.zeros, true, Space::kShared, at)) return;
  memcpy(at.data, reinterpret_cast<const void*>(copy.from), copy.bytes);
  memset(at.data + copy.bytes, 0, copy.zeros);
  mark(at, copy.bytes + copy.zeros, true);
  touch(w, i, copy.lane, at, copy.bytes + copy.zeros, true);
}

template <uint32_t bytes>
void copy_async(Warp& w, const Instruction& i, Mask mask) {  // to, from, bytes that are read
  uint64_t addresses[kLanes] = {};
  must_know(w, i, mask, i.slots[0], "an address");
  must_know(w, i, mask, i.slots[1], "an address");
  must_know(w, i, mask, i.slots[2], "a copy's size");
  Mask reading = 0;
  each_lane(mask, [&](int l) {
    const uint64_t to = w.row<uint64_t>(i.slots[0])[l] + uint64_t(i.immediate & 0xffffffff),
                   from = w.row<uint64_t>(i.slots[1])[l] + uint64_t(i.immediate >> 32);
    const uint32_t read = std::min(w.row<uint32_t>(i.slots[2])[l], bytes);
    Place source, target;
    if (!resolve(w, i, l, to, bytes, true, Space::kShared, target)) return;
    if (read > 0) {
      if (!resolve(w, i, l, from, bytes, false, Space::kGlobal, source)) return;
      must_be_written(w, i, l, source, read);
      touch(w, i, l, source, read, false);
      addresses[l] = from, reading |= Mask(1) << l;
    }
    touch(w, i, l, target, bytes, true);
    memset(target.shadow, kAllocated, bytes);
    w.copies.push_back({to, from, 0, read, bytes - read, w.copy_group, w.number, l});
  });
  if (reading) count(of(w).loads[size_t(of(w).place(i))], w.cta->loads, addresses, reading, bytes);
}
void commit(Warp& w, const Instruction&, Mask) { ++w.copy_group; }
void wait(Warp& w, const Instruction& i, Mask) {  // until at most `immediate` groups are under way
  std::vector<Copy> left;
  for (const Copy& copy : w.copies)
    if (i.immediate < 0 || copy.group + uint64_t(i.immediate) < w.copy_group) finish(w, i, copy);
    else left.push_back(copy);
  w.copies.swap(left);
}

#define VECTORS(name, f, T, type)                               \
  {name ".global." type "x1", f<T, 1, Space::kGlobal>},         \
      {name ".global." type "x2", f<T, 2, Space::kGlobal>},     \
      {name ".global." type "x4", f<T, 4, Space::kGlobal>},     \
      {name ".shared." type "x1", f<T, 1, Space::kShared>},     \
      {name ".shared." type "x2", f<T, 2, Space::kShared>},     \
      {name ".shared." type "x4", f<T, 4, Space::kShared>},     \
      {name ".cluster." type "x1", f<T, 1, Space::kCluster>},   \
      {name ".cluster." type "x2", f<T, 2, Space::kCluster>},   \
      {name ".cluster." type "x4", f<T, 4, Space::kCluster>},   \
      {name ".generic." type "x1", f<T, 1, Space::kGeneric>},   \
      {name ".generic." type "x2", f<T, 2, Space::kGeneric>}, { \
    name ".generic." type "x4", f<T, 4, Space::kGeneric>        \
  }
#define PARAMS(T, type)                                                                   \
  {"ld.param." type "x1", load_param<T, 1>}, {"ld.param." type "x2", load_param<T, 2>}, { \
    "ld.param." type "x4", load_param<T, 4>                                               \
  }

const Register accesses({
    VECTORS("ld", load, uint8_t, "u1"),
    VECTORS("ld", load, int8_t, "s1"),
    VECTORS("ld", load, uint16_t, "u2"),
    VECTORS("ld", load, int16_t, "s2"),
    VECTORS("ld", load, uint32_t, "u4"),
    VECTORS("ld", load, uint64_t, "u8"),
    VECTORS("st", store, uint8_t, "u1"),
    VECTORS("st", store, uint16_t, "u2"),
    VECTORS("st", store, uint32_t, "u4"),
    VECTORS("st", store, uint64_t, "u8"),
    PARAMS(uint8_t, "u1"),
    PARAMS(int8_t, "s1"),
    PARAMS(uint16_t, "u2"),
    PARAMS(int16_t, "s2"),
    PARAMS(uint32_t, "u4"),
    PARAMS(uint64_t, "u8"),
});

#define ATOMIC(name, f, T)                                           \
  {"atom.global." name, atomic<f, T, Space::kGlobal, true>},         \
      {"red.global." name, atomic<f, T, Space::kGlobal, false>},     \
      {"atom.generic." name, atomic<f, T, Space::kGeneric, true>}, { \
    "atom.shared." name, atomic<f, T, Space::kShared, true>          \
  }

constexpr auto kPlus = [](auto old, auto value) { return decltype(old)(old + value); };
constexpr auto kLeast = [](auto old, auto value) { return value < old ? value : old; };
constexpr auto kMost = [](auto old, auto value) { return old < value ? value : old; };
constexpr auto kOther = [](auto, auto value) { return value; };

const Register atomics({
    ATOMIC("add.u32", kPlus, uint32_t),
    ATOMIC("add.s32", kPlus, int32_t),
    ATOMIC("add.u64", kPlus, uint64_t),
    ATOMIC("add.f32", kPlus, float),
    ATOMIC("add.f64", kPlus, double),
    ATOMIC("min.s32", kLeast, int32_t),
    ATOMIC("max.s32", kMost, int32_t),
    ATOMIC("min.u32", kLeast, uint32_t),
    ATOMIC("max.u32", kMost, uint32_t),
    ATOMIC("exch.b32", kOther, uint32_t),
    {"fence", fence},
    {"cp.async.4", copy_async<4>},
    {"cp.async.8", copy_async<8>},
    {"cp.async.16", copy_async<16>},
    {"cp.async.commit", commit},
    {"cp.async.wait", wait},
});

}  // namespace
}  // namespace ptx
