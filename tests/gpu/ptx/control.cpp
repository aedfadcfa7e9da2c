// Branches, barriers, and what the lanes of a warp say to each other.
#include "lanes.h"
#include "place.h"

namespace ptx {
namespace {

using U = uint32_t;

void branch(Warp& w, const Instruction& i, Mask mask) {
  const Mask rest = w.active & ~mask;
  if (rest == 0) {
    w.next = i.target;
    return;
  }
  const int32_t here = w.at + 1;
  if (i.target < here) {
    w.split(rest, here);
    w.next = i.target;
  } else {
    w.split(mask, i.target);
  }
}
void leave(Warp& w, const Instruction&, Mask mask) { w.retire(mask); }

void barrier(Warp& w, const Instruction& i, Mask mask) {
  if (mask != w.live) {
    w.launch->fault("divergent barrier", w, i, __builtin_ctz(mask),
                    text("lanes %08x of %08x", mask, w.live));
    throw Stop("divergent barrier");
  }
  w.state = State::kBarrier;
  w.barrier = int32_t(i.immediate);
}
void cluster_arrive(Warp& w, const Instruction& i, Mask mask) {
  if (mask != w.live) {
    w.launch->fault("divergent barrier", w, i, __builtin_ctz(mask), "of a cluster");
    throw Stop("divergent barrier");
  }
  ++w.arrivals;
  ++w.cta->cluster->arrived;
}
void cluster_wait(Warp& w, const Instruction& i, Mask mask) {
  if (mask != w.live || w.arrivals <= w.waits) {
    w.launch->fault("divergent barrier", w, i, __builtin_ctz(mask), "a wait without an arrival");
    throw Stop("divergent barrier");
  }
  w.state = State::kCluster;
}

// Whether the lanes that a warp's instruction names are the ones that are here.
void meet(Warp& w, const Instruction& i, Mask mask, int32_t slot) {
  must_know(w, i, mask, slot, "a member mask");
  const int lane = __builtin_ctz(mask);
  const Mask members = w.row<U>(slot)[lane];
  if (const Mask away = members & w.live & ~mask)
    w.launch->fault("lanes apart", w, i, __builtin_ctz(away),
                    text("named in %08x, but elsewhere", members));
  if (mask & ~members)
    w.launch->fault("lanes apart", w, i, __builtin_ctz(mask & ~members),
                    text("not named in %08x", members));
}
void warp_sync(Warp& w, const Instruction& i, Mask mask) {
  meet(w, i, mask, i.slots[0]);
  ++w.warp_phase;
}

enum class Way { kXor, kIndex, kUp, kDown };

template <Way way>
void shuffle(Warp& w, const Instruction& i, Mask mask) {  // d, p or -1, a, b, c, members
  meet(w, i, mask, i.slots[5]);
  must_know(w, i, mask, i.slots[3], "a lane's number");
  const U *a = w.row<U>(i.slots[2]), *b = w.row<U>(i.slots[3]), *c = w.row<U>(i.slots[4]);
  U* d = w.row<U>(i.slots[0]);
  U copy[kLanes];
  memcpy(copy, a, sizeof copy);
  const Mask known = w.known[i.slots[2]];
  Mask out_known = 0, inside = 0;
  each_lane(mask, [&](int l) {
    const int by = int(b[l] & 31), clamp = int(c[l] & 31), segment = int(c[l] >> 8 & 31);
    const int low = l & segment, top = low | (clamp & ~segment);
    int from = 0;
    bool in = false;
    switch (way) {
      case Way::kXor: from = l ^ by, in = from <= top; break;
      case Way::kIndex: from = low | (by & ~segment), in = from <= top; break;
      case Way::kUp: from = l - by, in = from >= top; break;
      case Way::kDown: from = l + by, in = from <= top; break;
    }
    if (!in) from = l;
    if (!(mask >> from & 1))
      w.launch->fault("lanes apart", w, i, l, text("reads lane %d, which is not here", from));
    d[l] = copy[from];
    out_known |= Mask(known >> from & 1) << l;
    inside |= Mask(in) << l;
  });
  w.know(i.slots[0], mask, out_known);
  if (i.slots[1] >= 0) {
    Mask& p = w.predicate(i.slots[1]);
    p = (p & ~mask) | inside;
    w.know(i.slots[1], mask, mask);
  }
}

void ballot(Warp& w, const Instruction& i, Mask mask) {
  meet(w, i, mask, i.slots[2]);
  must_know(w, i, mask, i.slots[1], "a vote");
  const Mask votes = w.predicate(i.slots[1]) & mask;
  each_lane(mask, [&](int l) { w.row<U>(i.slots[0])[l] = votes; });
  w.know(i.slots[0], mask, mask);
}
template <bool all>
void vote(Warp& w, const Instruction& i, Mask mask) {
  meet(w, i, mask, i.slots[2]);
  must_know(w, i, mask, i.slots[1], "a vote");
  const Mask votes = w.predicate(i.slots[1]) & mask;
  Mask& p = w.predicate(i.slots[0]);
  p = (p & ~mask) | (all ? votes == mask : votes != 0 ? mask : 0);
  if (all && votes == mask) p |= mask;
  w.know(i.slots[0], mask, mask);
}
template <auto f, class T>
void reduce(Warp& w, const Instruction& i, Mask mask) {  // redux.sync
  meet(w, i, mask, i.slots[2]);
  const U* a = w.row<U>(i.slots[1]);
  must_know(w, i, mask, i.slots[1], "a reduction's operand");
  T all = take<T>(a[__builtin_ctz(mask)]);
  each_lane(mask & (mask - 1), [&](int l) { all = f(all, take<T>(a[l])); });
  each_lane(mask, [&](int l) { w.row<U>(i.slots[0])[l] = hold<T>(all); });
  w.know(i.slots[0], mask, mask);
}

void elect(Warp& w, const Instruction& i, Mask mask) {  // d or -1, p, members
  meet(w, i, mask, i.slots[2]);
  const int leader = __builtin_ctz(mask);
  if (i.slots[0] >= 0) {
    each_lane(mask, [&](int l) { w.row<U>(i.slots[0])[l] = U(leader); });
    w.know(i.slots[0], mask, mask);
  }
  Mask& p = w.predicate(i.slots[1]);
  p = (p & ~mask) | Mask(1) << leader;
  w.know(i.slots[1], mask, mask);
}

// --- addresses of shared memory

template <class T>
void of_rank(Warp& w, const Instruction& i, Mask mask) {  // mapa
  w.know(i.slots[0], mask, w.known[i.slots[1]] & w.known[i.slots[2]]);
  each_lane(mask, [&](int l) {
    const T a = w.row<T>(i.slots[1])[l];
    const uint64_t offset = uint64_t(a) % kSharedStride, window = uint64_t(a) & kSharedWindow;
    w.row<T>(i.slots[0])[l] = T(window | (w.row<U>(i.slots[2])[l] * kSharedStride + offset));
  });
}
void shared_variable(Warp& w, const Instruction& i, Mask mask) {  // its address, in this block
  const uint64_t at = w.cta->rank * kSharedStride + uint64_t(i.immediate);
  each_lane(mask, [&](int l) { w.row<uint64_t>(i.slots[0])[l] = at; });
  w.know(i.slots[0], mask, mask);
}
void shared_variable_32(Warp& w, const Instruction& i, Mask mask) {
  const U at = U(w.cta->rank * kSharedStride + uint64_t(i.immediate));
  each_lane(mask, [&](int l) { w.row<U>(i.slots[0])[l] = at; });
  w.know(i.slots[0], mask, mask);
}

void nothing(Warp&, const Instruction&, Mask) {}
void trap(Warp& w, const Instruction& i, Mask mask) {
  w.launch->fault("trap", w, i, __builtin_ctz(mask), "");
  throw Stop("trap");
}

constexpr auto kAdd = [](auto a, auto b) { return decltype(a)(a + b); };
constexpr auto kMin = [](auto a, auto b) { return b < a ? b : a; };
constexpr auto kMax = [](auto a, auto b) { return a < b ? b : a; };
constexpr auto kOr = [](auto a, auto b) { return a | b; };

const Register control({
    {"bra", branch},
    {"ret", leave},
    {"exit", leave},
    {"trap", trap},
    {"nothing", nothing},
    {"bar.sync", barrier},
    {"bar.warp.sync", warp_sync},
    {"barrier.cluster.arrive", cluster_arrive},
    {"barrier.cluster.wait", cluster_wait},
    {"shfl.bfly", shuffle<Way::kXor>},
    {"shfl.idx", shuffle<Way::kIndex>},
    {"shfl.up", shuffle<Way::kUp>},
    {"shfl.down", shuffle<Way::kDown>},
    {"vote.ballot.b32", ballot},
    {"vote.any.pred", vote<false>},
    {"vote.all.pred", vote<true>},
    {"redux.add.u32", reduce<kAdd, U>},
    {"redux.add.s32", reduce<kAdd, int32_t>},
    {"redux.min.u32", reduce<kMin, U>},
    {"redux.min.s32", reduce<kMin, int32_t>},
    {"redux.max.u32", reduce<kMax, U>},
    {"redux.max.s32", reduce<kMax, int32_t>},
    {"redux.or.b32", reduce<kOr, U>},
    {"elect", elect},
    {"mapa.u64", of_rank<uint64_t>},
    {"mapa.u32", of_rank<U>},
    {"shared.address.b64", shared_variable},
    {"shared.address.b32", shared_variable_32},
    {"cvta.to.shared", unary<[](uint64_t a) { return a & ~kSharedWindow; }, uint64_t, uint64_t>},
    {"cvta.shared", unary<[](uint64_t a) { return a | kSharedWindow; }, uint64_t, uint64_t>},
});

}  // namespace

void Warp::split(Mask apart, int32_t at_other) {
  active &= ~apart;
  others.push_back({at_other, apart});
  stop = std::min(stop, at_other);
}

void Warp::retire(Mask mask) {
  live &= ~mask;
  active &= ~mask;
  if (live == 0) state = State::kDone;
}

}  // namespace ptx
