// Vectors of float for one instruction set; included once per FASTTAX_ISA by isa.h (so no include
// guard). Arithmetic uses the compilers' vector extensions; only what they can't say is an
// intrinsic.
namespace fasttax {
namespace FASTTAX_ISA_NS {

constexpr int kLanes = FASTTAX_ISA / 32;

typedef float VF __attribute__((vector_size(FASTTAX_ISA / 8)));
typedef int32_t VI __attribute__((vector_size(FASTTAX_ISA / 8)));
typedef uint32_t VU __attribute__((vector_size(FASTTAX_ISA / 8)));
typedef uint16_t VH __attribute__((vector_size(FASTTAX_ISA / 16)));

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline VF splat(float a) { return a - VF{}; }
inline VI splat_i(int32_t a) { return a - VI{}; }
inline VF as_float(VI a) { return (VF)a; }
inline VI as_int(VF a) { return (VI)a; }

inline VF fma(VF a, VF b, VF c) {
#if FASTTAX_ISA == 512
  return (VF)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif FASTTAX_ISA == 256
  return (VF)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// A NaN in `b` survives both (the x86 instructions return their second operand when either is NaN).
inline VF max_keep_nan(VF a, VF b) {
#if FASTTAX_ISA == 512
  return (VF)_mm512_max_ps((__m512)a, (__m512)b);
#elif FASTTAX_ISA == 256
  return (VF)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
inline VF min_keep_nan(VF a, VF b) {
#if FASTTAX_ISA == 512
  return (VF)_mm512_min_ps((__m512)a, (__m512)b);
#elif FASTTAX_ISA == 256
  return (VF)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}

inline VF sqrt(VF a) {
#if FASTTAX_ISA == 512
  return (VF)_mm512_sqrt_ps((__m512)a);
#elif FASTTAX_ISA == 256
  return (VF)_mm256_sqrt_ps((__m256)a);
#else
  VF v;
  for (int i = 0; i < kLanes; ++i) v[i] = std::sqrt(a[i]);
  return v;
#endif
}

// 1 / a to 4e-4 of itself or better
inline VF reciprocal(VF a) {
#if FASTTAX_ISA == 512
  return (VF)_mm512_rcp14_ps((__m512)a);
#elif FASTTAX_ISA == 256
  return (VF)_mm256_rcp_ps((__m256)a);
#else
  return 1.0f / a;
#endif
}

inline VF abs(VF a) { return as_float(as_int(a) & 0x7fffffff); }

// max(|a|, b) of a b >= 0; a NaN of either may be passed over
inline VF max_size(VF a, VF b) {
#if FASTTAX_ISA == 512
  return (VF)_mm512_range_ps((__m512)a, (__m512)b, 0b1011);  // the larger size, without a sign
#else
  return max_keep_nan(abs(a), b);
#endif
}

// True when a <= b holds in every lane; a NaN makes it false.
inline bool all_le(VF a, VF b) {
#if FASTTAX_ISA == 512
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LE_OQ) == 0xffff;
#elif FASTTAX_ISA == 256
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_LE_OQ)) == 0xff;
#else
  const VI le = a <= b;
  bool all = true;
  for (int i = 0; i < kLanes; ++i) all &= le[i] != 0;
  return all;
#endif
}

// In doubles, by halves: one lane after the other waits for an addition sixteen times.
inline double sum(VF a) {
#if FASTTAX_ISA == 512
  const __m512 b = (__m512)a;
  return _mm512_reduce_add_pd(_mm512_add_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(b)),
                                            _mm512_cvtps_pd(_mm512_extractf32x8_ps(b, 1))));
#elif FASTTAX_ISA == 256
  const __m256 b = (__m256)a;
  const __m256d four = _mm256_add_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(b)),
                                     _mm256_cvtps_pd(_mm256_extractf128_ps(b, 1)));
  const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
  return two[0] + two[1];
#else
  double s = 0;
  for (int i = 0; i < kLanes; ++i) s += static_cast<double>(a[i]);
  return s;
#endif
}

inline float max_of(VF a) {  // NaN lanes are ignored
  float m = -std::numeric_limits<float>::infinity();
  for (int i = 0; i < kLanes; ++i) m = a[i] > m ? a[i] : m;
  return m;
}

// Memory.

inline VF load(const float* p) {
  VF v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// kLanes 16-bit words as 32-bit ones; GCC 12 converts vectors by halves, in five instructions
inline VU widen_halves(const void* p) {
#if FASTTAX_ISA == 512
  return (VU)_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
#elif FASTTAX_ISA == 256
  return (VU)_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)));
#else
  VH h;
  std::memcpy(&h, p, sizeof h);
  return __builtin_convertvector(h, VU);
#endif
}

inline VF load(const BFloat16* p) { return (VF)(widen_halves(p) << 16); }

inline float to_float(float a) { return a; }
inline float to_float(BFloat16 a) {
  const uint32_t u = uint32_t(a.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline float to_float(Float16 a) {
  const uint32_t sign = uint32_t(a.bits & 0x8000) << 16, magnitude = uint32_t(a.bits & 0x7fff)
                                                                     << 13;
  // inf and NaN keep exponent 255
  uint32_t u = sign | (magnitude >= 0x0f800000 ? magnitude | 0x7f800000 : magnitude);
  float f;
  std::memcpy(&f, &u, 4);
  // 2^112 moves the exponent bias from 15 to 127, subnormals too
  return magnitude >= 0x0f800000 ? f : f * 0x1p112f;
}

inline VF load(const Float16* p) {
#if FASTTAX_ISA == 512
  return (VF)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif FASTTAX_ISA == 256
  return (VF)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  VF v;
  for (int i = 0; i < kLanes; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}

// Two vectors at once, the 2 * kLanes entries from p in an order of the type's own, which
// store_pair puts back: bfloat16 takes those of even and of odd place, one instruction each.
template <class T>
inline void load_pair(const T* p, VF& a, VF& b) {
  a = load(p);
  b = load(p + kLanes);
}
inline void load_pair(const BFloat16* p, VF& a, VF& b) {
  VU both;
  std::memcpy(&both, p, sizeof both);
  a = (VF)(both << 16);
  b = (VF)(both & 0xffff0000u);
}

// Fetches what a loop reads `bytes` at a time 1 KB before it gets there. The processor's own
// streams stop at every 4 KB page and arithmetic fills its window before the next miss is
// seen: 17.1 -> 13.5 ns for 16 float32 cells of a row pair on Cascade Lake, where reading them
// takes 10.
static const int64_t kUpwards = fetch_ahead(1024), kDownwards = fetch_ahead(-1024);
constexpr int kIntoL1 = 3, kIntoL2 = 2;
template <int where = kIntoL1>
inline void fetch(const void* p, int64_t bytes, int64_t distance) {
  for (int64_t line = 0; line < bytes; line += 64)
    __builtin_prefetch(static_cast<const char*>(p) + distance + line, 0, where);
}

template <class T>
inline VF load(const T* p, int64_t n, float fill) {  // the first n < kLanes elements
  VF v = splat(fill);
  for (int64_t i = 0; i < n; ++i) v[i] = to_float(p[i]);
  return v;
}

inline void store(float* p, VF v) { std::memcpy(p, &v, sizeof v); }

// to nearest even in the upper half, which is all that counts; a NaN stays one
inline VU round_to_bfloat16(VF v) {
  const VU u = (VU)v;
  return (VU)((v == v) ? (VI)(u + 0x7fff + ((u >> 16) & 1)) : (VI)(u | 0x400000));
}

inline void store(BFloat16* p, VF v) {
  const VU upper = round_to_bfloat16(v) >> 16;
#if FASTTAX_ISA == 512
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16((__m512i)upper));
#else
  const VH h = __builtin_convertvector(upper, VH);
  std::memcpy(p, &h, sizeof h);
#endif
}

inline uint16_t to_half_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  const uint32_t sign = (u >> 16) & 0x8000;
  u &= 0x7fffffff;
  if (u > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (u >= 0x477ff000) return uint16_t(sign | 0x7c00);  // 65520 and above round to infinity
  // below 2^-14: subnormal, rounded by one float addition
  if (u < 0x38800000) {
    float g;
    std::memcpy(&g, &u, 4);
    g += 0.5f;
    std::memcpy(&u, &g, 4);
    return uint16_t(sign | (u - 0x3f000000));
  }
  return uint16_t(sign | ((u - 0x38000000 + 0xfff + ((u >> 13) & 1)) >> 13));
}

inline void store(Float16* p, VF v) {
#if FASTTAX_ISA == 512
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif FASTTAX_ISA == 256
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) p[i].bits = to_half_bits(v[i]);
#endif
}

template <class T>
inline void store_pair(T* p, VF a, VF b) {
  store(p, a);
  store(p + kLanes, b);
}
inline void store_pair(BFloat16* p, VF a, VF b) {
  const VU both = (round_to_bfloat16(a) >> 16) | (round_to_bfloat16(b) & 0xffff0000u);
  std::memcpy(p, &both, sizeof both);
}

template <class T>
inline void store(T* p, VF v, int64_t n) {
  T whole[kLanes];
  store(whole, v);
  std::memcpy(p, whole, size_t(n) * sizeof(T));
}

// Where there is AVX512-BF16: acc + a pair of products in each lane, which are exact.
#if FASTTAX_ISA == 512
#if defined(__clang__)
#define FASTTAX_BF16 \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,avx512bf16")))
#else
#define FASTTAX_BF16 __attribute__((target("avx512bf16")))
#endif
FASTTAX_BF16 inline VF dot_bf16x2(VF row, VF col, VF acc) {
  return (VF)_mm512_dpbf16_ps((__m512)acc, (__m512bh)(__m512i)row, (__m512bh)(__m512i)col);
}
#endif

// Functions.

constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves round(a) in the low bits

// e^z, relative error <= 2.5e-7 (degree-5 minimax on [-ln2/2, ln2/2] with e^0 = 1 exactly, 1.1e-7
// of it); 0 below -104, NaN for NaN. Above 88 it is inf or NaN: a caller that may get there checks
// its frame.
inline VF exp(VF z) {
  z = max_keep_nan(splat(-104.0f), z);
#if FASTTAX_ISA != 512
  z = min_keep_nan(splat(89.0f), z);
#endif
  const VF shifted = fma(z, splat(1.44269504088896341f), splat(kRound));
  const VF n = shifted - kRound;
  VF r = fma(n, splat(-0.693145751953125f), z);
  r = fma(n, splat(-1.42860682030941723e-6f), r);
  VF p = splat(8.312480e-3f);
  p = fma(p, r, splat(4.189055e-2f));
  p = fma(p, r, splat(1.6667116e-1f));
  p = fma(p, r, splat(4.9999229e-1f));
  p = fma(p, r, splat(1.0f));
  p = fma(p, r, splat(1.0f));
#if FASTTAX_ISA == 512
  return (VF)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  const VI exponent = as_int(shifted) - as_int(splat(kRound));
  // two factors, so that results below 2^-126 and above 2^127 come out right
  const VI half = exponent >> 1;
  return p * as_float((half + 127) << 23) * as_float((exponent - half + 127) << 23);
#endif
}

// e^z for z <= 88 where a flush to 0 below -87 is no loss, relative error <= 2.5e-7 + 1.4e-8 |z|,
// e^0 = 1; NaN for NaN, and no meaning above 88. With n = round(32 z / ln 2): 2^(n / 32) from a
// table of 2^(j / 32), whose entries have j << 18 taken off so that one addition of n << 18 puts
// the exponent in, times 2^(rest / 32) to second order. 7 operations less than exp.
inline VF exp_flushed(VF z) {
#if FASTTAX_ISA == 512
  alignas(64) static constexpr uint32_t kTable[32] = {
      0x3f800000, 0x3f7ecd87, 0x3f7daac3, 0x3f7c980f, 0x3f7b95c2, 0x3f7aa43a, 0x3f79c3d3,
      0x3f78f4f0, 0x3f7837f0, 0x3f778d3a, 0x3f76f532, 0x3f767043, 0x3f75fed7, 0x3f75a15b,
      0x3f75583f, 0x3f7523f6, 0x3f7504f3, 0x3f74fbaf, 0x3f7508a4, 0x3f752c4d, 0x3f75672a,
      0x3f75b9be, 0x3f76248c, 0x3f76a81e, 0x3f7744fd, 0x3f77fbb8, 0x3f78ccdf, 0x3f79b907,
      0x3f7ac0c7, 0x3f7be4ba, 0x3f7d257d, 0x3f7e83b3};
  const VF scaled = splat(46.166241308446828f);
  const VF shifted = fma(z, scaled, splat(kRound));
  const VF r = fma(z, scaled, kRound - shifted);
  const VF p = fma(fma(r, splat(2.3459620e-4f), splat(2.16611670e-2f)), r, splat(1.0f));
  const __m512i power = _mm512_permutex2var_epi32(
      _mm512_load_si512(kTable), (__m512i)as_int(shifted), _mm512_load_si512(kTable + 16));
  const VF two_to_n = (VF)_mm512_add_epi32(power, _mm512_slli_epi32((__m512i)as_int(shifted), 18));
  return (VF)_mm512_maskz_mul_ps(_mm512_cmp_ps_mask((__m512)z, _mm512_set1_ps(-87.0f), _CMP_NLT_UQ),
                                 (__m512)p, (__m512)two_to_n);
#else
  return exp(z);
#endif
}

#if FASTTAX_ISA == 512
// Of a table of 32 numbers those whose places are the lowest five bits of each lane.
__attribute__((always_inline)) inline VF pick(const float* table, VI at) {
  return (VF)_mm512_permutex2var_ps((__m512)load(table), (__m512i)at, (__m512)load(table + 16));
}
#endif

// e^-d, e^-d - 1, and f = e^-d - 1 + d, for |d| <= kMostGap, each to 3e-7 of itself however small
// (below -8, to 3e-6):
// with -d = n ln 2 + r, the parts that stand without r (0 for n = 0), and h = e^r - 1 - r by its
// series (degree-6 minimax on [-ln2/2, ln2/2]).
constexpr float kMostGap = 87.0f;
struct ExpRest {
  VF e, rest, f;
};
inline ExpRest exp_rest(VF d) {
  const VF shifted = fma(d, splat(-1.44269504088896341f), splat(kRound));
  const VF n = shifted - kRound;
  const VF r = fma(n, splat(-0.693147180559945f), -d);
  VF p = splat(1.390130945e-3f);
  p = fma(p, r, splat(8.363200058e-3f));
  p = fma(p, r, splat(4.166685410e-2f));
  p = fma(p, r, splat(1.666657696e-1f));
  p = fma(p, r, splat(0.5f));
  const VF r2 = r * r, h = p * r2, grow = fma(p, r2, r);
  const VF power = as_float((as_int(shifted) << 23) + as_int(splat(1.0f)));
  const VF grown = power - 1.0f;
  return {fma(power, grow, power), fma(power, grow, grown),
          fma(power, h, fma(grown, r, fma(n, splat(-0.693147180559945f), grown)))};
}

// ln(a 2^-fewer) + more for a normal and above 0, relative error <= 2e-7 away from 1; `more` is
// what a lacks of its own digits.
__attribute__((always_inline)) inline VF log_normal(VF a, VF fewer, VF more) {
  const VI bits = as_int(a);
  const VI e = (bits - 0x3f3504f3) >> 23;  // mantissa in [sqrt(1/2), sqrt 2)
  const VF f = as_float(bits - (e << 23)) - 1.0f;
  const VF k = __builtin_convertvector(e, VF) - fewer;
  // ln(1+f) = f - f^2/2 + f^3 * P(f): least-squares fit on the mantissa's range
  VF p = splat(7.0376836292e-2f);
  p = fma(p, f, splat(-1.1514610310e-1f));
  p = fma(p, f, splat(1.1676998740e-1f));
  p = fma(p, f, splat(-1.2420140846e-1f));
  p = fma(p, f, splat(1.4249322787e-1f));
  p = fma(p, f, splat(-1.6668057665e-1f));
  p = fma(p, f, splat(2.0000714765e-1f));
  p = fma(p, f, splat(-2.4999993993e-1f));
  p = fma(p, f, splat(3.3333331174e-1f));
  const VF f2 = f * f;
  VF r = fma(p * f, f2, fma(k, splat(-2.12194440e-4f), more));
  r = fma(f2, splat(-0.5f), r) + f;
  return fma(k, splat(0.693359375f), r);
}

// ln a for a > 0 (normal or subnormal); -inf at 0, inf at inf, NaN below 0.
inline VF log(VF a) {
  const VI tiny = a < 1.17549435e-38f;
  const VF scaled = tiny ? a * 8388608.0f : a, fewer = tiny ? splat(23.0f) : splat(0.0f);
  VF r = log_normal(scaled, fewer, splat(0.0f));
  const float inf = std::numeric_limits<float>::infinity();
  r = (a == inf) ? a : r;
  r = (a == 0.0f) ? splat(-inf) : r;
  return ((a < 0.0f) | (a != a)) ? splat(std::numeric_limits<float>::quiet_NaN()) : r;
}

inline VF log1p(VF t) {  // Kahan's correction: exact where 1 + t rounds
  const VF w = t + 1.0f;
  const VF r = log(w) + (t - (w - 1.0f)) / w;
  return ((w == std::numeric_limits<float>::infinity()) | (w == 0.0f)) ? log(w) : r;
}

// tanh z = z + z^3 P(z^2) for |z| <= kTanhMid, relative error <= 8e-8 (P by minimax: 5e-9).
constexpr float kTanhMid = 1.0f;
__attribute__((always_inline)) inline VF tanh_mid(VF z) {
  const VF w = z * z;
  VF p = splat(-3.584518332e-04f);
  p = fma(p, w, splat(2.301363994e-03f));
  p = fma(p, w, splat(-7.946105589e-03f));
  p = fma(p, w, splat(2.148665699e-02f));
  p = fma(p, w, splat(-5.387980250e-02f));
  p = fma(p, w, splat(1.333234457e-01f));
  p = fma(p, w, splat(-3.333329543e-01f));
  return fma(z * w, p, z);
}

// For |z| >= kTanhMid, out of e = e^-2|z|: tanh z = 1 - 2 e / (1 + e), rounded once, and 1 - tanh^2
// z = 4 e / (1 + e)^2, which keeps its digits.
struct TanhHigh {
  VF value, bend;
};
__attribute__((always_inline)) inline TanhHigh tanh_high(VF z) {
  const VF e = exp(abs(z) * -2.0f);
  const VF whole = e + 1.0f, rough = reciprocal(whole);
  const VF share = fma(rough, fma(rough, -whole, splat(1.0f)), rough);
  const VF size = fma(e * -2.0f, share, splat(1.0f));
  const VI sign = as_int(z) & splat_i(int32_t(0x80000000));
  return {as_float((as_int(size) & 0x7fffffff) | sign), e * 4.0f * (share * share)};
}

inline VF tanh(VF z) {
  const VF mid = tanh_mid(z);
  if (all_le(abs(z), splat(kTanhMid))) return mid;
  const VF high = tanh_high(z).value;
  return (abs(z) <= kTanhMid) ? mid : high;
}

// What formulas that know no vectors ask for, on vectors.
struct VectorMath {
  using S = VF;
  using R = float;
  static constexpr bool kVector = true;
  static VF exp(VF a) { return FASTTAX_ISA_NS::exp(a); }
  static VF log(VF a) { return FASTTAX_ISA_NS::log(a); }
  static VF log1p(VF a) { return FASTTAX_ISA_NS::log1p(a); }
  static VF tanh(VF a) { return FASTTAX_ISA_NS::tanh(a); }
  static VF abs(VF a) { return FASTTAX_ISA_NS::abs(a); }
  static VF fma(VF a, VF b, VF c) { return FASTTAX_ISA_NS::fma(a, b, c); }
  // a * b rounded, also where it goes on into a sum: contracted there, it would not cancel against
  // the same product that was rounded before
  static VF product(VF a, VF b) { return fma(a, b, splat(0.0f)); }
  static VF splat(float a) { return FASTTAX_ISA_NS::splat(a); }
  static VF only(bool b, VF v) { return as_float(as_int(v) & splat_i(b ? -1 : 0)); }
  static VF if_lt(VF a, VF b, VF yes, VF no) { return (a < b) ? yes : no; }
  static VF if_le(VF a, VF b, VF yes, VF no) { return (a <= b) ? yes : no; }
  static bool all_le(VF a, VF b) { return FASTTAX_ISA_NS::all_le(a, b); }
  static double total(VF a) { return sum(a); }
};

}  // namespace FASTTAX_ISA_NS
}  // namespace fasttax
