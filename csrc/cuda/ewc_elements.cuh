#pragma once

// Reading and writing EWC's operands on the device: one element, or four at a time, of any type, as
// float (float64 as itself).

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../math/ewc_types.h"

namespace fasttax {

enum EwcOperand : int { kTheta, kAnchor, kFisher, kGrad };

// The chunk that a block owns. Offsets within it are 32-bit; the 64-bit one, to its first element,
// is added once, in ewc_view.
struct EwcView {
  char* data[4];
  const float* scales;
  EwcType types[4];
};

__device__ __forceinline__ EwcView ewc_view(const EwcTensor& x, int64_t begin) {
  EwcView view;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const EwcType type = x.types[k];
    // of split: begin is a multiple of 256, so this is whole blocks
    const int64_t size = type == EwcType::kDouble  ? 8
                         : type == EwcType::kFloat ? 4
                         : type == EwcType::kSplit ? 3
                         : type == EwcType::kU8Log ? 1
                                                   : 2;
    view.types[k] = type;
    view.data[k] = static_cast<char*>(x.data[k]) + begin * size;
#if defined(__CUDA_ARCH__)
    // one pointer for all loops: the compiler would hoist one per width, and spill
    asm("" : "+l"(view.data[k]));
#endif
  }
  view.scales = x.scales ? x.scales + begin / 256 * 2 : nullptr;
  return view;
}

template <class T>
__device__ __forceinline__ T& ewc_at(const EwcView& x, int k, int i) {  // i counts T
  return reinterpret_cast<T*>(x.data[k])[i];
}

template <class To, class From>
__device__ __forceinline__ To ewc_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "same bits");
  To to;
  memcpy(static_cast<void*>(&to), &from, sizeof(To));
  return to;
}

__device__ __forceinline__ float ewc_u8log(uint32_t code, float lo, float step) {
  return code == 0 ? 0.0f : exp2f(u8log_log2(code, lo, step));
}

__device__ __forceinline__ float ewc_join(float hi, int8_t lo) {
  return fmaf(float(lo), split_unit(hi), hi);
}

template <int width>
using EwcWidth = std::integral_constant<int, width>;

struct EwcSplitFour {
  uint2 hi;
  uint32_t lo;
};

// Four elements of 4, 2 or 1 bytes (3: split) as they lie. __ldcs, __stcs: every byte is used once,
// so it is first to leave the cache; and they name global memory, which the compiler cannot know of
// pointers that come in a struct.
template <int width>
using EwcFour = std::conditional_t<
    width == 4, uint4,
    std::conditional_t<width == 3, EwcSplitFour, std::conditional_t<width == 2, uint2, uint32_t>>>;

template <int width>
__device__ __forceinline__ EwcFour<width> ewc_load(const EwcView& x, int k, int i) {
  if constexpr (width == 3) {
    const char* block = x.data[k] + i / kEwcBlock * kSplitBytes;
    const int at = i % kEwcBlock;
    return {__ldcs(reinterpret_cast<const uint2*>(block + 2 * at)),
            __ldcs(reinterpret_cast<const uint32_t*>(block + 2 * kEwcBlock + at))};
  } else {
    return __ldcs(&ewc_at<EwcFour<width>>(x, k, i / 4));
  }
}

__device__ __forceinline__ void ewc_widen(const uint4& four, bool, float (&out)[4]) {
  out[0] = ewc_bits<float>(four.x), out[1] = ewc_bits<float>(four.y),
  out[2] = ewc_bits<float>(four.z), out[3] = ewc_bits<float>(four.w);
}

__device__ __forceinline__ void ewc_widen(const uint2& four, bool bfloat, float (&out)[4]) {
  const uint32_t word[2] = {four.x, four.y};
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const uint32_t bits = j % 2 ? word[j / 2] >> 16 : word[j / 2] & 0xffff;
    out[j] = bfloat ? ewc_bits<float>(bits << 16) : __half2float(ewc_bits<__half>(uint16_t(bits)));
  }
}

__device__ __forceinline__ void ewc_widen(const EwcSplitFour& four, bool, float (&out)[4]) {
  ewc_widen(four.hi, true, out);
#pragma unroll
  for (int j = 0; j < 4; ++j) out[j] = ewc_join(out[j], int8_t(four.lo >> 8 * j & 0xff));
}

__device__ __forceinline__ void ewc_store(uint4* to, bool, const float (&v)[4]) {
  __stcs(to, make_uint4(ewc_bits<uint32_t>(v[0]), ewc_bits<uint32_t>(v[1]),
                        ewc_bits<uint32_t>(v[2]), ewc_bits<uint32_t>(v[3])));
}

__device__ __forceinline__ void ewc_store(uint2* to, bool bfloat, const float (&v)[4]) {
  if (bfloat)
    __stcs(to, make_uint2(ewc_bits<uint32_t>(__floats2bfloat162_rn(v[0], v[1])),
                          ewc_bits<uint32_t>(__floats2bfloat162_rn(v[2], v[3]))));
  else
    __stcs(to, make_uint2(ewc_bits<uint32_t>(__floats2half2_rn(v[0], v[1])),
                          ewc_bits<uint32_t>(__floats2half2_rn(v[2], v[3]))));
}

template <class S>
__device__ __forceinline__ S ewc_get(const EwcView& x, int k, int i) {
  if constexpr (std::is_same<S, double>::value) {
    return __ldcs(&ewc_at<double>(x, k, i));
  } else {
    if (k == kFisher && x.types[k] == EwcType::kU8Log)
      return ewc_u8log(__ldcs(&ewc_at<uint8_t>(x, k, i)), x.scales[i / 256 * 2],
                       x.scales[i / 256 * 2 + 1]);
    if (k == kAnchor && x.types[k] == EwcType::kSplit) {
      const char* block = x.data[k] + i / kEwcBlock * kSplitBytes;
      const int at = i % kEwcBlock;
      return ewc_join(__bfloat162float(__ldcs(reinterpret_cast<const __nv_bfloat16*>(block) + at)),
                      int8_t(__ldcs(reinterpret_cast<const uint8_t*>(block) + 2 * kEwcBlock + at)));
    }
    if (x.types[k] == EwcType::kFloat) return __ldcs(&ewc_at<float>(x, k, i));
    if (x.types[k] == EwcType::kBFloat16)
      return __bfloat162float(__ldcs(&ewc_at<__nv_bfloat16>(x, k, i)));
    return __half2float(__ldcs(&ewc_at<__half>(x, k, i)));
  }
}

template <class S>
__device__ __forceinline__ void ewc_put(const EwcView& x, int k, int i, S v) {
  if constexpr (std::is_same<S, double>::value) {
    __stcs(&ewc_at<double>(x, k, i), v);
  } else {
    switch (x.types[k]) {
      case EwcType::kFloat: __stcs(&ewc_at<float>(x, k, i), v); break;
      case EwcType::kBFloat16:
        __stcs(&ewc_at<__nv_bfloat16>(x, k, i), __float2bfloat16_rn(v));
        break;
      default: __stcs(&ewc_at<__half>(x, k, i), __float2half_rn(v));
    }
  }
}

}  // namespace fasttax
