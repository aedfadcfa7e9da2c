// label_variance_: logits -> p (1 - p), row by row in place. A row stays in L2 between its three
// sweeps: one read and one write of memory, where softmax and its complement take five passes.
#include "../call/check.h"
#include "parallel.h"

#define FASTTAX_KERNELS "fisher_labels_kernels.h"
#include "isa.h"

namespace fasttax {
namespace {

void label_variance_double(double* x, int64_t V) {
  double top = -std::numeric_limits<double>::infinity(), rest = 0, ties = 0;
  for (int64_t i = 0; i < V; ++i) top = x[i] > top ? x[i] : top;
  for (int64_t i = 0; i < V; ++i) {
    const bool is_top = x[i] == top;
    x[i] = std::exp(x[i] - top);
    (is_top ? ties : rest) += x[i];
  }
  const double others = ties - 1 + rest, total = others + 1;
  for (int64_t i = 0; i < V; ++i) x[i] *= ((1 - x[i]) + others) / (total * total);
}

// logits (N, V), float32 or float64, rows contiguous.
void label_variance_(Tensor logits) {
  const char* op = "label_variance_";
  const bool wide = logits.scalar_type() == ScalarType::Double;
  FASTTAX_CHECK(wide || logits.scalar_type() == ScalarType::Float, op,
                "logits: dtype must be float32 or float64");
  FASTTAX_CHECK(logits.dim() == 2 && (logits.stride(1) == 1 || logits.size(1) <= 1), op,
                "logits: expected (N, V) with contiguous rows");
  const int64_t V = logits.size(1), stride = logits.stride(0);
  void* data = logits.mutable_data_ptr();
  if (V == 0) return;
  interruptible_for(op, 0, logits.size(0), 1, [&](int64_t begin, int64_t end, Watch&) {
    for (int64_t n = begin; n < end; ++n)
      if (wide) label_variance_double(static_cast<double*>(data) + n * stride, V);
      else FASTTAX_DISPATCH(label_variance_row, static_cast<float*>(data) + n * stride, V);
  });
}

}  // namespace
}  // namespace fasttax

STABLE_TORCH_LIBRARY_IMPL(fasttax, CPU, m) {
  m.impl("label_variance_", TORCH_BOX(&fasttax::label_variance_));
}
