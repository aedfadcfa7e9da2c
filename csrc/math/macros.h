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

namespace fasttax {

// A number as S: as the scalar, or in every lane of the vector.
template <class S>
FASTTAX_HD S constant(double a) {
  if constexpr (std::is_floating_point<S>::value) return S(a);
  else return float(a) - S{};
}

}  // namespace fasttax
