#pragma once

#include <cstdint>

namespace fasttax {

enum class Isa : int64_t { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

Isa isa_level();  // what the kernels use now
Isa isa_best();   // what this CPU can run

}  // namespace fasttax
