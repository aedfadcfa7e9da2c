// Where large outputs of a step live. A fresh 100 MB output costs 24,600 page faults of 2.3 us (55
// ms, three times the KL kernel), on 2 MB pages 560, and on pages that the step before has used
// none. So the last few blocks that were freed are kept, as torch keeps a GPU's memory; unlike
// there they are marked free (MADV_FREE): a system short of memory takes their pages back without
// swapping or asking.
#include "memory.h"

#include <algorithm>
#include <cstdlib>
#include <mutex>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fasttax {

#if defined(__linux__) && defined(MADV_HUGEPAGE) && defined(MADV_FREE)

namespace {

constexpr size_t kHuge = size_t(1) << 21;
constexpr size_t kSmallest = size_t(1) << 23;  // malloc keeps what is smaller
constexpr size_t kKept = 2;                    // the gradients of both rows

struct Block {
  void* data;
  size_t bytes;
};

struct Pool {
  std::mutex mutex;
  std::vector<Block> blocks;  // the one freed last stands last
};

// Never destroyed: tensors may be freed after the destructors of static objects have run.
Pool& pool() {
  static Pool* const p = new Pool;
  return *p;
}

// The smallest kept block that is large enough, or a new one; {nullptr, 0} where the system has
// none.
Block take(size_t bytes) {
  {
    Pool& p = pool();
    const std::lock_guard<std::mutex> lock(p.mutex);
    auto best = p.blocks.end();
    for (auto b = p.blocks.begin(); b != p.blocks.end(); ++b)
      if (b->bytes >= bytes && (best == p.blocks.end() || b->bytes < best->bytes)) best = b;
    if (best != p.blocks.end()) {
      const Block found = *best;
      p.blocks.erase(best);
      return found;
    }
  }
  bytes = (bytes + kHuge - 1) & ~(kHuge - 1);
  // One page more than needed, so that what is left after cutting both ends begins on a 2 MB
  // boundary.
  char* mapped = static_cast<char*>(
      mmap(nullptr, bytes + kHuge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (mapped == MAP_FAILED) return {nullptr, 0};
  char* begin = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(mapped) + kHuge - 1) &
                                        ~uintptr_t(kHuge - 1));
  if (begin > mapped) munmap(mapped, size_t(begin - mapped));
  munmap(begin + bytes, size_t(mapped + kHuge - begin));
  madvise(begin, bytes, MADV_HUGEPAGE);
  return {begin, bytes};
}

void give(Block block) {
  madvise(block.data, block.bytes, MADV_FREE);
  Pool& p = pool();
  {
    const std::lock_guard<std::mutex> lock(p.mutex);
    p.blocks.push_back(block);
    if (p.blocks.size() <= kKept) return;
    block = p.blocks.front();
    p.blocks.erase(p.blocks.begin());
  }
  munmap(block.data, block.bytes);
}

bool recycling() {
  const char* choice = std::getenv("FASTTAX_RECYCLE");
  return !choice || std::string(choice) != "0";
}

}  // namespace

void prefer_huge_pages(const Tensor& t) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(t.const_data_ptr());
  const uintptr_t end = begin + uintptr_t(t.numel()) * uintptr_t(element_size(t.scalar_type()));
  const uintptr_t first = (begin + kHuge - 1) & ~(kHuge - 1), last = end & ~(kHuge - 1);
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
}

Tensor recycled_empty(const std::vector<int64_t>& sizes, ScalarType type) {
  static const bool wanted = recycling();
  size_t bytes = size_t(element_size(type));
  for (const int64_t size : sizes) bytes *= size_t(size);
  const Block block = wanted && bytes >= kSmallest ? take(bytes) : Block{nullptr, 0};
  if (!block.data) {
    const Tensor t = torch::stable::empty(sizes, type);
    prefer_huge_pages(t);
    return t;
  }
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * sizes[d];
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  return torch::stable::from_blob(block.data, sizes, strides, cpu, type,
                                  [block](void*) { give(block); });
}

#else

void prefer_huge_pages(const Tensor&) {}

Tensor recycled_empty(const std::vector<int64_t>& sizes, ScalarType type) {
  return torch::stable::empty(sizes, type);
}

#endif

}  // namespace fasttax
