#include "level.h"

#include <atomic>

#include "../call/check.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fasttax {

Isa isa_best() {
#if FASTTAX_ONE_ISA == 512
  return Isa::kAvx512;
#elif FASTTAX_ONE_ISA == 256
  return Isa::kAvx2;
#elif defined(__x86_64__) && !FASTTAX_ONE_ISA
  __builtin_cpu_init();
  // by cpuid: clang 14's __builtin_cpu_supports does not know f16c
  unsigned eax, ebx, ecx = 0, edx;
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx2 && avx512 ? Isa::kAvx512 : avx2 ? Isa::kAvx2 : Isa::kPortable;
#else
  return Isa::kPortable;
#endif
}

namespace {

std::atomic<int64_t> chosen{-1};

constexpr int64_t kForceBFloat16 = 3;
// what is compiled
constexpr int64_t kLowest = FASTTAX_ONE_ISA == 512 ? 2 : FASTTAX_ONE_ISA == 256 ? 1 : 0;

bool has_bf16() {
#if defined(__x86_64__)
  static const bool there = __builtin_cpu_supports("avx512bf16") != 0;
  return there && isa_best() == Isa::kAvx512;
#else
  return false;
#endif
}

// Tests and benchmarks lower the level; -1 asks without changing; 3 is AVX-512 with vdpbf16ps even
// where it does not gain. Returns the level in force.
int64_t simd_level(int64_t level) {
  const int64_t best = static_cast<int64_t>(isa_best());
  FASTTAX_CHECK(
      level == -1 || (level >= kLowest && level <= best) || (level == kForceBFloat16 && has_bf16()),
      "_simd_level", "level must be -1 (ask) or ", kLowest, "..", best,
      " on this CPU (0 portable, 1 AVX2, 2 AVX-512, 3 AVX-512 with bfloat16 products), got ",
      level);
  if (level >= 0) chosen.store(level, std::memory_order_relaxed);
  return static_cast<int64_t>(isa_level());
}

}  // namespace

Isa isa_level() {
  int64_t level = chosen.load(std::memory_order_relaxed);
  if (level < 0) {
    level = static_cast<int64_t>(isa_best());
    chosen.store(level, std::memory_order_relaxed);
  }
  return static_cast<Isa>(level == kForceBFloat16 ? static_cast<int64_t>(Isa::kAvx512) : level);
}

bool isa_bf16() {
#if defined(__x86_64__)
  static const bool gains = __builtin_cpu_is("amd") != 0;
  return has_bf16() && isa_level() == Isa::kAvx512 &&
         (gains || chosen.load(std::memory_order_relaxed) == kForceBFloat16);
#else
  return false;
#endif
}

}  // namespace fasttax

STABLE_TORCH_LIBRARY_IMPL(fasttax, CompositeExplicitAutograd, m) {
  m.impl("_simd_level", TORCH_BOX(&fasttax::simd_level));
}
