// EWC over a model's whole parameter list in one call (design: five passes over memory, read theta, anchor,
// fisher, grad, write grad). The list is cut into tasks of 64 Ki elements, one parallel region runs them all, and
// each task leaves its part of the penalty in its own slot: the sum in slot order does not depend on threads.
#include "../check.h"

namespace fasttax {
enum class EwcType { kFloat, kBFloat16, kFloat16, kU8Log, kDouble };
enum class EwcMode { kValue, kAdd, kWrite, kProx };
}  // namespace fasttax

#define FASTTAX_KERNELS "ewc_kernels.h"
#include "isa.h"
#include "memory.h"

namespace fasttax {
namespace {

constexpr int64_t kTask = 1 << 16;  // elements; a multiple of 256, the u8log block

struct Task {
  const void* data[4];  // theta, anchor, fisher, grad
  EwcType types[4];
  const float* scales;
  int64_t begin, end;
};

EwcType type_of(const Tensor& t, const char* op, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return EwcType::kFloat;
    case ScalarType::BFloat16: return EwcType::kBFloat16;
    case ScalarType::Half: return EwcType::kFloat16;
    case ScalarType::Double: return EwcType::kDouble;
    case ScalarType::Byte: return EwcType::kU8Log;
    default: FASTTAX_CHECK(false, op, name, ": dtype must be float32, float64, bfloat16 or float16 (or uint8 for a u8log fisher)");
  }
  return EwcType::kFloat;
}

void check_list(const char* op, const char* name, const std::vector<Tensor>& list, const std::vector<Tensor>& params) {
  FASTTAX_CHECK(list.size() == params.size(), op, name, ": expected ", params.size(), " tensors, one per parameter, got ", list.size());
  for (size_t i = 0; i < list.size(); ++i) {
    FASTTAX_CHECK(list[i].numel() == params[i].numel(), op, name, "[", i, "]: expected ", params[i].numel(), " elements as in params, got ", list[i].numel());
    FASTTAX_CHECK(list[i].is_contiguous(), op, name, "[", i, "]: must be contiguous; call .contiguous() first");
    FASTTAX_CHECK(list[i].is_cpu(), op, name, "[", i, "]: must be on the CPU as the other lists are");
  }
}

std::vector<Task> cut(const char* op, const std::vector<Tensor>& params, const std::vector<Tensor>& anchors,
                      const std::vector<Tensor>& fishers, const std::vector<Tensor>& scales, const std::vector<Tensor>* grads) {
  check_list(op, "params", params, params);
  check_list(op, "anchors", anchors, params);
  check_list(op, "fishers", fishers, params);
  if (grads) check_list(op, "grads", *grads, params);
  FASTTAX_CHECK(scales.empty() || scales.size() == params.size(), op, "scales: expected none, or one tensor per parameter");
  std::vector<Task> tasks;
  for (size_t i = 0; i < params.size(); ++i) {
    const int64_t n = params[i].numel();
    Task task{{params[i].const_data_ptr(), anchors[i].const_data_ptr(), fishers[i].const_data_ptr(), grads ? (*grads)[i].const_data_ptr() : nullptr},
              {type_of(params[i], op, "params"), type_of(anchors[i], op, "anchors"), type_of(fishers[i], op, "fishers"), grads ? type_of((*grads)[i], op, "grads") : EwcType::kFloat},
              nullptr, 0, 0};
    const bool any_double = task.types[0] == EwcType::kDouble, all_double = any_double && task.types[1] == EwcType::kDouble &&
        task.types[2] == EwcType::kDouble && (!grads || task.types[3] == EwcType::kDouble);
    for (int k = 0; k < 4; ++k) FASTTAX_CHECK(all_double || task.types[k] != EwcType::kDouble, op, "a float64 parameter needs a float64 anchor, fisher and gradient (parameter ", i, ")");
    for (int k : {0, 1, 3}) FASTTAX_CHECK(task.types[k] != EwcType::kU8Log, op, "only fishers may be uint8 (u8log)");
    if (task.types[2] == EwcType::kU8Log) {
      FASTTAX_CHECK(!scales.empty() && scales[i].scalar_type() == ScalarType::Float && scales[i].is_contiguous() && scales[i].numel() == (n + 255) / 256 * 2,
                    op, "scales[", i, "]: a uint8 fisher needs contiguous float32 scales of shape (", (n + 255) / 256, ", 2)");
      task.scales = static_cast<const float*>(scales[i].const_data_ptr());
    }
    for (int64_t begin = 0; begin < n; begin += kTask) {
      task.begin = begin;
      task.end = std::min(n, begin + kTask);
      tasks.push_back(task);
    }
  }
  return tasks;
}

double run_double(EwcMode mode, const Task& t, double scale) {
  auto theta = static_cast<double*>(const_cast<void*>(t.data[0]));
  auto anchor = static_cast<const double*>(t.data[1]), fisher = static_cast<const double*>(t.data[2]);
  auto grad = static_cast<double*>(const_cast<void*>(t.data[3]));
  double total = 0;
  for (int64_t i = t.begin; i < t.end; ++i) {
    if (mode == EwcMode::kProx) {
      theta[i] = ewc_prox(theta[i], anchor[i], fisher[i], scale, 1.0);
      continue;
    }
    total += ewc_term(theta[i], anchor[i], fisher[i]);
    if (mode == EwcMode::kAdd) grad[i] += scale * ewc_pull(theta[i], anchor[i], fisher[i]);
    if (mode == EwcMode::kWrite) grad[i] = scale * ewc_pull(theta[i], anchor[i], fisher[i]);
  }
  return total;
}

double run(EwcMode mode, const std::vector<Task>& tasks, double scale) {
  std::vector<double> parts(tasks.size());
  torch::stable::parallel_for(0, int64_t(tasks.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Task& t = tasks[i];
      parts[i] = t.types[0] == EwcType::kDouble
                     ? run_double(mode, t, scale)
                     : FASTTAX_DISPATCH(ewc_task, mode, t.data, t.types, t.scales, t.begin, t.end, float(scale));
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

Tensor ewc_penalty(std::vector<Tensor> params, std::vector<Tensor> anchors, std::vector<Tensor> fishers,
                   std::vector<Tensor> scales, double strength) {
  const auto tasks = cut("ewc_penalty", params, anchors, fishers, scales, nullptr);
  return scalar_like(params, strength / 2 * run(EwcMode::kValue, tasks, 0));
}

std::vector<Tensor> ewc_penalty_backward(Tensor grad, std::vector<Tensor> params, std::vector<Tensor> anchors,
                                         std::vector<Tensor> fishers, std::vector<Tensor> scales, double strength) {
  std::vector<Tensor> d_params;
  for (const Tensor& p : params) {
    d_params.push_back(torch::stable::empty_like(p));
    prefer_huge_pages(d_params.back());
  }
  const auto tasks = cut("ewc_penalty_backward", params, anchors, fishers, scales, &d_params);
  const double upstream = grad.scalar_type() == ScalarType::Double ? *static_cast<const double*>(grad.const_data_ptr())
                                                                    : *static_cast<const float*>(grad.const_data_ptr());
  run(EwcMode::kWrite, tasks, upstream * strength);
  return d_params;
}

Tensor ewc_add_grad_(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> anchors,
                     std::vector<Tensor> fishers, std::vector<Tensor> scales, double strength, double scale) {
  const auto tasks = cut("ewc_add_grad_", params, anchors, fishers, scales, &grads);
  return scalar_like(params, strength / 2 * run(EwcMode::kAdd, tasks, strength * scale));
}

void ewc_prox_(std::vector<Tensor> params, std::vector<Tensor> anchors, std::vector<Tensor> fishers,
               std::vector<Tensor> scales, double strength_times_lr) {
  run(EwcMode::kProx, cut("ewc_prox_", params, anchors, fishers, scales, nullptr), strength_times_lr);
}

}  // namespace
}  // namespace fasttax

STABLE_TORCH_LIBRARY_IMPL(fasttax, CPU, m) {
  m.impl("ewc_penalty", TORCH_BOX(&fasttax::ewc_penalty));
  m.impl("ewc_penalty_backward", TORCH_BOX(&fasttax::ewc_penalty_backward));
  m.impl("ewc_add_grad_", TORCH_BOX(&fasttax::ewc_add_grad_));
  m.impl("ewc_prox_", TORCH_BOX(&fasttax::ewc_prox_));
}
