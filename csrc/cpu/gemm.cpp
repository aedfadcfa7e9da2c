// _gemm_: the two products of a head's backward, out = or += a b with float32 sums. Either b is
// small and is packed once for all rows (a weight's gradient: d^T hidden), or the sum is long and
// both are packed a fold of it at a time (hidden states' gradient: d weight), where a GEMM of a
// library packs all of the head. One sum for each element, in one order, whatever the number of
// threads.
#include "gemm.h"

#include <algorithm>
#include <memory>

#include "../call/float_type.h"
#include "gemm_amx.h"
#include "parallel.h"

#define FASTTAX_KERNELS "gemm_kernels.h"
#include "isa.h"

namespace fasttax {
namespace {

constexpr int64_t kPackedOnce = 1 << 21;  // floats of b, and
// of a sum: few enough rows of a beside it in L2
constexpr int64_t kPackedSteps = 2048;
constexpr int64_t kRowFloats = 100 * 1024;  // of a in L2
// of out that one thread sums over folds: 0.6 MB
constexpr int64_t kDeepRows = 256, kDeepColumns = 576;

struct Gemm : GemmArgs {
  GemmMatrix a, b;
  int64_t steps, fold, rows, cols;  // of the sum; of one run of it; of a tile

  int64_t row_blocks() const { return (M + rows - 1) / rows; }
  int64_t col_blocks() const { return (N + cols - 1) / cols; }

  // Of `m`, the steps [first, last) of its other side's [begin, end).
  GemmAhead ahead(const GemmMatrix& m, int64_t first, int64_t last, int64_t begin,
                  int64_t end) const {
    if (first == last) return {};
    const int64_t item = m.type == FloatType::kFloat ? 4 : 2, each = bf16x2 ? 2 : 1;
    const int64_t from = first * each, to = std::min(K, last * each);
    const auto block = [&](int64_t row, int64_t rows, int64_t col, int64_t cols) -> GemmAhead {
      return {static_cast<const char*>(m.data) + (row * m.stride + col) * item, m.stride * item,
              cols * item, rows};
    };
    if (m.turned) return block(begin, end - begin, from, to - from);
    return block(from, to - from, begin, end - begin);
  }

  void pack_a(int64_t first, int64_t last, int64_t block, int64_t blocks, float* dst,
              int64_t size) const {
    if (a.turned)
      FASTTAX_DISPATCH(turn_steps, a, bf16x2, K, first, last, block * rows, M, blocks, dst, size);
    else
      FASTTAX_DISPATCH(pack_steps, a, bf16x2, K, first, last, block * rows, M, blocks, rows, dst,
                       size);
  }
  void pack_b(int64_t first, int64_t last, int64_t block, int64_t blocks, float* dst,
              int64_t size) const {
    FASTTAX_DISPATCH(pack_steps, b, bf16x2, K, first, last, block * cols, N, blocks, cols, dst,
                     size);
  }
};

struct Floats {  // whole cache lines
  std::unique_ptr<float[]> memory;
  float* data;
  explicit Floats(int64_t count) : memory(new float[size_t(count + 16)]) {
    data = memory.get() + (16 - reinterpret_cast<uintptr_t>(memory.get()) / 4 % 16) % 16;
  }
};

// A block's last step may be written a vector long, so blocks of rows are a tile's width further
// apart than they need.
void with_b_packed_once(const Gemm& g) {
  const int64_t b_size = g.steps * g.cols, a_size = g.steps * g.rows + g.cols,
                col_blocks = g.col_blocks(), row_blocks = g.row_blocks();
  const Floats b(col_blocks * b_size + g.cols);
  interruptible_for("_gemm_", 0, col_blocks, 1, [&](int64_t from, int64_t to, Watch&) {
    g.pack_b(0, g.steps, from, to - from, b.data + from * b_size, b_size);
  });
  const int64_t group = std::clamp<int64_t>(kRowFloats / a_size, 1, 24);
  interruptible_for(
      "_gemm_", 0, (row_blocks + group - 1) / group, 1, [&](int64_t from, int64_t to, Watch&) {
        const Floats a(group * a_size);
        for (int64_t block = from * group; block < std::min(row_blocks, to * group);
             block += group) {
          const int64_t blocks = std::min(group, row_blocks - block);
          for (int64_t s = 0; s < g.steps; s += g.fold)
            g.pack_a(s, std::min(g.steps, s + g.fold), block, blocks, a.data + s * g.rows, a_size);
          FASTTAX_DISPATCH(gemm_blocks, g, a.data, a_size, blocks, block * g.rows, b.data, b_size,
                           col_blocks, 0, g.steps, g.fold, g.add, nullptr);
        }
      });
}

void fold_by_fold(const Gemm& g) {
  const int64_t col_blocks = g.col_blocks(), row_blocks = g.row_blocks(),
                threads = torch::stable::get_num_threads();
  const int64_t row_group = std::min(row_blocks, kDeepRows / g.rows),
                row_groups = (row_blocks + row_group - 1) / row_group;
  const int64_t wanted = std::max((col_blocks * g.cols + kDeepColumns - 1) / kDeepColumns,
                                  (threads + row_groups - 1) / row_groups);
  const int64_t col_group = (col_blocks + wanted - 1) / wanted,
                col_groups = (col_blocks + col_group - 1) / col_group;
  const int64_t a_size = g.fold * g.rows + g.cols, b_size = g.fold * g.cols;
  interruptible_for(
      "_gemm_", 0, row_groups * col_groups, 1, [&](int64_t from, int64_t to, Watch& watch) {
        const Floats a(row_group * a_size), b(col_group * b_size + g.cols);
        for (int64_t task = from; task < to; ++task) {
          const int64_t row = task / col_groups * row_group,
                        rows = std::min(row_group, row_blocks - row);
          const int64_t col = task % col_groups * col_group,
                        cols = std::min(col_group, col_blocks - col);
          for (int64_t s = 0; s < g.steps; s += g.fold) {
            if (watch.stops()) return;
            const int64_t last = std::min(g.steps, s + g.fold);
            g.pack_a(s, last, row, rows, a.data, a_size);
            g.pack_b(s, last, col, cols, b.data, b_size);
            const int64_t then = std::min(g.steps, last + g.fold);
            GemmAhead upcoming[2] = {
                g.ahead(g.a, last, then, row * g.rows, std::min(g.M, (row + rows) * g.rows)),
                g.ahead(g.b, last, then, col * g.cols, std::min(g.N, (col + cols) * g.cols))};
            FASTTAX_DISPATCH(gemm_blocks, g, a.data, a_size, rows, row * g.rows, b.data, b_size,
                             cols, col * g.cols, last - s, g.fold, g.add || s > 0, upcoming);
          }
        }
      });
}

}  // namespace

void gemm(int64_t M, int64_t N, int64_t K, const GemmMatrix& a, const GemmMatrix& b, float* out,
          int64_t out_stride, bool add, bool bf16x2) {
  const int64_t steps = bf16x2 ? (K + 1) / 2 : K, most = FASTTAX_DISPATCH(tile_fold),
                folds = (steps + most - 1) / most;
  const Gemm g{{M, N, K, out, out_stride, add, bf16x2},
               a,
               b,
               steps,
               (steps + folds - 1) / folds,
               FASTTAX_DISPATCH(tile_rows),
               FASTTAX_DISPATCH(tile_cols)};
  if (steps <= kPackedSteps && steps * N <= kPackedOnce) with_b_packed_once(g);
  else fold_by_fold(g);
}

namespace {

// of out, whose sums are made before they are rounded: 1 MB, in L2
constexpr int64_t kRoundedAtOnce = 1 << 18;

// out (M, N) = or += a (M, K) b (K, N). b's rows are contiguous, and a's rows or its columns.
// Products are exact or float32's, sums float32; a bfloat16 out is those rounded, none added.
void gemm_(Tensor out, Tensor a, Tensor b, bool add) {
  const char* op = "_gemm_";
  const FloatType a_type = float_type(a, op, "a"), b_type = float_type(b, op, "b"),
                  out_type = float_type(out, op, "out");
  const bool rounded = out_type == FloatType::kBFloat16 && !add;
  FASTTAX_CHECK(
      out.dim() == 2 && a.dim() == 2 && b.dim() == 2 &&
          (out_type == FloatType::kFloat || rounded) && a_type != FloatType::kDouble &&
          b_type != FloatType::kDouble,
      op,
      "expected out (M, N) float32 (or, not added to, bfloat16), a (M, K) and b (K, N), none "
      "float64");
  const int64_t M = a.size(0), K = a.size(1), N = b.size(1);
  FASTTAX_CHECK(out.size(0) == M && out.size(1) == N && b.size(0) == K && K > 0, op,
                "shapes do not fit");
  const bool by_rows = a.stride(1) == 1 || K == 1;
  FASTTAX_CHECK((out.stride(1) == 1 || N == 1) && (b.stride(1) == 1 || N == 1) &&
                    (by_rows || a.stride(0) == 1 || M == 1),
                op, "rows of out and b must be contiguous, and rows or columns of a");
  if (M == 0 || N == 0) return;
  const GemmMatrix of_b{b_type, b.const_data_ptr(), b.stride(0)};
  const bool halves = b_type == FloatType::kBFloat16 && a_type == FloatType::kBFloat16;
  const int64_t a_stride = by_rows ? a.stride(0) : a.stride(1), a_next = by_rows ? a_stride : 1;
  const auto product = [&](int64_t row, int64_t rows, float* to, int64_t stride) {
    const char* start = static_cast<const char*>(a.const_data_ptr());
    const GemmMatrix of_a{a_type, start + row * a_next * (a_type == FloatType::kFloat ? 4 : 2),
                          a_stride, by_rows};
    if (halves && isa_amx()) gemm_amx(rows, N, K, of_a, of_b, {to, stride}, add);
    else gemm(rows, N, K, of_a, of_b, to, stride, add, halves && isa_bf16());
  };
  if (rounded && halves && isa_amx() && gemm_amx_rounds(N, K))
    return gemm_amx(M, N, K, {a_type, a.const_data_ptr(), a_stride, by_rows}, of_b,
                    {out.mutable_data_ptr(), out.stride(0), false, true}, add);
  if (!rounded) return product(0, M, static_cast<float*>(out.mutable_data_ptr()), out.stride(0));
  const int64_t at_once = std::min(M, std::max<int64_t>(kDeepRows, kRoundedAtOnce / N));
  const Floats sums(at_once * N);
  for (int64_t row = 0; row < M; row += at_once) {
    const int64_t rows = std::min(at_once, M - row);
    product(row, rows, sums.data, N);
    interruptible_for("_gemm_", 0, rows, 32, [&](int64_t from, int64_t to, Watch&) {
      FASTTAX_DISPATCH(round_rows, sums.data + from * N, to - from, N, out.mutable_data_ptr(),
                       row + from, out.stride(0));
    });
  }
}

// Whether products of bfloat16 are faster here than float32's.
bool bf16_gemm() { return isa_amx() || isa_bf16(); }

}  // namespace
}  // namespace fasttax

STABLE_TORCH_LIBRARY_IMPL(fasttax, CPU, m) { m.impl("_gemm_", TORCH_BOX(&fasttax::gemm_)); }
STABLE_TORCH_LIBRARY_IMPL(fasttax, CompositeExplicitAutograd, m) {
  m.impl("_bf16_gemm", TORCH_BOX(&fasttax::bf16_gemm));
}
