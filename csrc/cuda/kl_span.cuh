#pragma once

// A span of entries in a warp's registers, and what is made of all lanes'.

#include "kl_parts.cuh"

namespace fasttax {

// v[i] summed over the warp, in lane i * 32 / K and the ones after it: K + log2(32 / K) shuffles
// for K sums.
template <int half, int bit, int K>
__device__ __forceinline__ void kl_fold(float (&v)[K]) {
  if constexpr (half > 0) {
    const bool upper = threadIdx.x & bit;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float send = upper ? v[i] : v[i + half], keep = upper ? v[i + half] : v[i];
      v[i] = keep + __shfl_xor_sync(kWholeWarp, send, bit);
    }
  } else {
    v[0] += __shfl_xor_sync(kWholeWarp, v[0], bit);
  }
  if constexpr (bit > 1) kl_fold<half / 2, bit / 2>(v);
}

template <int K>
__device__ __forceinline__ float kl_warp_sums(float (&v)[K]) {
  kl_fold<K / 2, 16>(v);
  return v[0];
}

__device__ __forceinline__ float kl_warp_max(float v) {
#pragma unroll
  for (int bit = 16; bit > 0; bit /= 2) v = fmaxf(v, __shfl_xor_sync(kWholeWarp, v, bit));
  return v;
}

template <class T, int n>
__device__ __forceinline__ KlVector<T> kl_highest(const KlVector<T> (&of)[n]) {
  KlVector<T> most = of[0];
#pragma unroll
  for (int j = 1; j < n; ++j)
#pragma unroll
    for (int w = 0; w < 4; ++w) most.word(w) = kl_higher<T>(most.word(w), of[j].word(w));
  return most;
}

template <class T>
__device__ __forceinline__ KlVector<T> kl_either(int second, const KlVector<T>& a,
                                                 const KlVector<T>& b) {
  KlVector<T> one;
#pragma unroll
  for (int w = 0; w < 4; ++w) one.word(w) = second ? b.word(w) : a.word(w);
  return one;
}

// Of every lane's entries the highest, of x and of y.
template <class T>
__device__ __forceinline__ KlSides<float> kl_warp_max(const KlVector<T>& x, const KlVector<T>& y) {
  if constexpr (std::is_same<T, float>::value) {
    float wide_x[4], wide_y[4];
    kl_widen(x, wide_x);
    kl_widen(y, wide_y);
    return {kl_warp_max(fmaxf(fmaxf(wide_x[0], wide_x[1]), fmaxf(wide_x[2], wide_x[3]))),
            kl_warp_max(fmaxf(fmaxf(wide_y[0], wide_y[1]), fmaxf(wide_y[2], wide_y[3])))};
  } else {  // both in one word
    const uint32_t of_x = kl_higher<T>(kl_higher<T>(x.word(0), x.word(1)),
                                       kl_higher<T>(x.word(2), x.word(3))),
                   of_y = kl_higher<T>(kl_higher<T>(y.word(0), y.word(1)),
                                       kl_higher<T>(y.word(2), y.word(3)));
    uint32_t most =
        kl_higher<T>((of_x & 0xffffu) | (of_y << 16), (of_x >> 16) | (of_y & 0xffff0000u));
#pragma unroll
    for (int bit = 16; bit > 0; bit /= 2)
      most = kl_higher<T>(most, __shfl_xor_sync(kWholeWarp, most, bit));
    KlVector<T> both{};
    both.word(0) = most;
    float wide[KlVector<T>::kEntries];
    kl_widen(both, wide);
    return {wide[0], wide[1]};
  }
}

// --- a span in registers

template <class T>
struct KlSpanEntries {
  static constexpr int kEntries = KlVector<T>::kEntries;
  static constexpr int kRound = 32 * kEntries;
  static constexpr int kVectors = kSpan / kRound;
  KlVector<T> x[kVectors], y[kVectors];
  int left;  // entries from this lane's first one to the end

  // `count` entries from `begin`, filled up with -inf
  template <bool kPair, class Source>
  __device__ __forceinline__ void load(const Source& row, int64_t begin, int count) {
    const int first = int(threadIdx.x % 32) * kEntries;
    const int64_t own = begin + first;
    left = count - first;
    if (count == kSpan) {
      const auto beyond_x = row.x.load_span(x, own);
      typename Source::Beyond beyond_y{};
      if (kPair) beyond_y = row.y.load_span(y, own);
      row.x.settle_span(x, own, beyond_x);
      if (kPair) row.y.settle_span(y, own, beyond_y);
      return;
    }
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      float to_x[kEntries], to_y[kEntries];
#pragma unroll
      for (int i = 0; i < kEntries; ++i) {
        to_x[i] = has(j, i) ? row.x.one(own + (j * kRound + i)) : -kl_infinity();
        to_y[i] = kPair && has(j, i) ? row.y.one(own + (j * kRound + i)) : -kl_infinity();
      }
      x[j] = kl_narrow<T>(to_x);
      y[j] = kl_narrow<T>(to_y);
    }
  }

  // Whether there is an entry i in vector j, and whether any lane has one there.
  __device__ __forceinline__ bool has(int j, int i) const { return j * kRound + i < left; }
  __device__ __forceinline__ bool has(int j) const {
    return j * kRound < left + int(threadIdx.x % 32) * kEntries;
  }

  // f(j, x, y) for each vector that has entries, one at a time in x[0] and y[0]: registers have no
  // index, and the code of what is rare is held short.
  template <bool kPair, class F>
  __device__ __forceinline__ void in_turn(const F& f) {
#pragma unroll 1
    for (int j = 0; j < kVectors; ++j) {
      if (has(j)) {
        float wide_x[kEntries], wide_y[kEntries];
        kl_widen(x[0], wide_x);
        kl_widen(kPair ? y[0] : x[0], wide_y);
        f(j, wide_x, wide_y);
      }
      const KlVector<T> first_x = x[0], first_y = y[0];
#pragma unroll
      for (int i = 0; i + 1 < kVectors; ++i) x[i] = x[i + 1], y[i] = y[i + 1];
      x[kVectors - 1] = first_x, y[kVectors - 1] = first_y;
    }
  }

  // Keeps the compiler from carrying what it makes of the entries from one use to the next: twice
  // the registers.
  __device__ __forceinline__ void forget() {
#pragma unroll
    for (int j = 0; j < kVectors; ++j)
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        FASTTAX_OPAQUE(x[j].word(w));
        FASTTAX_OPAQUE(y[j].word(w));
      }
  }

  // Their maxima, NaN passed over; -inf where there is none.
  template <bool kPair>
  __device__ __forceinline__ KlSides<float> maxima(const KlParams& k) const {
    KlSides<float> most{-kl_infinity(), -kl_infinity()};
    if (kPair && k.inf_mask) {
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
        float wide_x[kEntries], wide_y[kEntries];
        kl_widen(x[j], wide_x);
        kl_widen(y[j], wide_y);
#pragma unroll
        for (int i = 0; i < kEntries; ++i) {
          if (wide_x[i] == -kl_infinity() || wide_y[i] == -kl_infinity()) continue;
          most.x = fmaxf(most.x, wide_x[i]);
          most.y = fmaxf(most.y, wide_y[i]);
        }
      }
      most.x = kl_warp_max(most.x);
      most.y = kl_warp_max(most.y);
    } else if constexpr (kPair) {
      most = kl_warp_max(kl_highest(x), kl_highest(y));
    } else {
      most.x = kl_warp_max(kl_highest(x), kl_highest(x)).x;
    }
    // the caps rise with the logits
    if (k.cap > 0 && !(k.inf_mask && most.x == -kl_infinity()))
      most.x = kl_capped<DeviceMath>(most.x, k.inside, k.cap);
    if (kPair && k.ref_cap > 0 && !(k.inf_mask && most.y == -kl_infinity()))
      most.y = kl_capped<DeviceMath>(most.y, k.ref_inside, k.ref_cap);
    if (!kPair) most.y = most.x;
    return most;
  }
};

}  // namespace fasttax
