// Compiles FASTTAX_KERNELS (a header of kernels written on simd.h) once per instruction set, each
// in its own namespace, and leaves `fasttax::isa_level()` to choose at run time: one binary serves
// every x86-64, and every other CPU gets the portable vectors. No -march flag, so the baseline code
// stays baseline. A header of kernels is read once more before that, without FASTTAX_ISA: what it
// includes is compiled there, for the baseline (but formulas again in each pass), and what it
// defines is left out.
// FASTTAX_ONE_ISA=512, 256 or 128 compiles that instruction set alone (`make quick`): a third of
// the time, for a CPU that has it.
#ifndef FASTTAX_KERNELS
#error "define FASTTAX_KERNELS before including isa.h"
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "fetch.h"
#include "level.h"
#include FASTTAX_KERNELS

#if FASTTAX_HAS_ISA(512)
#define FASTTAX_ISA_NS avx512
#define FASTTAX_ISA 512
#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#endif
#include "pass.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

#if FASTTAX_HAS_ISA(256)
#define FASTTAX_ISA_NS avx2
#define FASTTAX_ISA 256
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#include "pass.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

#if FASTTAX_HAS_ISA(128)
#define FASTTAX_ISA_NS portable
#define FASTTAX_ISA 128
#include "pass.h"
#endif

#if FASTTAX_ONE_ISA == 512
#define FASTTAX_DISPATCH(fn, ...) avx512::fn(__VA_ARGS__)
#elif FASTTAX_ONE_ISA == 256
#define FASTTAX_DISPATCH(fn, ...) avx2::fn(__VA_ARGS__)
#elif defined(__x86_64__) && !FASTTAX_ONE_ISA
#define FASTTAX_DISPATCH(fn, ...)                                              \
  (::fasttax::isa_level() == ::fasttax::Isa::kAvx512 ? avx512::fn(__VA_ARGS__) \
   : ::fasttax::isa_level() == ::fasttax::Isa::kAvx2 ? avx2::fn(__VA_ARGS__)   \
                                                     : portable::fn(__VA_ARGS__))
#else
#define FASTTAX_DISPATCH(fn, ...) portable::fn(__VA_ARGS__)
#endif
