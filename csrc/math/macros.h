#pragma once

// The formulas in this folder are compiled by g++ or clang for the CPU and by nvcc for the GPU.
#if defined(__CUDACC__)
#define FASTTAX_HD __host__ __device__ __forceinline__
#else
#define FASTTAX_HD inline __attribute__((always_inline))
#endif

// What a formula asks of its backend comes as M, a struct of static functions on M::S, which is
// float, double or a vector of float (kVector); M::R is the type of a lane:
//   exp log log1p tanh abs fma
//   splat(r)        a number in every lane
//   only(bool, a)   a or 0, without a branch
//   if_lt(a, b, yes, no), if_le    a choice by each lane's a < b, a <= b
//   all_le(a, b)    whether a <= b in every lane
//   total(a)        the lanes' sum, in double

// A header of formulas is read once for scalars, and once more for each instruction set, in that
// one's namespace: clang passes a vector only between functions of one set, and GCC 12 takes what
// is compiled for none apart lane by lane. cpu/pass.h takes away the guard that it has in place of
// #pragma once.
#define FASTTAX_MATH_NS scalar
namespace fasttax {
namespace scalar {}
using namespace scalar;
}  // namespace fasttax
