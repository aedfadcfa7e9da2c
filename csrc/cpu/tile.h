// A tile of a product, kRows x kCols sums in registers, and the packing that it wants: what
// linear_sqgrad and gemm are made of.
//  - 8 x 3 vectors issue 35 instructions for 24 multiplications, 12 x 2 issue 38; two steps a loop:
//  6 % and 5 % of an op's time.
//  - bfloat16 with AVX512-BF16: steps are pairs of tokens, and one instruction multiplies and adds
//  a pair (products exact, sums float32),
//    half the instructions of float32.
#include <algorithm>

#include "rows.h"

#if defined(FASTTAX_ISA)  // isa.h: once per instruction set
namespace fasttax {
namespace FASTTAX_ISA_NS {

#if FASTTAX_ISA == 512
// 24 accumulators + 3 columns of A + broadcast, of 32 registers
constexpr int kRows = 8, kVectors = 3;
#elif FASTTAX_ISA == 256
constexpr int kRows = 6, kVectors = 2;  // 12 + 2 + 1 of 16
#else
constexpr int kRows = 4, kVectors = 2;
#endif
constexpr int64_t kCols = kVectors * kLanes;
// tokens summed in one run of floats: 16 KB of A in L1; the error grows as sqrt(T / 128) beyond
constexpr int64_t kFold = 128;

constexpr int64_t kRowsAhead = 8;

// Columns col.. of src in blocks of `width`, each [step][width] and `block_size` floats from the
// next, padded with zeros. A block narrower than a vector is one load and one store, whose excess
// the next step overwrites (blocks are kLanes floats apart or more). Steps outside, blocks inside:
// a row of src is read as it lies.
template <class T>
inline void pack(const T* src, int64_t row_stride, int64_t tokens, int64_t col, int64_t total,
                 int64_t blocks, int64_t width, bool square, const float* weights, float* out,
                 int64_t block_size) {
  for (int64_t t = 0; t < tokens; ++t) {
    const T* row = src + t * row_stride;
    const float weight = weights ? weights[t] : 1.0f;
    // rows lie a page apart, where no hardware stream follows
    for (int64_t at = col; at < std::min(total, col + blocks * width);
         at += 64 / int64_t(sizeof(T)))
      __builtin_prefetch(row + kRowsAhead * row_stride + at);
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t first = col + b * width, cols = std::min(width, total - first),
                    reach = cols == width ? total - first : cols;
      float* dst = out + b * block_size + t * width;
      int64_t j = 0;
      for (; j < cols && j + kLanes <= reach; j += kLanes) {
        const VF v = load(row + first + j);
        store(dst + j, square ? v * v * weight : v);
      }
      for (; j < cols; ++j) {
        const float v = to_float(row[first + j]);
        dst[j] = square ? v * v * weight : v;
      }
      for (; j < width; ++j) dst[j] = 0;
    }
  }
}

// A step is a pair of tokens, (token, next) in one 32-bit word; an example of odd length ends with
// a zero for its partner.
inline void pack_bf16x2(const BFloat16* src, int64_t row_stride, const int64_t* starts,
                        int64_t examples, int64_t col, int64_t total, int64_t blocks, int64_t width,
                        uint32_t* out, int64_t block_size) {
  for (int64_t n = 0; n < examples; ++n)
    for (int64_t t = starts[n]; t < starts[n + 1]; t += 2, out += width) {
      const BFloat16* row = src + t * row_stride;
      const bool both = t + 1 < starts[n + 1];
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t first = col + b * width, cols = std::min(width, total - first),
                      reach = cols == width ? total - first : cols;
        uint32_t* dst = out + b * block_size;
        int64_t j = 0;
        for (; j < cols && j + kLanes <= reach; j += kLanes) {
          VU pair = widen_halves(row + first + j);
          if (both) pair |= widen_halves(row + row_stride + first + j) << 16;
          std::memcpy(dst + j, &pair, sizeof pair);
        }
        for (; j < cols; ++j)
          dst[j] =
              row[first + j].bits | (both ? uint32_t(row[row_stride + first + j].bits) << 16 : 0);
        for (; j < width; ++j) dst[j] = 0;
      }
    }
}

// Of the examples that begin at `starts`; tokens' rows of `type`, or pairs of bfloat16 rows.
inline void pack_examples(FloatType type, bool bf16x2, const void* src, int64_t row_stride,
                          const int64_t* starts, int64_t examples, int64_t col, int64_t total,
                          int64_t blocks, int64_t width, float* out, int64_t block_size) {
  const int64_t begin = starts[0], tokens = starts[examples] - begin;
  if (bf16x2)
    pack_bf16x2(static_cast<const BFloat16*>(src), row_stride, starts, examples, col, total, blocks,
                width, reinterpret_cast<uint32_t*>(out), block_size);
  else
    typed(type, src, [&](auto* p) {
      pack(p + begin * row_stride, row_stride, tokens, col, total, blocks, width, false, nullptr,
           out, block_size);
    });
}

// acc = sum over `steps` of d[step][kRows] (x) a[step][kCols]; a step is a token, or with
// dot_bf16x2 a pair of bfloat16 tokens. `ahead` is fetched, a cache line a step: what comes next
// lies in L3, and its lines are two for each step of 24 multiplications.
#define FASTTAX_RUN(STEP)                                                          \
  _Pragma("GCC unroll 16") for (int r = 0; r < kRows; ++r)                         \
      _Pragma("GCC unroll 4") for (int v = 0; v < kVectors; ++v) acc[r][v] = VF{}; \
  _Pragma("GCC unroll 2") for (int64_t t = 0; t < steps; ++t) {                    \
    __builtin_prefetch(ahead + t * 16, 0, 2);                                      \
    VF col[kVectors];                                                              \
    for (int v = 0; v < kVectors; ++v) col[v] = load(a + t * kCols + v * kLanes);  \
    _Pragma("GCC unroll 16") for (int r = 0; r < kRows; ++r) {                     \
      const VF row = splat(d[t * kRows + r]);                                      \
      _Pragma("GCC unroll 4") for (int v = 0; v < kVectors; ++v) acc[r][v] =       \
          STEP(row, col[v], acc[r][v]);                                            \
    }                                                                              \
  }

enum class Leave { kWrite, kAdd, kSquare, kSquareSum };

// What becomes of a run: written to `sum` (whose rows are `stride` apart), added to it, squared
// into it, or added to `before` and then squared into it. Unrolled, or the accumulators would go
// through memory: half the time of a run of 16 tokens.
template <Leave how>
inline void leave(VF (&acc)[kRows][kVectors], float weight, const float* before, float* sum,
                  int64_t stride) {
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      float* to = sum + r * stride + v * kLanes;
      VF g = acc[r][v];
      if (how == Leave::kSquareSum) g += load(before + r * kCols + v * kLanes);
      if (how == Leave::kWrite) store(to, g);
      else store(to, how == Leave::kAdd ? load(to) + g : fma(g * weight, g, load(to)));
    }
}

#define FASTTAX_LEAVE                                                                    \
  switch (how) {                                                                         \
    case Leave::kWrite: leave<Leave::kWrite>(acc, weight, before, sum, stride); break;   \
    case Leave::kAdd: leave<Leave::kAdd>(acc, weight, before, sum, stride); break;       \
    case Leave::kSquare: leave<Leave::kSquare>(acc, weight, before, sum, stride); break; \
    case Leave::kSquareSum: leave<Leave::kSquareSum>(acc, weight, before, sum, stride);  \
  }

inline void run_floats(const float* a, const float* d, const float* ahead, int64_t steps, Leave how,
                       float weight, const float* before, float* sum, int64_t stride = kCols) {
  VF acc[kRows][kVectors];
  FASTTAX_RUN(fma)
  FASTTAX_LEAVE
}

#if FASTTAX_ISA == 512
FASTTAX_BF16 inline void run_bf16x2(const float* a, const float* d, const float* ahead,
                                    int64_t steps, Leave how, float weight, const float* before,
                                    float* sum, int64_t stride = kCols) {
  VF acc[kRows][kVectors];
  FASTTAX_RUN(dot_bf16x2)
  FASTTAX_LEAVE
}
#endif
#undef FASTTAX_RUN
#undef FASTTAX_LEAVE

constexpr int64_t kTile = kRows * kCols;
inline int64_t tile_rows() { return kRows; }
inline int64_t tile_cols() { return kCols; }

}  // namespace FASTTAX_ISA_NS
}  // namespace fasttax
#endif
