#pragma once

#include <cstdint>

namespace fasttax {

enum class Isa : int64_t { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

Isa isa_level();  // what the kernels use now
Isa isa_best();   // what this CPU can run
bool isa_bf16();  // vdpbf16ps is there and gains: 1.31 a nanosecond on Emerald Rapids, where FMAs are 5.3; on Zen 4 as many as FMAs

}  // namespace fasttax
