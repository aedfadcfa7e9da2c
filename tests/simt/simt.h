#pragma once

// A SIMT machine on the CPU: a CUDA kernel header, compiled by g++ and run thread by thread.
//
// One CTA runs at a time on one OS thread, and each of its CUDA threads is a fiber with a stack of its own. The order of the fibers is
// drawn anew (SIMT_SEED) every time they are resumed, so a missing barrier shows as a wrong result; under -fsanitize=thread it shows as a
// data race with both lines, because a fiber is a thread to TSan and only barriers and *_sync calls order two of them. Under
// -fsanitize=address,undefined an access outside an allocation, or misaligned for its vector type, stops the program with its line.
// The machine itself aborts on: divergent __syncthreads, threads that exit before a barrier, lanes outside their own mask, lanes that meet
// in different *_sync calls, deadlock.
// Not modelled: CTAs that run at the same time (a race between CTAs), inline PTX, tensor cores, asynchronous copies, time.
//
// Use: include it, then the kernels' .cuh, then simt::launch(grid, block, dynamic_bytes, [&] { kernel(arguments); }).

#include <sys/mman.h>
#include <vector_functions.h>  // CUDA's own host headers: dim3, uint4, make_uint4
#include <vector_types.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

#if !defined(__x86_64__) || !defined(__linux__)
#error "simt.h switches fibers with x86-64 System V assembly; port simt_switch to run it elsewhere"
#endif

// --- what the sanitizers are told --------------------------------------------------------------------------------------

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define SIMT_ASAN(call) call
#else
#define SIMT_ASAN(call) ((void)0)
#endif

#if defined(__SANITIZE_THREAD__)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned);
void __tsan_switch_to_fiber(void*, unsigned);
void __tsan_acquire(void*);
void __tsan_release(void*);
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#define SIMT_TSAN(call) call
#else
#define SIMT_TSAN(call) ((void)0)
#endif

namespace simt {
struct Unwatched {  // the machine's own state is no part of the kernel
  Unwatched() { SIMT_TSAN((AnnotateIgnoreReadsBegin("", 0), AnnotateIgnoreWritesBegin("", 0))); }
  ~Unwatched() { SIMT_TSAN((AnnotateIgnoreWritesEnd("", 0), AnnotateIgnoreReadsEnd("", 0))); }
};
inline void acquire([[maybe_unused]] void* at) { SIMT_TSAN(__tsan_acquire(at)); }
inline void release([[maybe_unused]] void* at) { SIMT_TSAN(__tsan_release(at)); }
}  // namespace simt

// Saves the callee-saved registers on the running stack, its pointer in *save, and continues on the stack `to`.
extern "C" void simt_switch(void** save, void* to);
asm(R"(
.text
.weak simt_switch
.type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, .-simt_switch
)");

namespace simt {

constexpr size_t kStack = 64 * 1024;
constexpr int kWarp = 32;

enum class Waits { kNo, kBarrier, kWarp, kExited };

struct Fiber {
  int thread = 0;
  Waits waits = Waits::kNo;
  unsigned mask = 0;            // of the *_sync call it waits in
  const void* where = nullptr;  // which call
  void* sp = nullptr;
  char* stack = nullptr;
  void* tsan = nullptr;
  void* asan = nullptr;
};

struct Warp {
  uint64_t value[kWarp];  // what the lanes exchange
  char sync[2];           // addresses that TSan orders by, used in turn so that two successive calls stay apart
  unsigned turn;
};

struct Machine {
  dim3 grid, block;
  uint3 cta{}, thread{};
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<unsigned char> dynamic;
  std::function<void()> kernel;
  std::mt19937 random{12345};
  Fiber* running = nullptr;
  void *sp = nullptr, *tsan = nullptr, *asan = nullptr;
  const void* stack = nullptr;
  size_t stack_size = 0;
  char started, ended, barrier[2];
  unsigned turn = 0;
};

inline Machine& machine() {
  static Machine m;
  return m;
}

[[noreturn]] inline void fail(const char* what, int thread) {
  const Machine& m = machine();
  fprintf(stderr, "simt: %s (thread %d of CTA %u,%u,%u)\n", what, thread, m.cta.x, m.cta.y, m.cta.z);
  abort();
}

// --- fibers ------------------------------------------------------------------------------------------------------------

inline void leave([[maybe_unused]] bool for_good = false) {  // from a fiber to the scheduler
  Machine& m = machine();
  Fiber* self = m.running;
  SIMT_ASAN(__sanitizer_start_switch_fiber(for_good ? nullptr : &self->asan, m.stack, m.stack_size));
  SIMT_TSAN(__tsan_switch_to_fiber(m.tsan, 1));  // 1: the switch itself orders nothing
  simt_switch(&self->sp, m.sp);
  SIMT_ASAN(__sanitizer_finish_switch_fiber(self->asan, nullptr, nullptr));
}

inline void resume(Fiber& fiber) {  // from the scheduler to a fiber
  Machine& m = machine();
  const unsigned t = unsigned(fiber.thread);
  m.running = &fiber;
  m.thread = {t % m.block.x, t / m.block.x % m.block.y, t / (m.block.x * m.block.y)};
  SIMT_ASAN(__sanitizer_start_switch_fiber(&m.asan, fiber.stack, kStack));
  SIMT_TSAN(__tsan_switch_to_fiber(fiber.tsan, 1));
  simt_switch(&m.sp, fiber.sp);
  SIMT_ASAN(__sanitizer_finish_switch_fiber(m.asan, nullptr, nullptr));
}

inline void fiber_main() {
  Machine& m = machine();
  SIMT_ASAN(__sanitizer_finish_switch_fiber(nullptr, &m.stack, &m.stack_size));
  acquire(&m.started);
  m.kernel();
  Unwatched unwatched;
  release(&m.ended);
  m.running->waits = Waits::kExited;
  leave(true);
  abort();
}

inline void prepare(Fiber& fiber, int thread) {
  if (!fiber.stack) {
    fiber.stack = static_cast<char*>(mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (fiber.stack == MAP_FAILED) fail("no memory for a stack", thread);
    SIMT_TSAN(fiber.tsan = __tsan_create_fiber(0));
  }
  SIMT_ASAN(__asan_unpoison_memory_region(fiber.stack, kStack));
  fiber.thread = thread;
  fiber.waits = Waits::kNo;
  fiber.where = nullptr;
  void** sp = reinterpret_cast<void**>(fiber.stack + kStack - 64);
  *--sp = nullptr;  // keeps the stack 16-byte aligned at fiber_main's entry
  *--sp = reinterpret_cast<void*>(fiber_main);
  for (int i = 0; i < 6; ++i) *--sp = nullptr;
  fiber.sp = sp;
}

// --- barriers ----------------------------------------------------------------------------------------------------------

inline void barrier(const void* where) {
  Unwatched unwatched;
  Machine& m = machine();
  char* order = &m.barrier[m.turn & 1];
  release(order);
  m.running->waits = Waits::kBarrier;
  m.running->where = where;
  leave();
  acquire(order);
}

inline void warp_sync(unsigned mask, const void* where, bool orders_memory) {
  Unwatched unwatched;
  Fiber* self = machine().running;
  Warp& warp = machine().warps[size_t(self->thread / kWarp)];
  if (!(mask >> (self->thread % kWarp) & 1)) fail("a lane is not in its own *_sync mask", self->thread);
  char* order = &warp.sync[warp.turn & 1];
  if (orders_memory) release(order);
  self->waits = Waits::kWarp;
  self->mask = mask;
  self->where = where;
  leave();
  if (orders_memory) acquire(order);
}

// Lets go the lanes of `warp` whose masks are complete; true if any.
inline bool release_lanes(int warp, int threads) {
  Machine& m = machine();
  unsigned waiting = 0, gone = 0;
  const auto lane = [&](int l) -> Fiber& { return m.fibers[size_t(warp * kWarp + l)]; };
  for (int l = 0; l < kWarp; ++l) {
    if (warp * kWarp + l >= threads || lane(l).waits == Waits::kExited) gone |= 1u << l;
    else if (lane(l).waits == Waits::kWarp) waiting |= 1u << l;
  }
  bool any = false;
  for (int l = 0; l < kWarp; ++l) {
    if (!(waiting >> l & 1) || lane(l).mask & ~(waiting | gone)) continue;
    const unsigned mask = lane(l).mask;
    if (mask & gone) fail("a *_sync mask names a lane that has exited", lane(l).thread);
    for (int other = 0; other < kWarp; ++other) {
      if (!(mask >> other & 1)) continue;
      if (lane(other).mask != mask || lane(other).where != lane(l).where) fail("lanes of a warp meet in different *_sync calls", lane(other).thread);
    }
    for (int other = 0; other < kWarp; ++other)
      if (mask >> other & 1) lane(other).waits = Waits::kNo;
    waiting &= ~mask;
    ++m.warps[size_t(warp)].turn;
    any = true;
  }
  return any;
}

// Lets go a __syncthreads that every thread has reached; true if so.
inline bool release_barrier(int threads, int alive) {
  Machine& m = machine();
  int at = 0;
  const void* where = nullptr;
  for (int i = 0; i < threads; ++i) {
    if (m.fibers[size_t(i)].waits != Waits::kBarrier) continue;
    if (at++ && m.fibers[size_t(i)].where != where) fail("divergent __syncthreads", i);
    where = m.fibers[size_t(i)].where;
  }
  if (at == 0 || at != alive) return false;
  if (alive != threads) fail("__syncthreads after some threads have exited", 0);
  for (int i = 0; i < threads; ++i) m.fibers[size_t(i)].waits = Waits::kNo;
  ++m.turn;
  return true;
}

// --- launch ------------------------------------------------------------------------------------------------------------

inline void run_cta(int threads, std::vector<int>& order) {
  Machine& m = machine();
  for (int i = 0; i < threads; ++i) prepare(m.fibers[size_t(i)], order[size_t(i)] = i);
  release(&m.started);
  for (int alive = threads; alive > 0;) {
    bool progress = false;
    std::shuffle(order.begin(), order.end(), m.random);
    for (int i : order) {
      Fiber& fiber = m.fibers[size_t(i)];
      if (fiber.waits != Waits::kNo) continue;
      resume(fiber);
      progress = true;
      if (fiber.waits == Waits::kExited) --alive;
    }
    for (int w = 0; w * kWarp < threads; ++w) progress |= release_lanes(w, threads);
    progress |= release_barrier(threads, alive);
    if (!progress) fail("deadlock", 0);
  }
  acquire(&m.ended);
}

template <class Kernel>
void launch(dim3 grid, dim3 block, size_t dynamic_bytes, Kernel&& kernel) {
  Unwatched unwatched;
  Machine& m = machine();
  const int threads = int(block.x * block.y * block.z);
  if (threads < 1 || threads > 1024 || grid.x < 1) fail("CUDA would refuse this launch", threads);
  if (const char* seed = getenv("SIMT_SEED")) m.random.seed(unsigned(atoi(seed)));
  m.grid = grid, m.block = block, m.kernel = kernel;
  if (m.fibers.size() < size_t(threads)) m.fibers.resize(size_t(threads));
  m.warps.resize(size_t((threads + kWarp - 1) / kWarp));
  SIMT_TSAN(m.tsan = __tsan_get_current_fiber());
  std::vector<int> order(static_cast<size_t>(threads));
  for (m.cta.z = 0; m.cta.z < grid.z; ++m.cta.z)
    for (m.cta.y = 0; m.cta.y < grid.y; ++m.cta.y)
      for (m.cta.x = 0; m.cta.x < grid.x; ++m.cta.x) {
        m.dynamic.assign(dynamic_bytes, 0xff);  // NaN: shared memory starts undefined
        run_cta(threads, order);
      }
}

// --- CUDA's names ------------------------------------------------------------------------------------------------------

template <class Of>
struct Index {  // threadIdx and friends: members that read the machine
  struct Part {
    unsigned uint3::*member;
    operator unsigned() const {
      Unwatched unwatched;
      return Of::get().*member;
    }
  };
  Part x{&uint3::x}, y{&uint3::y}, z{&uint3::z};
};
struct OfThread { static uint3 get() { return machine().thread; } };
struct OfCta { static uint3 get() { return machine().cta; } };
struct OfBlock { static uint3 get() { return {machine().block.x, machine().block.y, machine().block.z}; } };
struct OfGrid { static uint3 get() { return {machine().grid.x, machine().grid.y, machine().grid.z}; } };

template <class T>
__attribute__((noinline)) T exchange(const void* where, unsigned mask, T value, int from) {
  static_assert(sizeof(T) <= 8, "a shuffle moves up to 8 bytes");
  Unwatched unwatched;
  Machine& m = machine();
  const int thread = m.running->thread;
  Warp* warp = &m.warps[size_t(thread / kWarp)];
  memcpy(&warp->value[thread % kWarp], &value, sizeof(T));
  warp_sync(mask, where, false);
  if (!(mask >> from & 1)) fail("a shuffle reads a lane outside its mask", thread);
  T result;
  memcpy(&result, &warp->value[from], sizeof(T));
  warp_sync(mask, static_cast<const char*>(where) + 1, false);  // all have read before any writes again
  return result;
}

inline int lane() {
  Unwatched unwatched;
  return machine().running->thread % kWarp;
}
template <class T>
T shuffle_xor(const void* where, unsigned mask, T value, int bits) { return exchange(where, mask, value, lane() ^ bits); }
template <class T>
T shuffle_down(const void* where, unsigned mask, T value, unsigned by) {
  return exchange(where, mask, value, lane() + int(by) < kWarp ? lane() + int(by) : lane());
}
template <class T>
T shuffle(const void* where, unsigned mask, T value, int from) { return exchange(where, mask, value, from & (kWarp - 1)); }

}  // namespace simt

static simt::Index<simt::OfThread> threadIdx;
static simt::Index<simt::OfCta> blockIdx;
static simt::Index<simt::OfBlock> blockDim;
static simt::Index<simt::OfGrid> gridDim;

#define SIMT_HERE ({ static char simt_here[2]; static_cast<const void*>(simt_here); })
#define __syncthreads() simt::barrier(SIMT_HERE)
#define __syncwarp() simt::warp_sync(0xffffffffu, SIMT_HERE, true)
#define __shfl_xor_sync(...) simt::shuffle_xor(SIMT_HERE, __VA_ARGS__)
#define __shfl_down_sync(...) simt::shuffle_down(SIMT_HERE, __VA_ARGS__)
#define __shfl_sync(...) simt::shuffle(SIMT_HERE, __VA_ARGS__)

template <class T> T __ldg(const T* p) { return *p; }
template <class T> T __ldcs(const T* p) { return *p; }
template <class T> void __stcs(T* p, T v) { *p = v; }

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
#define SIMT_DYNAMIC_SHARED(T, name) T* name = reinterpret_cast<T*>(simt::machine().dynamic.data())
