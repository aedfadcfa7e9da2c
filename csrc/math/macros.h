#pragma once

// The formulas in this folder are compiled by g++ for the CPU and by nvcc for the GPU.
#if defined(__CUDACC__)
#define FASTTAX_HD __host__ __device__ __forceinline__
#else
// always_inline is for more than speed: a formula on SIMD vectors that were called, not inlined, from a function of
// another target would pass its vectors by another ABI.
#define FASTTAX_HD inline __attribute__((always_inline))
#endif
