// EWC over a model's whole parameter list in one call (design: five passes over memory, read theta,
// anchor, fisher, grad, write grad). The list is cut into tasks of 64 Ki elements, one parallel
// region runs them all, and each task leaves its part of the penalty in its own slot: the sum in
// slot order does not depend on threads.
#include "../call/ewc_lists.h"
#include "parallel.h"

#include <limits>

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
  parallel_for(0, int64_t(tasks.size()), 1, [&](int64_t begin, int64_t end) {
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

// The product of a number and of one value, finite unless that is NaN: times a Fisher of 0 it is 0.
double timed(const char* op, const char* name, double factor, const Tensor& times,
             const std::vector<Tensor>& params) {
  const double product = factor * (ewc_is_wide(op, name, times, params)
                                       ? *static_cast<const double*>(times.const_data_ptr())
                                       : *static_cast<const float*>(times.const_data_ptr()));
  constexpr double kMost = std::numeric_limits<double>::max();
  return product > kMost ? kMost : product < -kMost ? -kMost : product;
}

double timed(const char* op, double factor, const std::optional<Tensor>& times,
             const std::vector<Tensor>& params) {
  if (!times.has_value() || params.empty()) return factor;
  return timed(op, "times", factor, *times, params);
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
  if (!params.empty())
    run(EwcMode::kWrite, tasks, timed("ewc_penalty_backward", "grad", strength, grad, params));
  return d_params;
}

Tensor ewc_add_grad_(std::vector<Tensor> params, std::vector<Tensor> grads,
                     std::vector<Tensor> anchors, std::vector<Tensor> fishers,
                     std::vector<Tensor> scales, double strength, double scale,
                     std::optional<Tensor> times) {
  const char* op = "ewc_add_grad_";
  const auto tasks = ewc_tasks(ewc_lists(op, params, anchors, fishers, scales, &grads));
  const double factor = timed(op, strength * scale, times, params);
  return scalar_like(params, strength / 2 * run(EwcMode::kAdd, tasks, factor));
}

void ewc_prox_(std::vector<Tensor> params, std::vector<Tensor> anchors, std::vector<Tensor> fishers,
               std::vector<Tensor> scales, double strength_times_lr, std::optional<Tensor> times) {
  const char* op = "ewc_prox_";
  run(EwcMode::kProx, ewc_tasks(ewc_lists(op, params, anchors, fishers, scales, nullptr)),
      timed(op, strength_times_lr, times, params));
}

}  // namespace
}  // namespace fasttax

STABLE_TORCH_LIBRARY_IMPL(fasttax, CPU, m) {
  m.impl("ewc_penalty", TORCH_BOX(&fasttax::ewc_penalty));
  m.impl("ewc_penalty_backward", TORCH_BOX(&fasttax::ewc_penalty_backward));
  m.impl("ewc_add_grad_", TORCH_BOX(&fasttax::ewc_add_grad_));
  m.impl("ewc_prox_", TORCH_BOX(&fasttax::ewc_prox_));
}
