// linear_sqgrad's tile: F[o, i] += sum_n w_n (sum_t D[t, o] A[t, i])^2 with the example's gradient in registers.
//  - A is packed once, by blocks of kCols columns: [block][t][kCols]; D by blocks of kRows rows: [block][t][kRows].
//  - kRows x kCols accumulators in registers run over an example's tokens and are squared into F, whose panel stays in
//    L1 over all examples. No per-example gradient reaches memory.
//  - bfloat16 on both sides with AVX512-BF16: tokens are packed in pairs, and one instruction multiplies and adds a pair
//    (products exact, sums float32), half the instructions of float32.
namespace fasttax {
namespace FASTTAX_ISA_NS {

#if FASTTAX_ISA == 512
constexpr int kRows = 12, kVectors = 2;  // 24 accumulators + 2 columns of A + broadcast, of 32 registers
#elif FASTTAX_ISA == 256
constexpr int kRows = 6, kVectors = 2;  // 12 + 2 + 1 of 16
#else
constexpr int kRows = 4, kVectors = 2;
#endif
constexpr int kCols = kVectors * kLanes;
constexpr int64_t kFold = 128;  // tokens summed in one run of floats: 16 KB of A in L1; the error grows as sqrt(T / 128) beyond

// Columns col.. of src in blocks of `width`, each [step][width] and `block_size` floats from the next, padded with zeros. A block
// narrower than a vector is one load and one store, whose excess the next step overwrites (blocks are kLanes floats apart or more).
// Steps outside, blocks inside: a row of src is read as it lies.
template <class T>
inline void pack(const T* src, int64_t row_stride, int64_t tokens, int64_t col, int64_t total, int64_t blocks, int64_t width, bool square,
                 const float* weights, float* out, int64_t block_size) {
  for (int64_t t = 0; t < tokens; ++t) {
    const T* row = src + t * row_stride;
    const float weight = weights ? weights[t] : 1.0f;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t first = col + b * width, cols = std::min(width, total - first), reach = cols == width ? total - first : cols;
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

// A step is a pair of tokens, (token, next) in one 32-bit word; an example of odd length ends with a zero for its partner.
inline void pack_pairs(const uint16_t* src, int64_t row_stride, const int64_t* starts, int64_t examples, int64_t col, int64_t total,
                       int64_t blocks, int64_t width, uint32_t* out, int64_t block_size) {
  for (int64_t n = 0; n < examples; ++n)
    for (int64_t t = starts[n]; t < starts[n + 1]; t += 2, out += width) {
      const uint16_t* row = src + t * row_stride;
      const bool both = t + 1 < starts[n + 1];
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t first = col + b * width, cols = std::min(width, total - first), reach = cols == width ? total - first : cols;
        uint32_t* dst = out + b * block_size;
        int64_t j = 0;
        for (; j < cols && j + kLanes <= reach; j += kLanes) {
          VH low, high = {};
          std::memcpy(&low, row + first + j, sizeof low);
          if (both) std::memcpy(&high, row + row_stride + first + j, sizeof high);
          const VU pair = __builtin_convertvector(low, VU) | (__builtin_convertvector(high, VU) << 16);
          std::memcpy(dst + j, &pair, sizeof pair);
        }
        for (; j < cols; ++j) dst[j] = row[first + j] | (both ? uint32_t(row[row_stride + first + j]) << 16 : 0);
        for (; j < width; ++j) dst[j] = 0;
      }
    }
}

inline void pack_blocks(LogitType type, const void* src, int64_t row_stride, int64_t tokens, int64_t col, int64_t total, int64_t blocks,
                        int64_t width, bool square, const float* weights, float* out, int64_t block_size) {
  switch (type) {
    case LogitType::kBFloat16:
      pack(static_cast<const BFloat16*>(src), row_stride, tokens, col, total, blocks, width, square, weights, out, block_size);
      break;
    case LogitType::kFloat16:
      pack(static_cast<const Float16*>(src), row_stride, tokens, col, total, blocks, width, square, weights, out, block_size);
      break;
    default: pack(static_cast<const float*>(src), row_stride, tokens, col, total, blocks, width, square, weights, out, block_size); break;
  }
}

// acc = sum over `steps` of d[step][kRows] (x) a[step][kCols]; a step is a token, or with dot_pairs a pair of bfloat16 tokens.
// `ahead` is fetched, a cache line a step: what comes next lies in L3, and its lines are two for each step of 24 multiplications.
#define FASTTAX_RUN(STEP)                                                                                                               \
  _Pragma("GCC unroll 16") for (int r = 0; r < kRows; ++r) _Pragma("GCC unroll 4") for (int v = 0; v < kVectors; ++v) acc[r][v] = VF{}; \
  for (int64_t t = 0; t < steps; ++t) {                                                                                                 \
    __builtin_prefetch(ahead + t * 16, 0, 2);                                                                                           \
    VF col[kVectors];                                                                                                                   \
    for (int v = 0; v < kVectors; ++v) col[v] = load(a + t * kCols + v * kLanes);                                                       \
    _Pragma("GCC unroll 16") for (int r = 0; r < kRows; ++r) {                                                                          \
      const VF row = splat(d[t * kRows + r]);                                                                                           \
      _Pragma("GCC unroll 4") for (int v = 0; v < kVectors; ++v) acc[r][v] = STEP(row, col[v], acc[r][v]);                              \
    }                                                                                                                                   \
  }

enum class Leave { kAdd, kSquare, kSquareSum };

// What becomes of a run: added to `sum`, squared into it, or added to `before` and then squared into it. Unrolled, or the
// accumulators would go through memory: half the time of a run of 16 tokens.
template <Leave how>
inline void leave(VF (&acc)[kRows][kVectors], float weight, const float* before, float* sum) {
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const int at = r * kCols + v * kLanes;
      VF g = acc[r][v];
      if (how == Leave::kSquareSum) g += load(before + at);
      store(sum + at, how == Leave::kAdd ? load(sum + at) + g : fma(g * weight, g, load(sum + at)));
    }
}

#define FASTTAX_LEAVE                                                         \
  if (how == Leave::kSquare) leave<Leave::kSquare>(acc, weight, before, sum); \
  else if (how == Leave::kAdd) leave<Leave::kAdd>(acc, weight, before, sum);  \
  else leave<Leave::kSquareSum>(acc, weight, before, sum);

inline void run_floats(const float* a, const float* d, const float* ahead, int64_t steps, Leave how, float weight, const float* before,
                       float* sum) {
  VF acc[kRows][kVectors];
  FASTTAX_RUN(fma)
  FASTTAX_LEAVE
}

#if FASTTAX_ISA == 512
#if defined(__clang__)
#define FASTTAX_BF16 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,avx512bf16")))
#else
#define FASTTAX_BF16 __attribute__((target("avx512bf16")))
#endif
FASTTAX_BF16 inline VF dot_pairs(VF row, VF col, VF acc) {
  return (VF)_mm512_dpbf16_ps((__m512)acc, (__m512bh)(__m512i)row, (__m512bh)(__m512i)col);
}

FASTTAX_BF16 inline void run_pairs(const float* a, const float* d, const float* ahead, int64_t steps, Leave how, float weight,
                                   const float* before, float* sum) {
  VF acc[kRows][kVectors];
  FASTTAX_RUN(dot_pairs)
  FASTTAX_LEAVE
}
#undef FASTTAX_BF16
#endif
#undef FASTTAX_RUN
#undef FASTTAX_LEAVE

// One column block of F against a group of row blocks. a: [step][kCols]; d: [block][step][kRows], `d_stride` floats a block.
// Examples outside, row blocks inside: an example's kFold x kCols of A stay in L1 while all of the group's rows meet them.
// `panel` and `gathered` ([rows][kCols], the latter for examples longer than kFold) stay in L1 too; F (rows, cols), whose rows
// are `stride` apart, is read and written once.
inline void fisher_panel(const float* a, const float* d, int64_t d_stride, const int64_t* starts, int64_t examples, const float* weights,
                         bool squares, bool pairs, float* f, int64_t stride, int64_t rows, int64_t cols, float* panel, float* gathered) {
  constexpr int64_t kTile = kRows * kCols;
  const int64_t blocks = (rows + kRows - 1) / kRows, fold = pairs ? kFold / 2 : kFold;
  std::fill(panel, panel + blocks * kTile, 0.0f);
  for (int64_t n = 0; n < examples; ++n) {
    const int64_t begin = starts[n], end = squares ? starts[examples] : starts[n + 1];
    const bool split = !squares && end - begin > fold;
    const float weight = weights ? weights[n] : 1.0f;
    if (split) std::fill(gathered, gathered + blocks * kTile, 0.0f);
    for (int64_t t = begin; t < end; t += fold) {
      const int64_t steps = std::min(fold, end - t);
      const bool last = t + steps == end;
      const Leave how = squares || !last ? Leave::kAdd : split ? Leave::kSquareSum : Leave::kSquare;
      float* const to = split && !last ? gathered : panel;
      for (int64_t b = 0; b < blocks; ++b) {
        const float* mine = d + b * d_stride + t * kRows;
        const float* ahead = b < 2 ? a + (t + steps) * kCols + b * steps * kLanes : mine + d_stride;
#if FASTTAX_ISA == 512
        if (pairs) {
          run_pairs(a + t * kCols, mine, ahead, steps, how, weight, gathered + b * kTile, to + b * kTile);
          continue;
        }
#endif
        run_floats(a + t * kCols, mine, ahead, steps, how, weight, gathered + b * kTile, to + b * kTile);
      }
    }
    if (squares) break;
  }
  for (int64_t r = 0; r < rows; ++r, f += stride, panel += kCols) {
    int64_t j = 0;
    for (; j + kLanes <= cols; j += kLanes) store(f + j, load(f + j) + load(panel + j));
    for (; j < cols; ++j) f[j] += panel[j];
  }
}

inline int64_t tile_rows() { return kRows; }
inline int64_t tile_cols() { return kCols; }

}  // namespace FASTTAX_ISA_NS
}  // namespace fasttax
