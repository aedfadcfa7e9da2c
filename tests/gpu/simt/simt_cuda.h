#pragma once

// CUDA's names on the SIMT machine: indices, barriers, shuffles, clusters, qualifiers. Include it
// in place of CUDA's headers.

#include "simt.h"

namespace simt {

inline void count(size_t& what, size_t by) {
  Unwatched unwatched;
  what += by;
}

template <class Of>
struct Index {  // threadIdx and friends: members that read the machine
  struct Part {
    unsigned uint3::* member;
    operator unsigned() const {
      Unwatched unwatched;
      return Of::get().*member;
    }
  };
  Part x{&uint3::x}, y{&uint3::y}, z{&uint3::z};
};
struct OfThread {
  static uint3 get() { return machine().thread; }
};
struct OfCta {
  static uint3 get() { return machine().cta; }
};
struct OfBlock {
  static uint3 get() { return {machine().block.x, machine().block.y, machine().block.z}; }
};
struct OfGrid {
  static uint3 get() { return {machine().grid.x, machine().grid.y, machine().grid.z}; }
};

template <class T>
__attribute__((noinline)) T exchange(const void* where, unsigned mask, T value, int from) {
  static_assert(sizeof(T) <= 8, "a shuffle moves up to 8 bytes");
  Unwatched unwatched;
  const int thread = machine().running->thread;
  Warp* warp = &running_cta().warps[size_t(thread / kWarp)];
  memcpy(&warp->value[thread % kWarp], &value, sizeof(T));
  warp_sync(mask, where, false);
  if (!(mask >> from & 1)) fail("a shuffle reads a lane outside its mask", thread);
  T result;
  memcpy(&result, &warp->value[from], sizeof(T));
  // all have read before any writes again
  warp_sync(mask, static_cast<const char*>(where) + 1, false);
  return result;
}

inline unsigned char* dynamic_shared() {
  Unwatched unwatched;
  return running_cta().dynamic.data();
}

inline int lane() {
  Unwatched unwatched;
  return machine().running->thread % kWarp;
}
template <class T>
T shuffle_xor(const void* where, unsigned mask, T value, int bits) {
  return exchange(where, mask, value, lane() ^ bits);
}
template <class T>
T shuffle_down(const void* where, unsigned mask, T value, unsigned by) {
  return exchange(where, mask, value, lane() + int(by) < kWarp ? lane() + int(by) : lane());
}
template <class T>
T shuffle(const void* where, unsigned mask, T value, int from) {
  return exchange(where, mask, value, from & (kWarp - 1));
}

__attribute__((noinline)) inline unsigned ballot(const void* where, unsigned mask, bool mine) {
  Unwatched unwatched;
  const int thread = machine().running->thread;
  Warp* warp = &running_cta().warps[size_t(thread / kWarp)];
  warp->value[thread % kWarp] = mine;
  warp_sync(mask, where, false);
  unsigned result = 0;
  for (int from = 0; from < kWarp; ++from)
    if (mask >> from & 1) result |= unsigned(warp->value[from]) << from;
  warp_sync(mask, static_cast<const char*>(where) + 1, false);
  return result;
}

// the same place in the dynamic shared memory of the cluster's CTA `rank`
template <class T>
T* of_rank(T* shared, unsigned rank) {
  Unwatched unwatched;
  const unsigned char* at = reinterpret_cast<const unsigned char*>(shared);
  std::vector<unsigned char>&own = running_cta().dynamic, &other = machine().ctas.at(rank).dynamic;
  if (at < own.data() || at >= own.data() + own.size())
    fail("mapa of what is not this CTA's shared memory", machine().running->thread);
  return reinterpret_cast<T*>(other.data() + (at - own.data()));
}

}  // namespace simt

static simt::Index<simt::OfThread> threadIdx;
static simt::Index<simt::OfCta> blockIdx;
static simt::Index<simt::OfBlock> blockDim;
static simt::Index<simt::OfGrid> gridDim;

#define SIMT_HERE                        \
  ({                                     \
    static char simt_here[2];            \
    static_cast<const void*>(simt_here); \
  })
#define __syncthreads() simt::barrier(SIMT_HERE)
#define __syncwarp() simt::warp_sync(0xffffffffu, SIMT_HERE, true)
#define __shfl_xor_sync(...) simt::shuffle_xor(SIMT_HERE, __VA_ARGS__)
#define __shfl_down_sync(...) simt::shuffle_down(SIMT_HERE, __VA_ARGS__)
#define __shfl_sync(...) simt::shuffle(SIMT_HERE, __VA_ARGS__)
#define __ballot_sync(...) simt::ballot(SIMT_HERE, __VA_ARGS__)
#define __cluster_barrier_arrive() ((void)0)  // the two in turn: one barrier
#define __cluster_barrier_wait() simt::cluster_barrier(SIMT_HERE)
#define __cluster_map_shared_rank(pointer, rank) static_cast<void*>(simt::of_rank(pointer, rank))
#define __threadfence() ((void)0)

template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  simt::count(simt::machine().streamed, sizeof(T));
  return *p;
}
template <class T>
T __ldca(const T* p) {
  return __ldcs(p);
}
template <class T>
void __stcs(T* p, T v) {
  *p = v;
}
inline int __popc(unsigned v) { return __builtin_popcount(v); }
template <class T>
T atomicAdd(T* p, T v) {
  return __atomic_fetch_add(p, v, __ATOMIC_RELAXED);
}

#include <cuda_bf16.h>  // before the qualifiers below: they define their own
#include <cuda_fp16.h>

#undef __global__
#undef __device__
#undef __host__
#undef __constant__
#undef __shared__
#undef __grid_constant__
#undef __forceinline__
#undef __launch_bounds__
#define __global__
#define __device__
#define __host__
#define __constant__
#define __shared__ static  // one CTA at a time
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define FASTTAX_DYNAMIC_SHARED(name) unsigned char* const name = simt::dynamic_shared()
#define FASTTAX_OPAQUE(a) simt::count(simt::machine().opaque, 1)
