// The Fisher-weighted square of a low-rank update, S = sum F * (B A)^2, and its gradients d_A = B^T
// G, d_B = G A^T with G = F * (B A), in one sweep over F: a tile of B A is made, weighed and used
// while it is in registers. Per element of F 6 r flops (r = 16: 48 FMA a vector) beside 4 bytes, so
// the arithmetic is what costs; a tile is kLoraRows x kLoraVectors vectors, as many as leave
// registers for a column of A and one of d_A.
#include "ewc_stage.h"

#if defined(FASTTAX_ISA)  // isa.h: once per instruction set
namespace fasttax {
namespace FASTTAX_ISA_NS {

constexpr int kLoraRows = 4;
#if FASTTAX_ISA == 512
constexpr int kLoraVectors = 4;  // 16 of the tile + 4 + 4 + broadcasts, of 32 registers
#else
constexpr int kLoraVectors = 2;  // 8 + 2 + 2 of 16
#endif
constexpr int64_t kLoraCols = kLoraVectors * kLanes;

inline int64_t lora_cols() { return kLoraCols; }
inline int64_t lora_lanes() { return kLanes; }

// F[row, col : col + n] as floats, padded with zeros to kLoraCols; in place where it can be.
inline const float* lora_fisher(const Operand& fisher, int64_t at, int64_t n, float* buffer) {
  if (fisher.type == EwcType::kFloat && n == kLoraCols)
    return static_cast<const float*>(fisher.data) + at;
  switch (fisher.type) {
    case EwcType::kFloat: widen(static_cast<const float*>(fisher.data) + at, n, buffer); break;
    case EwcType::kBFloat16:
      widen(static_cast<const BFloat16*>(fisher.data) + at, n, buffer);
      break;
    case EwcType::kFloat16: widen(static_cast<const Float16*>(fisher.data) + at, n, buffer); break;
    default:
      for (int64_t done = 0; done < n;) {  // a row need not start with a block
        const int64_t block = (at + done) / kEwcBlock,
                      part = std::min(n - done, (block + 1) * kEwcBlock - (at + done));
        decode_u8log(static_cast<const uint8_t*>(fisher.data) + at + done,
                     U8LogTables(fisher.scales + block * 2), part, buffer + done);
        done += part;
      }
  }
  std::fill(buffer + n, buffer + kLoraCols, 0.0f);
  return buffer;
}

// a, d_a: [r][kLoraCols]; b: kLoraRows rows of r; d_b: [kLoraRows][r] vectors whose lanes are yet
// to be added up.
template <bool gradient>
inline double lora_tile(const float* a, const float* b, const float* const* fisher, int64_t r,
                        float* d_a, float* d_b) {
  VF tile[kLoraRows][kLoraVectors] = {};
  for (int64_t k = 0; k < r; ++k) {
    VF col[kLoraVectors];
    for (int v = 0; v < kLoraVectors; ++v) col[v] = load(a + k * kLoraCols + v * kLanes);
    for (int row = 0; row < kLoraRows; ++row) {
      const VF factor = splat(b[row * r + k]);
      for (int v = 0; v < kLoraVectors; ++v) tile[row][v] = fma(factor, col[v], tile[row][v]);
    }
  }
  VF total{};
  for (int row = 0; row < kLoraRows; ++row)
    for (int v = 0; v < kLoraVectors; ++v) {
      const VF weighed = load(fisher[row] + v * kLanes) * tile[row][v];
      total = fma(weighed, tile[row][v], total);
      tile[row][v] = weighed;
    }
  if (gradient)
    for (int64_t k = 0; k < r; ++k) {
      VF col[kLoraVectors], sum_a[kLoraVectors];
      for (int v = 0; v < kLoraVectors; ++v) {
        col[v] = load(a + k * kLoraCols + v * kLanes);
        sum_a[v] = load(d_a + k * kLoraCols + v * kLanes);
      }
      for (int row = 0; row < kLoraRows; ++row) {
        const VF factor = splat(b[row * r + k]);
        float* at = d_b + (row * r + k) * kLanes;
        VF sum_b = load(at);
        for (int v = 0; v < kLoraVectors; ++v) {
          sum_b = fma(tile[row][v], col[v], sum_b);
          sum_a[v] = fma(factor, tile[row][v], sum_a[v]);
        }
        store(at, sum_b);
      }
      for (int v = 0; v < kLoraVectors; ++v) store(d_a + k * kLoraCols + v * kLanes, sum_a[v]);
    }
  return sum(total);
}

// Rows that share a block of A and of d_A while it is in L1, beside the rows' own d_b: at r = 16 4
// + 4 + 16 KB.
constexpr int64_t kLoraStrip = 16;

inline int64_t lora_strip() { return kLoraStrip; }

// Rows of F are read 256 bytes at a time, which no hardware stream follows: each block's are
// fetched while the block before is used.
inline void lora_fetch(const Operand& fisher, int64_t at, int64_t n) {
  const int64_t item = fisher.type == EwcType::kFloat ? 4 : fisher.type == EwcType::kU8Log ? 1 : 2;
  for (int64_t byte = 0; byte < n * item; byte += 64)
    __builtin_prefetch(static_cast<const char*>(fisher.data) + at * item + byte);
}

// Rows [begin, end) of F, a strip's at most. a: [column block][r][kLoraCols] and b: [rows][r], both
// padded with zeros; d_a (null without gradients) as a, this chunk's own; d_b: [rows][r]; lanes:
// scratch of kLoraStrip * r vectors.
inline double lora_sum_strip(const float* a, const float* b, void* data, EwcType type,
                             const float* scales, int64_t r, int64_t width, int64_t begin,
                             int64_t end, float* d_a, float* d_b, float* lanes) {
  alignas(64) float buffers[kLoraRows][kLoraCols];
  const Operand operand{data, type, scales};
  double total = 0;
  if (d_a) std::fill(lanes, lanes + kLoraStrip * r * kLanes, 0.0f);
  for (int64_t col = 0; col < width; col += kLoraCols) {
    const int64_t n = std::min(kLoraCols, width - col);
    for (int64_t row = begin; row < end; row += kLoraRows) {
      const float* fisher[kLoraRows];
      for (int k = 0; k < kLoraRows; ++k) {  // beyond the end B is 0 and any row of F will do
        const int64_t at = std::min(row + k, end - 1) * width + col;
        fisher[k] = lora_fisher(operand, at, n, buffers[k]);
        if (col + kLoraCols < width)
          lora_fetch(operand, at + kLoraCols, std::min(kLoraCols, width - col - kLoraCols));
      }
      total += d_a ? lora_tile<true>(a + col * r, b + row * r, fisher, r, d_a + col * r,
                                     lanes + (row - begin) * r * kLanes)
                   : lora_tile<false>(a + col * r, b + row * r, fisher, r, nullptr, nullptr);
    }
  }
  if (d_a)
    for (int64_t i = 0; i < (end - begin) * r; ++i)
      d_b[begin * r + i] = float(sum(load(lanes + i * kLanes)));
  return total;
}

inline void lora_widen(EwcType type, const void* src, int64_t at, int64_t n, float* dst) {
  switch (type) {
    case EwcType::kBFloat16: widen(static_cast<const BFloat16*>(src) + at, n, dst); break;
    case EwcType::kFloat16: widen(static_cast<const Float16*>(src) + at, n, dst); break;
    default: widen(static_cast<const float*>(src) + at, n, dst);
  }
}

}  // namespace FASTTAX_ISA_NS
}  // namespace fasttax
#endif
