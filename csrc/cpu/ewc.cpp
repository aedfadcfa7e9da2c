// EWC over a model's whole parameter list in one call (design: five passes over memory, read theta,
// anchor, fisher, grad, write grad). The list is cut into tasks of 64 Ki elements, one parallel
// region runs them all, and each task leaves its part of the penalty in its own slot: the sum in
// slot order does not depend on threads.
#include "../call/ewc_lists.h"

#define FASTTAX_KERNELS "ewc_kernels.h"
#include "isa.h"
#include "ewc_tasks.h"
#include "memory.h"

namespace fasttax {
namespace {

double run_double(EwcMode mode, const EwcTask& t, double scale) {
  auto theta = static_cast<double*>(t.data[0]), grad = static_cast<double*>(t.data[3]);
  auto anchor = static_cast<const double*>(t.data[1]),
       fisher = static_cast<const double*>(t.data[2]);
  double total = 0;
  for (int64_t i = t.begin; i < t.end; ++i) {
    if (mode == EwcMode::kProx) {
      theta[i] = ewc_prox(theta[i], anchor[i], 1.0, scale * fisher[i], 1.0);
      continue;
    }
    total += ewc_term(theta[i], anchor[i], fisher[i]);
    if (mode == EwcMode::kAdd) grad[i] += scale * ewc_pull(theta[i], anchor[i], fisher[i]);
    if (mode == EwcMode::kWrite) grad[i] = scale * ewc_pull(theta[i], anchor[i], fisher[i]);
  }
  return total;
}

double run(EwcMode mode, const std::vector<EwcTask>& tasks, double scale) {
  std::vector<double> parts(tasks.size());
  torch::stable::parallel_for(0, int64_t(tasks.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const EwcTask& t = tasks[i];
      parts[i] = t.types[0] == EwcType::kDouble
                     ? run_double(mode, t, scale)
                     : FASTTAX_DISPATCH(ewc_task, mode, t.data, t.types, t.scales, t.begin, t.end,
                                        ewc_step(scale));
    }
  });
  double total = 0;
  for (double part : parts) total += part;
  return total;
}

Tensor scalar_like(const std::vector<Tensor>& params, double value) {
  const bool wide = !params.empty() && params[0].scalar_type() == ScalarType::Double;
  Tensor out = torch::stable::empty({}, wide ? ScalarType::Double : ScalarType::Float);
  if (wide) *static_cast<double*>(out.mutable_data_ptr()) = value;
  else *static_cast<float*>(out.mutable_data_ptr()) = float(value);
  return out;
}

Tensor ewc_penalty(std::vector<Tensor> params, std::vector<Tensor> anchors,
                   std::vector<Tensor> fishers, std::vector<Tensor> scales, double strength) {
  const auto tasks = ewc_tasks(ewc_lists("ewc_penalty", params, anchors, fishers, scales, nullptr));
  return scalar_like(params, strength / 2 * run(EwcMode::kValue, tasks, 0));
}

std::vector<Tensor> ewc_penalty_backward(Tensor grad, std::vector<Tensor> params,
                                         std::vector<Tensor> anchors, std::vector<Tensor> fishers,
                                         std::vector<Tensor> scales, double strength) {
  std::vector<Tensor> d_params;
  for (const Tensor& p : params) {
    d_params.push_back(torch::stable::empty_like(p));
    prefer_huge_pages(d_params.back());
  }
  const auto tasks =
      ewc_tasks(ewc_lists("ewc_penalty_backward", params, anchors, fishers, scales, &d_params));
  const double upstream = grad.scalar_type() == ScalarType::Double
                              ? *static_cast<const double*>(grad.const_data_ptr())
                              : *static_cast<const float*>(grad.const_data_ptr());
  run(EwcMode::kWrite, tasks, upstream * strength);
  return d_params;
}

Tensor ewc_add_grad_(std::vector<Tensor> params, std::vector<Tensor> grads,
                     std::vector<Tensor> anchors, std::vector<Tensor> fishers,
                     std::vector<Tensor> scales, double strength, double scale) {
  const auto tasks =
      ewc_tasks(ewc_lists("ewc_add_grad_", params, anchors, fishers, scales, &grads));
  return scalar_like(params, strength / 2 * run(EwcMode::kAdd, tasks, strength * scale));
}

void ewc_prox_(std::vector<Tensor> params, std::vector<Tensor> anchors, std::vector<Tensor> fishers,
               std::vector<Tensor> scales, double strength_times_lr) {
  run(EwcMode::kProx, ewc_tasks(ewc_lists("ewc_prox_", params, anchors, fishers, scales, nullptr)),
      strength_times_lr);
}

}  // namespace
}  // namespace fasttax

STABLE_TORCH_LIBRARY_IMPL(fasttax, CPU, m) {
  m.impl("ewc_penalty", TORCH_BOX(&fasttax::ewc_penalty));
  m.impl("ewc_penalty_backward", TORCH_BOX(&fasttax::ewc_penalty_backward));
  m.impl("ewc_add_grad_", TORCH_BOX(&fasttax::ewc_add_grad_));
  m.impl("ewc_prox_", TORCH_BOX(&fasttax::ewc_prox_));
}
