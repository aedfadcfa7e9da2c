// Who runs when: the lanes of a warp that stand first, the warps of a cluster in turn, the clusters
// of a grid one after the other. And the functions that tests/gpu/ptx/machine.py calls.
#include <algorithm>
#include <climits>
#include <numeric>
#include <random>

#include "machine.h"

namespace ptx {

std::unordered_map<std::string, Handler>& handlers() {
  static std::unordered_map<std::string, Handler> all;
  return all;
}

void Launch::fault(const char* kind, const Warp& w, const Instruction& i, int lane,
                   std::string detail) {
  const int32_t at = place(i);
  for (Fault& f : faults)
    if (f.at == at && f.kind == kind) {
      ++f.count;
      return;
    }
  faults.push_back({kind, std::move(detail), at, w.cta->number, uint32_t(w.thread(lane)), 1});
}

namespace {

// Of all lanes of a warp those run that stand first in the program: the others have gone ahead, and
// meet them where the ways join.
void regroup(Warp& w) {
  if (w.active) w.others.push_back({w.at, w.active});
  if (w.others.empty()) {  // all that are left wait: for lanes that have gone, or in vain
    const Meeting last = w.waiting.back();
    w.waiting.pop_back();
    if (last.named & w.live & ~last.mask) {
      Mask same = 0;
      for (const Meeting& m : w.waiting)
        if (m.i->run == last.i->run && m.named == last.named) same |= m.mask;
      if (last.named & w.live & ~last.mask & ~same) {
        w.launch->fault("lanes apart", w, *last.i, __builtin_ctz(last.mask),
                        text("%08x wait for others of %08x", last.mask, last.named));
        throw Stop("lanes apart");
      }
    }
    w.others.push_back({w.launch->place(*last.i), last.mask});
  }
  int32_t first = INT_MAX;
  for (const Group& g : w.others) first = std::min(first, g.at);
  w.active = 0, w.at = first, w.stop = INT_MAX;
  std::erase_if(w.others, [&](const Group& g) {
    if (g.at != first) {
      w.stop = std::min(w.stop, g.at);
      return false;
    }
    w.active |= g.mask;
    return true;
  });
}

void run_warp(Warp& w) {
  Launch& launch = *w.launch;
  const Instruction* code = launch.program->code.data();
  while (w.state == State::kReady) {
    if (w.active == 0 || w.at >= w.stop) regroup(w);
    const Instruction& i = code[w.at];
    Mask mask = w.active;
    if (i.guard >= 0) {
      must_know(w, i, mask, i.guard, "a predicate");
      mask &= i.negated ? ~w.predicate(i.guard) : w.predicate(i.guard);
    }
    w.next = w.at + 1;
    ++launch.executed[size_t(w.at)];
    launch.lanes[size_t(w.at)] += uint64_t(__builtin_popcount(mask));
    if (mask) i.run(w, i, mask);
    w.at = w.next;
    if (++launch.steps > launch.args.most_steps) {
      launch.fault("endless", w, i, 0, "more steps than the launch was given");
      throw Stop("endless");
    }
  }
}

// Lets those go on whom a barrier has held and all have reached.
void release(Cluster& cluster) {
  size_t live = 0;
  for (Cta* cta : cluster.ctas) {
    size_t waiting = 0, running = 0;
    int32_t barrier = -1;
    bool one = true;
    for (Warp* w : cta->warps) {
      running += w->state != State::kDone;
      if (w->state != State::kBarrier) continue;
      ++waiting;
      one = one && (barrier < 0 || barrier == w->barrier);
      barrier = w->barrier;
    }
    live += running;
    if (waiting == 0 || waiting < running) continue;
    if (!one) throw Stop("warps wait at different barriers");
    for (Warp* w : cta->warps)
      if (w->state == State::kBarrier) w->state = State::kReady, ++w->phase;
  }
  if (cluster.arrived > 0 && cluster.arrived >= live) cluster.arrived = 0, ++cluster.waits;
  for (Cta* cta : cluster.ctas)
    for (Warp* w : cta->warps)
      if (w->state == State::kCluster && w->waits < cluster.waits)
        w->state = State::kReady, w->waits = w->arrivals;
}

struct Blocks {  // a cluster's memory, used again for the next one
  Launch& launch;
  Cluster cluster;
  std::vector<Cta> ctas;
  std::vector<Warp> warps;
  std::vector<uint32_t> files;
  std::vector<Mask> known;
  int per_block;

  explicit Blocks(Launch& of) : launch(of) {
    const uint32_t n = launch.args.cluster;
    per_block = int(launch.args.block.all() + kLanes - 1) / kLanes;
    ctas.resize(n), warps.resize(n * size_t(per_block));
    const size_t slots = size_t(launch.program->slot_count);
    files.resize(warps.size() * slots * kLanes), known.resize(warps.size() * slots);
  }

  void start(uint32_t first) {
    const Program& p = *launch.program;
    cluster = Cluster{};
    cluster.launch = &launch;
    const Size3 grid = launch.args.grid;
    const size_t bytes = size_t(p.dynamic_at) + launch.args.dynamic_bytes;
    for (uint32_t r = 0; r < ctas.size(); ++r) {
      Cta& cta = ctas[r];
      cta.cluster = &cluster, cta.rank = r, cta.number = first + r;
      cta.at = {cta.number % grid.x, cta.number / grid.x % grid.y, cta.number / grid.x / grid.y};
      cta.shared.assign(bytes, 0xcd), cta.shadow.assign(bytes, 0);
      for (const Variable& v : p.variables)
        std::fill_n(cta.shadow.begin() + v.at, v.bytes, kAllocated);
      std::fill_n(cta.shadow.begin() + p.dynamic_at, launch.args.dynamic_bytes, kAllocated);
      cta.cells.resize(bytes / size_t(launch.grain) + 1);
      cta.warps.clear(), cta.known.clear();
      cta.loads = cta.stores = Cache{};
      for (int k = 0; k < per_block; ++k) start_warp(cta, k);
      cluster.ctas.push_back(&cta);
    }
  }

  void start_warp(Cta& cta, int k) {
    const Program& p = *launch.program;
    const size_t number = cta.rank * size_t(per_block) + size_t(k);
    Warp& w = warps[number] = Warp{};
    w.cta = &cta, w.launch = &launch, w.number = k;
    w.file = files.data() + number * size_t(p.slot_count) * kLanes;
    w.known = known.data() + number * size_t(p.slot_count);
    std::fill_n(w.known, p.slot_count, 0);
    const int lanes = std::min(kLanes, int(launch.args.block.all()) - k * kLanes);
    w.active = w.live = lanes == kLanes ? kWhole : (Mask(1) << lanes) - 1;
    w.at = 0, w.stop = INT_MAX;
    for (const Constant& c : p.constants) {
      w.known[c.slot] = kWhole;
      if (c.wide) std::fill_n(w.row<uint64_t>(c.slot), kLanes, c.bits);
      else std::fill_n(w.row<uint32_t>(c.slot), kLanes, uint32_t(c.bits));
    }
    const Size3 block = launch.args.block, grid = launch.args.grid;
    const auto fill = [&](Special special, auto&& value) {
      const int32_t slot = p.specials[special];
      if (slot < 0) return;
      w.known[slot] = kWhole;
      for (int l = 0; l < kLanes; ++l) w.row<uint32_t>(slot)[l] = uint32_t(value(w.thread(l)));
    };
    fill(kTidX, [&](uint32_t t) { return t % block.x; });
    fill(kTidY, [&](uint32_t t) { return t / block.x % block.y; });
    fill(kTidZ, [&](uint32_t t) { return t / block.x / block.y; });
    fill(kLaneId, [&](uint32_t t) { return t % kLanes; });
    const uint32_t n = launch.args.cluster;
    const std::pair<Special, uint32_t> same[] = {{kNtidX, block.x},
                                                 {kNtidY, block.y},
                                                 {kNtidZ, block.z},
                                                 {kCtaX, cta.at.x},
                                                 {kCtaY, cta.at.y},
                                                 {kCtaZ, cta.at.z},
                                                 {kNctaX, grid.x},
                                                 {kNctaY, grid.y},
                                                 {kNctaZ, grid.z},
                                                 {kWarpId, uint32_t(k)},
                                                 {kClusterRank, cta.rank},
                                                 {kClusterSize, n},
                                                 {kClusterX, cta.number / n},
                                                 {kNclusterX, grid.x / n}};
    for (const auto& [special, value] : same) fill(special, [v = value](uint32_t) { return v; });
    cta.warps.push_back(&w);
  }

  void run(std::mt19937& random) {
    std::vector<Warp*> order;
    for (Warp& w : warps) order.push_back(&w);
    for (;;) {
      if (launch.args.seed) std::shuffle(order.begin(), order.end(), random);
      bool ran = false, left = false;
      for (Warp* w : order) {
        if (w->state == State::kYield) w->state = State::kReady, ran = true;
        if (w->state == State::kReady) run_warp(*w), ran = true;
      }
      release(cluster);
      for (Warp* w : order) {
        left |= w->state != State::kDone;
        ran |= w->state == State::kReady;
        if (w->state == State::kDone && !w->copies.empty()) unwaited(*w);
      }
      if (!left) return;
      if (!ran) {
        launch.fault("deadlock", *order[0], launch.program->code[size_t(order[0]->at)], 0,
                     "no warp can go on");
        throw Stop("deadlock");
      }
    }
  }

  void unwaited(Warp& w) {
    launch.fault("copy not waited for", w, launch.program->code[size_t(w.at)], w.copies[0].lane,
                 text("%zu of them", w.copies.size()));
    w.copies.clear();
  }
};

}  // namespace

void Launch::run() {
  const size_t n = program->code.size();
  executed.assign(n, 0), lanes.assign(n, 0);
  loads.assign(n, {}), stores.assign(n, {}), recent.assign(n, nullptr);
  ++memory->launch;
  std::mt19937 random(args.seed);
  std::vector<uint32_t> order(args.grid.all() / args.cluster);
  std::iota(order.begin(), order.end(), 0);
  if (args.seed) std::shuffle(order.begin(), order.end(), random);
  Blocks blocks(*this);
  try {
    for (const uint32_t k : order) {
      blocks.start(k * args.cluster);
      blocks.run(random);
    }
  } catch (const Stop& stop) {
    if (faults.empty()) faults.push_back({"stopped", stop.what(), 0, 0, 0, 1});
  }
}

}  // namespace ptx

// --- for Python

using namespace ptx;

extern "C" {

Handler ptx_handler(const char* name) {
  const auto found = handlers().find(name);
  return found == handlers().end() ? nullptr : found->second;
}

struct Encoded {  // an instruction, as Python has it
  Handler run;
  int64_t immediate;
  int32_t first_slot, guard, negated, target;
};

Program* ptx_program(const Encoded* code, int32_t n, const int32_t* slots, int32_t n_slots,
                     const Constant* constants, int32_t n_constants, const Variable* variables,
                     int32_t n_variables, const int32_t* specials, int32_t slot_count,
                     int32_t dynamic_at) {
  Program* p = new Program;
  p->slots.assign(slots, slots + n_slots);
  p->constants.assign(constants, constants + n_constants);
  p->variables.assign(variables, variables + n_variables);
  std::copy_n(specials, int(kSpecials), p->specials);
  p->slot_count = slot_count, p->dynamic_at = dynamic_at;
  for (int32_t k = 0; k < n; ++k) {
    const Encoded& e = code[k];
    p->code.push_back(
        {e.run, p->slots.data() + e.first_slot, e.immediate, e.guard, e.negated, e.target});
  }
  return p;
}
void ptx_program_delete(Program* p) { delete p; }

Memory* ptx_memory() { return new Memory; }
void ptx_memory_delete(Memory* m) { delete m; }
void ptx_add(Memory* m, uint64_t base, uint64_t bytes, const char* name, int readonly, int torn,
             int written, int grain) {
  m->add(base, bytes, name, readonly, torn, written, grain);
}
void ptx_remove(Memory* m, uint64_t base, uint64_t bytes) { m->remove(base, bytes); }
void ptx_write(Memory* m, uint64_t base, uint64_t bytes) {  // by the host
  if (Region* r = m->find(base))
    memset(r->shadow.data() + (base - r->base), kAllocated | kWritten,
           std::min(bytes, r->base + r->bytes - base));
}
uint64_t ptx_unwritten(Memory* m, uint64_t base, uint64_t bytes) {
  const Region* r = m->find(base);
  if (!r || !r->has(base, bytes)) return bytes;
  const auto begin = r->shadow.begin() + long(base - r->base);
  return uint64_t(
      std::count_if(begin, begin + long(bytes), [](unsigned char s) { return !(s & kWritten); }));
}

Launch* ptx_run(const Program* program, Memory* memory, const LaunchArgs* args, int grain) {
  Launch* launch = new Launch;
  launch->program = program, launch->memory = memory, launch->args = *args;
  launch->grain = grain;
  launch->run();
  return launch;
}
void ptx_launch_delete(Launch* l) { delete l; }
int32_t ptx_faults(const Launch* l) { return int32_t(l->faults.size()); }
const char* ptx_fault(const Launch* l, int32_t k, int32_t* at, uint32_t* block, uint32_t* thread,
                      uint64_t* count, const char** detail) {
  const Fault& f = l->faults[size_t(k)];
  *at = f.at, *block = f.block, *thread = f.thread, *count = f.count, *detail = f.detail.c_str();
  return f.kind.c_str();
}
const uint64_t* ptx_executed(const Launch* l) { return l->executed.data(); }
const uint64_t* ptx_lanes(const Launch* l) { return l->lanes.data(); }
const Traffic* ptx_loads(const Launch* l) { return l->loads.data(); }
const Traffic* ptx_stores(const Launch* l) { return l->stores.data(); }

}  // extern "C"
