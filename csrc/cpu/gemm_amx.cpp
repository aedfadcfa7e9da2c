// Products of bfloat16 by AMX. A tile register holds 16 rows of 64 bytes; one instruction adds to
// 16 x 16 sums 32 products each. Two tiles of a times two of b are 32 x 32 sums: four loads for
// four products, as many as the registers take. oneDNN's, which torch calls, rounds its results to
// bfloat16 and adds none up.
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
#include "parallel.h"

#if defined(__linux__) && defined(__x86_64__) && FASTTAX_HAS_ISA(512) && \
    (defined(__clang__) || __GNUC__ >= 11)

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
// b is packed whole, once, of so many entries (4 MB) and products, and
constexpr int64_t kOnce = 1 << 21, kDeep = 8192;
constexpr int64_t kRowsOnce = 1 << 18;  // so many of a at a time;
// else 512 products at a time, of 256 rows of a and 576 columns of b
constexpr int64_t kFold = 16, kRowBlocks = 8, kColBlocks = 18;

constexpr int64_t kPast = 1 << 20;  // results

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

// 16 entries of a row and below them those of the next: 16 words.
inline __m512i column_words(const uint16_t* row, const uint16_t* next, __mmask16 mask) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, row)),
                high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(next ? mask : 0, next));
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
template <bool turned>
inline void pack_rows(const uint16_t* src, int64_t stride, const Part& part, uint32_t* dst,
                      int64_t block_size) {
  for (int64_t half = 0; half < 2 * part.blocks; ++half) {
    const int64_t row = part.block * kBlock + half * 16;
    uint32_t* to = dst + half / 2 * block_size + half % 2 * kTile;
    for (int64_t s = part.first; s < part.last; ++s, to += 2 * kTile) {
      const uint16_t* at = src + row * stride + s * kStep;
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
template <bool turned>
inline void pack_columns(const uint16_t* src, int64_t stride, const Part& part, uint32_t* dst,
                         int64_t block_size) {
  for (int64_t s = part.first; s < part.last; ++s, dst += 2 * kTile)
    for (int64_t half = 0; half < 2 * part.blocks; ++half) {
      const int64_t col = part.block * kBlock + half * 16, rows = part.k - s * kStep;
      const uint16_t* at = src + s * kStep * stride + col;
      for (int i = 0; i < kStep && half % 2 == 0; ++i)
        fetch_lines<kBlock>(at + (kStep + i) * stride);
      const __mmask16 mask = first16(part.total - col);
      __m512i r[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        const uint16_t* row = at + 2 * i * stride;
        r[i] = 2 * i < rows ? column_words(row, 2 * i + 1 < rows ? row + stride : nullptr, mask)
                            : _mm512_setzero_si512();
      }
      store_tile<turned>(r, dst + half / 2 * block_size + half % 2 * kTile);
    }
}

inline void pack_a(const GemmMatrix& a, const Part& part, uint32_t* dst, int64_t block_size) {
  const auto* p = static_cast<const uint16_t*>(a.data);
  if (a.turned) pack_rows<false>(p, a.stride, part, dst, block_size);
  else pack_columns<true>(p, a.stride, part, dst, block_size);
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

inline bool whole_line(const void* p) { return reinterpret_cast<uintptr_t>(p) % 64 == 0; }

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

// The same of out's transpose: rows and columns of `sums` change places.
inline void leave_turned(const float* sums, float* out, int64_t stride, bool add, bool past,
                         int64_t rows, int64_t cols) {
  for (int64_t col = 0; col < cols; col += 16)
    for (int64_t row = 0; row < rows; row += 16) {
      const __mmask16 mask = first16(rows - row);
      __m512i r[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) r[i] = _mm512_load_si512(sums + (row + i) * kBlock + col);
      turn(r);
      float* to = out + col * stride + row;
      for (int64_t i = 0; i < std::min<int64_t>(16, cols - col); ++i, to += stride) {
        __m512 sum = _mm512_castsi512_ps(r[i]);
        if (add) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, to));
        if (past && mask == 0xffff && whole_line(to)) _mm512_stream_ps(to, sum);
        else _mm512_mask_storeu_ps(to, mask, sum);
      }
    }
}

// The same rounded, and not added to anything.
inline void leave_rounded(const float* sums, uint16_t* out, int64_t stride, int64_t rows,
                          int64_t cols) {
  for (int64_t r = 0; r < rows; ++r, out += stride, sums += kBlock)
    _mm512_mask_storeu_epi16(
        out, first32(cols),
        (__m512i)_mm512_cvtne2ps_pbh(_mm512_load_ps(sums + 16), _mm512_load_ps(sums)));
}

struct Product {
  int64_t M, N, K;
  const GemmMatrix &a, &b;
  GemmAmxOut out;
  bool add;
  int64_t steps, row_blocks, col_blocks;
  int64_t fold = 0, row_group = 0, col_group = 0;  // steps; blocks
  const uint32_t* whole_b = nullptr;
  // a turned out is too large for a cache: its lines are written past it, not read first
  bool past = M * N >= kPast;

  int64_t col_groups() const { return (col_blocks + col_group - 1) / col_group; }
  int64_t groups() const { return (row_blocks + row_group - 1) / row_group * col_groups(); }

  // Groups [from, to) of rows and columns, a fold of the sum at a time.
  void compute(int64_t from, int64_t to) const {
    const Tiles tiles;
    const int64_t size = fold * 2 * kTile;
    const Words some_a(row_group * size), some_b(whole_b ? 0 : col_group * size);
    for (int64_t group = from; group < to; ++group) {
      const int64_t row = group / col_groups() * row_group, col = group % col_groups() * col_group,
                    n_rows = std::min(row_group, row_blocks - row),
                    n_cols = std::min(col_group, col_blocks - col);
      for (int64_t s = 0; s < steps; s += fold) {
        const int64_t last = std::min(steps, s + fold);
        pack_a(a, {row, n_rows, M, s, last, K}, some_a.data, size);
        const uint32_t* mine_b = whole_b ? whole_b + col * size : some_b.data;
        if (!whole_b) pack_b(b, {col, n_cols, N, s, last, K}, some_b.data, size);
        for (int64_t r = 0; r < n_rows; ++r)
          for (int64_t c = 0; c < n_cols; ++c)
            block(some_a.data + r * size, mine_b + c * size, last - s, row + r, col + c,
                  add || s > 0);
      }
    }
    _mm_sfence();  // what was written past the caches, before another thread reads it
  }

  void block(const uint32_t* pa, const uint32_t* pb, int64_t count, int64_t row, int64_t col,
             bool adds) const {
    const int64_t n_rows = std::min(kBlock, M - row * kBlock),
                  n_cols = std::min(kBlock, N - col * kBlock);
    alignas(64) float sums[kBlock * kBlock];
    const int64_t stride = out.stride;
    if (out.rounded) {
      auto* to = static_cast<uint16_t*>(out.data) + row * kBlock * stride + col * kBlock;
      for (int64_t r = 0; r < n_rows; ++r) fetch_lines<kBlock>(to + r * stride);
      run(pa, pb, count, sums, kBlock);
      return leave_rounded(sums, to, stride, n_rows, n_cols);
    }
    auto* to = static_cast<float*>(out.data);
    if (out.turned) {
      to += col * kBlock * stride + row * kBlock;
      run(pa, pb, count, sums, kBlock);
      return leave_turned(sums, to, stride, adds, past && !adds, n_rows, n_cols);
    }
    to += row * kBlock * stride + col * kBlock;
    for (int64_t r = 0; r < n_rows; ++r) fetch_lines<kBlock>(to + r * stride);
    if (!adds && n_rows == kBlock && n_cols == kBlock) return run(pa, pb, count, to, stride);
    run(pa, pb, count, sums, kBlock);
    leave(sums, to, stride, adds, n_rows, n_cols);
  }
};

bool packed_once(int64_t N, int64_t K) { return K <= kDeep && N * K <= kOnce; }

int64_t blocks_of(int64_t n) { return (n + kBlock - 1) / kBlock; }

}  // namespace

bool gemm_amx_rounds(int64_t N, int64_t K) { return K <= kFold * kStep || packed_once(N, K); }

void gemm_amx(int64_t M, int64_t N, int64_t K, const GemmMatrix& a, const GemmMatrix& b,
              const GemmAmxOut& out, bool add) {
  const int64_t steps = (K + kStep - 1) / kStep, row_blocks = blocks_of(M),
                col_blocks = blocks_of(N), whole = steps * 2 * kTile;
  Product x{M, N, K, a, b, out, add, steps, row_blocks, col_blocks};
  const bool once = packed_once(N, K);
  const Words all_b(once ? col_blocks * whole : 0);
  if (once) {
    interruptible_for("_gemm_", 0, col_blocks, 8, [&](int64_t from, int64_t to, Watch&) {
      pack_b(b, {from, to - from, N, 0, steps, K}, all_b.data + from * whole, whole);
    });
    x.whole_b = all_b.data;
    x.fold = steps;
    x.row_group = std::clamp<int64_t>(kRowsOnce / (steps * kStep * kBlock), 1, row_blocks);
    x.col_group = col_blocks;
  } else {
    x.fold = std::min(steps, kFold);
    x.row_group = std::min(row_blocks, kRowBlocks);
    const int64_t threads = torch::stable::get_num_threads(),
                  row_groups = (row_blocks + x.row_group - 1) / x.row_group,
                  wanted = std::max((col_blocks + kColBlocks - 1) / kColBlocks,
                                    (threads + row_groups - 1) / row_groups);
    x.col_group = (col_blocks + wanted - 1) / wanted;
  }
  interruptible_for("_gemm_", 0, x.groups(), 1,
                    [&](int64_t from, int64_t to, Watch&) { x.compute(from, to); });
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
bool gemm_amx_rounds(int64_t, int64_t) { return false; }
void gemm_amx(int64_t, int64_t, int64_t, const GemmMatrix&, const GemmMatrix&, const GemmAmxOut&,
              bool) {}

}  // namespace fasttax
#endif
