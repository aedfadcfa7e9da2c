#pragma once

#include <type_traits>

// The formulas in this folder are compiled by g++ for the CPU and by nvcc for the GPU.
#if defined(__CUDACC__)
#define FASTTAX_HD __host__ __device__ __forceinline__
#else
// always_inline is for more than speed: a formula on SIMD vectors that were called, not inlined,
// from a function of another target would pass its vectors by another ABI.
#define FASTTAX_HD inline __attribute__((always_inline))
#endif

// What a formula asks of its backend comes as M, a struct of static functions on M::S, which is
// float, double or a vector of float (kVector); M::R is the type of a lane:
//   exp log log1p tanh abs fma
//   splat(r)        a number in every lane
//   only(bool, a)   a or 0, without a branch
//   if_lt(a, b, yes, no), if_le    a choice by each lane's a < b, a <= b. Written out here, outside
//   an
//                   instruction set's own code, GCC 12 would take it apart lane by lane
//   all_le(a, b)    whether a <= b in every lane
//   total(a)        the lanes' sum, in double
namespace fasttax {

// A literal as S: as the scalar, or in every lane of the vector. (Of a number that is none, GCC
// makes a vector lane by lane here, outside an instruction set's own code: M::splat.)
template <class S>
FASTTAX_HD S constant(double a) {
  if constexpr (std::is_floating_point<S>::value) return S(a);
  else return float(a) - S{};
}

// weight * value, where a weight of 0 makes 0 of an infinite value too.
template <class S>
FASTTAX_HD S times(S weight, S value) {
  return weight == 0 ? constant<S>(0) : weight * value;
}

}  // namespace fasttax
