// EWC on CUDA tensors, torch's side: check, allocate, find the stream, call the launcher.
// Not ewc.cpp: setuptools names objects by stem, and ewc.cu is one already.
#include "../call/ewc_lists.h"
#include "ewc.h"
#include "launch_torch.h"

namespace fasttax {
namespace {

// `launch` is complete but for the stream.
void start(const char* op, const Tensor& first, EwcLaunch launch) {
  check_on_gpu(op, "params", first);
  launch_on(op, first, [&](void* stream) {
    launch.stream = stream;
    return ewc_launch(launch);
  });
}

// times: on the device, or none
EwcLaunch launch_of(EwcMode mode, const std::vector<EwcTensor>& tensors, double scale,
                    const void* times, bool times_double) {
  EwcLaunch launch{};
  launch.mode = mode;
  launch.tensors = tensors.data();
  launch.count = int64_t(tensors.size());
  launch.scale = scale;
  launch.upstream = times;
  launch.upstream_double = times_double;
  return launch;
}

EwcLaunch launch_of(const char* op, EwcMode mode, const std::vector<EwcTensor>& tensors,
                    const std::vector<Tensor>& params, double scale,
                    const std::optional<Tensor>& times) {
  if (!times.has_value() || params.empty()) return launch_of(mode, tensors, scale, nullptr, false);
  const bool wide = ewc_is_wide(op, "times", *times, params);
  return launch_of(mode, tensors, scale, times->const_data_ptr(), wide);
}

// The value of the penalty: one partial sum per chunk, in memory that torch's allocator may reuse
// as soon as the stream is past it.
Tensor with_value(const char* op, const std::vector<Tensor>& params,
                  const std::vector<EwcTensor>& tensors, EwcLaunch launch, double factor) {
  FASTTAX_CHECK(!params.empty(), op, "params: expected at least one tensor");
  launch.out_double = params[0].scalar_type() == ScalarType::Double;
  launch.factor = factor;
  Tensor out = torch::stable::new_empty(params[0], {},
                                        launch.out_double ? ScalarType::Double : ScalarType::Float);
  Tensor parts = torch::stable::new_empty(params[0], {ewc_workspace(launch.tensors, launch.count)},
                                          ScalarType::Double);
  launch.out = out.mutable_data_ptr();
  launch.parts = static_cast<double*>(parts.mutable_data_ptr());
  start(op, params[0], launch);
  return out;
}

Tensor ewc_penalty(std::vector<Tensor> params, std::vector<Tensor> anchors,
                   std::vector<Tensor> fishers, std::vector<Tensor> scales, double strength) {
  const char* op = "ewc_penalty";
  const auto tensors = ewc_lists(op, params, anchors, fishers, scales, nullptr);
  return with_value(op, params, tensors, launch_of(EwcMode::kValue, tensors, 0, nullptr, false),
                    strength / 2);
}

std::vector<Tensor> ewc_penalty_backward(Tensor grad, std::vector<Tensor> params,
                                         std::vector<Tensor> anchors, std::vector<Tensor> fishers,
                                         std::vector<Tensor> scales, double strength) {
  const char* op = "ewc_penalty_backward";
  std::vector<Tensor> d_params;
  for (const Tensor& p : params) d_params.push_back(torch::stable::empty_like(p));
  const auto tensors = ewc_lists(op, params, anchors, fishers, scales, &d_params);
  if (params.empty()) return d_params;
  const bool wide = ewc_is_wide(op, "grad", grad, params);
  start(op, params[0], launch_of(EwcMode::kWrite, tensors, strength, grad.const_data_ptr(), wide));
  return d_params;
}

Tensor ewc_add_grad_(std::vector<Tensor> params, std::vector<Tensor> grads,
                     std::vector<Tensor> anchors, std::vector<Tensor> fishers,
                     std::vector<Tensor> scales, double strength, double scale,
                     std::optional<Tensor> times) {
  const char* op = "ewc_add_grad_";
  const auto tensors = ewc_lists(op, params, anchors, fishers, scales, &grads);
  return with_value(op, params, tensors,
                    launch_of(op, EwcMode::kAdd, tensors, params, strength * scale, times),
                    strength / 2);
}

void ewc_prox_(std::vector<Tensor> params, std::vector<Tensor> anchors, std::vector<Tensor> fishers,
               std::vector<Tensor> scales, double strength_times_lr, std::optional<Tensor> times) {
  const char* op = "ewc_prox_";
  const auto tensors = ewc_lists(op, params, anchors, fishers, scales, nullptr);
  if (!params.empty())
    start(op, params[0], launch_of(op, EwcMode::kProx, tensors, params, strength_times_lr, times));
}

}  // namespace
}  // namespace fasttax

STABLE_TORCH_LIBRARY_IMPL(fasttax, CUDA, m) {
  m.impl("ewc_penalty", TORCH_BOX(&fasttax::ewc_penalty));
  m.impl("ewc_penalty_backward", TORCH_BOX(&fasttax::ewc_penalty_backward));
  m.impl("ewc_add_grad_", TORCH_BOX(&fasttax::ewc_add_grad_));
  m.impl("ewc_prox_", TORCH_BOX(&fasttax::ewc_prox_));
}
