// The end of the functions of tokens and gradients that a forward has left, on CUDA tensors,
// torch's side: check, allocate, find the stream, call the launchers.
#include <cmath>

#include "../call/float_type.h"
#include "launch_torch.h"
#include "weigh.h"

namespace fasttax {
namespace {

bool all_strides_are_0(const Tensor& t) {
  for (int64_t d = 0; d < t.dim(); ++d)
    if (t.size(d) != 1 && t.stride(d) != 0) return false;
  return true;
}

struct Weigh {
  const char* op;
  const Tensor like;  // one of the rows
  WeighLaunch launch{};
  std::vector<int64_t> tokens;
  std::vector<Tensor> kept;  // copies, until the launch is queued

  Weigh(const char* name, const Tensor& first, const std::optional<Tensor>& mask,
        const std::optional<Tensor>& weight, int64_t reduction, double scale)
      : op(name), like(first) {
    FASTTAX_CHECK(like.is_cuda(), op, "values: must be on the GPU as another argument is");
    const ScalarType type = like.scalar_type();
    FASTTAX_CHECK(type == ScalarType::Float || type == ScalarType::Double, op,
                  "values: expected float32 or float64");
    FASTTAX_CHECK(reduction >= 0 && reduction <= 2, op, "reduction must be in 0..2, got ",
                  reduction);
    launch.wide = type == ScalarType::Double;
    WeighArgs& a = launch.args;
    a.scale = scale;
    a.reduction = Reduction(reduction);
    a.pair[0] = a.pair[1] = a.pair[2] = -1;
    if (mask.has_value()) mask_of(*mask);
    if (weight.has_value()) a.weight = numbers("weight", *weight);
  }

  void tokens_of(int64_t begin) {
    launch.args.n = 1;
    for (int64_t d = begin; d < like.dim(); ++d) {
      tokens.push_back(like.size(d));
      launch.args.n *= like.size(d);
    }
    FASTTAX_CHECK(launch.args.n < (int64_t(1) << 31), op, "values: more than 2^31 tokens");
  }

  void same_place(const char* name, const Tensor& t) const {
    FASTTAX_CHECK(t.is_cuda() && t.get_device_index() == like.get_device_index(), op, name,
                  ": must be on the device of the values");
  }

  void mask_of(const Tensor& mask) {
    FASTTAX_CHECK(mask.scalar_type() == ScalarType::Bool && mask.is_contiguous(), op,
                  "mask: expected a contiguous bool tensor");
    same_place("mask", mask);
    launch.args.mask = static_cast<const bool*>(mask.const_data_ptr());
    masked = mask.numel();
  }

  const void* numbers(const char* name, const Tensor& t) {
    FASTTAX_CHECK(t.scalar_type() == like.scalar_type() && t.is_contiguous(), op, name,
                  ": expected a contiguous tensor of the values' dtype");
    same_place(name, t);
    weights = t.numel();
    return t.const_data_ptr();
  }

  void check_tokens() const {
    FASTTAX_CHECK(masked < 0 || masked == launch.args.n, op, "mask: expected ", launch.args.n,
                  " elements");
    FASTTAX_CHECK(!launch.args.weight || weights == launch.args.n, op, "weight: expected ",
                  launch.args.n, " elements");
  }

  // (R, ...) each, as Python has them.
  void rows_of(const std::vector<Tensor>& values, const std::vector<int64_t>& outputs,
               const std::vector<int64_t>& pair, double clip, bool reverse) {
    WeighArgs& a = launch.args;
    tokens_of(1);
    check_tokens();
    const int64_t item = element_size(like.scalar_type());
    int64_t rows = 0;
    for (const Tensor& value : values) {
      FASTTAX_CHECK(value.dim() == like.dim() && value.scalar_type() == like.scalar_type() &&
                        value.is_contiguous() && value.numel() == value.size(0) * a.n,
                    op,
                    "values: expected contiguous tensors (R, ...) of one dtype and as many "
                    "tokens");
      same_place("values", value);
      const char* at = static_cast<const char*>(value.const_data_ptr());
      for (int64_t r = 0; r < value.size(0); ++r) {
        FASTTAX_CHECK(rows < kWeighRows, op, "values: more than ", kWeighRows, " rows");
        a.rows[rows++] = at + r * a.n * item;
      }
    }
    a.row_count = int32_t(rows);
    FASTTAX_CHECK(int64_t(outputs.size()) <= kWeighOutputs, op, "outputs: more than ",
                  kWeighOutputs);
    FASTTAX_CHECK(pair.size() <= 3, op, "pair: expected at most 3 rows");
    for (size_t i = 0; i < pair.size(); ++i) {
      FASTTAX_CHECK(pair[i] >= 0 && pair[i] < rows, op, "pair: there is no row ", pair[i]);
      a.pair[i] = int32_t(pair[i]);
    }
    for (size_t i = 0; i < outputs.size(); ++i) {
      FASTTAX_CHECK(outputs[i] >= -3 && outputs[i] < rows && (outputs[i] >= 0 || pair.size() >= 2),
                    op, "outputs: there is no output ", outputs[i]);
      a.outputs[i] = int32_t(outputs[i]);
    }
    a.output_count = int32_t(outputs.size());
    a.clip = clip, a.exp_clip = std::exp(clip), a.reverse = reverse;
  }

  void grad_of(const Tensor& grad, int64_t place) {
    WeighArgs& a = launch.args;
    FASTTAX_CHECK(place >= 0 && place < a.output_count, op, "which: there is no output ", place);
    FASTTAX_CHECK(grad.scalar_type() == like.scalar_type() &&
                      grad.numel() == (a.reduction == Reduction::kNone ? a.n : 1),
                  op, "grads: expected the results' dtype and sizes");
    same_place("grads", grad);
    a.shared_grad[place] = all_strides_are_0(grad);  // of a sum, expanded
    const bool as_it_is = a.shared_grad[place] || grad.is_contiguous();
    kept.push_back(as_it_is ? grad : torch::stable::contiguous(grad));
    a.grads[place] = kept.back().const_data_ptr();
  }

  Tensor fresh(const std::vector<int64_t>& sizes) const {
    return torch::stable::new_empty(like, sizes);
  }

  void start(const char* (*launcher)(const WeighLaunch&)) {
    launch_on(op, like, [&](void* stream) {
      launch.stream = stream;
      return launcher(launch);
    });
  }

  int64_t masked = -1, weights = -1;
};

const Tensor& first_of(const char* op, const std::vector<Tensor>& values) {
  FASTTAX_CHECK(!values.empty() && values[0].dim() >= 1, op, "values: expected a tensor (R, ...)");
  return values[0];
}

std::vector<Tensor> weigh_tokens(std::vector<Tensor> values, std::vector<int64_t> outputs,
                                 std::vector<int64_t> pair, std::optional<Tensor> mask,
                                 std::optional<Tensor> weight, int64_t reduction, double scale,
                                 double clip, bool reverse) {
  const char* op = "weigh_tokens";
  Weigh call(op, first_of(op, values), mask, weight, reduction, scale);
  call.rows_of(values, outputs, pair, clip, reverse);
  const torch::stable::accelerator::DeviceGuard guard(call.like.get_device_index());
  std::vector<Tensor> results;
  for (size_t k = 0; k < outputs.size(); ++k) {
    results.push_back(call.fresh(reduction == 0 ? call.tokens : std::vector<int64_t>{}));
    call.launch.args.results[k] = results.back().mutable_data_ptr();
  }
  call.start(weigh_forward);
  return results;
}

Tensor weigh_tokens_backward(std::vector<Tensor> grads, std::vector<int64_t> which,
                             std::vector<Tensor> values, std::vector<int64_t> outputs,
                             std::vector<int64_t> pair, std::optional<Tensor> mask,
                             std::optional<Tensor> weight, int64_t reduction, double scale,
                             double clip, bool reverse) {
  const char* op = "weigh_tokens_backward";
  Weigh call(op, first_of(op, values), mask, weight, reduction, scale);
  call.rows_of(values, outputs, pair, clip, reverse);
  FASTTAX_CHECK(grads.size() == which.size(), op, "which: expected one place a gradient");
  const torch::stable::accelerator::DeviceGuard guard(call.like.get_device_index());
  for (size_t i = 0; i < grads.size(); ++i) call.grad_of(grads[i], which[i]);
  std::vector<int64_t> sizes = call.tokens;
  sizes.insert(sizes.begin(), call.launch.args.row_count);
  Tensor by_row = call.fresh(sizes);
  call.launch.args.by_row = by_row.mutable_data_ptr();
  call.start(weigh_backward);
  return by_row;
}

Tensor token_weights(Tensor like, std::optional<Tensor> mask, std::optional<Tensor> weight,
                     int64_t reduction, double scale) {
  Weigh call("token_weights", like, mask, weight, reduction, scale);
  call.tokens_of(0);
  call.check_tokens();
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  Tensor by_token = call.fresh(call.tokens);
  call.launch.args.by_row = by_token.mutable_data_ptr();
  call.start(weigh_weights);
  return by_token;
}

void scale_held_(Tensor held, Tensor factor) {
  const char* op = "scale_held_";
  FASTTAX_CHECK(held.is_cuda() && held.is_contiguous(), op,
                "held: expected a contiguous tensor on the GPU");
  FASTTAX_CHECK(factor.is_cuda() && factor.get_device_index() == held.get_device_index() &&
                    factor.is_contiguous(),
                op, "factor: expected a contiguous tensor on the device of held");
  const bool wide = factor.scalar_type() == ScalarType::Double;
  FASTTAX_CHECK(wide || factor.scalar_type() == ScalarType::Float, op,
                "factor: expected float32 or float64");
  const int64_t rows = factor.numel();
  FASTTAX_CHECK(rows == 1 || (held.dim() >= 1 && held.size(0) == rows), op,
                "factor: expected one number, or one a row of held");
  if (held.numel() == 0) return;
  const ScaleArgs args{held.mutable_data_ptr(), factor.const_data_ptr(), wide, rows,
                       held.numel() / rows};
  const FloatType type = float_type(held, op, "held");
  launch_on(op, held, [&](void* stream) { return scale_held(type, args, stream); });
}

}  // namespace
}  // namespace fasttax

STABLE_TORCH_LIBRARY_IMPL(fasttax, CUDA, m) {
  m.impl("token_weights", TORCH_BOX(&fasttax::token_weights));
  m.impl("weigh_tokens", TORCH_BOX(&fasttax::weigh_tokens));
  m.impl("weigh_tokens_backward", TORCH_BOX(&fasttax::weigh_tokens_backward));
  m.impl("scale_held_", TORCH_BOX(&fasttax::scale_held_));
}
