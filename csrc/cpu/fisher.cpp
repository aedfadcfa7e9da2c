// linear_sqgrad: the exact per-example diagonal Fisher of a linear layer at the price of its weight-gradient GEMM.
// Two parallel regions: pack A, then walk the tiles of F. Deterministic, and the same bits for any thread count:
// each tile of F is summed by one thread, over examples and tokens in order.
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
  FASTTAX_CHECK((inputs.stride(1) == 1 || I == 1) && (grad_outputs.stride(1) == 1 || O == 1), op, "inputs and grad_outputs: the last dimension must be contiguous");
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
  const int64_t rows = FASTTAX_DISPATCH(tile_rows), cols = FASTTAX_DISPATCH(tile_cols);
  const int64_t col_blocks = (I + cols - 1) / cols, row_blocks = (O + rows - 1) / rows;
  const Tensor packed = torch::stable::empty({col_blocks * R * cols}, ScalarType::Float);
  float* a = static_cast<float*>(packed.mutable_data_ptr());
  const void *a_src = inputs.const_data_ptr(), *d_src = grad_outputs.const_data_ptr();
  torch::stable::parallel_for(0, col_blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      FASTTAX_DISPATCH(pack_block, a_type, a_src, inputs.stride(0), R, b * cols, std::min(cols, I - b * cols), cols, single, nullptr,
                       a + b * R * cols);
  });
  // A group of row blocks (about 96 rows of D) shares each block of A while it is in L2.
  const int64_t group = std::max<int64_t>(1, 96 / rows), groups = (row_blocks + group - 1) / group;
  float* f = static_cast<float*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> d(group * R * rows), tile(rows * cols);
    for (int64_t g = begin; g < end; ++g) {
      const int64_t first = g * group, last = std::min(row_blocks, first + group);
      for (int64_t b = first; b < last; ++b)
        FASTTAX_DISPATCH(pack_block, d_type, d_src, grad_outputs.stride(0), R, b * rows, std::min(rows, O - b * rows), rows, single,
                         single && weights ? token_weight.data() : nullptr, d.data() + (b - first) * R * rows);
      for (int64_t c = 0; c < col_blocks; ++c)
        for (int64_t b = first; b < last; ++b) {
          const int64_t live_rows = std::min(rows, O - b * rows), live_cols = std::min(cols, I - c * cols);
          std::fill(tile.begin(), tile.end(), 0.0f);
          FASTTAX_DISPATCH(fisher_tile, a + c * R * cols, d.data() + (b - first) * R * rows, starts, examples,
                           single ? nullptr : static_cast<const float*>(weights), single, tile.data());
          for (int64_t r = 0; r < live_rows; ++r)
            for (int64_t j = 0; j < live_cols; ++j) f[(b * rows + r) * I + c * cols + j] += tile[r * cols + j];
        }
    }
  });
}

}  // namespace
}  // namespace fasttax

STABLE_TORCH_LIBRARY_IMPL(fasttax, CPU, m) { m.impl("linear_sqgrad_", TORCH_BOX(&fasttax::linear_sqgrad_)); }
