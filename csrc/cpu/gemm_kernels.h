// out = or += a b by tiles (tile.h). Packed: a by blocks of kRows rows [block][step][kRows], b by
// blocks of kCols columns [block][step][kCols]; a step is one k, or with GemmArgs::bf16x2 two of
// them as bfloat16.
#include "gemm_args.h"
#include "tile.h"

#if defined(FASTTAX_ISA)  // isa.h: once per instruction set
namespace fasttax {
namespace FASTTAX_ISA_NS {

inline int64_t tile_fold() { return kFold; }

// Sums (rows, n) as bfloat16 rows of `out` from `first` on.
inline void round_rows(const float* sums, int64_t rows, int64_t n, void* out, int64_t first,
                       int64_t stride) {
  for (int64_t r = 0; r < rows; ++r)
    narrow_row(sums + r * n, n, static_cast<BFloat16*>(out) + (first + r) * stride);
}

// Steps [first, last) of `blocks` blocks of a matrix whose rows are k, from column `col` of
// `total`.
inline void pack_steps(const GemmMatrix& x, bool bf16x2, int64_t k, int64_t first, int64_t last,
                       int64_t col, int64_t total, int64_t blocks, int64_t width, float* dst,
                       int64_t block_size) {
  if (bf16x2) {
    const int64_t span[2] = {2 * first, std::min(k, 2 * last)};
    pack_bf16x2(static_cast<const BFloat16*>(x.data), x.stride, span, 1, col, total, blocks, width,
                reinterpret_cast<uint32_t*>(dst), block_size);
    return;
  }
  const float* weight = x.weight ? x.weight + first : nullptr;
  typed(x.type, x.data, [&](auto* p) {
    pack(p + first * x.stride, x.stride, last - first, col, total, blocks, width, x.square, weight,
         dst, block_size);
  });
}

// to[s][kRows] = at[r][s], from s on; returns how far it came.
inline int64_t turn_words(const float* const (&at)[kRows], int64_t steps, float* to) {
  int64_t s = 0;
#if FASTTAX_ISA == 512
  static_assert(kRows == 8);
  for (; s + 8 <= steps; s += 8) {
    __m256 row[8], two[8], four[8];
    for (int r = 0; r < 8; ++r) row[r] = _mm256_loadu_ps(at[r] + s);
    for (int r = 0; r < 8; r += 2) {
      two[r] = _mm256_unpacklo_ps(row[r], row[r + 1]);
      two[r + 1] = _mm256_unpackhi_ps(row[r], row[r + 1]);
    }
    for (int r = 0; r < 8; r += 4) {
      four[r] = _mm256_shuffle_ps(two[r], two[r + 2], 0x44);
      four[r + 1] = _mm256_shuffle_ps(two[r], two[r + 2], 0xee);
      four[r + 2] = _mm256_shuffle_ps(two[r + 1], two[r + 3], 0x44);
      four[r + 3] = _mm256_shuffle_ps(two[r + 1], two[r + 3], 0xee);
    }
    for (int r = 0; r < 4; ++r) {
      float* dst = to + (s + r) * 8;
      _mm256_storeu_ps(dst, _mm256_permute2f128_ps(four[r], four[r + 4], 0x20));
      _mm256_storeu_ps(dst + 32, _mm256_permute2f128_ps(four[r], four[r + 4], 0x31));
    }
  }
#endif
  return s;
}

// The same of a matrix whose rows are those of the blocks: turned.
inline void turn_steps(const GemmMatrix& x, bool bf16x2, int64_t k, int64_t first, int64_t last,
                       int64_t row, int64_t total, int64_t blocks, float* dst, int64_t block_size) {
  const int64_t steps = last - first;
  float words[kRows][kFold];
  for (int64_t b = 0; b < blocks; ++b, row += kRows, dst += block_size) {
    const float* at[kRows];
    for (int64_t r = 0; r < kRows; ++r) {
      const int64_t start = (row + r) * x.stride;
      at[r] = words[r];
      if (row + r >= total) std::fill(words[r], words[r] + steps, 0.0f);
      else if (bf16x2)
        bf16x2_of(static_cast<const BFloat16*>(x.data) + start + 2 * first,
                  std::min(k, 2 * last) - 2 * first, words[r]);
      else if (x.type == FloatType::kFloat)
        at[r] = static_cast<const float*>(x.data) + start + first;
      else typed(x.type, x.data, [&](auto* p) { widen_row(p + start + first, steps, words[r]); });
    }
    for (int64_t s = turn_words(at, steps, dst); s < steps; ++s)
      for (int64_t r = 0; r < kRows; ++r) dst[s * kRows + r] = at[r][s];
  }
}

// One run of a tile at out[row, col]; what reaches over the edge goes by way of a tile aside.
inline void gemm_tile(const GemmArgs& x, const float* a, const float* b, const float* ahead,
                      int64_t steps, int64_t row, int64_t col, bool add) {
  const int64_t rows = std::min<int64_t>(kRows, x.M - row), cols = std::min(kCols, x.N - col);
  float* out = x.out + row * x.out_stride + col;
  const bool whole = rows == kRows && cols == kCols;
  alignas(64) float aside[kTile];
  float* to = whole ? out : aside;
  const int64_t stride = whole ? x.out_stride : kCols;
  const Leave how = whole && add ? Leave::kAdd : Leave::kWrite;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < cols; c += 16) __builtin_prefetch(out + r * x.out_stride + c, 1);
#if FASTTAX_ISA == 512
  if (x.bf16x2) run_bf16x2(b, a, ahead, steps, how, 1.0f, nullptr, to, stride);
  else
#endif
    run_floats(b, a, ahead, steps, how, 1.0f, nullptr, to, stride);
  if (whole) return;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < cols; ++c) {
      float& o = out[r * x.out_stride + c];
      o = add ? o + aside[r * kCols + c] : aside[r * kCols + c];
    }
}

// Blocks of rows from `row` times blocks of columns from `col`. Rows inside: a fold of a column
// block stays in L1 meanwhile.
inline void gemm_blocks(const GemmArgs& x, const float* a, int64_t a_size, int64_t row_blocks,
                        int64_t row, const float* b, int64_t b_size, int64_t col_blocks,
                        int64_t col, int64_t steps, int64_t fold, bool add, GemmAhead* upcoming) {
  const int64_t runs = col_blocks * row_blocks * ((steps + fold - 1) / fold);
  const int64_t share[2] = {upcoming ? upcoming[0].lines() / runs + 1 : 0,
                            upcoming ? upcoming[1].lines() / runs + 1 : 0};
  for (int64_t c = 0; c < col_blocks; ++c)
    for (int64_t s = 0; s < steps; s += fold) {
      const int64_t count = std::min(fold, steps - s);
      const float *mine = b + c * b_size + s * kCols,
                  *next = s + fold < steps ? mine + count * kCols : b + (c + 1) * b_size;
      for (int64_t r = 0; r < row_blocks; ++r) {
        const float* rows = a + r * a_size + s * kRows;
        for (int m = 0; m < 2 && upcoming; ++m) upcoming[m].fetch(share[m]);
        const float* ahead = r < 3 ? next + r * count * kLanes : rows + a_size;
        gemm_tile(x, rows, mine, ahead, count, row + r * kRows, col + c * kCols, add || s > 0);
      }
    }
}

}  // namespace FASTTAX_ISA_NS
}  // namespace fasttax
#endif
