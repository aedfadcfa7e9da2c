#pragma once

// A SIMT machine on the CPU: a CUDA kernel header, compiled by g++ and run thread by thread.
//
// One CTA, or the CTAs of one cluster, run at a time on one OS thread, and each CUDA thread is a
// fiber with a stack of its own. The order of the fibers is drawn anew (SIMT_SEED) every time they
// are resumed, so a missing barrier shows as a wrong result; under -fsanitize=thread it shows as a
// data race with both lines, because a fiber is a thread to TSan and only barriers and *_sync calls
// order two of them. Under -fsanitize=address,undefined an access outside an allocation, or
// misaligned for its vector type, stops the program with its line. The machine itself aborts on:
// divergent __syncthreads, threads that exit before a barrier, lanes outside their own mask, lanes
// that meet in different *_sync calls, deadlock. Not modelled: CTAs of no cluster that run at the
// same time (a race between them), inline PTX, tensor cores, asynchronous copies, time.
//
// Use: include simt_cuda.h, then the kernels' .cuh, then simt::launch(grid, block, dynamic_bytes,
// [&] { kernel(arguments); }), with the number of CTAs in a cluster as its last argument where
// there is more than one. __shared__ variables are one for all CTAs: a kernel for clusters keeps
// all of its shared memory in the dynamic part.

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

// --- what the sanitizers are told

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

// Saves the callee-saved registers on the running stack, its pointer in *save, and continues on the
// stack `to`.
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

constexpr size_t kStack =
    192 * 1024;  // a kernel's 32 KB of arguments lie on it, and copies of them
constexpr int kWarp = 32;

enum class Waits { kNo, kBarrier, kCluster, kWarp, kExited };

struct Fiber {
  int thread = 0, cta = 0;  // within the CTA, within the cluster
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
  // addresses that TSan orders by, used in turn so that two successive calls stay apart
  char sync[2];
  unsigned turn;
};

struct Cta {
  std::vector<Warp> warps;
  std::vector<unsigned char> dynamic;
  char barrier[2];
  unsigned turn = 0;
};

struct Machine {
  dim3 grid, block;
  uint3 cta{}, thread{};
  int threads = 0;  // of a CTA
  std::vector<Fiber> fibers;
  std::vector<Cta> ctas;  // of the cluster that runs
  std::function<void()> kernel;
  std::mt19937 random{12345};
  Fiber* running = nullptr;
  void *sp = nullptr, *tsan = nullptr, *asan = nullptr;
  const void* stack = nullptr;
  size_t stack_size = 0;
  char started, ended, barrier[2];  // addresses that TSan orders by
  unsigned turn = 0;
  unsigned first = 0;               // the blocks before it (along x) do not run
  size_t streamed = 0, opaque = 0;  // bytes that __ldcs read; FASTTAX_OPAQUEs passed
};

inline Machine& machine() {
  static Machine m;
  return m;
}

[[noreturn]] inline void fail(const char* what, int thread) {
  const Machine& m = machine();
  fprintf(stderr, "simt: %s (thread %d of CTA %u,%u,%u)\n", what, thread, m.cta.x, m.cta.y,
          m.cta.z);
  abort();
}

// --- fibers

inline void leave([[maybe_unused]] bool for_good = false) {  // from a fiber to the scheduler
  Machine& m = machine();
  Fiber* self = m.running;
  SIMT_ASAN(
      __sanitizer_start_switch_fiber(for_good ? nullptr : &self->asan, m.stack, m.stack_size));
  SIMT_TSAN(__tsan_switch_to_fiber(m.tsan, 1));  // 1: the switch itself orders nothing
  simt_switch(&self->sp, m.sp);
  SIMT_ASAN(__sanitizer_finish_switch_fiber(self->asan, nullptr, nullptr));
}

inline void resume(Fiber& fiber) {  // from the scheduler to a fiber
  Machine& m = machine();
  const unsigned t = unsigned(fiber.thread);
  m.running = &fiber;
  m.cta.x = m.cta.x / unsigned(m.ctas.size()) * unsigned(m.ctas.size()) + unsigned(fiber.cta);
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

inline void prepare(Fiber& fiber, int thread, int cta) {
  if (!fiber.stack) {
    fiber.stack = static_cast<char*>(mmap(nullptr, kStack, PROT_READ | PROT_WRITE,
                                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (fiber.stack == MAP_FAILED) fail("no memory for a stack", thread);
    SIMT_TSAN(fiber.tsan = __tsan_create_fiber(0));
  }
  SIMT_ASAN(__asan_unpoison_memory_region(fiber.stack, kStack));
  fiber.thread = thread;
  fiber.cta = cta;
  fiber.waits = Waits::kNo;
  fiber.where = nullptr;
  void** sp = reinterpret_cast<void**>(fiber.stack + kStack - 64);
  *--sp = nullptr;  // keeps the stack 16-byte aligned at fiber_main's entry
  *--sp = reinterpret_cast<void*>(fiber_main);
  for (int i = 0; i < 6; ++i) *--sp = nullptr;
  fiber.sp = sp;
}

// --- barriers

inline void wait_in(Waits what, char* order, const void* where) {
  release(order);
  machine().running->waits = what;
  machine().running->where = where;
  leave();
  acquire(order);
}

inline Cta& running_cta() { return machine().ctas[size_t(machine().running->cta)]; }

inline void barrier(const void* where) {
  Unwatched unwatched;
  wait_in(Waits::kBarrier, &running_cta().barrier[running_cta().turn & 1], where);
}

inline void cluster_barrier(const void* where) {
  Unwatched unwatched;
  wait_in(Waits::kCluster, &machine().barrier[machine().turn & 1], where);
}

inline void warp_sync(unsigned mask, const void* where, bool orders_memory) {
  Unwatched unwatched;
  Fiber* self = machine().running;
  Warp& warp = running_cta().warps[size_t(self->thread / kWarp)];
  if (!(mask >> (self->thread % kWarp) & 1))
    fail("a lane is not in its own *_sync mask", self->thread);
  char* order = &warp.sync[warp.turn & 1];
  if (orders_memory) release(order);
  self->waits = Waits::kWarp;
  self->mask = mask;
  self->where = where;
  leave();
  if (orders_memory) acquire(order);
}

// Lets go the lanes of a warp whose masks are complete; true if any.
inline bool release_lanes(int cta, int warp) {
  Machine& m = machine();
  unsigned waiting = 0, gone = 0;
  const auto lane = [&](int l) -> Fiber& {
    return m.fibers[size_t(cta * m.threads + warp * kWarp + l)];
  };
  for (int l = 0; l < kWarp; ++l) {
    if (warp * kWarp + l >= m.threads || lane(l).waits == Waits::kExited) gone |= 1u << l;
    else if (lane(l).waits == Waits::kWarp) waiting |= 1u << l;
  }
  bool any = false;
  for (int l = 0; l < kWarp; ++l) {
    if (!(waiting >> l & 1) || lane(l).mask & ~(waiting | gone)) continue;
    const unsigned mask = lane(l).mask;
    if (mask & gone) fail("a *_sync mask names a lane that has exited", lane(l).thread);
    for (int other = 0; other < kWarp; ++other) {
      if (!(mask >> other & 1)) continue;
      if (lane(other).mask != mask || lane(other).where != lane(l).where)
        fail("lanes of a warp meet in different *_sync calls", lane(other).thread);
    }
    for (int other = 0; other < kWarp; ++other)
      if (mask >> other & 1) lane(other).waits = Waits::kNo;
    waiting &= ~mask;
    ++m.ctas[size_t(cta)].warps[size_t(warp)].turn;
    any = true;
  }
  return any;
}

// Lets go a barrier that all of the `count` fibers from `first` on have reached; true if so.
inline bool release_barrier(Waits kind, int first, int count, unsigned& turn) {
  Machine& m = machine();
  int at = 0, alive = 0;
  const void* where = nullptr;
  for (int i = first; i < first + count; ++i) {
    const Fiber& fiber = m.fibers[size_t(i)];
    alive += fiber.waits != Waits::kExited;
    if (fiber.waits != kind) continue;
    if (at++ && fiber.where != where) fail("divergent barrier", fiber.thread);
    where = fiber.where;
  }
  if (at == 0 || at != alive) return false;
  if (alive != count) fail("a barrier after some threads have exited", 0);
  for (int i = first; i < first + count; ++i) m.fibers[size_t(i)].waits = Waits::kNo;
  ++turn;
  return true;
}

// --- launch

inline void run_cluster(std::vector<int>& order) {
  Machine& m = machine();
  const int ctas = int(m.ctas.size()), count = ctas * m.threads;
  for (int i = 0; i < count; ++i)
    prepare(m.fibers[size_t(i)], i % m.threads, i / m.threads), order[size_t(i)] = i;
  release(&m.started);
  for (int alive = count; alive > 0;) {
    bool progress = false;
    std::shuffle(order.begin(), order.end(), m.random);
    for (int i : order) {
      Fiber& fiber = m.fibers[size_t(i)];
      if (fiber.waits != Waits::kNo) continue;
      resume(fiber);
      progress = true;
      if (fiber.waits == Waits::kExited) --alive;
    }
    for (int c = 0; c < ctas; ++c) {
      for (int w = 0; w * kWarp < m.threads; ++w) progress |= release_lanes(c, w);
      progress |=
          release_barrier(Waits::kBarrier, c * m.threads, m.threads, m.ctas[size_t(c)].turn);
    }
    progress |= release_barrier(Waits::kCluster, 0, count, m.turn);
    if (!progress) fail("deadlock", 0);
  }
  acquire(&m.ended);
}

template <class Kernel>
void launch(dim3 grid, dim3 block, size_t dynamic_bytes, Kernel&& kernel, int cluster = 1) {
  Unwatched unwatched;
  Machine& m = machine();
  m.threads = int(block.x * block.y * block.z);
  if (m.threads < 1 || m.threads > 1024 || grid.x < 1 || grid.x % unsigned(cluster))
    fail("CUDA would refuse this launch", m.threads);
  if (const char* seed = getenv("SIMT_SEED")) m.random.seed(unsigned(atoi(seed)));
  m.grid = grid, m.block = block, m.kernel = kernel;
  m.ctas.resize(size_t(cluster));
  for (Cta& cta : m.ctas) cta.warps.resize(size_t((m.threads + kWarp - 1) / kWarp));
  const size_t count = size_t(cluster) * size_t(m.threads);
  if (m.fibers.size() < count) m.fibers.resize(count);
  SIMT_TSAN(m.tsan = __tsan_get_current_fiber());
  std::vector<int> order(count);
  for (m.cta.z = 0; m.cta.z < grid.z; ++m.cta.z)
    for (m.cta.y = 0; m.cta.y < grid.y; ++m.cta.y)
      for (unsigned x = m.first; x < grid.x; x += unsigned(cluster)) {
        m.cta.x = x;
        // NaN: shared memory starts undefined
        for (Cta& cta : m.ctas) cta.dynamic = std::vector<unsigned char>(dynamic_bytes, 0xff);
        run_cluster(order);
      }
}

}  // namespace simt
