#pragma once

#include "../call/check.h"

namespace fasttax {

// Asks for 2 MB pages under a fresh tensor. Advice only: the system may refuse, and the result is
// the same.
void prefer_huge_pages(const Tensor& t);

// An uninitialised contiguous CPU tensor whose memory, when the tensor is freed, waits for the next
// one of at most its size.
Tensor recycled_empty(const std::vector<int64_t>& sizes, ScalarType type);

}  // namespace fasttax
