// EWC's operands as floats, 256 at a time: what EWC's and AdamW's kernels read and write through.
#include "../math/ewc_types.h"
#include "fetch.h"

#if defined(FASTTAX_ISA)  // isa.h: once per instruction set
namespace fasttax {
namespace FASTTAX_ISA_NS {

struct Operand {
  void* data;
  EwcType type;
  const float* scales;  // u8log: (lo, step) per 256 elements
};

constexpr int64_t kStage = kEwcBlock;

// Asks for what lies a page further: the hardware's own prefetch stops at each 4 KB page of each of
// up to seven streams. Into L2: large tensors begin at one place of their pages, so that in L1 the
// streams' next lines would push each other out.
static const int64_t kAhead = fetch_ahead(4096);
template <class T>
inline void ahead(const T* p) {
  __builtin_prefetch(reinterpret_cast<const char*>(p) + kAhead, 0, 2);
}

template <class T>
inline void widen(const T* src, int64_t n, float* dst) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    ahead(src + i);
    store(dst + i, load(src + i));
  }
  for (; i < n; ++i) dst[i] = to_float(src[i]);
}

// Keeps the compiler from fusing a product into a later sum: torch rounds it, and over 100 steps
// one rounding a step shows.
inline VF rounded(VF a) {
#if FASTTAX_ISA == 512
  asm("" : "+v"(a));
#elif defined(__x86_64__)
  asm("" : "+x"(a));
#endif
  return a;
}
inline float rounded(float a) {
#if defined(__x86_64__)
  asm("" : "+x"(a));
#endif
  return a;
}

template <class T>
inline void narrow(const float* src, int64_t n, T* dst) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(dst + i, load(src + i));
  if (i < n) store(dst + i, load(src + i, n - i, 0.0f), n - i);
}

// 2^z, relative error <= 3e-7 for any z: the fraction is exact, and the power in two halves, for
// subnormal results.
inline VF exp2(VF z) {
  const VF n = fma(z, splat(1.0f), splat(kRound)) - kRound;
  const VI power = __builtin_convertvector(n, VI), half = power >> 1;
  return exp((z - n) * 0.693147180559945f) * as_float((half + 127) << 23) *
         as_float((power - half + 127) << 23);
}

// What a code of a u8log block stands for, as a product of two of 16 values: code - 1 = 16 h + l,
// and 2^(lo + step (code - 1)) = 2^(lo + 16 step h) * 2^(step l). 32 exponentials a block of 256.
struct U8LogTables {
  alignas(64) float high[16], low[16];

  explicit U8LogTables(const float* scale) {
    VF at;
    for (int j = 0; j < kLanes; ++j) at[j] = float(j);
    for (int j = 0; j < 16; j += kLanes) {
      const VF place = at + float(j);
      store(high + j, exp2(fma(place, splat(16.0f * scale[1]), splat(scale[0]))));
      store(low + j, exp2(place * scale[1]));
    }
  }

  float value(uint8_t code) const {
    return code == 0 ? 0.0f : high[uint8_t(code - 1) >> 4] * low[(code - 1) & 15];
  }
};

// n codes of one block; the first need not be the block's.
inline void decode_u8log(const uint8_t* codes, const U8LogTables& tables, int64_t n, float* dst) {
  int64_t i = 0;
#if FASTTAX_ISA == 512
  const __m512 high = _mm512_load_ps(tables.high), low = _mm512_load_ps(tables.low);
  for (; i + 16 <= n; i += 16) {
    const __m512i code =
        _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i)));
    // permutes look at the lowest four bits alone
    const __m512i from_zero = _mm512_sub_epi32(code, _mm512_set1_epi32(1));
    const __m512 h = _mm512_permutexvar_ps(_mm512_srli_epi32(from_zero, 4), high),
                 l = _mm512_permutexvar_ps(from_zero, low);
    _mm512_storeu_ps(dst + i, _mm512_maskz_mul_ps(_mm512_test_epi32_mask(code, code), h, l));
  }
#elif FASTTAX_ISA == 256
  const __m256 high[2] = {_mm256_load_ps(tables.high), _mm256_load_ps(tables.high + 8)};
  const __m256 low[2] = {_mm256_load_ps(tables.low), _mm256_load_ps(tables.low + 8)};
  for (; i + 8 <= n; i += 8) {
    const __m256i code =
        _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + i)));
    const __m256i from_zero = _mm256_sub_epi32(code, _mm256_set1_epi32(1)),
                  upper = _mm256_srli_epi32(from_zero, 4);
    // permutes look at three bits; the fourth, shifted to the sign, chooses the half of the table
    const __m256 h = _mm256_blendv_ps(_mm256_permutevar8x32_ps(high[0], upper),
                                      _mm256_permutevar8x32_ps(high[1], upper),
                                      _mm256_castsi256_ps(_mm256_slli_epi32(upper, 28)));
    const __m256 l = _mm256_blendv_ps(_mm256_permutevar8x32_ps(low[0], from_zero),
                                      _mm256_permutevar8x32_ps(low[1], from_zero),
                                      _mm256_castsi256_ps(_mm256_slli_epi32(from_zero, 28)));
    const __m256 zero = _mm256_castsi256_ps(_mm256_cmpeq_epi32(code, _mm256_setzero_si256()));
    _mm256_storeu_ps(dst + i, _mm256_andnot_ps(zero, _mm256_mul_ps(h, l)));
  }
#endif
  for (; i < n; ++i) dst[i] = tables.value(codes[i]);
}

inline void decode_split(const uint8_t* block, int64_t n, float* dst) {
  const BFloat16* hi = reinterpret_cast<const BFloat16*>(block);
  const int8_t* lo = reinterpret_cast<const int8_t*>(block + 2 * kEwcBlock);
  typedef int8_t VB __attribute__((vector_size(kLanes)));
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    VB low;
    std::memcpy(&low, lo + i, sizeof low);
    const VF high = load(hi + i);
    store(dst + i, fma(__builtin_convertvector(low, VF),
                       as_float(as_int(high) & 0x7f800000) * kSplitStep, high));
  }
  for (; i < n; ++i) dst[i] = to_float(hi[i]) + float(lo[i]) * split_unit(to_float(hi[i]));
}

// The n <= 256 elements from `start` (a multiple of 256) as floats: in place, or in `buffer`.
inline const float* stage(const Operand& x, int64_t start, int64_t n, float* buffer) {
  switch (x.type) {
    case EwcType::kFloat: return static_cast<const float*>(x.data) + start;
    case EwcType::kBFloat16:
      widen(static_cast<const BFloat16*>(x.data) + start, n, buffer);
      return buffer;
    case EwcType::kFloat16:
      widen(static_cast<const Float16*>(x.data) + start, n, buffer);
      return buffer;
    case EwcType::kSplit:
      decode_split(static_cast<const uint8_t*>(x.data) + start * 3, n, buffer);
      return buffer;
    default:
      decode_u8log(static_cast<const uint8_t*>(x.data) + start,
                   U8LogTables(x.scales + start / kStage * 2), n, buffer);
      return buffer;
  }
}

// The same of an operand that is only read: where bfloat16 anchors and Fisher meet they are read as
// they lie, in step with the other streams. By way of a buffer they came in bursts: AdamW 1.34
// -> 1.18 times torch's fused one on Zen 5.
template <class T>
inline const T* held(const Operand& x, int64_t start, int64_t n, float* buffer) {
  if constexpr (std::is_same_v<T, float>) return stage(x, start, n, buffer);
  else return static_cast<const T*>(x.data) + start;
}
inline bool lie_as_bfloat16(const Operand& anchor, const Operand& fisher) {
  return anchor.type == EwcType::kBFloat16 && fisher.type == EwcType::kBFloat16 && fisher.data;
}

inline void unstage(const Operand& x, int64_t start, int64_t n, const float* buffer) {
  switch (x.type) {
    case EwcType::kBFloat16: narrow(buffer, n, static_cast<BFloat16*>(x.data) + start); break;
    case EwcType::kFloat16: narrow(buffer, n, static_cast<Float16*>(x.data) + start); break;
    default: break;  // float was written in place
  }
}

}  // namespace FASTTAX_ISA_NS
}  // namespace fasttax
#endif
