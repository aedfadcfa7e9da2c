#pragma once

// A machine that executes PTX as nvcc and Triton emit it: warps of 32 lanes, blocks and clusters.
// An instruction is run for a whole warp by a handler (alu.cpp, access.cpp, ...) that
// tests/gpu/ptx/program.py has chosen by name. Registers are rows of 32 lanes; a bit beside each
// says whether the lane's value is known, and goes where the value goes.

#include <cstdint>
#include <cstring>
#include <map>
#include <set>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <unordered_map>
#include <vector>

#include "memory.h"

namespace ptx {

constexpr int kLanes = 32;
constexpr int kSlotBytes = 4 * kLanes;
constexpr int kMostBlocks = 16;              // of a cluster
constexpr uint64_t kSharedStride = 1 << 18;  // from a block's shared memory to the next one's
constexpr uint64_t kSharedWindow = uint64_t(1) << 60;  // of generic addresses
constexpr Mask kWhole = ~Mask(0);

struct Warp;
struct Instruction;
using Handler = void (*)(Warp&, const Instruction&, Mask);

struct Instruction {
  Handler run;
  const int32_t* slots;  // of its operands, destinations first
  int64_t immediate;     // an offset, or what the handler makes of it
  int32_t guard;         // slot of its predicate, or -1
  int32_t negated;
  int32_t target;  // of a branch
};

struct Constant {
  int32_t slot, wide;
  uint64_t bits;
};

struct Variable {  // in a block's static shared memory
  int32_t at, bytes;
};

// Registers that the hardware fills, by their places in Program::specials.
enum Special {
  kTidX,
  kTidY,
  kTidZ,
  kNtidX,
  kNtidY,
  kNtidZ,
  kCtaX,
  kCtaY,
  kCtaZ,
  kNctaX,
  kNctaY,
  kNctaZ,
  kLaneId,
  kWarpId,
  kClusterRank,
  kClusterSize,
  kClusterX,
  kNclusterX,
  kSpecials
};

struct Program {
  std::vector<Instruction> code;
  std::vector<int32_t> slots;
  std::vector<Constant> constants;
  std::vector<Variable> variables;
  int32_t specials[kSpecials];  // slots, or -1
  int32_t slot_count = 0, shared_bytes = 0, dynamic_at = 0;
};

struct Size3 {
  uint32_t x, y, z;
  uint32_t all() const { return x * y * z; }
};

struct LaunchArgs {
  Size3 grid, block;
  uint32_t cluster, dynamic_bytes;
  uint32_t seed;  // of the order of blocks and warps; 0: as they are numbered
  const unsigned char* params;
  uint32_t param_bytes;
  uint64_t most_steps;
};

struct Fault {
  std::string kind, detail;
  int32_t at;  // instruction
  uint32_t block, thread;
  uint64_t count;
};

// Of global memory, by one instruction: bytes that lanes asked for, sectors of 32 bytes that warps
// did, and those that the block's part of the cache did not hold.
struct Traffic {
  uint64_t bytes = 0, sectors = 0, missed = 0;
};

// The share of a cache that is a block's: 32 KB of sectors, any of which lies in one of 4 places.
struct Cache {
  static constexpr size_t kSets = 256, kWays = 4;
  uint64_t held[kSets][kWays] = {};
  uint8_t next[kSets] = {};

  bool take(uint64_t sector) {  // whether it was there
    const size_t set = size_t(sector * 0x9e3779b97f4a7c15u >> 56);
    for (const uint64_t one : held[set])
      if (one == sector) return true;
    held[set][next[set]++ % kWays] = sector;
    return false;
  }
};

struct Launch;

struct Stop : std::runtime_error {  // a fault after which nothing that follows means anything
  using std::runtime_error::runtime_error;
};

struct Barrier {  // an mbarrier, by its address; what it counts
  uint32_t expected = 0, pending = 0, phase = 0;
  int64_t bytes = 0;
};

struct Copy {  // under way into shared memory
  uint64_t to, from, barrier;
  uint32_t bytes, zeros, group;
  int warp, lane;
};

// What a block's atomics behind a fence have made visible: all before its barrier number `phase`,
// and what these threads did themselves.
struct Released {
  uint32_t phase = 0;
  std::set<int32_t> threads;
};

struct Cluster;

struct Cta {
  Cluster* cluster;
  uint32_t rank, number;  // in the cluster, in the grid
  Size3 at;
  std::vector<unsigned char> shared, shadow;  // bytes, and what is known of them (Shadow)
  std::vector<Cell> cells;                    // one per Launch::grain bytes
  std::vector<Warp*> warps;
  std::map<uint32_t, Released> known;  // of blocks beyond the cluster
  Cache loads, stores;
};

struct Cluster {
  Launch* launch;
  std::vector<Cta*> ctas;
  std::map<uint64_t, Barrier> barriers;
  uint32_t arrived = 0, waits = 0;  // warps; barriers of the whole cluster that were passed
};

struct Group {  // lanes that stand elsewhere
  int32_t at;
  Mask mask;
};

struct Meeting {  // lanes that wait in an instruction for others that its mask names
  const Instruction* i;
  Mask mask, named;
};

enum class State { kReady, kBarrier, kCluster, kYield, kDone };

struct Warp {
  Cta* cta;
  Launch* launch;
  int number;
  uint32_t* file;  // registers
  Mask* known;     // by slot
  Mask active, live, barred = 0;
  int32_t at, next, stop;  // stop: the first place where others stand
  std::vector<Group> others;
  std::vector<Meeting> waiting;
  State state = State::kReady;
  int32_t barrier = -1;
  uint32_t phase = 0, warp_phase = 0, arrivals = 0, waits = 0, meets = 0;  // see Stamp
  Mask fenced = 0;
  uint32_t copy_group = 0;
  std::vector<Copy> copies;  // not waited for

  template <class T>
  T* row(int32_t slot) {
    return reinterpret_cast<T*>(file + slot * kLanes);
  }
  Mask& predicate(int32_t slot) { return file[slot * kLanes]; }
  int thread(int lane) const { return number * kLanes + lane; }
  Stamp stamp(int lane) const {
    return {int32_t(cta->number),
            int32_t(cta->cluster->ctas[0]->number),
            thread(lane),
            phase,
            warp_phase,
            arrivals,
            waits,
            meets};
  }
  void know(int32_t slot, Mask mask, Mask is) { known[slot] = (known[slot] & ~mask) | (is & mask); }
  void jump(Mask mask, int32_t target);
  void split(Mask apart, int32_t at_other);
  void retire(Mask mask);
};

struct Launch {
  const Program* program;
  LaunchArgs args;
  Memory* memory;
  std::vector<Fault> faults;
  std::vector<uint64_t> executed, lanes;  // by instruction: warps, lanes
  std::vector<Traffic> loads, stores;
  std::map<uint64_t, std::map<uint32_t, Released>> released;   // by the atomic's address, by block
  std::vector<Region*> recent;                                 // by instruction: its last region
  std::unordered_map<const Cell*, std::vector<Stamp>> crowds;  // blocks that read one cell
  int grain = 4;  // bytes of shared memory that are watched together
  uint64_t steps = 0;

  int32_t place(const Instruction& i) const { return int32_t(&i - program->code.data()); }
  void fault(const char* kind, const Warp& w, const Instruction& i, int lane, std::string detail);
  void run();
  void run_cluster(uint32_t first);
};

// --- handlers by name

std::unordered_map<std::string, Handler>& handlers();

struct Register {
  Register(std::initializer_list<std::pair<const char*, Handler>> list) {
    for (const auto& [name, handler] : list) handlers()[name] = handler;
  }
};

template <class F>
void each_lane(Mask mask, F&& f) {
  for (Mask rest = mask; rest; rest &= rest - 1) f(__builtin_ctz(rest));
}

// Faults for the lanes of `mask` whose value in `slot` is unknown.
inline void must_know(Warp& w, const Instruction& i, Mask mask, int32_t slot, const char* what) {
  const Mask unknown = mask & ~w.known[slot];
  if (unknown == 0) return;
  w.launch->fault("uninitialised register", w, i, __builtin_ctz(unknown), what);
  w.known[slot] |= unknown;  // said once
}

inline std::string text(const char* format, auto... values) {
  char line[256];
  snprintf(line, sizeof line, format, values...);
  return line;
}

}  // namespace ptx
