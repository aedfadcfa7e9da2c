// linear_sqgrad's tile: F[o, i] += sum_n w_n (sum_t D[t, o] A[t, i])^2 with the example's gradient in registers.
//  - A is packed once, by blocks of kCols columns: [block][t][kCols]; D by blocks of kRows rows: [block][t][kRows].
//  - A tile runs over all examples before it leaves: kRows x kCols accumulators in registers, squared into a tile of
//    F in L1 at the end of each example. No per-example gradient reaches memory.
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
constexpr int64_t kFold = 256;  // tokens summed in one run of floats; longer examples add runs, so the error grows as sqrt(T / 256)

template <class T>
inline void pack(const T* src, int64_t row_stride, int64_t t, int64_t col, int64_t cols, int64_t width, bool square, float weight,
                 float* dst) {
  // one token: src[t, col : col + cols], padded with zeros to `width`
  const T* row = src + t * row_stride + col;
  int64_t j = 0;
  for (; j + kLanes <= cols; j += kLanes) {
    const VF v = load(row + j);
    store(dst + j, square ? v * v * weight : v * weight);
  }
  for (; j < cols; ++j) {
    const float v = to_float(row[j]);
    dst[j] = square ? v * v * weight : v * weight;
  }
  for (; j < width; ++j) dst[j] = 0;
}

inline void pack_block(LogitType type, const void* src, int64_t row_stride, int64_t tokens, int64_t col, int64_t cols, int64_t width,
                       bool square, const float* weights, float* dst) {
  for (int64_t t = 0; t < tokens; ++t, dst += width) {
    const float w = weights ? weights[t] : 1.0f;
    switch (type) {
      case LogitType::kBFloat16: pack(static_cast<const BFloat16*>(src), row_stride, t, col, cols, width, square, w, dst); break;
      case LogitType::kFloat16: pack(static_cast<const Float16*>(src), row_stride, t, col, cols, width, square, w, dst); break;
      default: pack(static_cast<const float*>(src), row_stride, t, col, cols, width, square, w, dst); break;
    }
  }
}

// a: [tokens][kCols], d: [tokens][kRows], tile: [kRows][kCols]. `squares`: the operands are squared already (examples
// of one token each), so the sum over tokens is the answer and one pass over all of them will do.
inline void fisher_tile(const float* a, const float* d, const int64_t* starts, int64_t examples, const float* weights, bool squares,
                        float* tile) {
  for (int64_t n = 0; n < examples; ++n) {
    const int64_t begin = starts[n], end = squares ? starts[examples] : starts[n + 1];
    const bool split = end - begin > kFold;
    float folded[kRows * kCols];
    if (split) std::fill(folded, folded + kRows * kCols, 0.0f);
    VF acc[kRows][kVectors] = {};
    for (int64_t t = begin; t < end;) {
      const int64_t stop = std::min(end, t + kFold);
      for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < kVectors; ++v) acc[r][v] = VF{};
      for (; t < stop; ++t) {
        VF col[kVectors];
        for (int v = 0; v < kVectors; ++v) col[v] = load(a + t * kCols + v * kLanes);
        for (int r = 0; r < kRows; ++r) {
          const VF row = splat(d[t * kRows + r]);
          for (int v = 0; v < kVectors; ++v) acc[r][v] = fma(row, col[v], acc[r][v]);
        }
      }
      if (split)
        for (int r = 0; r < kRows; ++r)
          for (int v = 0; v < kVectors; ++v) {
            float* f = folded + r * kCols + v * kLanes;
            acc[r][v] += load(f);
            store(f, acc[r][v]);
          }
    }
    const float w = weights ? weights[n] : 1.0f;
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kVectors; ++v) {
        float* f = tile + r * kCols + v * kLanes;
        store(f, squares ? load(f) + acc[r][v] : fma(acc[r][v] * w, acc[r][v], load(f)));
      }
    if (squares) break;
  }
}

inline int64_t tile_rows() { return kRows; }
inline int64_t tile_cols() { return kCols; }

}  // namespace FASTTAX_ISA_NS
}  // namespace fasttax
