#pragma once

#include <cstdint>

namespace fasttax {

// How far ahead to fetch by hand: `distance` bytes, or 0 on AMD, where each fetch competes with the
// processor's own (AdamW with EWC 128 -> 154 ms on Zen 4, 49 -> 70 on Zen 5; token_kl's
// forward 15.2
// -> 16.1 and 3.3 -> 3.8).
inline int64_t fetch_ahead(int64_t distance) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_is("amd")) return 0;
#endif
  return distance;
}

}  // namespace fasttax
