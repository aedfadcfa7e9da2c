// accumulate_sqgrad_: sums += weight * grad^2 over a model's whole gradient list in one call, cut into tasks as ewc.cpp cuts.
// Three passes: read sum and gradient, write the sum.
#include "../square_lists.h"

#define FASTTAX_KERNELS "fisher_squares_kernels.h"
#include "isa.h"

namespace fasttax {
namespace {

constexpr int64_t kTask = 1 << 16;  // elements

struct Task {
  EwcTensor x;
  int64_t begin, end;
};

void accumulate_sqgrad_(std::vector<Tensor> sums, std::vector<Tensor> grads, double weight) {
  std::vector<Task> tasks;
  for (const EwcTensor& x : square_lists(sums, grads))
    for (int64_t begin = 0; begin < x.numel; begin += kTask) tasks.push_back({x, begin, std::min(x.numel, begin + kTask)});
  torch::stable::parallel_for(0, int64_t(tasks.size()), 1, [&](int64_t first, int64_t last) {
    for (int64_t k = first; k < last; ++k) {
      const Task& t = tasks[k];
      if (t.x.types[0] == EwcType::kDouble) {
        auto s = static_cast<double*>(t.x.data[0]);
        auto g = static_cast<const double*>(t.x.data[3]);
        for (int64_t i = t.begin; i < t.end; ++i) s[i] += weight * g[i] * g[i];
      } else {
        FASTTAX_DISPATCH(square_run, static_cast<float*>(t.x.data[0]), t.x.data[3], t.x.types[3], float(weight), t.begin, t.end);
      }
    }
  });
}

}  // namespace
}  // namespace fasttax

STABLE_TORCH_LIBRARY_IMPL(fasttax, CPU, m) { m.impl("accumulate_sqgrad_", TORCH_BOX(&fasttax::accumulate_sqgrad_)); }
