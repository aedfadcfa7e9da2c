#pragma once

// Rows of logits on the device: addresses, and 16 bytes at a time.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../math/kl_frame.h"
#include "kl.h"

#if !defined(FASTTAX_DYNAMIC_SHARED)  // the SIMT machine of the tests has its own
#define FASTTAX_DYNAMIC_SHARED(name) extern __shared__ __align__(16) char name[]
#define FASTTAX_OPAQUE(a) asm volatile("" : "+r"(a))  // a new value to the compiler
#endif

namespace fasttax {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr unsigned kWholeWarp = 0xffffffffu;

__device__ __forceinline__ float kl_infinity() { return __builtin_huge_valf(); }

FASTTAX_HD float kl_exp2(float v) {  // relative error 2^-22; 0 below 2^-126
#if defined(__CUDA_ARCH__)
  float e;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(v));
  return e;
#else
  return exp2f(v);
#endif
}

FASTTAX_HD float kl_inverse(float v) {  // relative error 2^-23
#if defined(__CUDA_ARCH__)
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
#else
  return 1 / v;
#endif
}

// the smaller, NaN where one of them is
FASTTAX_HD float kl_min_or_nan(float a, float b) {
#if defined(__CUDA_ARCH__)
  float smaller;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(smaller) : "f"(a), "f"(b));
  return smaller;
#else
  return a <= b || a != a ? a : b;
#endif
}

// The functions that the formulas of csrc/math ask for.
struct DeviceMath {
  using S = float;
  using R = float;
  static constexpr bool kVector = false;
  FASTTAX_HD static float exp(float a) { return expf(a); }
  FASTTAX_HD static float log(float a) { return logf(a); }
  FASTTAX_HD static float log1p(float a) { return log1pf(a); }
  // 1 - 2 / (1 + e^2a), error 2^-22: capped logits have that of capped logits in float32. Beyond
  // 2^60 the quotient is nothing to 1.
  FASTTAX_HD static float tanh(float a) {
    return fmaf(kl_inverse(1 + kl_exp2(kl_min_or_nan(a * (2 * kLog2e), 60.0f))), -2.0f, 1.0f);
  }
  FASTTAX_HD static float abs(float a) { return fabsf(a); }
  FASTTAX_HD static float fma(float a, float b, float c) { return fmaf(a, b, c); }
  // rounded by itself: never a part of an fma
  FASTTAX_HD static float product(float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fmul_rn(a, b);
#else
    return a * b;
#endif
  }
  FASTTAX_HD static float splat(float a) { return a; }
  FASTTAX_HD static float only(bool b, float a) { return b ? a : 0.0f; }
  FASTTAX_HD static float if_lt(float a, float b, float yes, float no) { return a < b ? yes : no; }
  FASTTAX_HD static float if_le(float a, float b, float yes, float no) { return a <= b ? yes : no; }
  FASTTAX_HD static bool all_le(float a, float b) { return a <= b; }
  FASTTAX_HD static double total(float a) { return double(a); }
};

// the larger, NaN where one of them is
__device__ __forceinline__ float kl_max_or_nan(float a, float b) {
#if defined(__CUDA_ARCH__)
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
  return larger;
#else
  return b <= a || a != a ? a : b;
#endif
}

template <class To, class From>
__device__ __forceinline__ To kl_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "same bits");
  To to;
  memcpy(static_cast<void*>(&to), &from, sizeof(To));
  return to;
}

__device__ __forceinline__ char* kl_row_at(const KlLayout& rows, int64_t row) {
  int64_t offset = 0;
#pragma unroll
  for (int d = kKlDims - 1; d >= 0; --d) {
    if (d >= rows.dims) continue;
    offset += d == 0 ? row * rows.strides[d] : row % rows.sizes[d] * rows.strides[d];
    if (d > 0) row /= rows.sizes[d];
  }
  return rows.base + offset;
}

// --- 16 bytes: 4 floats or 8 halves

template <class T>
struct KlVector {
  static constexpr int kEntries = 16 / int(sizeof(T));
  uint4 bits;

  __device__ __forceinline__ uint32_t& word(int w) {
    return w == 0 ? bits.x : w == 1 ? bits.y : w == 2 ? bits.z : bits.w;
  }
  __device__ __forceinline__ uint32_t word(int w) const {
    return w == 0 ? bits.x : w == 1 ? bits.y : w == 2 ? bits.z : bits.w;
  }
};

__device__ __forceinline__ float kl_widen(float v) { return v; }
__device__ __forceinline__ float kl_widen(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float kl_widen(__half v) { return __half2float(v); }
template <class T>
__device__ __forceinline__ T kl_narrow(float v) {
  if constexpr (std::is_same<T, float>::value) return v;
  else if constexpr (std::is_same<T, __nv_bfloat16>::value) return __float2bfloat16_rn(v);
  else return __float2half_rn(v);
}

template <class T>
__device__ __forceinline__ void kl_widen(const KlVector<T>& from,
                                         float (&to)[KlVector<T>::kEntries]) {
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const uint32_t word = from.word(w);
    if constexpr (std::is_same<T, float>::value) {
      to[w] = kl_bits<float>(word);
    } else if constexpr (std::is_same<T, __nv_bfloat16>::value) {
      to[2 * w] = kl_bits<float>(word << 16);
      to[2 * w + 1] = kl_bits<float>(word & 0xffff0000u);
    } else {
      to[2 * w] = __half2float(kl_bits<__half>(uint16_t(word & 0xffff)));
      to[2 * w + 1] = __half2float(kl_bits<__half>(uint16_t(word >> 16)));
    }
  }
}

// Of the entries in a word of T, each the larger; NaN is passed over.
template <class T>
__device__ __forceinline__ uint32_t kl_higher(uint32_t a, uint32_t b) {
  if constexpr (std::is_same<T, float>::value) {
    return kl_bits<uint32_t>(fmaxf(kl_bits<float>(a), kl_bits<float>(b)));
  } else {
    using Two = std::conditional_t<std::is_same<T, __half>::value, __half2, __nv_bfloat162>;
    return kl_bits<uint32_t>(__hmax2(kl_bits<Two>(a), kl_bits<Two>(b)));
  }
}

template <class T>
__device__ __forceinline__ KlVector<T> kl_narrow(const float (&from)[KlVector<T>::kEntries]) {
  KlVector<T> to;
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    if constexpr (std::is_same<T, float>::value) to.word(w) = kl_bits<uint32_t>(from[w]);
    else if constexpr (std::is_same<T, __nv_bfloat16>::value)
      to.word(w) = kl_bits<uint32_t>(__floats2bfloat162_rn(from[2 * w], from[2 * w + 1]));
    else to.word(w) = kl_bits<uint32_t>(__floats2half2_rn(from[2 * w], from[2 * w + 1]));
  }
  return to;
}

// --- where a row pair is read from

__device__ __forceinline__ bool kl_aligned(const void* p) {
  return (reinterpret_cast<uintptr_t>(p) & 15) == 0;
}

// kKeep: another sweep reads it again, out of L2 where it is still there; else evicted first.
template <bool kKeep, class Word>
__device__ __forceinline__ Word kl_word(const Word* from) {
  return kKeep ? __ldca(from) : __ldcs(from);
}

template <bool kKeep, class T>
__device__ __forceinline__ KlVector<T> kl_load_wide(const T* from) {
  return {kl_word<kKeep>(reinterpret_cast<const uint4*>(from))};
}

// Entry by entry: where 16 bytes at an address of 16 would reach beyond the row.
template <bool kKeep, class T>
__device__ __forceinline__ KlVector<T> kl_load_each(const T* from) {
  KlVector<T> v;
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    if constexpr (sizeof(T) == 4) {
      v.word(w) = kl_word<kKeep>(reinterpret_cast<const unsigned*>(from) + w);
    } else {
      const unsigned short* halves = reinterpret_cast<const unsigned short*>(from) + 2 * w;
      const uint32_t low = kl_word<kKeep>(halves), high = kl_word<kKeep>(halves + 1);
      v.word(w) = low | high << 16;
    }
  }
  return v;
}

// 16 bytes out of 32, from byte `at` < 16 on.
__device__ __forceinline__ uint4 kl_funnel(const uint4& low, const uint4& high, unsigned at) {
  const bool two = at & 8, one = at & 4;
  const uint32_t a[6] = {two ? low.z : low.x,  two ? low.w : low.y,   two ? high.x : low.z,
                         two ? high.y : low.w, two ? high.z : high.x, two ? high.w : high.y};
  uint32_t b[5];
#pragma unroll
  for (int i = 0; i < 5; ++i) b[i] = one ? a[i + 1] : a[i];
  const auto word = [&](int i) {
    return uint32_t((uint64_t(b[i + 1]) << 32 | b[i]) >> ((at & 3) * 8));
  };
  return {word(0), word(1), word(2), word(3)};
}

// 8 bytes out of 16, from byte `at` < 8 on.
__device__ __forceinline__ uint2 kl_funnel(const uint2& low, const uint2& high, unsigned at) {
  const bool one = at & 4;
  const uint32_t b[3] = {one ? low.y : low.x, one ? high.x : low.y, one ? high.y : high.x};
  const auto word = [&](int i) {
    return uint32_t((uint64_t(b[i + 1]) << 32 | b[i]) >> ((at & 3) * 8));
  };
  return {word(0), word(1)};
}

// Of a row whose vocabulary or offset is odd: the two aligned 16 bytes that hold the entries, of
// which L1 has one already. The lanes get the same entries as of an aligned row: which lane adds
// what must not depend on where a row lies, or the batch around a token would change its bits.
// [row, end): what may be read; entries whose 32 bytes go beyond it come out wrong.
template <bool kKeep, class T>
__device__ __forceinline__ KlVector<T> kl_load_shifted(const T* from, const T* row, const T* end) {
  const unsigned at = unsigned(reinterpret_cast<uintptr_t>(from) & 15);
  const char* const low = reinterpret_cast<const char*>(from) - at;
  const bool before =
      low<reinterpret_cast<const char*>(row), beyond = low + 32> reinterpret_cast<const char*>(end);
  const uint4 first = kl_word<kKeep>(reinterpret_cast<const uint4*>(before ? low + 16 : low)),
              second = kl_word<kKeep>(reinterpret_cast<const uint4*>(beyond ? low : low + 16));
  return {kl_funnel(first, second, at)};
}

template <class T>
__device__ __forceinline__ void kl_store_each(T* to, const KlVector<T>& v, int first, int last) {
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    if constexpr (sizeof(T) == 4) {
      if (w >= first && w < last) __stcs(reinterpret_cast<unsigned*>(to) + w, v.word(w));
    } else {
      unsigned short* halves = reinterpret_cast<unsigned short*>(to) + 2 * w;
      if (2 * w >= first && 2 * w < last)
        __stcs(halves, static_cast<unsigned short>(v.word(w) & 0xffff));
      if (2 * w + 1 >= first && 2 * w + 1 < last)
        __stcs(halves + 1, static_cast<unsigned short>(v.word(w) >> 16));
    }
  }
}

// whole: every lane of the warp is here, with the vector after that of the lane before.
template <class T>
__device__ __forceinline__ void kl_store(T* to, const KlVector<T>& v, bool aligned, bool whole) {
  constexpr int n = KlVector<T>::kEntries;
  if (aligned) {
    __stcs(reinterpret_cast<uint4*>(to), v.bits);
  } else if (!whole) {
    kl_store_each(to, v, 0, n);
  } else {  // the aligned 16 bytes that begin in the lane before; the warp's ends entry by entry
    const int lane = int(threadIdx.x) % 32;
    const unsigned at = unsigned(reinterpret_cast<uintptr_t>(to) & 15);
    KlVector<T> before;
#pragma unroll
    for (int w = 0; w < 4; ++w)
      before.word(w) = __shfl_sync(kWholeWarp, v.word(w), (lane + 31) % 32);
    const uint4 block = kl_funnel(before.bits, v.bits, 16 - at);
    if (lane > 0) __stcs(reinterpret_cast<uint4*>(reinterpret_cast<char*>(to) - at), block);
    const int own = n - int(at / sizeof(T));  // entries before the next aligned address
    if (lane == 0 || lane == 31) kl_store_each(to, v, lane == 0 ? 0 : own, lane == 0 ? own : n);
  }
}

}  // namespace fasttax
