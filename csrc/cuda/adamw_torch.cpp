// AdamW with EWC on CUDA tensors, torch's side: check, allocate, find the stream, call the
// launcher.
#include "../call/adamw_lists.h"
#include "adamw.h"
#include "launch_torch.h"

namespace fasttax {
namespace {

struct Scalar {
  const void* pointer = nullptr;  // on the device
  double value = 0;               // from the host
  bool wide = false;
};

Scalar scalar(const char* op, const char* name, const std::optional<Tensor>& t) {
  Scalar out;
  if (!t.has_value()) return out;
  out.wide = t->scalar_type() == ScalarType::Double;
  FASTTAX_CHECK(t->numel() == 1 && (out.wide || t->scalar_type() == ScalarType::Float), op, name,
                ": expected one float32 or float64 value");
  if (t->is_cuda()) out.pointer = t->const_data_ptr();
  else
    out.value = out.wide ? *static_cast<const double*>(t->const_data_ptr())
                         : double(*static_cast<const float*>(t->const_data_ptr()));
  return out;
}

Tensor ewc_adamw_(std::vector<Tensor> params, std::vector<Tensor> grads,
                  std::vector<Tensor> exp_avgs, std::vector<Tensor> exp_avg_sqs,
                  std::vector<Tensor> max_exp_avg_sqs, std::vector<Tensor> steps,
                  std::vector<Tensor> anchors, std::vector<Tensor> fishers,
                  std::vector<Tensor> scales, bool prox, double strength, double second_moment,
                  Tensor lr, double beta1, double beta2, double eps, double weight_decay,
                  bool maximize, std::optional<Tensor> grad_scale,
                  std::optional<Tensor> found_inf) {
  const char* op = "ewc_adamw_";
  FASTTAX_CHECK(!params.empty() && params[0].is_cuda(), op,
                "params: expected at least one tensor, on the GPU as other arguments are");
  if (lr.is_cuda()) ewc_check_place(op, "lr", 0, lr, params[0]);
  if (grad_scale.has_value()) ewc_check_place(op, "grad_scale", 0, *grad_scale, params[0]);
  if (found_inf.has_value()) ewc_check_place(op, "found_inf", 0, *found_inf, params[0]);
  const auto tensors = adamw_lists(
      op, {params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, anchors, fishers, scales},
      prox ? AdamWMode::kProx : AdamWMode::kGrad);
  const Scalar rate = scalar(op, "lr", lr), scale = scalar(op, "grad_scale", grad_scale),
               inf = scalar(op, "found_inf", found_inf);
  AdamWLaunch launch{};
  launch.tensors = tensors.data();
  launch.count = int64_t(tensors.size());
  launch.options = {rate.value, beta1, beta2, eps, weight_decay, strength, second_moment, maximize};
  launch.lr = rate.pointer, launch.grad_scale = scale.pointer, launch.found_inf = inf.pointer;
  launch.lr_double = rate.wide, launch.grad_scale_double = scale.wide,
  launch.found_inf_double = inf.wide;
  launch.out_double = params[0].scalar_type() == ScalarType::Double;
  Tensor out = torch::stable::new_empty(params[0], {},
                                        launch.out_double ? ScalarType::Double : ScalarType::Float);
  Tensor parts = torch::stable::new_empty(
      params[0], {adamw_workspace(launch.tensors, launch.count)}, ScalarType::Double);
  launch.out = out.mutable_data_ptr();
  launch.parts = static_cast<double*>(parts.mutable_data_ptr());
  launch_on(op, params[0], [&](void* stream) {
    launch.stream = stream;
    return adamw_launch(launch);
  });
  return out;
}

}  // namespace
}  // namespace fasttax

STABLE_TORCH_LIBRARY_IMPL(fasttax, CUDA, m) {
  m.impl("ewc_adamw_", TORCH_BOX(&fasttax::ewc_adamw_));
}
