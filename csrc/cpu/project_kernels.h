// Logits out of hidden states, out[t, v] = sum_h hidden[t, h] weight[v, h]. The head is read once
// and as it lies: its entries are broadcast, and the lanes are tokens, whose hidden states (few)
// are packed [h][token] once a call. A GEMM packs the head for every call instead: a third of its
// time at 88 tokens.
#include <vector>

#include "rows.h"

#if defined(FASTTAX_ISA)  // isa.h: once per instruction set
namespace fasttax {
namespace FASTTAX_ISA_NS {

#if FASTTAX_ISA == 512
// 24 accumulators + 3 of tokens + broadcast, of 32 registers
constexpr int kWords = 8, kVectors = 3;
#elif FASTTAX_ISA == 256
constexpr int kWords = 6, kVectors = 2;
#else
constexpr int kWords = 4, kVectors = 2;
#endif
// words whose logits are turned and written together: a cache line
constexpr int64_t kTokens = kVectors * kLanes, kUnit = 2 * kWords;
// products summed in one run of floats
constexpr int64_t kFold = 256;

inline int64_t project_steps(bool bf16x2, int64_t depth) {
  return bf16x2 ? (depth + 1) / 2 : depth;
}

// A row of hidden states or of the head as words: products' floats, or pairs of bfloat16.
inline void words_of(FloatType type, bool bf16x2, const void* src, int64_t first, int64_t depth,
                     float* dst) {
  if (bf16x2) bf16x2_of(static_cast<const BFloat16*>(src) + first, depth, dst);
  else typed(type, src, [&](auto* p) { widen_row(p + first, depth, dst); });
}

// x [block of kTokens][steps][width], a step one product or, of bfloat16, a pair; zeros beyond the
// last token; width is kTokens, for the last block as many vectors as it needs.
inline int64_t block_width(int64_t tokens, int64_t first) {
  return std::min(kTokens, (tokens - first + kLanes - 1) / kLanes * kLanes);
}

inline void pack_tokens(FloatType type, bool bf16x2, const void* hidden, int64_t stride,
                        int64_t tokens, int64_t depth, float* x) {
  const int64_t steps = project_steps(bf16x2, depth);
  std::vector<float> row(size_t(steps), 0.0f);
  for (int64_t first = 0; first < tokens; first += kTokens) {
    const int64_t width = block_width(tokens, first);
    for (int64_t t = 0; t < width; ++t) {
      if (first + t >= tokens) std::fill(row.begin(), row.end(), 0.0f);
      else words_of(type, bf16x2, hidden, (first + t) * stride, depth, row.data());
      for (int64_t h = 0; h < steps; ++h)
        std::memcpy(x + first * steps + h * width + t, &row[size_t(h)], sizeof(float));
    }
  }
}

// sum[kWords][vectors * kLanes] = or += the products of `steps` columns of kWords rows of the head.
// `next`: rows that will be needed, half a line a step.
#define FASTTAX_PROJECT(STEP)                                                                 \
  VF acc[kWords][vectors];                                                                    \
  _Pragma("GCC unroll 16") for (int w = 0; w < kWords; ++w)                                   \
      _Pragma("GCC unroll 4") for (int v = 0; v < vectors; ++v) acc[w][v] = VF{};             \
  _Pragma("GCC unroll 2") for (int64_t h = 0; h < steps; ++h) {                               \
    __builtin_prefetch(next + h * 8, 0, 2);                                                   \
    VF token[vectors];                                                                        \
    for (int v = 0; v < vectors; ++v) token[v] = load(x + h * vectors * kLanes + v * kLanes); \
    _Pragma("GCC unroll 16") for (int w = 0; w < kWords; ++w) {                               \
      const VF word = splat(words[w * stride + h]);                                           \
      _Pragma("GCC unroll 4") for (int v = 0; v < vectors; ++v) acc[w][v] =                   \
          STEP(word, token[v], acc[w][v]);                                                    \
    }                                                                                         \
  }                                                                                           \
  _Pragma("GCC unroll 16") for (int w = 0; w < kWords; ++w)                                   \
      _Pragma("GCC unroll 4") for (int v = 0; v < vectors; ++v) {                             \
    float* to = sum + w * vectors * kLanes + v * kLanes;                                      \
    store(to, add ? load(to) + acc[w][v] : acc[w][v]);                                        \
  }

template <int vectors>
inline void project_run(const float* words, int64_t stride, const float* x, const float* next,
                        int64_t steps, bool add, float* sum) {
  FASTTAX_PROJECT(fma)
}

#if FASTTAX_ISA == 512
template <int vectors>
FASTTAX_BF16 inline void project_bf16x2(const float* words, int64_t stride, const float* x,
                                        const float* next, int64_t steps, bool add, float* sum) {
  FASTTAX_PROJECT(dot_bf16x2)
}
#endif
#undef FASTTAX_PROJECT

template <int vectors>
inline void project_run(bool bf16x2, const float* words, int64_t stride, const float* x,
                        const float* next, int64_t steps, bool add, float* sum) {
#if FASTTAX_ISA == 512
  if (bf16x2) return project_bf16x2<vectors>(words, stride, x, next, steps, add, sum);
#endif
  project_run<vectors>(words, stride, x, next, steps, add, sum);
}

inline void project_run_of(int64_t width, bool bf16x2, const float* words, int64_t stride,
                           const float* x, const float* next, int64_t steps, bool add, float* sum) {
  switch (width / kLanes) {
    case 1: project_run<1>(bf16x2, words, stride, x, next, steps, add, sum); break;
    case 2: project_run<2>(bf16x2, words, stride, x, next, steps, add, sum); break;
    default: project_run<kVectors>(bf16x2, words, stride, x, next, steps, add, sum);
  }
}

// Logits of the words [first, last). scratch: kUnit rows, for those that do not lie as whole units
// of float32 or of pairs.
inline void project_words(FloatType type, bool bf16x2, const void* weight, int64_t weight_stride,
                          const float* x, int64_t tokens, int64_t depth, int64_t first,
                          int64_t last, float* out, int64_t out_stride, float* scratch) {
  alignas(64) float sum[kUnit * kTokens];
  const int64_t steps = project_steps(bf16x2, depth);
  for (int64_t v = first; v < last; v += kUnit) {
    const int64_t words = std::min(kUnit, last - v);
    const int64_t each = bf16x2 ? 2 : 1;
    const bool in_place = words == kUnit && (bf16x2 ? depth % 2 == 0 && weight_stride % 2 == 0
                                                    : type == FloatType::kFloat);
    const float* rows =
        in_place ? static_cast<const float*>(weight) + v * weight_stride / each : scratch;
    const int64_t stride = in_place ? weight_stride / each : steps;
    for (int64_t w = 0; w < kUnit && !in_place; ++w)
      if (w >= words) std::fill(scratch + w * steps, scratch + (w + 1) * steps, 0.0f);
      else words_of(type, bf16x2, weight, (v + w) * weight_stride, depth, scratch + w * steps);
    for (int64_t t0 = 0; t0 < tokens; t0 += kTokens) {
      const int64_t width = block_width(tokens, t0);
      for (int64_t w = 0; w < kUnit; w += kWords)
        for (int64_t h = 0; h < steps; h += kFold) {
          const float* mine = rows + w * stride + h;
          const float* next =
              in_place && t0 == 0 && v + 2 * kUnit <= last ? mine + kUnit * stride : mine;
          project_run_of(width, bf16x2, mine, stride, x + t0 * steps + h * width, next,
                         std::min(kFold, steps - h), h > 0, sum + w * width);
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
#endif
