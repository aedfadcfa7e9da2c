#pragma once

// Global memory as the simulated kernels see it: ranges of the host's memory that a test has named.
// Beside each byte stands whether it has been written, and in ranges that kernels write, beside
// each entry, who touched it last: from that races are told.

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace ptx {

using Mask = uint32_t;

// Who touched an entry, and how many barriers it had passed then.
struct Stamp {
  int32_t cta = -1, cluster = -1;  // numbers in the grid: the block's, its cluster's first one's
  int32_t thread = -1;             // in the block; kMany of a warp, kAny of a block
  uint32_t phase = 0, warp_phase = 0;  // of the block, of the warp
  uint32_t arrivals = 0, waits = 0;    // of the cluster
  uint32_t meets = 0;                  // shuffles and votes of the warp
};
constexpr int32_t kMany = 1 << 16, kAny = 1 << 20;  // kMany + warp: several lanes of one warp

struct Cell {
  uint32_t epoch = 0;  // of these stamps, a launch's or a block's; older ones are history
  Stamp writer, reader;
};

// kUnknown: written with a register's value that nothing had set.
enum Shadow : unsigned char { kAllocated = 1, kWritten = 2, kUnknown = 4 };

struct Region {
  uint64_t base, bytes;
  std::string name;
  bool readonly;
  // Vectors may reach beyond a thread's own entries into those that others write: a read that
  // meets a write is no race. That no result depends on such bytes is another test's business.
  bool torn;
  int grain;                          // bytes of a cell
  std::vector<unsigned char> shadow;  // Shadow of each byte
  std::vector<Cell> cells;            // made when a kernel first comes here

  bool has(uint64_t address, uint64_t n) const {
    return address >= base && address + n <= base + bytes;
  }
};

struct Memory {
  std::map<uint64_t, Region> regions;  // by base
  uint32_t launch = 0;                 // the number of the running one

  void add(uint64_t base, uint64_t bytes, const char* name, bool readonly, bool torn, bool written,
           int grain) {
    remove(base, bytes);
    Region r{base, bytes, name, readonly, torn, grain, {}, {}};
    r.shadow.assign(bytes, written ? kAllocated | kWritten : kAllocated);
    regions.emplace(base, std::move(r));
  }
  // What a test took back, or an allocator gave to another tensor.
  void remove(uint64_t base, uint64_t bytes) {
    for (auto it = regions.begin(); it != regions.end();)
      if (it->second.base < base + bytes && base < it->second.base + it->second.bytes)
        it = regions.erase(it);
      else ++it;
  }
  Region* find(uint64_t address) {
    auto it = regions.upper_bound(address);
    if (it == regions.begin()) return nullptr;
    Region& r = std::prev(it)->second;
    return address < r.base + r.bytes ? &r : nullptr;
  }
  // An address that is in no region, in words.
  std::string near(uint64_t address) const {
    const Region* best = nullptr;
    uint64_t least = ~uint64_t(0);
    for (const auto& [base, r] : regions) {
      const uint64_t end = base + r.bytes, off = address < base ? base - address : address - end;
      if ((address < base || address >= end) && off < least) least = off, best = &r;
    }
    if (!best || least > (1 << 20)) return "near nothing that was named";
    const bool past = address >= best->base;
    return std::to_string(past ? address - best->base - best->bytes : best->base - address) +
           (past ? " bytes past the end of " : " bytes before ") + best->name + " (" +
           std::to_string(best->bytes) + " bytes)";
  }
};

}  // namespace ptx
