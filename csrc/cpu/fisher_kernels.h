// linear_sqgrad's tile: F[o, i] += sum_n w_n (sum_t D[t, o] A[t, i])^2 with the example's gradient in registers.
//  - A is packed once, by blocks of kCols columns: [block][t][kCols]; D by blocks of kRows rows: [block][t][kRows].
//  - kRows x kCols accumulators in registers run over an example's tokens and are squared into a panel of F, a batch of examples at a
//    time, whose rows of D stay in L2. No per-example gradient reaches memory.
//  - 8 x 3 vectors issue 35 instructions for 24 multiplications, 12 x 2 issue 38; two steps a loop: 6 % and 5 % of the op's time.
//  - bfloat16 on both sides with AVX512-BF16: tokens are packed in pairs, and one instruction multiplies and adds a pair
//    (products exact, sums float32), half the instructions of float32.
namespace fasttax {
namespace FASTTAX_ISA_NS {

#if FASTTAX_ISA == 512
constexpr int kRows = 8, kVectors = 3;  // 24 accumulators + 3 columns of A + broadcast, of 32 registers
#elif FASTTAX_ISA == 256
constexpr int kRows = 6, kVectors = 2;  // 12 + 2 + 1 of 16
#else
constexpr int kRows = 4, kVectors = 2;
#endif
constexpr int64_t kCols = kVectors * kLanes;
constexpr int64_t kFold = 128;  // tokens summed in one run of floats: 16 KB of A in L1; the error grows as sqrt(T / 128) beyond

constexpr int64_t kRowsAhead = 8;

// Columns col.. of src in blocks of `width`, each [step][width] and `block_size` floats from the next, padded with zeros. A block
// narrower than a vector is one load and one store, whose excess the next step overwrites (blocks are kLanes floats apart or more).
// Steps outside, blocks inside: a row of src is read as it lies.
template <class T>
inline void pack(const T* src, int64_t row_stride, int64_t tokens, int64_t col, int64_t total, int64_t blocks, int64_t width, bool square,
                 const float* weights, float* out, int64_t block_size) {
  for (int64_t t = 0; t < tokens; ++t) {
    const T* row = src + t * row_stride;
    const float weight = weights ? weights[t] : 1.0f;
    for (int64_t at = col; at < std::min(total, col + blocks * width); at += 64 / int64_t(sizeof(T)))
      __builtin_prefetch(row + kRowsAhead * row_stride + at);  // rows lie a page apart, where no hardware stream follows
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
          VU pair = widen_halves(row + first + j);
          if (both) pair |= widen_halves(row + row_stride + first + j) << 16;
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
  _Pragma("GCC unroll 2") for (int64_t t = 0; t < steps; ++t) {                                                                         \
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

constexpr int64_t kTile = kRows * kCols;

// The squares of a batch's examples in one column block, for all of its row blocks, added to `panel` [block][kRows][kCols]. Row blocks
// inside: an example's kFold x kCols of A stay in L1 while all rows meet them. gathered: as panel, for examples longer than kFold.
inline void fisher_column(const FisherBatch& x, const float* a, const float* next, float* panel, float* gathered) {
  const int64_t fold = x.pairs ? kFold / 2 : kFold, stop = x.starts[x.last];
  for (int64_t n = x.first; n < x.last; ++n) {
    const int64_t begin = x.starts[n], end = x.starts[n + 1];
    const bool split = end - begin > fold;
    const float weight = x.weights ? x.weights[n] : 1.0f;
    if (split) std::fill(gathered, gathered + x.blocks * kTile, 0.0f);
    for (int64_t t = begin; t < end; t += fold) {
      const int64_t steps = std::min(fold, end - t);
      const bool whole = t + steps == end;
      const Leave how = !whole ? Leave::kAdd : split ? Leave::kSquareSum : Leave::kSquare;
      float* const to = whole ? panel : gathered;
      const float* then = t + steps < stop ? a + (t + steps) * kCols : next;
      for (int64_t b = 0; b < x.blocks; ++b) {
        const float* mine = x.d + b * x.d_stride + (t - x.starts[x.first]) * kRows;
        const float* ahead = b < 2 ? then + b * steps * kLanes : mine + x.d_stride;
#if FASTTAX_ISA == 512
        if (x.pairs) {
          run_pairs(a + t * kCols, mine, ahead, steps, how, weight, gathered + b * kTile, to + b * kTile);
          continue;
        }
#endif
        run_floats(a + t * kCols, mine, ahead, steps, how, weight, gathered + b * kTile, to + b * kTile);
      }
    }
  }
}

// T = 1: a and d hold squares, whose products are added up over all steps.
inline void fisher_squares(const FisherBatch& x, const float* a, const float* next, float* panel) {
  const int64_t begin = x.starts[x.first], end = x.starts[x.last];
  for (int64_t t = begin; t < end; t += kFold) {
    const int64_t steps = std::min(kFold, end - t);
    const float* then = t + steps < end ? a + (t + steps) * kCols : next;
    for (int64_t b = 0; b < x.blocks; ++b) {
      const float* mine = x.d + b * x.d_stride + (t - begin) * kRows;
      const float* ahead = b < 2 ? then + b * steps * kLanes : mine + x.d_stride;
      run_floats(a + t * kCols, mine, ahead, steps, Leave::kAdd, 1.0f, nullptr, panel + b * kTile);
    }
  }
}

// One batch in column blocks [from, to), whose panels (`blocks` tiles each) lie side by side.
inline void fisher_batch(const FisherBatch& x, bool squares, int64_t from, int64_t to, float* panels, float* gathered) {
  for (int64_t c = from; c < to; ++c, panels += x.blocks * kTile) {
    const float *a = x.a + c * x.a_stride, *next = x.a + (c + 1 < to ? c + 1 : from) * x.a_stride + x.starts[x.first] * kCols;
    if (squares) fisher_squares(x, a, next, panels);
    else fisher_column(x, a, next, panels, gathered);
  }
}

// F (rows, total) in column blocks [from, to) plus their panels of `blocks` tiles: read and written once a call.
inline void fisher_add(const float* panels, int64_t blocks, int64_t from, int64_t to, float* f, int64_t rows, int64_t total) {
  for (int64_t c = from; c < to; ++c, panels += blocks * kTile)
    for (int64_t r = 0; r < rows; ++r) {
      const float* p = panels + r * kCols;
      float* row = f + r * total + c * kCols;
      const int64_t cols = std::min(kCols, total - c * kCols);
      int64_t j = 0;
      for (; j + kLanes <= cols; j += kLanes) store(row + j, load(row + j) + load(p + j));
      for (; j < cols; ++j) row[j] += p[j];
    }
}

inline int64_t tile_rows() { return kRows; }
inline int64_t tile_cols() { return kCols; }

}  // namespace FASTTAX_ISA_NS
}  // namespace fasttax
