// accumulate_sqgrad_: sums += weight * grad^2 over a model's whole gradient list in one call, in
// ewc.cpp's tasks. Three passes: read sum and gradient, write the sum.
#include "../call/square_lists.h"
#include "parallel.h"

#define FASTTAX_KERNELS "fisher_squares_kernels.h"
#include "ewc_tasks.h"
#include "isa.h"

namespace fasttax {
namespace {

void accumulate_sqgrad_(std::vector<Tensor> sums, std::vector<Tensor> grads, double weight) {
  const auto tasks = ewc_tasks(square_lists(sums, grads));
  parallel_for(0, int64_t(tasks.size()), 1, [&](int64_t first, int64_t last) {
    for (int64_t k = first; k < last; ++k) {
      const EwcTask& t = tasks[k];
      if (t.types[0] == EwcType::kDouble) {
        auto s = static_cast<double*>(t.data[0]);
        auto g = static_cast<const double*>(t.data[3]);
        for (int64_t i = t.begin; i < t.end; ++i) s[i] += weight * g[i] * g[i];
      } else {
        FASTTAX_DISPATCH(square_run, static_cast<float*>(t.data[0]), t.data[3], t.types[3],
                         float(weight), t.begin, t.end);
      }
    }
  });
}

}  // namespace
}  // namespace fasttax

STABLE_TORCH_LIBRARY_IMPL(fasttax, CPU, m) {
  m.impl("accumulate_sqgrad_", TORCH_BOX(&fasttax::accumulate_sqgrad_));
}
