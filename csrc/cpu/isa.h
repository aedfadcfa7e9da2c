// Compiles FASTTAX_KERNELS (a header of kernels written on simd.h) once per instruction set, each in its own
// namespace, and leaves `fasttax::isa_level()` to choose at run time: one binary serves every x86-64, and
// every other CPU gets the portable vectors. No -march flag, so the baseline code stays baseline.
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

#include "../kl_params.h"
#include "../math/adamw.h"
#include "../math/ewc.h"
#include "../math/kl_row.h"
#include "fetch.h"
#include "level.h"

#if defined(__x86_64__)
#define FASTTAX_ISA_NS avx512
#define FASTTAX_ISA 512
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#endif
#include "simd.h"
#include FASTTAX_KERNELS
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef FASTTAX_ISA
#undef FASTTAX_ISA_NS

#define FASTTAX_ISA_NS avx2
#define FASTTAX_ISA 256
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#include "simd.h"
#include FASTTAX_KERNELS
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef FASTTAX_ISA
#undef FASTTAX_ISA_NS
#endif

#define FASTTAX_ISA_NS portable
#define FASTTAX_ISA 128
#include "simd.h"
#include FASTTAX_KERNELS
#undef FASTTAX_ISA
#undef FASTTAX_ISA_NS

#if defined(__x86_64__)
#define FASTTAX_DISPATCH(fn, ...)                                              \
  (::fasttax::isa_level() == ::fasttax::Isa::kAvx512 ? avx512::fn(__VA_ARGS__) \
   : ::fasttax::isa_level() == ::fasttax::Isa::kAvx2 ? avx2::fn(__VA_ARGS__)   \
                                                     : portable::fn(__VA_ARGS__))
#else
#define FASTTAX_DISPATCH(fn, ...) portable::fn(__VA_ARGS__)
#endif
