#pragma once

// Where an address leads, and what every access to it is checked for: bounds, alignment, bytes
// that nobody has written, and races.

#include "machine.h"

namespace ptx {

enum class Space { kGlobal, kShared, kCluster, kGeneric, kParam };

struct Place {
  unsigned char *data = nullptr, *shadow = nullptr;
  Cell* cells = nullptr;  // of the first byte
  uint32_t epoch = 0;
  int grain = 1, skew = 0;  // skew: the first byte's place in its cell
  bool global = false, torn = false;
};

// false, with a fault, where there is no such memory
bool resolve(Warp& w, const Instruction& i, int lane, uint64_t address, uint32_t bytes, bool write,
             Space space, Place& out);
// Faults for a race; remembers the access. same: a write that changes nothing.
void touch(Warp& w, const Instruction& i, int lane, const Place& at, uint32_t bytes, bool write,
           bool same = false);
// Faults where a byte was never written; false where what was written is unknown.
bool must_be_written(Warp& w, const Instruction& i, int lane, const Place& at, uint32_t bytes);
void mark(const Place& at, uint32_t bytes, bool known);
// Adds what the lanes of one access move.
void count(Traffic& traffic, Cache& cache, const uint64_t* addresses, Mask mask, uint32_t bytes);

inline uint64_t address_of(const Warp& w, int32_t slot, int lane) {
  return *reinterpret_cast<const uint64_t*>(w.file + slot * kLanes + 2 * lane);
}

}  // namespace ptx
