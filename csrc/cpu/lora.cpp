// lora_ewc_penalty: F is read once, the dense B A never stored, value and gradients in one sweep.
// Rows of F are cut into at most 32 chunks, each with its own d_A, added up in order: the same bits
// for any number of threads.
#include "../call/ewc_lists.h"
#include "parallel.h"

#define FASTTAX_KERNELS "lora_kernels.h"
#include "isa.h"

namespace fasttax {
namespace {

// partial d_A: 32 MB at most, or two of them
constexpr int64_t kChunks = 32, kPartialFloats = 1 << 23;

double lora_double(const double* a, const double* b, const double* fisher, int64_t O, int64_t r,
                   int64_t I, double* d_a, double* d_b, Watch& watch) {
  double total = 0;
  for (int64_t o = 0; o < O && !watch.stops(); ++o)
    for (int64_t i = 0; i < I; ++i) {
      double delta = 0;
      for (int64_t k = 0; k < r; ++k) delta += b[o * r + k] * a[k * I + i];
      const double weighed = fisher[o * I + i] * delta;
      total += weighed * delta;
      for (int64_t k = 0; d_a && k < r; ++k) {
        d_a[k * I + i] += b[o * r + k] * weighed;
        d_b[o * r + k] += weighed * a[k * I + i];
      }
    }
  return total;
}

std::vector<float> packed_columns(EwcType type, const Tensor& lora_A, int64_t cols) {
  const int64_t r = lora_A.size(0), I = lora_A.size(1), blocks = (I + cols - 1) / cols;
  std::vector<float> out(blocks * r * cols, 0.0f);
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t k = 0; k < r; ++k)
      FASTTAX_DISPATCH(lora_widen, type, lora_A.const_data_ptr(), k * I + block * cols,
                       std::min(cols, I - block * cols), out.data() + (block * r + k) * cols);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> lora_ewc_penalty(Tensor lora_A, Tensor lora_B, Tensor fisher,
                                                    Tensor scales, double scale, double strength,
                                                    bool gradient) {
  const char* op = "lora_ewc_penalty";
  FASTTAX_CHECK(lora_A.dim() == 2 && lora_B.dim() == 2 && fisher.dim() == 2, op,
                "lora_A, lora_B and fisher must be matrices");
  const int64_t r = lora_A.size(0), I = lora_A.size(1), O = lora_B.size(0);
  FASTTAX_CHECK(lora_B.size(1) == r && fisher.size(0) == O && fisher.size(1) == I, op,
                "shapes must be lora_A (r, in), lora_B (out, r), fisher (out, in)");
  const EwcType a_type = ewc_type(lora_A, op, "lora_A"), b_type = ewc_type(lora_B, op, "lora_B"),
                f_type = ewc_type(fisher, op, "fisher");
  FASTTAX_CHECK(a_type != EwcType::kU8Log && b_type != EwcType::kU8Log, op,
                "only the fisher may be uint8 (u8log)");
  const bool wide = a_type == EwcType::kDouble;
  FASTTAX_CHECK(wide == (b_type == EwcType::kDouble) && wide == (f_type == EwcType::kDouble), op,
                "float64 goes with float64 throughout");
  for (const Tensor* t : {&lora_A, &lora_B, &fisher, &scales})
    FASTTAX_CHECK(t->is_contiguous() && t->is_cpu(), op, "expected contiguous CPU tensors");
  const float* block_scales = ewc_check_scales(op, 0, f_type, {scales}, {fisher});

  const ScalarType type = wide ? ScalarType::Double : ScalarType::Float;
  Tensor value = torch::stable::empty({}, type);
  Tensor d_a = torch::stable::empty({gradient ? r : 0, gradient ? I : 0}, type),
         d_b = torch::stable::empty({gradient ? O : 0, gradient ? r : 0}, type);
  const double factor = strength * scale * scale;
  if (wide) {
    double *to_a = gradient ? static_cast<double*>(d_a.mutable_data_ptr()) : nullptr,
           *to_b = gradient ? static_cast<double*>(d_b.mutable_data_ptr()) : nullptr;
    if (gradient) std::fill(to_a, to_a + r * I, 0.0), std::fill(to_b, to_b + O * r, 0.0);
    Watch watch;
    const double total = lora_double(static_cast<const double*>(lora_A.const_data_ptr()),
                                     static_cast<const double*>(lora_B.const_data_ptr()),
                                     static_cast<const double*>(fisher.const_data_ptr()), O, r, I,
                                     to_a, to_b, watch);
    watch.check(op);
    *static_cast<double*>(value.mutable_data_ptr()) = factor / 2 * total;
    for (int64_t i = 0; gradient && i < r * I; ++i) to_a[i] *= factor;
    for (int64_t i = 0; gradient && i < O * r; ++i) to_b[i] *= factor;
    return {value, d_a, d_b};
  }

  const int64_t cols = FASTTAX_DISPATCH(lora_cols), lanes = FASTTAX_DISPATCH(lora_lanes),
                strip = FASTTAX_DISPATCH(lora_strip);
  const std::vector<float> a = packed_columns(a_type, lora_A, cols);
  std::vector<float> b((O + strip) * r, 0.0f), rows_b(gradient ? O * r : 0);
  FASTTAX_DISPATCH(lora_widen, b_type, lora_B.const_data_ptr(), int64_t(0), O * r, b.data());
  const int64_t most = std::max<int64_t>(
      2, std::min(kChunks, kPartialFloats / std::max<int64_t>(1, int64_t(a.size()))));
  const int64_t rows = std::max(strip, ((O + most - 1) / most + strip - 1) / strip * strip),
                chunks = (O + rows - 1) / rows;
  std::vector<float> partial(gradient ? chunks * int64_t(a.size()) : 0);
  std::vector<double> parts(chunks);
  interruptible_for(op, 0, chunks, 1, [&](int64_t begin, int64_t end, Watch& watch) {
    std::vector<float> scratch(strip * r * lanes);
    // a strip at a time: of high ranks there are two chunks, of seconds each
    for (int64_t c = begin; c < end; ++c)
      for (int64_t row = c * rows, last = std::min(O, row + rows); row < last && !watch.stops();
           row += strip)
        parts[c] += FASTTAX_DISPATCH(lora_sum_strip, a.data(), b.data(), ewc_pointer(fisher),
                                     f_type, block_scales, r, I, row, std::min(last, row + strip),
                                     gradient ? partial.data() + c * int64_t(a.size()) : nullptr,
                                     rows_b.data(), scratch.data());
  });
  double total = 0;
  for (double part : parts) total += part;
  *static_cast<float*>(value.mutable_data_ptr()) = float(factor / 2 * total);
  if (!gradient) return {value, d_a, d_b};
  float *to_a = static_cast<float*>(d_a.mutable_data_ptr()),
        *to_b = static_cast<float*>(d_b.mutable_data_ptr());
  interruptible_for(op, 0, r, 1, [&](int64_t begin, int64_t end, Watch&) {
    std::vector<double> sums(cols);
    for (int64_t k = begin; k < end; ++k)
      for (int64_t i = 0; i < I; i += cols) {
        std::fill(sums.begin(), sums.end(), 0.0);
        for (int64_t c = 0; c < chunks; ++c) {
          const float* part = partial.data() + c * int64_t(a.size()) + i * r + k * cols;
          for (int64_t j = 0; j < cols; ++j) sums[j] += part[j];
        }
        for (int64_t j = 0; j < std::min(cols, I - i); ++j)
          to_a[k * I + i + j] = float(factor * sums[j]);
      }
  });
  for (int64_t i = 0; i < O * r; ++i) to_b[i] = float(factor * rows_b[i]);
  return {value, d_a, d_b};
}

}  // namespace
}  // namespace fasttax

STABLE_TORCH_LIBRARY_IMPL(fasttax, CPU, m) {
  m.impl("lora_ewc_penalty", TORCH_BOX(&fasttax::lora_ewc_penalty));
}
