#pragma once

#include <cstdint>

namespace fasttax {

enum class Isa : int64_t { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

Isa isa_level();  // what the kernels use now
Isa isa_best();   // what this CPU can run
bool isa_bf16();  // vdpbf16ps is there and gains, as on AMD; Emerald Rapids does 1.3 of them a nanosecond, and 5.3 FMAs

// How far ahead to fetch by hand: `distance` bytes, or 0 where the processor's own prefetch crosses pages (AMD from Zen 5 on). There each
// fetch only competes with it: token_kl's forward 3.3 -> 3.8 ms, AdamW with EWC 49 -> 70 ms.
int64_t fetch_ahead(int64_t distance);

}  // namespace fasttax
