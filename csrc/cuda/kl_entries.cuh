#pragma once

// Where a row pair is read from, and where gradients go. Kernels of float32 take rows of any type
// of up to 32 bits, each of its own, and widen what they load: their type is looked at once for
// some vectors, by whole warps. So a bfloat16 policy beside a float32 reference costs no copy, and
// no kernels of its own.

#include "kl_elements.cuh"

namespace fasttax {

// Four halves of `type`.
__device__ __forceinline__ KlVector<float> kl_widen(const uint2& halves, FloatType type) {
  float wide[4];
  const uint32_t words[2] = {halves.x, halves.y};
#pragma unroll
  for (int w = 0; w < 2; ++w) {
    if (type == FloatType::kBFloat16) {
      wide[2 * w] = kl_bits<float>(words[w] << 16);
      wide[2 * w + 1] = kl_bits<float>(words[w] & 0xffff0000u);
    } else {
      wide[2 * w] = __half2float(kl_bits<__half>(uint16_t(words[w] & 0xffff)));
      wide[2 * w + 1] = __half2float(kl_bits<__half>(uint16_t(words[w] >> 16)));
    }
  }
  return kl_narrow<float>(wide);
}

__device__ __forceinline__ float kl_widen_one(const char* row, FloatType type, int64_t i) {
  if (type == FloatType::kFloat) return reinterpret_cast<const float*>(row)[i];
  if (type == FloatType::kBFloat16) return kl_widen(reinterpret_cast<const __nv_bfloat16*>(row)[i]);
  return kl_widen(reinterpret_cast<const __half*>(row)[i]);
}

// --- a row in memory

// 16 bytes of a row from entry i on, wherever it lies.
template <class T, bool kKeep = false>
struct KlBits {
  const T* row;
  int64_t v;

  __device__ __forceinline__ KlBits(const char* base, int64_t entries)
      : row(reinterpret_cast<const T*>(base)), v(entries) {}
  __device__ __forceinline__ KlVector<T> at(int64_t i) const {
    if (kl_aligned(row)) return kl_load_wide<kKeep>(row + i);
    return at_end(i) ? kl_load_each<kKeep>(row + i) : shifted(i);
  }
  // wrong at a row's ends
  __device__ __forceinline__ KlVector<T> shifted(int64_t i) const {
    return kl_load_shifted<kKeep>(row + i, row, row + v);
  }
  __device__ __forceinline__ bool at_end(int64_t i) const {
    return i == 0 || i + 2 * KlVector<T>::kEntries > v;
  }
};

// at(i), one(i): a vector from entry i on, and an entry. load_span(to, own), then settle_span(): n
// vectors, a warp's apart, of a span of which every entry is there; what the first has loaded the
// second makes them of, so that the loads of two rows are under way at once.
template <class T, bool kKeep>
struct KlEntries : KlBits<T, kKeep> {
  static constexpr int kRound = 32 * KlVector<T>::kEntries;
  using Beyond = int;
  bool aligned;

  __device__ __forceinline__ KlEntries(const char* base, FloatType, int64_t entries)
      : KlBits<T, kKeep>(base, entries), aligned(kl_aligned(base)) {}

  __device__ __forceinline__ float one(int64_t i) const { return kl_widen(this->row[i]); }
  template <int n>
  __device__ __forceinline__ Beyond load_span(KlVector<T> (&to)[n], int64_t own) const {
#pragma unroll
    for (int j = 0; j < n; ++j) {
      const int64_t i = own + j * kRound;
      to[j] = aligned ? kl_load_wide<kKeep>(this->row + i) : this->shifted(i);
    }
    return 0;
  }
  template <int n>
  __device__ __forceinline__ void settle_span(KlVector<T> (&to)[n], int64_t own, Beyond) const {
    if (aligned) return;
    const int64_t last = own + (n - 1) * kRound;
    if (own == 0) to[0] = kl_load_each<kKeep>(this->row + own);
    if (this->at_end(last)) to[n - 1] = kl_load_each<kKeep>(this->row + last);
  }
};

template <bool kKeep>
struct KlEntries<float, kKeep> {
  static constexpr int kEntries = 4, kRound = 32 * kEntries;
  using Beyond = uint4;
  const char* row;
  int64_t v;
  FloatType type;

  __device__ __forceinline__ KlEntries(const char* base, FloatType of, int64_t entries)
      : row(base), v(entries), type(of) {}

  __device__ __forceinline__ float one(int64_t i) const { return kl_widen_one(row, type, i); }
  __device__ __forceinline__ KlVector<float> at(int64_t i) const {
    if (type != FloatType::kFloat) {
      const uint2 halves = off() == 0  ? kl_word<kKeep>(reinterpret_cast<const uint2*>(row + 2 * i))
                           : at_end(i) ? each_half(i)
                                       : funnel(two_words(i));
      return kl_widen(halves, type);
    }
    return KlBits<float, kKeep>(row, v).at(i);
  }

  // Of float32 the 16 bytes at an address of 16 that hold a lane's first entry: those after it are
  // its neighbour's, and after the last lane's the first one's of the next round. Beyond the span's
  // last round they are `Beyond`, in lane 0.
  template <int n>
  __device__ __forceinline__ Beyond load_span(KlVector<float> (&to)[n], int64_t own) const {
    uint4 beyond{};
    if (type != FloatType::kFloat) {
#pragma unroll
      for (int j = 0; j < n; ++j) {
        const int64_t i = own + j * kRound;
        if (off() == 0) {
          const uint2 halves = kl_word<kKeep>(reinterpret_cast<const uint2*>(row + 2 * i));
          to[j].bits = {halves.x, halves.y, 0, 0};
        } else {
          to[j].bits = two_words(i);
        }
      }
      return beyond;
    }
    const int before = int(off() / 4);  // entries of the 16 bytes that are not a lane's
    const float* const from = floats() + own - before;
#pragma unroll
    for (int j = 0; j < n; ++j) {
      if (j == 0 && own == 0 && before > 0) to[0].bits = some(from, before, kEntries);
      else to[j] = kl_load_wide<kKeep>(from + j * kRound);
    }
    if (before > 0 && threadIdx.x % 32 == 0) beyond = some(from + n * kRound, 0, before);
    return beyond;
  }
  template <int n>
  __device__ __forceinline__ void settle_span(KlVector<float> (&to)[n], int64_t own,
                                              const Beyond& beyond) const {
    if (type != FloatType::kFloat) {
#pragma unroll
      for (int j = 0; j < n; ++j) {
        const int64_t i = own + j * kRound;
        uint2 halves{to[j].bits.x, to[j].bits.y};
        if (off() != 0) halves = at_end(i) ? each_half(i) : funnel(to[j].bits);
        to[j] = kl_widen(halves, type);
      }
      return;
    }
    if (off() == 0) return;
    const int lane = int(threadIdx.x) % 32;
#pragma unroll
    for (int j = 0; j < n; ++j) {
      KlVector<float> next = to[j];
      if (lane == 0 && j + 1 < n) next = to[j + 1 < n ? j + 1 : j];
      if (lane == 0 && j + 1 == n) next.bits = beyond;
#pragma unroll
      for (int w = 0; w < 3; ++w)
        next.word(w) = __shfl_sync(kWholeWarp, next.word(w), (lane + 1) % 32);
      to[j].bits = kl_funnel(to[j].bits, next.bits, unsigned(off()));
    }
  }

 private:
  __device__ __forceinline__ const float* floats() const {
    return reinterpret_cast<const float*>(row);
  }
  // bytes between the row's first entry and the address before it that a vector can be read from
  __device__ __forceinline__ unsigned off() const {
    return unsigned(reinterpret_cast<uintptr_t>(row) & (type == FloatType::kFloat ? 15 : 7));
  }
  __device__ __forceinline__ bool at_end(int64_t i) const { return i == 0 || i + 2 * kEntries > v; }
  // entries [first, last) of 4 floats
  __device__ __forceinline__ static uint4 some(const float* from, int first, int last) {
    KlVector<float> v{};
#pragma unroll
    for (int w = 0; w < 4; ++w)
      if (w >= first && w < last)
        v.word(w) = kl_word<kKeep>(reinterpret_cast<const unsigned*>(from) + w);
    return v.bits;
  }
  __device__ __forceinline__ uint2 each_half(int64_t i) const {
    const unsigned short* from = reinterpret_cast<const unsigned short*>(row) + i;
    const auto word = [&](int w) {
      return uint32_t(kl_word<kKeep>(from + 2 * w)) | uint32_t(kl_word<kKeep>(from + 2 * w + 1))
                                                          << 16;
    };
    return {word(0), word(1)};
  }
  // The two aligned 8 bytes that hold four halves; at a row's ends (at_end) others of its.
  __device__ __forceinline__ uint4 two_words(int64_t i) const {
    const char* const low = row + 2 * i - off();
    const bool before = low<row, beyond = low + 16> row + 2 * v;
    const uint2 first = kl_word<kKeep>(reinterpret_cast<const uint2*>(before ? low + 8 : low)),
                second = kl_word<kKeep>(reinterpret_cast<const uint2*>(beyond ? low : low + 8));
    return {first.x, first.y, second.x, second.y};
  }
  __device__ __forceinline__ uint2 funnel(const uint4& words) const {
    return kl_funnel(uint2{words.x, words.y}, uint2{words.z, words.w}, off());
  }
};

// --- a row's slice in this block's shared memory

template <class T>
struct KlStagedEntries {
  using Beyond = int;
  const T* row;  // less the first entry's index

  __device__ __forceinline__ KlStagedEntries(const char* slice, int64_t first)
      : row(reinterpret_cast<const T*>(slice) - first) {}
  __device__ __forceinline__ float one(int64_t i) const { return kl_widen(row[i]); }
  __device__ __forceinline__ KlVector<T> at(int64_t i) const {
    return {*reinterpret_cast<const uint4*>(row + i)};
  }
  template <int n>
  __device__ __forceinline__ Beyond load_span(KlVector<T> (&to)[n], int64_t own) const {
#pragma unroll
    for (int j = 0; j < n; ++j) to[j] = at(own + j * 32 * KlVector<T>::kEntries);
    return 0;
  }
  template <int n>
  __device__ __forceinline__ void settle_span(KlVector<T> (&)[n], int64_t, Beyond) const {}
};

// --- a row pair

template <class Entries>
struct KlPairOf {
  using Beyond = typename Entries::Beyond;
  Entries x, y;
};
template <class T, bool kKeep = false>
struct KlGlobal
    : KlPairOf<KlEntries<T, kKeep>> {  // the rows themselves; without a reference one row
  using Entry = T;
  __device__ __forceinline__ KlGlobal(const KlArgs& a, int64_t row, bool has_ref)
      : KlPairOf<KlEntries<T, kKeep>>{
            {kl_row_at(a.x, row), a.x_type, a.v},
            {kl_row_at(has_ref ? a.y : a.x, row), has_ref ? a.y_type : a.x_type, a.v}} {}
  // both of one type, which is known when this is compiled
  __device__ __forceinline__ KlGlobal(const KlArgs& a, int64_t row, FloatType of)
      : KlPairOf<KlEntries<T, kKeep>>{{kl_row_at(a.x, row), of, a.v},
                                      {kl_row_at(a.y, row), of, a.v}} {}
};
template <class T>
struct KlStaged : KlPairOf<KlStagedEntries<T>> {  // their slices, from entry `first` on
  using Entry = T;
  __device__ __forceinline__ KlStaged(const char* x, const char* y, int64_t first)
      : KlPairOf<KlStagedEntries<T>>{{x, first}, {y, first}} {}
};

// --- where a gradient goes

template <class T>
struct KlTarget {
  T* to;  // null: there is none
  bool aligned;

  __device__ __forceinline__ KlTarget(const KlLayout& rows, FloatType, int64_t row)
      : to(rows.base ? reinterpret_cast<T*>(kl_row_at(rows, row)) : nullptr),
        aligned(kl_aligned(to)) {}
  // whole: as of kl_store()
  __device__ __forceinline__ void vector(int64_t i, const float (&v)[KlVector<T>::kEntries],
                                         bool whole) const {
    if (to) kl_store(to + i, kl_narrow<T>(v), aligned, whole);
  }
  __device__ __forceinline__ void one(int64_t i, float v) const {
    if (to) to[i] = kl_narrow<T>(v);
  }
};

template <>
struct KlTarget<float> {
  char* to;
  FloatType type;
  bool aligned;

  __device__ __forceinline__ KlTarget(const KlLayout& rows, FloatType of, int64_t row)
      : to(rows.base ? kl_row_at(rows, row) : nullptr),
        type(of),
        aligned((reinterpret_cast<uintptr_t>(to) & (of == FloatType::kFloat ? 15 : 7)) == 0) {}
  __device__ __forceinline__ void vector(int64_t i, const float (&v)[4], bool whole) const {
    if (!to) return;
    if (type == FloatType::kFloat) {
      kl_store(reinterpret_cast<float*>(to) + i, kl_narrow<float>(v), aligned, whole);
      return;
    }
    unsigned short* const halves = reinterpret_cast<unsigned short*>(to) + i;
    uint32_t words[2];
#pragma unroll
    for (int w = 0; w < 2; ++w)
      words[w] = uint32_t(half(v[2 * w])) | uint32_t(half(v[2 * w + 1])) << 16;
    if (aligned) {
      __stcs(reinterpret_cast<uint2*>(halves), uint2{words[0], words[1]});
      return;
    }
#pragma unroll
    for (int e = 0; e < 4; ++e)
      __stcs(halves + e, static_cast<unsigned short>(words[e / 2] >> (e % 2 * 16) & 0xffff));
  }
  __device__ __forceinline__ void one(int64_t i, float v) const {
    if (!to) return;
    if (type == FloatType::kFloat) reinterpret_cast<float*>(to)[i] = v;
    else reinterpret_cast<unsigned short*>(to)[i] = half(v);
  }

 private:
  __device__ __forceinline__ unsigned short half(float v) const {
    if (type == FloatType::kBFloat16) return kl_bits<unsigned short>(kl_narrow<__nv_bfloat16>(v));
    return kl_bits<unsigned short>(kl_narrow<__half>(v));
  }
};

}  // namespace fasttax
