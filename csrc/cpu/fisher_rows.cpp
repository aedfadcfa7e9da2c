// bias_sqgrad, norm_sqgrad, embedding_sqgrad: one pass over the gradient rows, no per-example sums
// in memory. Threads divide the columns, so that every sum has one order: deterministic, and the
// same bits for any thread count.
#include <algorithm>

#include "../call/float_type.h"
#include "parallel.h"

#define FASTTAX_KERNELS "fisher_rows_kernels.h"
#include "isa.h"

namespace fasttax {
namespace {

// Rows order[starts[r] .. starts[r + 1]) are summed, squared, and added to row to[r] of out; the
// runs of one row of out stand side by side.
struct Runs {
  std::vector<int64_t> order, starts, to;
  std::vector<double> weights;
  bool weighted = false;
};

void square(const char* op, const Runs& runs, const Tensor* x, const Tensor& d, Tensor& out) {
  const FloatType type = float_type(d, op, "grad_outputs");
  const int64_t width = d.size(1), count = int64_t(runs.starts.size()) - 1;
  FASTTAX_CHECK(out.is_contiguous() &&
                    out.scalar_type() ==
                        (type == FloatType::kDouble ? ScalarType::Double : ScalarType::Float),
                op, "out must be contiguous, and float32, or float64 where grad_outputs is");
  FASTTAX_CHECK((d.stride(1) == 1 || width == 1) && (!x || x->stride(1) == 1 || width == 1), op,
                "the last dimension must be contiguous");
  FASTTAX_CHECK(!x || (x->scalar_type() == d.scalar_type() && x->dim() == 2 &&
                       x->size(0) == d.size(0) && x->size(1) == width),
                op, "inputs must be as grad_outputs in dtype and shape");
  if (width == 0 || count <= 0) return;
  const int64_t* order = runs.order.empty() ? nullptr : runs.order.data();
  const int64_t* to = runs.to.empty() ? nullptr : runs.to.data();
  const int64_t x_stride = x ? x->stride(0) : 0, out_stride = width;
  if (type == FloatType::kDouble) {
    auto from = static_cast<const double*>(d.const_data_ptr());
    auto other = x ? static_cast<const double*>(x->const_data_ptr()) : nullptr;
    auto f = static_cast<double*>(out.mutable_data_ptr());
    interruptible_for(op, 0, width, 16, [&](int64_t begin, int64_t end, Watch&) {
      for (int64_t r = 0; r < count; ++r)
        for (int64_t j = begin; j < end; ++j) {
          double sum = 0;
          for (int64_t t = runs.starts[r]; t < runs.starts[r + 1]; ++t) {
            const int64_t row = order ? order[t] : t;
            sum += from[row * d.stride(0) + j] * (other ? other[row * x_stride + j] : 1.0);
          }
          f[(to ? to[r] : 0) * out_stride + j] +=
              sum * sum * (runs.weighted ? runs.weights[r] : 1.0);
        }
    });
    return;
  }
  const std::vector<float> weights(runs.weights.begin(), runs.weights.end());
  const void *from = d.const_data_ptr(), *other = x ? x->const_data_ptr() : nullptr;
  float* f = static_cast<float*>(out.mutable_data_ptr());
  interruptible_for(op, 0, (width + 63) / 64, 1, [&](int64_t begin, int64_t end, Watch&) {
    FASTTAX_DISPATCH(square_runs_of, type, other, x_stride, from, d.stride(0), order,
                     runs.starts.data(), count, to, runs.weighted ? weights.data() : nullptr,
                     begin * 64, std::min(width, end * 64) - begin * 64, f, out_stride);
  });
}

std::vector<int64_t> checked(const char* op, const Tensor& cu_seqlens, int64_t R) {
  FASTTAX_CHECK(cu_seqlens.scalar_type() == ScalarType::Long && cu_seqlens.is_contiguous() &&
                    cu_seqlens.numel() > 0,
                op, "cu_seqlens: expected a contiguous int64 tensor of at least one element");
  auto p = static_cast<const int64_t*>(cu_seqlens.const_data_ptr());
  std::vector<int64_t> starts(p, p + cu_seqlens.numel());
  FASTTAX_CHECK(
      starts.front() == 0 && starts.back() == R && std::is_sorted(starts.begin(), starts.end()), op,
      "cu_seqlens: must rise from 0 to ", R, " (the number of rows)");
  return starts;
}

std::vector<double> values(const char* op, const Tensor& weight, size_t examples,
                           ScalarType dtype) {
  FASTTAX_CHECK(
      size_t(weight.numel()) == examples && weight.is_contiguous() && weight.scalar_type() == dtype,
      op, "example_weight: expected ", examples, " contiguous values in out's dtype");
  std::vector<double> out(examples);
  for (size_t n = 0; n < examples; ++n)
    out[n] = dtype == ScalarType::Double
                 ? static_cast<const double*>(weight.const_data_ptr())[n]
                 : double(static_cast<const float*>(weight.const_data_ptr())[n]);
  return out;
}

void add_rows(const char* op, Tensor& out, const Tensor* x, const Tensor& d,
              const Tensor& cu_seqlens, const std::optional<Tensor>& weight) {
  FASTTAX_CHECK(d.dim() == 2 && out.numel() == d.size(1), op,
                "grad_outputs (R, O) and out (O) must have one O");
  Runs runs;
  runs.starts = checked(op, cu_seqlens, d.size(0));
  runs.weighted = weight.has_value();
  if (weight) runs.weights = values(op, *weight, runs.starts.size() - 1, out.scalar_type());
  square(op, runs, x, d, out);
}

void bias_sqgrad_(Tensor out, Tensor grad_outputs, Tensor cu_seqlens,
                  std::optional<Tensor> example_weight) {
  add_rows("bias_sqgrad_", out, nullptr, grad_outputs, cu_seqlens, example_weight);
}

void norm_sqgrad_(Tensor out, Tensor inputs, Tensor grad_outputs, Tensor cu_seqlens,
                  std::optional<Tensor> example_weight) {
  add_rows("norm_sqgrad_", out, &inputs, grad_outputs, cu_seqlens, example_weight);
}

// `order` by key[order[i]] in [0, keys), equal ones as they stand: 11 bits of the keys at a time.
void sort_by(const int64_t* key, int64_t keys, std::vector<int64_t>& order) {
  constexpr int kBits = 11;
  std::vector<int64_t> sorted(order.size());
  for (int shift = 0; shift < 63 && (keys - 1) >> shift > 0; shift += kBits) {
    int64_t places[(1 << kBits) + 1] = {};
    const auto digit = [&](int64_t t) { return (key[t] >> shift) & ((1 << kBits) - 1); };
    for (const int64_t t : order) ++places[digit(t) + 1];
    for (int i = 0; i < 1 << kBits; ++i) places[i + 1] += places[i];
    for (const int64_t t : order) sorted[size_t(places[digit(t)]++)] = t;
    order.swap(sorted);
  }
}

// ids (R) int64; skip: an id whose row takes no gradient, or -1.
void embedding_sqgrad_(Tensor out, Tensor ids, Tensor grad_outputs, Tensor cu_seqlens,
                       std::optional<Tensor> example_weight, int64_t skip) {
  const char* op = "embedding_sqgrad_";
  const int64_t R = ids.numel();
  FASTTAX_CHECK(ids.scalar_type() == ScalarType::Long && ids.is_contiguous() &&
                    grad_outputs.dim() == 2 && grad_outputs.size(0) == R,
                op, "ids (R) must be contiguous int64, grad_outputs (R, H)");
  FASTTAX_CHECK(out.dim() == 2 && out.size(1) == grad_outputs.size(1), op,
                "out (V, H) and grad_outputs (R, H) must have one H");
  const std::vector<int64_t> bounds = checked(op, cu_seqlens, R);
  std::vector<double> weights;
  if (example_weight) weights = values(op, *example_weight, bounds.size() - 1, out.scalar_type());
  auto id = static_cast<const int64_t*>(ids.const_data_ptr());
  for (int64_t t = 0; t < R; ++t)
    FASTTAX_CHECK(id[t] >= 0 && id[t] < out.size(0), op, "ids: expected values in [0, ",
                  out.size(0), "), got ", id[t]);
  // tokens by id, then as they come: a row of out has its examples side by side
  Runs runs;
  runs.weighted = example_weight.has_value();
  runs.order.reserve(size_t(R));
  std::vector<int64_t> example(static_cast<size_t>(R));
  for (size_t n = 0; n + 1 < bounds.size(); ++n)
    for (int64_t t = bounds[n]; t < bounds[n + 1]; ++t) {
      example[size_t(t)] = int64_t(n);
      if (id[t] != skip) runs.order.push_back(t);
    }
  sort_by(id, out.size(0), runs.order);
  for (size_t i = 0; i < runs.order.size(); ++i) {
    const int64_t t = runs.order[i], n = example[size_t(t)];
    if (i > 0 && id[t] == runs.to.back() && n == example[size_t(runs.order[i - 1])]) continue;
    runs.starts.push_back(int64_t(i));
    runs.to.push_back(id[t]);
    if (runs.weighted) runs.weights.push_back(weights[size_t(n)]);
  }
  runs.starts.push_back(int64_t(runs.order.size()));
  square(op, runs, nullptr, grad_outputs, out);
}

}  // namespace
}  // namespace fasttax

STABLE_TORCH_LIBRARY_IMPL(fasttax, CPU, m) {
  m.impl("bias_sqgrad_", TORCH_BOX(&fasttax::bias_sqgrad_));
  m.impl("norm_sqgrad_", TORCH_BOX(&fasttax::norm_sqgrad_));
  m.impl("embedding_sqgrad_", TORCH_BOX(&fasttax::embedding_sqgrad_));
}
