// AdamW with EWC over a whole parameter group in one call: the penalty costs the reads of fisher
// and anchor, not passes of its own (7 passes become 9; AdamW, then a penalty into the gradient,
// makes 12). Tasks of 64 Ki elements, one parallel region, each task's part of the penalty in its
// own slot: the sum does not depend on threads.
#include "../call/adamw_lists.h"
#include "../math/adamw.h"
#include "parallel.h"

#define FASTTAX_KERNELS "adamw_kernels.h"
#include "isa.h"

namespace fasttax {
namespace {

constexpr int64_t kTask = 1 << 16;

double value_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Double: return *static_cast<const double*>(t.const_data_ptr());
    case ScalarType::Float: return *static_cast<const float*>(t.const_data_ptr());
    default:
      FASTTAX_CHECK(false, "ewc_adamw_",
                    "lr, grad_scale and found_inf: expected a float32 or float64 value");
      return 0;
  }
}

double take_step(const AdamWTensor& t) {  // counts, and returns the count
  if (t.step_double) return *static_cast<double*>(t.step) += 1;
  return double(*static_cast<float*>(t.step) += 1);
}

template <AdamWMode mode>
double run_double(const AdamWTensor& t, int64_t begin, int64_t end, const AdamWStep<double>& k) {
  const auto at = [&](AdamWOperand o) { return static_cast<double*>(t.data[o]); };
  double total = 0, none = 0;
  for (int64_t i = begin; i < end; ++i) {
    double& theta = at(kAwTheta)[i];
    const double anchor = mode == AdamWMode::kPlain ? 0 : at(kAwAnchor)[i],
                 fisher = at(kAwFisher) ? at(kAwFisher)[i] : 0;
    const auto root = [](double a) { return std::sqrt(a); };
    const auto as_it_is = [](double a) { return a; };
    double& most = at(kAwMax) ? at(kAwMax)[i] : none;
    total += adamw_element<mode>(theta, anchor, fisher, at(kAwGrad)[i], at(kAwFirst)[i],
                                 at(kAwSecond)[i], most, at(kAwMax) != nullptr, !at(kAwFisher), k,
                                 root, as_it_is, 1.0);
  }
  return total;
}

Tensor ewc_adamw_(std::vector<Tensor> params, std::vector<Tensor> grads,
                  std::vector<Tensor> exp_avgs, std::vector<Tensor> exp_avg_sqs,
                  std::vector<Tensor> max_exp_avg_sqs, std::vector<Tensor> steps,
                  std::vector<Tensor> anchors, std::vector<Tensor> fishers,
                  std::vector<Tensor> scales, bool prox, double strength, double second_moment,
                  Tensor lr, double beta1, double beta2, double eps, double weight_decay,
                  bool maximize, std::optional<Tensor> grad_scale,
                  std::optional<Tensor> found_inf) {
  const auto tensors = adamw_lists(
      "ewc_adamw_",
      {params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, anchors, fishers, scales},
      prox ? AdamWMode::kProx : AdamWMode::kGrad);
  const bool wide = !params.empty() && params[0].scalar_type() == ScalarType::Double;
  Tensor out = torch::stable::empty({}, wide ? ScalarType::Double : ScalarType::Float);
  double total = 0;
  if (!found_inf.has_value() || value_of(*found_inf) == 0) {
    const AdamWOptions options{value_of(lr), beta1,    beta2,         eps,
                               weight_decay, strength, second_moment, maximize};
    const double inv_grad_scale = grad_scale.has_value() ? 1 / value_of(*grad_scale) : 1;
    struct Task {
      size_t tensor;
      int64_t begin, end;
    };
    std::vector<Task> tasks;
    std::vector<AdamWStep<float>> narrow;
    std::vector<AdamWStep<double>> exact;
    for (size_t i = 0; i < tensors.size(); ++i) {
      const double t = take_step(tensors[i]);
      narrow.push_back(adamw_step<float>(options, tensors[i].mode, options.lr, inv_grad_scale, t));
      exact.push_back(adamw_step<double>(options, tensors[i].mode, options.lr, inv_grad_scale, t));
      for (int64_t begin = 0; begin < tensors[i].numel; begin += kTask)
        tasks.push_back({i, begin, std::min(tensors[i].numel, begin + kTask)});
    }
    std::vector<double> parts(tasks.size());
    parallel_for(0, int64_t(tasks.size()), 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const Task& task = tasks[i];
        const AdamWTensor& t = tensors[task.tensor];
        const AdamWStep<double>& k = exact[task.tensor];
        if (t.types[kAwTheta] != EwcType::kDouble)
          parts[i] = FASTTAX_DISPATCH(adamw_task, t, task.begin, task.end, narrow[task.tensor]);
        else if (t.mode == AdamWMode::kPlain)
          parts[i] = run_double<AdamWMode::kPlain>(t, task.begin, task.end, k);
        else if (t.mode == AdamWMode::kGrad)
          parts[i] = run_double<AdamWMode::kGrad>(t, task.begin, task.end, k);
        else parts[i] = run_double<AdamWMode::kProx>(t, task.begin, task.end, k);
      }
    });
    for (double part : parts) total += part;
  }
  total *= strength / 2;
  if (wide) *static_cast<double*>(out.mutable_data_ptr()) = total;
  else *static_cast<float*>(out.mutable_data_ptr()) = float(total);
  return out;
}

}  // namespace
}  // namespace fasttax

STABLE_TORCH_LIBRARY_IMPL(fasttax, CPU, m) {
  m.impl("ewc_adamw_", TORCH_BOX(&fasttax::ewc_adamw_));
}
