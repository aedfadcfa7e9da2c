#pragma once

#include "gemm.h"

// Products of bfloat16 by AMX (gemm_amx.cpp).
namespace fasttax {

// AMX's tiles multiply bfloat16: the processor has them, Linux lends them to this process, and the
// level in force is AVX-512 without vdpbf16ps.
bool isa_amx();

// As gemm(), of a bfloat16 b and a bfloat16 or float32 a, which is rounded to bfloat16. Where b is
// turned it is (N, K). Products are exact, sums float32: 32 products to a sum of their own, those
// in order. Subnormal operands count as 0.
void gemm_amx(int64_t M, int64_t N, int64_t K, const GemmMatrix& a, const GemmMatrix& b, float* out,
              int64_t out_stride, bool add);

}  // namespace fasttax
