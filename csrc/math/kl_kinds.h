#pragma once

#include <cstdint>

namespace fasttax {

enum class KlKind : int64_t { kPolicyRef = 0, kRefPolicy = 1, kJsd = 2 };

}  // namespace fasttax
