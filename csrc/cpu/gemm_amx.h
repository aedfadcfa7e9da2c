#pragma once

#include "gemm.h"

// Products of bfloat16 by AMX (gemm_amx.cpp).
namespace fasttax {

// AMX's tiles multiply bfloat16: the processor has them, Linux lends them to this process, and the
// level in force is AVX-512 without vdpbf16ps.
bool isa_amx();

struct GemmAmxOut {
  void* data;            // float32
  int64_t stride;        // of its rows
  bool turned = false;   // it is (N, M)
  bool rounded = false;  // it is bfloat16; not added to, and gemm_amx_rounds
};

// Whether each sum of a product of N columns is made at once, and so can be rounded.
bool gemm_amx_rounds(int64_t N, int64_t K);

// As gemm(), of bfloat16; b is (N, K) where it is turned. Products are exact, sums float32: of 32
// products, of 16 such sums or more, of those in order. Subnormal operands count as 0.
void gemm_amx(int64_t M, int64_t N, int64_t K, const GemmMatrix& a, const GemmMatrix& b,
              const GemmAmxOut& out, bool add);

}  // namespace fasttax
