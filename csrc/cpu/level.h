#pragma once

#include <cstdint>

// Which instruction sets are compiled: all that the processor's family has, or FASTTAX_ONE_ISA
// (isa.h).
#if !defined(FASTTAX_ONE_ISA)
#define FASTTAX_ONE_ISA 0
#endif
#if defined(__x86_64__)
#define FASTTAX_HAS_ISA(bits) (FASTTAX_ONE_ISA == 0 || FASTTAX_ONE_ISA == bits)
#else
#define FASTTAX_HAS_ISA(bits) (bits == 128)
#endif

namespace fasttax {

enum class Isa : int64_t { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

Isa isa_level();  // what the kernels use now
Isa isa_best();   // what this CPU can run, of what is compiled
// vdpbf16ps is there and gains, as on AMD; Emerald Rapids does 1.3 of them a nanosecond, and 5.3
// FMAs
bool isa_bf16();

}  // namespace fasttax
