#include "place.h"

#include <algorithm>

namespace ptx {
namespace {

constexpr uint64_t kOffsets = kSharedStride - 1;

bool resolve_shared(Warp& w, const Instruction& i, int lane, uint64_t address, uint32_t bytes,
                    bool anywhere, Place& out) {
  const uint64_t rank = address / kSharedStride, offset = address & kOffsets;
  Cluster& cluster = *w.cta->cluster;
  if (rank >= cluster.ctas.size() || (!anywhere && rank != w.cta->rank)) {
    w.launch->fault("out of bounds", w, i, lane,
                    text("shared address %#lx is no block's of the cluster", address));
    return false;
  }
  Cta& owner = *cluster.ctas[rank];
  const bool inside =
      offset + bytes <= owner.shadow.size() &&
      std::all_of(owner.shadow.begin() + long(offset), owner.shadow.begin() + long(offset + bytes),
                  [](unsigned char s) { return s & kAllocated; });
  if (!inside) {
    w.launch->fault("out of bounds", w, i, lane,
                    text("%u bytes at %lu of shared memory, which ends before", bytes, offset));
    return false;
  }
  out.data = owner.shared.data() + offset;
  out.shadow = owner.shadow.data() + offset;
  out.grain = w.launch->grain;
  out.cells = owner.cells.data() + offset / uint64_t(out.grain);
  out.skew = int(offset % uint64_t(out.grain));
  out.epoch = owner.number + 1;
  return true;
}

bool resolve_global(Warp& w, const Instruction& i, int lane, uint64_t address, uint32_t bytes,
                    bool write, Place& out) {
  Launch& launch = *w.launch;
  Region*& region = launch.recent[size_t(launch.place(i))];
  if (!region || !region->has(address, bytes)) {
    Region* found = launch.memory->find(address);
    if (!found || !found->has(address, bytes)) {
      launch.fault("out of bounds", w, i, lane,
                   text("%u bytes at %#lx: ", bytes, address) +
                       (found ? "over the end of " + found->name : launch.memory->near(address)));
      return false;
    }
    region = found;
  }
  if (write && region->readonly) {
    launch.fault("write to an input", w, i, lane, region->name);
    return false;
  }
  const uint64_t offset = address - region->base;
  out.global = true;
  out.data = reinterpret_cast<unsigned char*>(address);
  out.shadow = region->shadow.data() + offset;
  if (region->readonly) return true;
  out.torn = region->torn;
  out.grain = region->grain;
  if (region->cells.empty()) region->cells.resize(region->bytes / uint64_t(out.grain) + 1);
  out.cells = region->cells.data() + offset / uint64_t(out.grain);
  out.skew = int(offset % uint64_t(out.grain));
  out.epoch = launch.memory->launch;
  return true;
}

constexpr int32_t kBlocks = -2;  // a cell that several blocks have read

bool before(const Stamp& x, const Stamp& now, const Warp& w) {
  if (x.cta == kBlocks) return x.cluster == now.cluster && x.arrivals < now.waits;
  if (x.cta == now.cta) {
    if (x.thread == now.thread || x.phase < now.phase || x.arrivals < now.waits) return true;
    const int32_t warp = x.thread >= kAny    ? -1
                         : x.thread >= kMany ? x.thread - kMany
                                             : x.thread / kLanes;
    return warp == now.thread / kLanes && x.warp_phase < now.warp_phase;
  }
  if (x.cluster == now.cluster) return x.arrivals < now.waits;
  const auto known = w.cta->known.find(uint32_t(x.cta));
  return known != w.cta->known.end() &&
         (x.phase < known->second.phase || known->second.threads.count(x.thread));
}

// What lanes have read before they met in a shuffle, others may write behind it: the shuffle has
// waited for what was read.
bool met(const Stamp& x, const Stamp& now) {
  const int32_t warp = x.thread >= kMany ? x.thread - kMany : x.thread / kLanes;
  return x.cta == now.cta && warp == now.thread / kLanes && x.meets < now.meets;
}

void merge(Stamp& reader, const Stamp& now) {  // one more who reads at the same time
  reader.phase = std::max(reader.phase, now.phase);
  reader.warp_phase = std::max(reader.warp_phase, now.warp_phase);
  reader.arrivals = std::max(reader.arrivals, now.arrivals);
  reader.meets = std::max(reader.meets, now.meets);
  if (reader.cta != now.cta) {
    reader.cta = kBlocks;
    if (reader.cluster != now.cluster) reader.cluster = -1;
  } else if (reader.thread != now.thread) {
    const int32_t warp = now.thread / kLanes;
    const bool one =
        reader.thread == kMany + warp || (reader.thread < kMany && reader.thread / kLanes == warp);
    reader.thread = one ? kMany + warp : kAny;
  }
}

std::string who(const Stamp& x) {
  if (x.cta == kBlocks) return "several blocks";
  if (x.thread >= kAny) return text("several threads of block %d", x.cta);
  if (x.thread >= kMany) return text("lanes of warp %d of block %d", x.thread - kMany, x.cta);
  return text("thread %d of block %d", x.thread, x.cta);
}

}  // namespace

bool resolve(Warp& w, const Instruction& i, int lane, uint64_t address, uint32_t bytes, bool write,
             Space space, Place& out) {
  if (address % bytes != 0) {
    w.launch->fault("misaligned", w, i, lane, text("%u bytes at %#lx", bytes, address));
    return false;
  }
  bool anywhere = space == Space::kCluster;
  if (space == Space::kGeneric && address >= kSharedWindow) {
    address -= kSharedWindow, anywhere = true, space = Space::kShared;
  }
  if (space == Space::kShared || space == Space::kCluster)
    return resolve_shared(w, i, lane, address, bytes, anywhere, out);
  return resolve_global(w, i, lane, address, bytes, write, out);
}

void touch(Warp& w, const Instruction& i, int lane, const Place& at, uint32_t bytes, bool write,
           bool same) {
  if (!at.cells) return;
  const Stamp now = w.stamp(lane);
  const int last = (at.skew + int(bytes) - 1) / at.grain;
  for (int k = 0; k <= last; ++k) {
    Cell& cell = at.cells[k];
    if (cell.epoch != at.epoch) {
      cell.epoch = at.epoch;
      cell.writer = cell.reader = Stamp{};
    }
    const char* kind = at.global ? "race in global memory" : "race in shared memory";
    if (cell.writer.thread >= 0 && !(write ? same : at.torn) && !before(cell.writer, now, w))
      w.launch->fault(
          kind, w, i, lane,
          std::string(write ? "writes" : "reads") + " what was written by " + who(cell.writer));
    if (write) {
      const auto race = [&](const Stamp& reader) {
        if (reader.thread < 0 || same || at.torn || before(reader, now, w) || met(reader, now))
          return;
        w.launch->fault(kind, w, i, lane, "writes what was read by " + who(reader));
      };
      race(cell.reader);
      const auto crowd = w.launch->crowds.find(&cell);
      if (crowd != w.launch->crowds.end()) {
        for (const Stamp& reader : crowd->second) race(reader);
        w.launch->crowds.erase(crowd);
      }
      cell.writer = now;
    } else if (cell.reader.thread < 0 || before(cell.reader, now, w)) {
      cell.reader = now;
    } else if (at.global && cell.reader.cta != now.cta) {
      w.launch->crowds[&cell].push_back(cell.reader);
      cell.reader = now;
    } else {
      merge(cell.reader, now);
    }
  }
}

bool must_be_written(Warp& w, const Instruction& i, int lane, const Place& at, uint32_t bytes) {
  bool known = true;
  for (uint32_t k = 0; k < bytes; ++k) {
    if (at.shadow[k] & kWritten) {
      known &= !(at.shadow[k] & kUnknown);
      continue;
    }
    w.launch->fault("uninitialised read", w, i, lane,
                    text("byte %u of %u in %s memory", k, bytes, at.global ? "global" : "shared"));
    break;
  }
  return known;
}

void mark(const Place& at, uint32_t bytes, bool known) {
  memset(at.shadow, kAllocated | kWritten | (known ? 0 : kUnknown), bytes);
}

void count(Traffic& traffic, Cache& cache, const uint64_t* addresses, Mask mask, uint32_t bytes) {
  uint64_t sectors[kLanes * 2];
  int n = 0;
  bool sorted = true;
  each_lane(mask, [&](int l) {
    for (uint64_t s = addresses[l] / 32; s <= (addresses[l] + bytes - 1) / 32; ++s) {
      if (n > 0 && sectors[n - 1] == s) continue;
      sorted &= n == 0 || sectors[n - 1] < s;
      if (n < kLanes * 2) sectors[n++] = s;
    }
  });
  if (!sorted) {
    std::sort(sectors, sectors + n);
    n = int(std::unique(sectors, sectors + n) - sectors);
  }
  traffic.bytes += uint64_t(__builtin_popcount(mask)) * bytes;
  traffic.sectors += uint64_t(n);
  for (int k = 0; k < n; ++k) traffic.missed += !cache.take(sectors[k]);
}

}  // namespace ptx
