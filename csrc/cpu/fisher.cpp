// linear_sqgrad: the exact per-example diagonal Fisher of a linear layer at the price of its weight-gradient GEMM.
// Two parallel regions: pack A, then walk the tiles of F. Deterministic, and the same bits for any thread count:
// each tile of F is summed by one thread, over examples and tokens in order.
#include <memory>

#include "../check.h"

namespace fasttax {
enum class LogitType { kFloat, kBFloat16, kFloat16, kDouble };
}

#define FASTTAX_KERNELS "fisher_kernels.h"
#include "isa.h"

namespace fasttax {
namespace {

LogitType float_type(const Tensor& t, const char* op, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return LogitType::kFloat;
    case ScalarType::BFloat16: return LogitType::kBFloat16;
    case ScalarType::Half: return LogitType::kFloat16;
    case ScalarType::Double: return LogitType::kDouble;
    default: FASTTAX_CHECK(false, op, name, ": dtype must be float32, float64, bfloat16 or float16");
  }
  return LogitType::kFloat;
}

void sqgrad_double(const double* a, int64_t a_stride, const double* d, int64_t d_stride, const int64_t* starts, int64_t examples,
                   const double* weights, int64_t I, int64_t O, double* out) {
  torch::stable::parallel_for(0, O, 1, [&](int64_t begin, int64_t end) {
    std::vector<double> g(I);
    for (int64_t o = begin; o < end; ++o)
      for (int64_t n = 0; n < examples; ++n) {
        std::fill(g.begin(), g.end(), 0.0);
        for (int64_t t = starts[n]; t < starts[n + 1]; ++t)
          for (int64_t i = 0; i < I; ++i) g[i] += d[t * d_stride + o] * a[t * a_stride + i];
        for (int64_t i = 0; i < I; ++i) out[o * I + i] += (weights ? weights[n] : 1.0) * g[i] * g[i];
      }
  });
}

// inputs (R, I), grad_outputs (R, O), cu_seqlens (n + 1) int64 from 0 to R, out (O, I) accumulated into.
void linear_sqgrad_(Tensor out, Tensor inputs, Tensor grad_outputs, Tensor cu_seqlens, std::optional<Tensor> example_weight) {
  const char* op = "linear_sqgrad_";
  FASTTAX_CHECK(inputs.dim() == 2 && grad_outputs.dim() == 2 && inputs.size(0) == grad_outputs.size(0), op,
                "inputs (R, I) and grad_outputs (R, O) must have one R");
  const int64_t R = inputs.size(0), I = inputs.size(1), O = grad_outputs.size(1), examples = cu_seqlens.numel() - 1;
  FASTTAX_CHECK(out.dim() == 2 && out.size(0) == O && out.size(1) == I && out.is_contiguous(), op, "out: expected a contiguous (", O, ", ",
                I, ") tensor");
  FASTTAX_CHECK(cu_seqlens.scalar_type() == ScalarType::Long && cu_seqlens.is_contiguous() && examples >= 0, op,
                "cu_seqlens: expected a contiguous int64 tensor of at least one element");
  const LogitType a_type = float_type(inputs, op, "inputs"), d_type = float_type(grad_outputs, op, "grad_outputs");
  const bool wide = a_type == LogitType::kDouble;
  FASTTAX_CHECK(wide == (d_type == LogitType::kDouble) && out.scalar_type() == (wide ? ScalarType::Double : ScalarType::Float), op,
                "out must be float32, or float64 where inputs and grad_outputs both are");
  const int64_t* starts = static_cast<const int64_t*>(cu_seqlens.const_data_ptr());
  bool single = examples > 0;  // every example is one token
  for (int64_t n = 0; n < examples; ++n) {
    FASTTAX_CHECK(starts[n] <= starts[n + 1], op, "cu_seqlens: must not decrease");
    single &= starts[n + 1] - starts[n] <= 1;
  }
  FASTTAX_CHECK(starts[0] == 0 && starts[examples] == R, op, "cu_seqlens: must run from 0 to ", R, " (the number of rows), got ", starts[0],
                " to ", starts[examples]);
  const void* weights = nullptr;
  if (example_weight.has_value()) {
    FASTTAX_CHECK(
        example_weight->numel() == examples && example_weight->is_contiguous() && example_weight->scalar_type() == out.scalar_type(), op,
        "example_weight: expected ", examples, " contiguous values in out's dtype");
    weights = example_weight->const_data_ptr();
  }
  if (R == 0 || I == 0 || O == 0) return;
  FASTTAX_CHECK((inputs.stride(1) == 1 || I == 1) && (grad_outputs.stride(1) == 1 || O == 1), op,
                "inputs and grad_outputs: the last dimension must be contiguous");
  if (wide) {
    sqgrad_double(static_cast<const double*>(inputs.const_data_ptr()), inputs.stride(0),
                  static_cast<const double*>(grad_outputs.const_data_ptr()), grad_outputs.stride(0), starts, examples,
                  static_cast<const double*>(weights), I, O, static_cast<double*>(out.mutable_data_ptr()));
    return;
  }
  std::vector<float> token_weight;
  if (single && weights) {
    token_weight.resize(R);
    for (int64_t n = 0; n < examples; ++n)
      if (starts[n + 1] > starts[n]) token_weight[starts[n]] = static_cast<const float*>(weights)[n];
  }
  const bool pairs = !single && isa_bf16() && a_type == LogitType::kBFloat16 && d_type == LogitType::kBFloat16;
  std::vector<int64_t> pair_starts;
  if (pairs) {
    pair_starts.assign(1, 0);
    for (int64_t n = 0; n < examples; ++n) pair_starts.push_back(pair_starts.back() + (starts[n + 1] - starts[n] + 1) / 2);
  }
  const int64_t* bounds = pairs ? pair_starts.data() : starts;
  const int64_t steps = bounds[examples], rows = FASTTAX_DISPATCH(tile_rows), cols = FASTTAX_DISPATCH(tile_cols);
  const int64_t col_blocks = (I + cols - 1) / cols, row_blocks = (O + rows - 1) / rows;
  const int64_t block_size = steps * cols;
  thread_local std::vector<float> kept;  // fresh pages cost a tenth of the op: up to 64 MB stay for the next layer
  std::vector<float> fresh;
  const size_t needed = size_t((col_blocks * block_size + cols) + 16);
  std::vector<float>& packed = needed <= (size_t(1) << 24) ? kept : fresh;
  if (packed.size() < needed) packed = std::vector<float>(needed);
  float* a = packed.data() + (16 - reinterpret_cast<uintptr_t>(packed.data()) / 4 % 16) % 16;
  const void *a_src = inputs.const_data_ptr(), *d_src = grad_outputs.const_data_ptr();
  const auto pack = [&](LogitType type, const void* src, int64_t stride, int64_t first, int64_t total, int64_t blocks, int64_t width,
                        const float* scale, float* dst, int64_t dst_stride) {
    if (pairs)
      FASTTAX_DISPATCH(pack_pairs, static_cast<const uint16_t*>(src), stride, starts, examples, first, total, blocks, width,
                       reinterpret_cast<uint32_t*>(dst), dst_stride);
    else FASTTAX_DISPATCH(pack_blocks, type, src, stride, R, first, total, blocks, width, single, scale, dst, dst_stride);
  };
  constexpr int64_t kTogether = 4;  // column blocks packed at once
  torch::stable::parallel_for(0, (col_blocks + kTogether - 1) / kTogether, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin * kTogether; b < std::min(col_blocks, end * kTogether); b += kTogether)
      pack(a_type, a_src, inputs.stride(0), b * cols, I, std::min(kTogether, col_blocks - b), cols, nullptr, a + b * block_size,
           block_size);
  });
  // Rows of F that share a block of A: many, since it comes from L3; for short examples fewer, so that the panel of squares, which
  // they read and write once an example, stays in L1; and never so many that a thread is left without work.
  const int64_t most = R < 64 * examples && !single ? 96 : 384, threads = torch::stable::get_num_threads();
  const int64_t group = std::max<int64_t>(1, std::min(most, (O + threads - 1) / threads) / rows), groups = (row_blocks + group - 1) / group;
  const int64_t d_stride = steps * rows + cols;  // a block's last step may be written a vector long
  float* f = static_cast<float*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> memory(new float[group * (d_stride + 2 * rows * cols) + cols]);
    float* panel = memory.get() + (16 - reinterpret_cast<uintptr_t>(memory.get()) / 4 % 16) % 16;  // whole cache lines
    float *gathered = panel + group * rows * cols, *d = gathered + group * rows * cols;
    for (int64_t g = begin; g < end; ++g) {
      const int64_t first = g * group, last = std::min(row_blocks, first + group);
      pack(d_type, d_src, grad_outputs.stride(0), first * rows, O, last - first, rows, single && weights ? token_weight.data() : nullptr, d,
           d_stride);
      for (int64_t c = 0; c < col_blocks; ++c) {
        FASTTAX_DISPATCH(fisher_panel, a + c * block_size, d, d_stride, bounds, examples,
                         single ? nullptr : static_cast<const float*>(weights), single, pairs, f + first * rows * I + c * cols, I,
                         std::min(O, last * rows) - first * rows, std::min(cols, I - c * cols), panel, gathered);
      }
    }
  });
}

}  // namespace
}  // namespace fasttax

STABLE_TORCH_LIBRARY_IMPL(fasttax, CPU, m) { m.impl("linear_sqgrad_", TORCH_BOX(&fasttax::linear_sqgrad_)); }
