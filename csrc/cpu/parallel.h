#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>

#include "../call/check.h"
#if defined(__SANITIZE_THREAD__)
extern "C" {
void __tsan_acquire(void*);
void __tsan_release(void*);
}
#endif

namespace fasttax {

// Runs the handlers of signals that have come, as Python does between its own steps; whether one of
// them raised. What it raised is raised again when Python goes on (parallel.cpp).
bool signal_raised();

// Whether torch's threads are there: not in a fork.
bool has_threads();

// Asks for signals now and then, in the thread that called the op: the one that has Python's.
class Watch {
 public:
  // Whether the op is to end: whatever it has written until then is given to nobody.
  bool stops() {
    if (raised_.load(std::memory_order_relaxed)) return true;
    if (std::this_thread::get_id() != caller_ || Clock::now() < next_) return false;
    if (signal_raised()) raised_.store(true, std::memory_order_relaxed);
    next_ = Clock::now() + kBetween;
    return raised_.load(std::memory_order_relaxed);
  }
  // An error if it was ended; a name of the op for it.
  void check(const char* op) const {
    FASTTAX_CHECK(!raised_.load(std::memory_order_relaxed), op,
                  "interrupted: a signal's handler raised, KeyboardInterrupt for Ctrl-C");
  }

  using Clock = std::chrono::steady_clock;
  static constexpr std::chrono::milliseconds kBetween{50};

 private:
  const std::thread::id caller_ = std::this_thread::get_id();
  Clock::time_point next_ = Clock::now() + kBetween;
  std::atomic<bool> raised_{false};
};

// What one thread does before a parallel region is done before what the others do in it, and that
// before what follows. ThreadSanitizer does not see it, for libgomp is not built for it, and is
// told by these two places in memory.
#if defined(__SANITIZE_THREAD__)
inline char region_begun, region_ended;
inline void done_before(char& place) { __tsan_release(&place); }
inline void comes_after(char& place) { __tsan_acquire(&place); }
#define FASTTAX_ORDER(call) call
#else
#define FASTTAX_ORDER(call) ((void)0)
#endif

// f(begin, end) on parts of the range, in torch's threads.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  if (begin >= end) return;
  if (end - begin <= grain || !has_threads()) return f(begin, end);
  const auto part = [&](int64_t from, int64_t to) {
    FASTTAX_ORDER(comes_after(region_begun));
    f(from, to);
    FASTTAX_ORDER(done_before(region_ended));
  };
  FASTTAX_ORDER(done_before(region_begun));
  torch::stable::parallel_for(begin, end, grain, part);
  FASTTAX_ORDER(comes_after(region_ended));
}

// The same for an op that Ctrl-C ends, with an error: one that writes to memory of its own. The
// parts are such that it asks about twenty times a second; f(begin, end, watch) may ask too.
template <class F>
void interruptible_for(const char* op, int64_t begin, int64_t end, int64_t grain, const F& f) {
  constexpr std::chrono::milliseconds kShort{5}, kLong{50};
  Watch watch;
  parallel_for(begin, end, grain, [&](int64_t from, int64_t to) {
    int64_t size = std::max<int64_t>(1, grain);
    while (from < to && !watch.stops()) {
      const int64_t next = to - from > size ? from + size : to;
      const auto start = Watch::Clock::now();
      f(from, next, watch);
      const auto taken = Watch::Clock::now() - start;
      if (taken < kShort) size *= 4;
      else if (taken > kLong) size = std::max<int64_t>(1, size / 2);
      from = next;
    }
  });
  watch.check(op);
}

}  // namespace fasttax
