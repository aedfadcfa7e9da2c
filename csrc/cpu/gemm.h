#pragma once

#include <cstdint>

#include "../math/types.h"

// out = or += a b with float32 sums, the products of a head's backward and of single tokens'
// squares (gemm.cpp).
namespace fasttax {

struct GemmMatrix {
  FloatType type;
  const void* data;
  int64_t stride;                 // of its rows
  bool turned = false;            // its rows are out's, not those that are summed over
  bool square = false;            // its entries are squared
  const float* weight = nullptr;  // of the rows that are summed over, or null
};

// out (M, N), rows out_stride apart, from a (M, K), or (K, M) unless it is turned, and b (K, N).
// bf16x2: both are bfloat16 and the CPU multiplies pairs of it (isa_bf16).
void gemm(int64_t M, int64_t N, int64_t K, const GemmMatrix& a, const GemmMatrix& b, float* out,
          int64_t out_stride, bool add, bool bf16x2);

}  // namespace fasttax
