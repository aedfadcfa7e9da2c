// linear_sqgrad's tile: F[o, i] += sum_n w_n (sum_t D[t, o] A[t, i])^2 with the example's gradient
// in registers.
//  - A is packed once, by blocks of kCols columns: [block][t][kCols]; D by blocks of kRows rows:
//  [block][t][kRows].
//  - kRows x kCols accumulators in registers run over an example's tokens and are squared into a
//  panel of F, a batch of examples at a
//    time, whose rows of D stay in L2. No per-example gradient reaches memory.
#include "fisher_batch.h"
#include "tile.h"

#if defined(FASTTAX_ISA)  // isa.h: once per instruction set
namespace fasttax {
namespace FASTTAX_ISA_NS {

// The squares of a batch's examples in one column block, for all of its row blocks, added to
// `panel` [block][kRows][kCols]. Row blocks inside: an example's kFold x kCols of A stay in L1
// while all rows meet them. gathered: as panel, for examples longer than kFold.
inline void fisher_column(const FisherBatch& x, const float* a, const float* next, float* panel,
                          float* gathered) {
  const int64_t fold = x.bf16x2 ? kFold / 2 : kFold, stop = x.starts[x.last];
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
        if (x.bf16x2) {
          run_bf16x2(a + t * kCols, mine, ahead, steps, how, weight, gathered + b * kTile,
                     to + b * kTile);
          continue;
        }
#endif
        run_floats(a + t * kCols, mine, ahead, steps, how, weight, gathered + b * kTile,
                   to + b * kTile);
      }
    }
  }
}

// One batch in column blocks [from, to), whose panels (`blocks` tiles each) lie side by side.
inline void fisher_batch(const FisherBatch& x, int64_t from, int64_t to, float* panels,
                         float* gathered) {
  for (int64_t c = from; c < to; ++c, panels += x.blocks * kTile) {
    const float *a = x.a + c * x.a_stride,
                *next = x.a + (c + 1 < to ? c + 1 : from) * x.a_stride + x.starts[x.first] * kCols;
    fisher_column(x, a, next, panels, gathered);
  }
}

// F (rows, total) in column blocks [from, to) plus their panels of `blocks` tiles: read and written
// once a call.
inline void fisher_add(const float* panels, int64_t blocks, int64_t from, int64_t to, float* f,
                       int64_t rows, int64_t total) {
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

}  // namespace FASTTAX_ISA_NS
}  // namespace fasttax
#endif
