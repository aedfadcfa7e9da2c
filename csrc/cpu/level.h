#pragma once

#include <cstdint>

namespace fasttax {

enum class Isa : int64_t { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

Isa isa_level();  // what the kernels use now
Isa isa_best();   // what this CPU can run
bool isa_bf16();  // vdpbf16ps is there and gains, as on AMD; Emerald Rapids does 1.3 of them a nanosecond, and 5.3 FMAs

}  // namespace fasttax
