#pragma once

// Rows of logits on the device: addresses, 16 bytes at a time, and raw logits turned into what
// math/kl.h sums.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../math/kl_frame.h"
#include "../math/kl_row.h"
#include "kl.h"

#if !defined(FASTTAX_DYNAMIC_SHARED)  // the SIMT machine of the tests has its own
#define FASTTAX_DYNAMIC_SHARED(name) extern __shared__ __align__(16) char name[]
#define FASTTAX_OPAQUE(a, b) asm volatile("" : "+r"(a), "+r"(b))  // new values to the compiler
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

template <class T>
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

template <class T, bool kKeep = false>
struct KlGlobal {  // the rows themselves
  using Entry = T;
  static constexpr bool kShifts = true;
  const T *x, *y;
  bool aligned;
  int64_t v;

  __device__ __forceinline__ KlGlobal(const T* policy, const T* ref, int64_t entries)
      : x(policy), y(ref), aligned(kl_aligned(policy) && kl_aligned(ref)), v(entries) {}
  // whether x_wide and y_wide may be asked for
  __device__ __forceinline__ bool wide() const { return aligned; }
  __device__ __forceinline__ KlVector<T> x_wide(int64_t i) const {
    return kl_load_wide<kKeep>(x + i);
  }
  __device__ __forceinline__ KlVector<T> y_wide(int64_t i) const {
    return kl_load_wide<kKeep>(y + i);
  }
  // wrong at a row's ends (at_end), where x_each and y_each are to be asked
  __device__ __forceinline__ KlVector<T> x_shifted(int64_t i) const {
    return kl_load_shifted<kKeep>(x + i, x, x + v);
  }
  __device__ __forceinline__ KlVector<T> y_shifted(int64_t i) const {
    return kl_load_shifted<kKeep>(y + i, y, y + v);
  }
  __device__ __forceinline__ bool at_end(int64_t i) const {
    return i == 0 || i + 2 * KlVector<T>::kEntries > v;
  }
  __device__ __forceinline__ KlVector<T> x_each(int64_t i) const {
    return kl_load_each<kKeep>(x + i);
  }
  __device__ __forceinline__ KlVector<T> y_each(int64_t i) const {
    return kl_load_each<kKeep>(y + i);
  }
  __device__ __forceinline__ KlVector<T> x_at(int64_t i) const {
    if (kl_aligned(x)) return x_wide(i);
    return at_end(i) ? x_each(i) : x_shifted(i);
  }
  __device__ __forceinline__ KlVector<T> y_at(int64_t i) const {
    if (kl_aligned(y)) return y_wide(i);
    return at_end(i) ? y_each(i) : y_shifted(i);
  }
  __device__ __forceinline__ float x_one(int64_t i) const { return kl_widen(x[i]); }
  __device__ __forceinline__ float y_one(int64_t i) const { return kl_widen(y[i]); }
};

template <class T>
struct KlStaged {  // the rows' slices in this block's shared memory
  using Entry = T;
  static constexpr bool kShifts = false;
  const T* x;  // less the first entry's index
  int apart;   // from the policy's to the reference's, in entries

  __device__ __forceinline__ bool wide() const { return true; }
  __device__ __forceinline__ KlVector<T> x_wide(int64_t i) const { return x_at(i); }
  __device__ __forceinline__ KlVector<T> y_wide(int64_t i) const { return y_at(i); }
  __device__ __forceinline__ KlVector<T> x_at(int64_t i) const {
    return {*reinterpret_cast<const uint4*>(x + i)};
  }
  __device__ __forceinline__ KlVector<T> y_at(int64_t i) const { return x_at(i + apart); }
  __device__ __forceinline__ float x_one(int64_t i) const { return kl_widen(x[i]); }
  __device__ __forceinline__ float y_one(int64_t i) const { return kl_widen(x[i + apart]); }
};

// --- frames

// e^-up, relative error 2^-22, 0 below 2^-126
__device__ __forceinline__ double kl_fall(double up) {
  const double t = -up * 1.4426950408889634, whole = rint(t);
  return double(kl_exp2(float(t - whole)) * kl_exp2(float(whole)));
}

// KlMove by single precision's exponentials: an error in sx moves a span's entries of both rows
// alike, and so does no harm to a divergence.
__device__ inline KlMove kl_move(double up_x, double up_y) {
  KlMove to;
  to.up_x = up_x;
  to.delta = up_x - up_y;
  to.sx = kl_fall(up_x);
  if (fabs(to.delta) <= double(kMidGap)) {
    const double toward = double(kl_bregman_mid(float(-to.delta)));
    to.toward = to.sx * toward;
    to.rise = to.sx * (toward + to.delta);
    to.sy = to.sx + to.rise;
    to.away = to.sy * double(kl_bregman_mid(float(to.delta)));
  } else {
    to.sy = kl_fall(up_y);
    to.rise = to.sy - to.sx;
    to.toward = to.rise - to.sx * to.delta;
    to.away = to.sy * to.delta - to.rise;
  }
  return to;
}

// Up to which 2 (x - y) / cap capped logits are near; expm1 of it there, relative error 5e-8.
constexpr float kCapSeries = 0.125f;
__device__ __forceinline__ float kl_capped_rest(float t) {
  return fmaf(fmaf(fmaf(fmaf(t, 1.0f / 120, 1.0f / 24), t, 1.0f / 6), t, 0.5f), t, 1.0f) * t;
}

// How raw logits become ax and d: fast, for rows that share one scale and lie in like frames, as
// ax log2 e = (x - mx) s2 and d = (x - y) row_scale + minus_cs; careful() for all.
struct KlDeviceFrame : KlFrame<DeviceMath> {
  float s2, scale, minus_cs;
  bool fast;
  bool capped;  // fast, of logits that have been through cap_jointly()
  bool bare;    // ax2() of raw logits is the policy's, whatever the reference is

  __device__ __forceinline__ KlDeviceFrame(const KlParams& params, const KlRow& row)
      : KlFrame(params, row) {
    fast = params.plain && alike(row);
    capped = params.joint_cap && !params.inf_mask && alike(row);
    bare = !(params.cap > 0) && !params.inf_mask;
    s2 = params.row_scale * kLog2e;
    scale = params.row_scale;
    minus_cs = (row.my - row.mx) * params.row_scale;
  }

  __device__ __forceinline__ float gap(float x, float y) const {
    return fmaf(x - y, scale, minus_cs);
  }
  // u of x - y, which under a joint cap cap_jointly() has made; to_u()
  __device__ __forceinline__ float u(float difference, float to_u) const {
    return fmaf(difference, scale, to_u);
  }
  __device__ __forceinline__ float to_u() const { return minus_cs - r.log_ratio; }
  // cap_jointly() of some entries: y becomes the capped rows' difference. With a, b = e^(2 x / cap)
  // and that of y, tanh is 1 - 2 / (1 + a), and of logits that are near
  //   a - b = b expm1(2 (x - y) / cap)     tanh - tanh = 2 (a - b) / ((1 + a) (1 + b))
  // take one exponential and one division. An entry's result does not depend on the others.
  template <int n>
  __device__ __forceinline__ void cap_all(float (&x)[n], float (&y)[n]) const {
    const float twice = 2 * k.scale / k.cap, to_exp2 = twice * kLog2e, both = 2 * k.cap;
    float widest = 0;
#pragma unroll
    for (int j = 0; j < n; ++j) widest = kl_max_or_nan(widest, fabsf((x[j] - y[j]) * twice));
    const bool all_near = widest <= kCapSeries;
#pragma unroll
    for (int j = 0; j < n; ++j) {
      const float delta = (x[j] - y[j]) * twice;
      const float b = kl_exp2(kl_min_or_nan(y[j] * to_exp2, 60.0f));
      const float one_b = 1 + b;
      float change = b * kl_capped_rest(delta), one_a = one_b + change;
      if (!all_near) {
        const float a = kl_exp2(kl_min_or_nan(x[j] * to_exp2, 60.0f));
        const bool near = fabsf(delta) <= kCapSeries;
        change = near ? change : a - b;
        one_a = near ? one_a : 1 + a;
      }
      const float over = kl_inverse(one_a * one_b) * both;
      x[j] = fmaf(-over, one_b, k.cap);
      y[j] = change * over;
    }
  }
  __device__ __forceinline__ float capped_gap(float difference) const {
    return fmaf(difference, scale, minus_cs);
  }
  // not x s2 - mx s2: rounded at 1000, that is 4e-5 off
  __device__ __forceinline__ float ax2(float x) const { return (x - r.mx) * s2; }
  __device__ __forceinline__ float ay2(float y) const { return (y - r.my) * s2; }
  __device__ __forceinline__ float ax(float x) const { return (x - r.mx) * k.row_scale; }

  // x and y become what cap() makes of them
  __device__ __forceinline__ void careful(float& x, float& y, float& ax_out, float& ay_out,
                                          float& d) const {
    if (k.plain) {
      place<FrameMode::kShared>(x, y, ax_out, d);
    } else {
      cap(x, y);
      place<FrameMode::kGeneral>(x, y, ax_out, d);
    }
    ay_out = ay<FrameMode::kGeneral>(x, y);
  }
};

}  // namespace fasttax
