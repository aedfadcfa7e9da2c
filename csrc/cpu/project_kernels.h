// Logits out of hidden states, out[t, v] = sum_h hidden[t, h] weight[v, h]. The head is read once and as it lies: its entries are
// broadcast, and the lanes are tokens, whose hidden states (few) are packed [h][token] once a call. A GEMM packs the head for every call
// instead: a third of its time at 88 tokens.
namespace fasttax {
namespace FASTTAX_ISA_NS {

#if FASTTAX_ISA == 512
constexpr int kWords = 8, kVectors = 3;  // 24 accumulators + 3 of tokens + broadcast, of 32 registers
#elif FASTTAX_ISA == 256
constexpr int kWords = 6, kVectors = 2;
#else
constexpr int kWords = 4, kVectors = 2;
#endif
constexpr int64_t kTokens = kVectors * kLanes, kUnit = 2 * kWords;  // words whose logits are turned and written together: a cache line
constexpr int64_t kFold = 256;                                      // products summed in one run of floats

template <class T>
inline void widen_row(const T* src, int64_t n, float* dst) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(dst + i, load(src + i));
  for (; i < n; ++i) dst[i] = to_float(src[i]);
}

inline void widen_row_of(LogitType type, const void* src, int64_t first, int64_t n, float* dst) {
  switch (type) {
    case LogitType::kBFloat16: widen_row(static_cast<const BFloat16*>(src) + first, n, dst); break;
    case LogitType::kFloat16: widen_row(static_cast<const Float16*>(src) + first, n, dst); break;
    default: std::memcpy(dst, static_cast<const float*>(src) + first, size_t(n) * sizeof(float));
  }
}

// x [block of kTokens][depth][width], zeros beyond the last token; width is kTokens, for the last block as many vectors as it needs.
inline int64_t block_width(int64_t tokens, int64_t first) { return std::min(kTokens, (tokens - first + kLanes - 1) / kLanes * kLanes); }

inline void pack_tokens(LogitType type, const void* hidden, int64_t stride, int64_t tokens, int64_t depth, float* x) {
  std::vector<float> row(size_t(depth), 0.0f);
  for (int64_t first = 0; first < tokens; first += kTokens) {
    const int64_t width = block_width(tokens, first);
    for (int64_t t = 0; t < width; ++t) {
      if (first + t < tokens) widen_row_of(type, hidden, (first + t) * stride, depth, row.data());
      else std::fill(row.begin(), row.end(), 0.0f);
      for (int64_t h = 0; h < depth; ++h) x[first * depth + h * width + t] = row[size_t(h)];
    }
  }
}

// sum[kWords][vectors * kLanes] = or += the products of `steps` columns of kWords rows of the head. `next`: rows that will be needed, half
// a line a step.
template <int vectors>
inline void project_run(const float* words, int64_t stride, const float* x, const float* next, int64_t steps, bool add, float* sum) {
  VF acc[kWords][vectors];
#pragma GCC unroll 16
  for (int w = 0; w < kWords; ++w)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) acc[w][v] = VF{};
#pragma GCC unroll 2
  for (int64_t h = 0; h < steps; ++h) {
    __builtin_prefetch(next + h * 8, 0, 2);
    VF token[vectors];
    for (int v = 0; v < vectors; ++v) token[v] = load(x + h * vectors * kLanes + v * kLanes);
#pragma GCC unroll 16
    for (int w = 0; w < kWords; ++w) {
      const VF word = splat(words[w * stride + h]);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) acc[w][v] = fma(word, token[v], acc[w][v]);
    }
  }
#pragma GCC unroll 16
  for (int w = 0; w < kWords; ++w)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      float* to = sum + w * vectors * kLanes + v * kLanes;
      store(to, add ? load(to) + acc[w][v] : acc[w][v]);
    }
}

inline void project_run_of(int64_t width, const float* words, int64_t stride, const float* x, const float* next, int64_t steps, bool add,
                           float* sum) {
  switch (width / kLanes) {
    case 1: project_run<1>(words, stride, x, next, steps, add, sum); break;
    case 2: project_run<2>(words, stride, x, next, steps, add, sum); break;
    default: project_run<kVectors>(words, stride, x, next, steps, add, sum);
  }
}

// Logits of the words [first, last). scratch: kUnit rows of `depth`, for those that do not lie as whole float32 units.
inline void project_words(LogitType type, const void* weight, int64_t weight_stride, const float* x, int64_t tokens, int64_t depth,
                          int64_t first, int64_t last, float* out, int64_t out_stride, float* scratch) {
  alignas(64) float sum[kUnit * kTokens];
  for (int64_t v = first; v < last; v += kUnit) {
    const int64_t words = std::min(kUnit, last - v);
    const float* rows = static_cast<const float*>(weight) + v * weight_stride;
    int64_t stride = weight_stride;
    const bool in_place = type == LogitType::kFloat && words == kUnit;
    if (!in_place) {
      for (int64_t w = 0; w < kUnit; ++w)
        if (w < words) widen_row_of(type, weight, (v + w) * weight_stride, depth, scratch + w * depth);
        else std::fill(scratch + w * depth, scratch + (w + 1) * depth, 0.0f);
      rows = scratch;
      stride = depth;
    }
    for (int64_t t0 = 0; t0 < tokens; t0 += kTokens) {
      const int64_t width = block_width(tokens, t0);
      for (int64_t w = 0; w < kUnit; w += kWords)
        for (int64_t h = 0; h < depth; h += kFold) {
          const float* mine = rows + w * stride + h;
          const float* next = in_place && t0 == 0 && v + 2 * kUnit <= last ? mine + kUnit * stride : mine;
          project_run_of(width, mine, stride, x + t0 * depth + h * width, next, std::min(kFold, depth - h), h > 0, sum + w * width);
        }
      const int64_t count = std::min(width, tokens - t0);
      for (int64_t t = 0; t < count; ++t) {
        float* to = out + (t0 + t) * out_stride + v;
        for (int64_t w = 0; w < words; ++w) to[w] = sum[w * width + t];
      }
    }
  }
}

inline int64_t token_lanes() { return kLanes; }
inline int64_t word_unit() { return kUnit; }

}  // namespace FASTTAX_ISA_NS
}  // namespace fasttax
