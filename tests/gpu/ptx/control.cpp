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

// --- instructions that the lanes of a mask meet in, also from different places of the program

struct Exchange {
  Warp& w;
  const Instruction& i;  // one of them, for faults
  const std::vector<Meeting>& parts;
  Mask all;  // lanes that are here

  template <class F>
  void each_part(F&& f) const {
    for (const Meeting& part : parts) f(*part.i, part.mask);
  }
};

// A part whose lanes are not all there yet stays behind until they come; the last one brings all
// on. `members`: the operand with the mask's lanes; f(exchange): what happens when they meet.
template <int members, auto f>
void meet(Warp& w, const Instruction& i, Mask mask) {
  must_know(w, i, mask, i.slots[members], "a member mask");
  const Mask named = w.row<U>(i.slots[members])[__builtin_ctz(mask)];
  if (mask & ~named)
    w.launch->fault("lanes apart", w, i, __builtin_ctz(mask & ~named),
                    text("not named in %08x", named));
  std::vector<Meeting> parts;
  Mask all = mask;
  for (const Meeting& part : w.waiting)
    if (part.i->run == i.run && part.named == named) parts.push_back(part), all |= part.mask;
  if (named & w.live & ~all) {
    w.waiting.push_back({&i, mask, named});
    w.active &= ~mask;
    return;
  }
  std::erase_if(w.waiting,
                [&](const Meeting& part) { return part.i->run == i.run && part.named == named; });
  for (const Meeting& part : parts) w.split(part.mask, w.launch->place(*part.i) + 1);
  parts.push_back({&i, mask, named});
  ++w.meets;
  f(Exchange{w, i, parts, all});
}

void pass(const Exchange& x) { ++x.w.warp_phase; }

enum class Way { kXor, kIndex, kUp, kDown };

template <Way way>
void shuffle(const Exchange& x) {  // d, p or -1, a, b, c, members
  Warp& w = x.w;
  U values[kLanes];
  Mask known = 0;
  x.each_part([&](const Instruction& i, Mask mask) {
    must_know(w, i, mask, i.slots[3], "a lane's number");
    known |= w.known[i.slots[2]] & mask;
    each_lane(mask, [&](int l) { values[l] = w.row<U>(i.slots[2])[l]; });
  });
  x.each_part([&](const Instruction& i, Mask mask) {
    Mask out_known = 0, inside = 0;
    each_lane(mask, [&](int l) {
      const U b = w.row<U>(i.slots[3])[l], c = w.row<U>(i.slots[4])[l];
      const int by = int(b & 31), clamp = int(c & 31), segment = int(c >> 8 & 31);
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
      if (!(x.all >> from & 1))
        w.launch->fault("lanes apart", w, i, l, text("reads lane %d, which is not here", from));
      else w.row<U>(i.slots[0])[l] = values[from];
      out_known |= Mask(known >> from & 1) << l;
      inside |= Mask(in) << l;
    });
    w.know(i.slots[0], mask, out_known);
    if (i.slots[1] < 0) return;
    Mask& p = w.predicate(i.slots[1]);
    p = (p & ~mask) | inside;
    w.know(i.slots[1], mask, mask);
  });
}

Mask votes_of(const Exchange& x) {
  Mask votes = 0;
  x.each_part([&](const Instruction& i, Mask mask) {
    must_know(x.w, i, mask, i.slots[1], "a vote");
    votes |= x.w.predicate(i.slots[1]) & mask;
  });
  return votes;
}
void ballot(const Exchange& x) {
  const Mask votes = votes_of(x);
  x.each_part([&](const Instruction& i, Mask mask) {
    each_lane(mask, [&](int l) { x.w.row<U>(i.slots[0])[l] = votes; });
    x.w.know(i.slots[0], mask, mask);
  });
}
template <bool all>
void vote(const Exchange& x) {
  const Mask votes = votes_of(x);
  const bool is = all ? votes == x.all : votes != 0;
  x.each_part([&](const Instruction& i, Mask mask) {
    Mask& p = x.w.predicate(i.slots[0]);
    p = is ? p | mask : p & ~mask;
    x.w.know(i.slots[0], mask, mask);
  });
}
template <auto f, class T>
void reduce(const Exchange& x) {  // redux.sync
  T all{};
  bool first = true;
  x.each_part([&](const Instruction& i, Mask mask) {
    must_know(x.w, i, mask, i.slots[1], "a reduction's operand");
    each_lane(mask, [&](int l) {
      const T one = take<T>(x.w.row<U>(i.slots[1])[l]);
      all = first ? one : f(all, one);
      first = false;
    });
  });
  x.each_part([&](const Instruction& i, Mask mask) {
    each_lane(mask, [&](int l) { x.w.row<U>(i.slots[0])[l] = hold<T>(all); });
    x.w.know(i.slots[0], mask, mask);
  });
}
void elect(const Exchange& x) {  // d or -1, p, members
  const int leader = __builtin_ctz(x.all);
  x.each_part([&](const Instruction& i, Mask mask) {
    if (i.slots[0] >= 0) {
      each_lane(mask, [&](int l) { x.w.row<U>(i.slots[0])[l] = U(leader); });
      x.w.know(i.slots[0], mask, mask);
    }
    Mask& p = x.w.predicate(i.slots[1]);
    p = (p & ~mask) | (Mask(1) << leader & mask);
    x.w.know(i.slots[1], mask, mask);
  });
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
    {"bar.warp.sync", meet<0, pass>},
    {"barrier.cluster.arrive", cluster_arrive},
    {"barrier.cluster.wait", cluster_wait},
    {"shfl.bfly", meet<5, shuffle<Way::kXor>>},
    {"shfl.idx", meet<5, shuffle<Way::kIndex>>},
    {"shfl.up", meet<5, shuffle<Way::kUp>>},
    {"shfl.down", meet<5, shuffle<Way::kDown>>},
    {"vote.ballot.b32", meet<2, ballot>},
    {"vote.any.pred", meet<2, vote<false>>},
    {"vote.all.pred", meet<2, vote<true>>},
    {"redux.add.u32", meet<2, reduce<kAdd, U>>},
    {"redux.add.s32", meet<2, reduce<kAdd, int32_t>>},
    {"redux.min.u32", meet<2, reduce<kMin, U>>},
    {"redux.min.s32", meet<2, reduce<kMin, int32_t>>},
    {"redux.max.u32", meet<2, reduce<kMax, U>>},
    {"redux.max.s32", meet<2, reduce<kMax, int32_t>>},
    {"redux.or.b32", meet<2, reduce<kOr, U>>},
    {"elect", meet<2, elect>},
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
