// linear_sqgrad: the exact per-example diagonal Fisher of a linear layer at the price of its
// weight-gradient GEMM. Two parallel regions: pack A, then walk the tiles of F. Deterministic, and
// the same bits for any thread count: each tile of F is summed by one thread, over examples and
// tokens in order.
#include <algorithm>
#include <memory>
#include <vector>

#include "../call/float_type.h"
#include "gemm.h"
#include "parallel.h"

#define FASTTAX_KERNELS "fisher_kernels.h"
#include "isa.h"

namespace fasttax {
namespace {

constexpr int64_t kBatchSteps = 512, kBatchFloats = 100 * 1024;  // whose rows of D stay in L2
// of squares, which come and go once a batch
constexpr int64_t kPanelFloats = 1 << 20;
// products between two looks for Ctrl-C, 0.05 s of one core; blocks of A that share a pack of D;
// floats that are packed between two looks
constexpr int64_t kCallProducts = 1 << 30, kCallBlocks = 4, kCallFloats = 1 << 22;

// A float that squares are added to one by one is off by about 1e-8 an addition where they are
// equal: what so many added is set aside in doubles. Of examples of few tokens more of them, for
// the panels come and go with it.
constexpr int64_t kAsideExamples = 256, kAsideMost = 512, kAsideSteps = 4096;
// single tokens, of which kFold are added in registers first, and rows of F whose doubles are held
constexpr int64_t kAsideTokens = 1 << 15, kAsideRows = 256;

void sqgrad_double(const double* a, int64_t a_stride, const double* d, int64_t d_stride,
                   const int64_t* starts, int64_t examples, const double* weights, int64_t I,
                   int64_t O, double* out) {
  interruptible_for("linear_sqgrad_", 0, O, 1, [&](int64_t begin, int64_t end, Watch&) {
    std::vector<double> g(I);
    for (int64_t o = begin; o < end; ++o)
      for (int64_t n = 0; n < examples; ++n) {
        std::fill(g.begin(), g.end(), 0.0);
        for (int64_t t = starts[n]; t < starts[n + 1]; ++t)
          for (int64_t i = 0; i < I; ++i) g[i] += d[t * d_stride + o] * a[t * a_stride + i];
        for (int64_t i = 0; i < I; ++i)
          out[o * I + i] += (weights ? weights[n] : 1.0) * g[i] * g[i];
      }
  });
}

// F += (d * d)^T (a * a) over R tokens, d (R, O) and a (R, I) as gemm takes them.
void add_products(int64_t O, int64_t I, int64_t R, const GemmMatrix& d, const GemmMatrix& a,
                  float* f) {
  if (R <= kAsideTokens) {
    gemm(O, I, R, d, a, f, I, true, false);
    return;
  }
  const auto from = [](const GemmMatrix& x, int64_t row, int64_t col) {
    GemmMatrix part = x;
    const int64_t item = x.type == FloatType::kFloat ? 4 : 2;
    part.data = static_cast<const char*>(x.data) + (row * x.stride + col) * item;
    if (x.weight) part.weight = x.weight + row;
    return part;
  };
  std::vector<float> part(size_t(kAsideRows * I));
  std::vector<double> total(part.size());
  for (int64_t o = 0; o < O; o += kAsideRows) {
    const int64_t rows = std::min(kAsideRows, O - o);
    std::copy(f + o * I, f + (o + rows) * I, total.begin());
    for (int64_t t = 0; t < R; t += kAsideTokens) {
      gemm(rows, I, std::min(kAsideTokens, R - t), from(d, t, o), from(a, t, 0), part.data(), I,
           false, false);
      for (int64_t j = 0; j < rows * I; ++j) total[size_t(j)] += double(part[size_t(j)]);
    }
    for (int64_t j = 0; j < rows * I; ++j) f[o * I + j] = float(total[size_t(j)]);
  }
}

// inputs (R, I), grad_outputs (R, O), cu_seqlens (n + 1) int64 from 0 to R, out (O, I) accumulated
// into.
void linear_sqgrad_(Tensor out, Tensor inputs, Tensor grad_outputs, Tensor cu_seqlens,
                    std::optional<Tensor> example_weight) {
  const char* op = "linear_sqgrad_";
  FASTTAX_CHECK(
      inputs.dim() == 2 && grad_outputs.dim() == 2 && inputs.size(0) == grad_outputs.size(0), op,
      "inputs (R, I) and grad_outputs (R, O) must have one R");
  const int64_t R = inputs.size(0), I = inputs.size(1), O = grad_outputs.size(1),
                examples = cu_seqlens.numel() - 1;
  FASTTAX_CHECK(out.dim() == 2 && out.size(0) == O && out.size(1) == I && out.is_contiguous(), op,
                "out: expected a contiguous (", O, ", ", I, ") tensor");
  FASTTAX_CHECK(
      cu_seqlens.scalar_type() == ScalarType::Long && cu_seqlens.is_contiguous() && examples >= 0,
      op, "cu_seqlens: expected a contiguous int64 tensor of at least one element");
  const FloatType a_type = float_type(inputs, op, "inputs"),
                  d_type = float_type(grad_outputs, op, "grad_outputs");
  const bool wide = a_type == FloatType::kDouble;
  FASTTAX_CHECK(wide == (d_type == FloatType::kDouble) &&
                    out.scalar_type() == (wide ? ScalarType::Double : ScalarType::Float),
                op, "out must be float32, or float64 where inputs and grad_outputs both are");
  const int64_t* starts = static_cast<const int64_t*>(cu_seqlens.const_data_ptr());
  bool single = examples > 0;  // every example is one token
  for (int64_t n = 0; n < examples; ++n) {
    FASTTAX_CHECK(starts[n] <= starts[n + 1], op, "cu_seqlens: must not decrease");
    single &= starts[n + 1] - starts[n] <= 1;
  }
  FASTTAX_CHECK(starts[0] == 0 && starts[examples] == R, op, "cu_seqlens: must run from 0 to ", R,
                " (the number of rows), got ", starts[0], " to ", starts[examples]);
  const void* weights = nullptr;
  if (example_weight.has_value()) {
    FASTTAX_CHECK(example_weight->numel() == examples && example_weight->is_contiguous() &&
                      example_weight->scalar_type() == out.scalar_type(),
                  op, "example_weight: expected ", examples, " contiguous values in out's dtype");
    weights = example_weight->const_data_ptr();
  }
  if (R == 0 || I == 0 || O == 0) return;
  FASTTAX_CHECK((inputs.stride(1) == 1 || I == 1) && (grad_outputs.stride(1) == 1 || O == 1), op,
                "inputs and grad_outputs: the last dimension must be contiguous");
  if (wide) {
    sqgrad_double(static_cast<const double*>(inputs.const_data_ptr()), inputs.stride(0),
                  static_cast<const double*>(grad_outputs.const_data_ptr()), grad_outputs.stride(0),
                  starts, examples, static_cast<const double*>(weights), I, O,
                  static_cast<double*>(out.mutable_data_ptr()));
    return;
  }
  float* f = static_cast<float*>(out.mutable_data_ptr());
  if (single) {  // F = (d * d)^T (a * a)
    std::vector<float> token_weight(weights ? size_t(R) : 0);
    for (int64_t n = 0; n < examples && weights; ++n)
      if (starts[n + 1] > starts[n])
        token_weight[size_t(starts[n])] = static_cast<const float*>(weights)[n];
    const GemmMatrix d{
        d_type, grad_outputs.const_data_ptr(),          grad_outputs.stride(0), false,
        true,   weights ? token_weight.data() : nullptr};
    add_products(O, I, R, d, {a_type, inputs.const_data_ptr(), inputs.stride(0), false, true}, f);
    return;
  }
  const bool bf16x2 =
      isa_bf16() && a_type == FloatType::kBFloat16 && d_type == FloatType::kBFloat16;
  std::vector<int64_t> bf16x2_starts;
  if (bf16x2) {
    bf16x2_starts.assign(1, 0);
    for (int64_t n = 0; n < examples; ++n)
      bf16x2_starts.push_back(bf16x2_starts.back() + (starts[n + 1] - starts[n] + 1) / 2);
  }
  const int64_t* bounds = bf16x2 ? bf16x2_starts.data() : starts;
  // the examples at which they begin: examples whose rows of D lie in L2 together, or one
  std::vector<int64_t> batches{0};
  for (int64_t n = 1; n < examples; ++n)
    if (bounds[n + 1] - bounds[batches.back()] > kBatchSteps) batches.push_back(n);
  batches.push_back(examples);
  int64_t longest = 0;
  for (size_t k = 1; k < batches.size(); ++k)
    longest = std::max(longest, bounds[batches[k]] - bounds[batches[k - 1]]);

  const int64_t steps = bounds[examples], rows = FASTTAX_DISPATCH(tile_rows),
                cols = FASTTAX_DISPATCH(tile_cols);
  const int64_t col_blocks = (I + cols - 1) / cols, row_blocks = (O + rows - 1) / rows,
                a_stride = (steps + 1) * cols;
  // fresh pages cost a tenth of the op: up to 64 MB stay for the next layer
  thread_local std::vector<float> kept;
  std::vector<float> fresh;
  const size_t needed = size_t(col_blocks * a_stride + cols + 16);
  std::vector<float>& packed = needed <= (size_t(1) << 24) ? kept : fresh;
  if (packed.size() < needed) packed = std::vector<float>(needed);
  float* a = packed.data() + (16 - reinterpret_cast<uintptr_t>(packed.data()) / 4 % 16) % 16;
  // Columns `from`.. of a batch's rows of `t`, in `blocks` blocks of `width`.
  const auto pack = [&](const Tensor& t, FloatType type, int64_t batch, int64_t from, int64_t total,
                        int64_t blocks, int64_t width, float* dst, int64_t stride) {
    const int64_t first = batches[size_t(batch)], last = batches[size_t(batch) + 1];
    FASTTAX_DISPATCH(pack_examples, type, bf16x2, t.const_data_ptr(), t.stride(0), starts + first,
                     last - first, from, total, blocks, width, dst, stride);
  };
  const int64_t count = int64_t(batches.size()) - 1;
  const int64_t part = std::clamp<int64_t>(kCallFloats / (cols * longest), 1, col_blocks),
                parts = (col_blocks + part - 1) / part;
  const auto pack_parts = [&](int64_t begin, int64_t end, Watch&) {
    for (int64_t j = begin; j < end; ++j) {
      const int64_t k = j / parts, block = j % parts * part;
      pack(inputs, a_type, k, block * cols, I, std::min(part, col_blocks - block), cols,
           a + block * a_stride + bounds[batches[size_t(k)]] * cols, a_stride);
    }
  };
  interruptible_for("linear_sqgrad_", 0, count * parts, 1, pack_parts);
  // Rows of F that share a block of A, which comes from L3: as many as leave their D in L2; for
  // short examples fewer, so that the panel of squares, which they read and write once an example,
  // stays in L1.
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t most =
      R < 64 * examples ? 96 : std::clamp<int64_t>(kBatchFloats / longest, 48, 192);
  // as many groups for each thread
  const int64_t rounds = (O + threads * most - 1) / (threads * most);
  const int64_t group = (row_blocks + threads * rounds - 1) / (threads * rounds),
                groups = (row_blocks + group - 1) / group;
  const int64_t tiles = group * rows * cols,
                most_blocks = std::max(kCallProducts / (tiles * longest), kCallBlocks),
                chunk =
                    std::clamp<int64_t>(std::min(kPanelFloats / tiles, most_blocks), 1, col_blocks);
  const bool sets_aside = examples > kAsideExamples;
  // a block's last step may be written a vector long
  const int64_t d_stride = longest * rows + cols;
  interruptible_for("linear_sqgrad_", 0, groups, 1, [&](int64_t begin, int64_t end, Watch& watch) {
    const std::unique_ptr<float[]> memory(
        new float[size_t(group * d_stride + (chunk + 1) * tiles + cols)]);
    // whole cache lines
    float* panels = memory.get() + (16 - reinterpret_cast<uintptr_t>(memory.get()) / 4 % 16) % 16;
    float *gathered = panels + chunk * tiles, *d = gathered + tiles;
    std::vector<double> aside;  // of the panels, from examples before those that they hold
    for (int64_t g = begin; g < end; ++g) {
      const int64_t first = g * group, blocks = std::min(row_blocks, first + group) - first;
      for (int64_t from = 0; from < col_blocks; from += chunk) {
        const int64_t to = std::min(col_blocks, from + chunk),
                      size = (to - from) * blocks * rows * cols;
        std::fill(panels, panels + size, 0.0f);
        if (sets_aside) aside.assign(size_t(size), 0.0);
        int64_t kept_from = 0;  // the first example whose squares are in the panels
        for (int64_t k = 0; k < count; ++k) {
          if (watch.stops()) return;
          pack(grad_outputs, d_type, k, first * rows, O, blocks, rows, d, d_stride);
          FisherBatch x;
          x.a = a;
          x.d = d;
          x.a_stride = a_stride;
          x.d_stride = d_stride;
          x.starts = bounds;
          x.first = batches[size_t(k)];
          x.last = batches[size_t(k) + 1];
          x.blocks = blocks;
          x.weights = static_cast<const float*>(weights);
          x.bf16x2 = bf16x2;
          FASTTAX_DISPATCH(fisher_batch, x, from, to, panels, gathered);
          const int64_t held = x.last - kept_from, tokens = starts[x.last] - starts[kept_from];
          if (!sets_aside || held < kAsideExamples || (held < kAsideMost && tokens < kAsideSteps))
            continue;
          for (int64_t j = 0; j < size; ++j) {
            aside[size_t(j)] += double(panels[j]);
            panels[j] = 0.0f;
          }
          kept_from = x.last;
        }
        if (sets_aside)
          for (int64_t j = 0; j < size; ++j)
            panels[j] = float(aside[size_t(j)] + double(panels[j]));
        FASTTAX_DISPATCH(fisher_add, panels, blocks, from, to, f + first * rows * I,
                         std::min(O - first * rows, blocks * rows), I);
      }
    }
  });
}

}  // namespace
}  // namespace fasttax

STABLE_TORCH_LIBRARY_IMPL(fasttax, CPU, m) {
  m.impl("linear_sqgrad_", TORCH_BOX(&fasttax::linear_sqgrad_));
}
