// Products of bfloat16 by AMX. A tile register holds 16 rows of 64 bytes; one instruction adds to
// 16 x 16 sums 32 products each. Two tiles of a times two of b are 32 x 32 sums: four loads for
// four products, as many as the registers take. Against oneDNN's on Sapphire Rapids the result is
// float32, its gradients are rounded while they are packed, and a sum goes on in its tile from one
// call to the next.
//
// Packed, both operands are words, pairs of bfloat16 that are neighbours in the sum, in tiles of
// 16 x 16 words: of a [row][pair], of b [pair][column]. Blocks of 32 rows or columns are
// [step][half][tile], a step 16 pairs.
#include "gemm_amx.h"

#include <algorithm>
#include <cstring>
#include <memory>

#include "../call/float_type.h"
#include "level.h"

#if defined(__linux__) && defined(__x86_64__) && FASTTAX_HAS_ISA(512) && \
    (defined(__clang__) || __GNUC__ >= 11)
#define FASTTAX_AMX

#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#if defined(__clang__)
#pragma clang attribute push(                                                                      \
    __attribute__((                                                                                \
        target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,amx-tile,amx-bf16"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,amx-tile,amx-bf16")
#endif

namespace fasttax {
namespace {

constexpr int64_t kStep = 32;   // products of a step
constexpr int64_t kBlock = 32;  // rows or columns
constexpr int64_t kTile = 256;  // words
// an operand that is packed whole, once: 4 MB of it
constexpr int64_t kOnce = 1 << 21;
constexpr int64_t kDeep = 8192;      // products up to which all of a sum is packed
constexpr int64_t kFold = 16;        // steps that are packed at a time of a longer one
constexpr int64_t kRowBlocks = 8;    // of a at a time, and of
constexpr int64_t kColBlocks = 4;    // b where all of a is packed, or
constexpr int64_t kDeepBlocks = 18;  // where neither is: 576 columns

struct Words {  // whole cache lines
  std::unique_ptr<uint32_t[]> memory;
  uint32_t* data;
  explicit Words(int64_t count) : memory(new uint32_t[size_t(count + 16)]) {
    data = memory.get() + (16 - reinterpret_cast<uintptr_t>(memory.get()) / 4 % 16) % 16;
  }
};

inline __mmask16 first16(int64_t n) { return __mmask16((1u << std::clamp<int64_t>(n, 0, 16)) - 1); }
inline __mmask32 first32(int64_t n) {
  return __mmask32((uint64_t(1) << std::clamp<int64_t>(n, 0, 32)) - 1);
}

// 32 neighbours of a row as they lie, zeros from the n-th on: 16 words.
inline __m512i row_words(const uint16_t* p, int64_t n) {
  return _mm512_maskz_loadu_epi16(first32(n), p);
}
inline __m512i row_words(const float* p, int64_t n) {
  const __m512 low = _mm512_maskz_loadu_ps(first16(n), p),
               high = n > 16 ? _mm512_maskz_loadu_ps(first16(n - 16), p + 16) : _mm512_setzero_ps();
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

// 16 entries of a row and below them those of the next: 16 words.
inline __m512i column_words(const uint16_t* row, const uint16_t* next, __mmask16 mask) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, row)),
                high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(next ? mask : 0, next));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}
inline __m512i column_words(const float* row, const float* next, __mmask16 mask) {
  const __m512i low =
      _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, row)));
  const __m512i high = _mm512_cvtepu16_epi32(
      (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(next ? mask : 0, next)));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// Rows and columns of 16 x 16 words change places.
inline void turn(__m512i (&r)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// Rows lie a page apart, where no hardware stream follows: what comes next is fetched by hand.
template <int64_t count, class T>
inline void fetch_lines(const T* p) {
  for (int64_t i = 0; i < count; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(p + i);
}

template <bool turned>
inline void store_tile(__m512i (&r)[16], uint32_t* to) {
  if (turned) turn(r);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) _mm512_store_si512(to + 16 * i, r[i]);
}

// What of a matrix is packed: `blocks` of its rows or columns from `block` on, of `total` in all;
// steps [first, last) of the k products.
struct Part {
  int64_t block, blocks, total, first, last, k;
};

// Of a matrix whose rows are a's rows, or turned, b's columns.
template <bool turned, class T>
inline void pack_rows(const T* src, int64_t stride, const Part& part, uint32_t* dst,
                      int64_t block_size) {
  for (int64_t half = 0; half < 2 * part.blocks; ++half) {
    const int64_t row = part.block * kBlock + half * 16;
    uint32_t* to = dst + half / 2 * block_size + half % 2 * kTile;
    for (int64_t s = part.first; s < part.last; ++s, to += 2 * kTile) {
      const T* at = src + row * stride + s * kStep;
      for (int i = 0; i < 16; ++i) fetch_lines<kStep>(at + (16 + i) * stride);
      __m512i r[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        r[i] = row + i < part.total ? row_words(at + i * stride, part.k - s * kStep)
                                    : _mm512_setzero_si512();
      store_tile<turned>(r, to);
    }
  }
}

// Of a matrix whose rows are summed over: its columns are b's, or turned, a's rows.
template <bool turned, class T>
inline void pack_columns(const T* src, int64_t stride, const Part& part, uint32_t* dst,
                         int64_t block_size) {
  for (int64_t s = part.first; s < part.last; ++s, dst += 2 * kTile)
    for (int64_t half = 0; half < 2 * part.blocks; ++half) {
      const int64_t col = part.block * kBlock + half * 16, rows = part.k - s * kStep;
      const T* at = src + s * kStep * stride + col;
      for (int i = 0; i < kStep && half % 2 == 0; ++i)
        fetch_lines<kBlock>(at + (kStep + i) * stride);
      const __mmask16 mask = first16(part.total - col);
      __m512i r[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        const T* row = at + 2 * i * stride;
        r[i] = 2 * i < rows ? column_words(row, 2 * i + 1 < rows ? row + stride : nullptr, mask)
                            : _mm512_setzero_si512();
      }
      store_tile<turned>(r, dst + half / 2 * block_size + half % 2 * kTile);
    }
}

inline void pack_a(const GemmMatrix& a, const Part& part, uint32_t* dst, int64_t block_size) {
  const auto pack = [&](auto* p) {
    if (a.turned) pack_rows<false>(p, a.stride, part, dst, block_size);
    else pack_columns<true>(p, a.stride, part, dst, block_size);
  };
  if (a.type == FloatType::kFloat) pack(static_cast<const float*>(a.data));
  else pack(static_cast<const uint16_t*>(a.data));
}

inline void pack_b(const GemmMatrix& b, const Part& part, uint32_t* dst, int64_t block_size) {
  const auto* p = static_cast<const uint16_t*>(b.data);
  if (b.turned) pack_rows<true>(p, b.stride, part, dst, block_size);
  else pack_columns<false>(p, b.stride, part, dst, block_size);
}

struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

struct Tiles {  // of this thread, while it lives
  Tiles() {
    const TileShapes shapes;
    _tile_loadconfig(&shapes);
  }
  ~Tiles() { _tile_release(); }
};

// 32 x 32 sums.
inline void run(const uint32_t* a, const uint32_t* b, int64_t steps, float* out, int64_t stride) {
  const int64_t bytes = stride * int64_t(sizeof(float));
  asm volatile("" ::: "memory");  // the intrinsics do not say that they read and write memory
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t s = 0; s < steps; ++s, a += 2 * kTile, b += 2 * kTile) {
    _tile_loadd(4, a, 64);
    _tile_loadd(6, b, 64);
    _tile_loadd(7, b + kTile, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a + kTile, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, out, bytes);
  _tile_stored(1, out + 16, bytes);
  _tile_stored(2, out + 16 * stride, bytes);
  _tile_stored(3, out + 16 * stride + 16, bytes);
  asm volatile("" ::: "memory");
}

// out = or += a block of sums, of which rows x cols are there.
inline void leave(const float* sums, float* out, int64_t stride, bool add, int64_t rows,
                  int64_t cols) {
  const __mmask16 low = first16(cols), high = first16(cols - 16);
  for (int64_t r = 0; r < rows; ++r, out += stride, sums += kBlock) {
    __m512 one = _mm512_load_ps(sums), other = _mm512_load_ps(sums + 16);
    if (add) {
      one = _mm512_add_ps(one, _mm512_maskz_loadu_ps(low, out));
      other = _mm512_add_ps(other, _mm512_maskz_loadu_ps(high, out + 16));
    }
    _mm512_mask_storeu_ps(out, low, one);
    _mm512_mask_storeu_ps(out + 16, high, other);
  }
}

struct Product {
  int64_t M, N, K;
  const GemmMatrix &a, &b;
  float* out;
  int64_t out_stride;
  bool add;
  int64_t steps, fold, row_blocks, col_blocks, row_group, col_group;
  const uint32_t *whole_a, *whole_b;  // or null

  int64_t groups() const { return groups_of(row_blocks, row_group) * col_groups(); }
  int64_t col_groups() const { return groups_of(col_blocks, col_group); }
  static int64_t groups_of(int64_t blocks, int64_t group) { return (blocks + group - 1) / group; }

  Part rows(int64_t block, int64_t blocks, int64_t first, int64_t last) const {
    return {block, blocks, M, first, last, K};
  }
  Part cols(int64_t block, int64_t blocks, int64_t first, int64_t last) const {
    return {block, blocks, N, first, last, K};
  }

  // Groups [from, to) of rows and columns, a fold of the sum at a time.
  void compute(int64_t from, int64_t to) const {
    const Tiles tiles;
    const int64_t part = fold * 2 * kTile, whole = steps * 2 * kTile;
    const Words some_a(whole_a ? 0 : row_group * part), some_b(whole_b ? 0 : col_group * part);
    for (int64_t group = from; group < to; ++group) {
      const int64_t row = group / col_groups() * row_group, col = group % col_groups() * col_group,
                    n_rows = std::min(row_group, row_blocks - row),
                    n_cols = std::min(col_group, col_blocks - col);
      for (int64_t s = 0; s < steps; s += fold) {
        const int64_t last = std::min(steps, s + fold);
        const uint32_t *mine_a = some_a.data, *mine_b = some_b.data;
        if (whole_a) mine_a = whole_a + row * whole + s * 2 * kTile;
        else pack_a(a, rows(row, n_rows, s, last), some_a.data, part);
        if (whole_b) mine_b = whole_b + col * whole + s * 2 * kTile;
        else pack_b(b, cols(col, n_cols, s, last), some_b.data, part);
        const int64_t a_size = whole_a ? whole : part, b_size = whole_b ? whole : part;
        for (int64_t r = 0; r < n_rows; ++r)
          for (int64_t c = 0; c < n_cols; ++c)
            block(mine_a + r * a_size, mine_b + c * b_size, last - s, row + r, col + c,
                  add || s > 0);
      }
    }
  }

  void block(const uint32_t* pa, const uint32_t* pb, int64_t count, int64_t row, int64_t col,
             bool adds) const {
    const int64_t n_rows = std::min(kBlock, M - row * kBlock),
                  n_cols = std::min(kBlock, N - col * kBlock);
    float* to = out + row * kBlock * out_stride + col * kBlock;
    for (int64_t r = 0; r < n_rows; ++r) fetch_lines<kBlock>(to + r * out_stride);
    if (!adds && n_rows == kBlock && n_cols == kBlock) return run(pa, pb, count, to, out_stride);
    alignas(64) float sums[kBlock * kBlock];
    run(pa, pb, count, sums, kBlock);
    leave(sums, to, out_stride, adds, n_rows, n_cols);
  }
};

int64_t blocks_of(int64_t n) { return (n + kBlock - 1) / kBlock; }

}  // namespace

void gemm_amx(int64_t M, int64_t N, int64_t K, const GemmMatrix& a, const GemmMatrix& b, float* out,
              int64_t out_stride, bool add) {
  const int64_t steps = (K + kStep - 1) / kStep, row_blocks = blocks_of(M),
                col_blocks = blocks_of(N), whole = steps * 2 * kTile,
                threads = torch::stable::get_num_threads();
  const bool a_once = K <= kDeep && M * K <= kOnce && M <= N,
             b_once = K <= kDeep && N * K <= kOnce && !a_once;
  const Words all_a(a_once ? row_blocks * whole : 0), all_b(b_once ? col_blocks * whole : 0);
  Product x{M,
            N,
            K,
            a,
            b,
            out,
            out_stride,
            add,
            steps,
            std::min(steps, kFold),
            row_blocks,
            col_blocks,
            std::min(row_blocks, kRowBlocks),
            std::min(col_blocks, kDeepBlocks),
            a_once ? all_a.data : nullptr,
            b_once ? all_b.data : nullptr};
  if (a_once || b_once) x.fold = steps;
  if (a_once) {
    x.row_group = row_blocks;
    x.col_group = std::min(col_blocks, kColBlocks);
    torch::stable::parallel_for(0, row_blocks, 8, [&](int64_t from, int64_t to) {
      pack_a(a, x.rows(from, to - from, 0, steps), all_a.data + from * whole, whole);
    });
  } else if (b_once) {
    x.col_group = col_blocks;
    torch::stable::parallel_for(0, col_blocks, 8, [&](int64_t from, int64_t to) {
      pack_b(b, x.cols(from, to - from, 0, steps), all_b.data + from * whole, whole);
    });
  } else {
    const int64_t row_groups = Product::groups_of(row_blocks, x.row_group);
    const int64_t wanted = std::max(x.col_groups(), (threads + row_groups - 1) / row_groups);
    x.col_group = (col_blocks + wanted - 1) / wanted;
  }
  torch::stable::parallel_for(0, x.groups(), 1,
                              [&](int64_t from, int64_t to) { x.compute(from, to); });
}

namespace {

constexpr int kAskForState = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM

bool lent() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool tile = d >> 24 & 1, bf16 = d >> 22 & 1;
  if (!tile || !bf16 || !__builtin_cpu_supports("avx512bf16")) return false;
  return syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
}

}  // namespace

bool isa_amx() {
  static const bool there = lent();
  return there && isa_level() == Isa::kAvx512 && !isa_bf16();
}

}  // namespace fasttax

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#else

namespace fasttax {

bool isa_amx() { return false; }
void gemm_amx(int64_t, int64_t, int64_t, const GemmMatrix&, const GemmMatrix&, float*, int64_t,
              bool) {}

}  // namespace fasttax
#endif
