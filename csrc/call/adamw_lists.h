#pragma once

#include "../math/adamw_types.h"
#include "ewc_lists.h"

// The lists of ewc_adamw_, checked against each other and turned into one AdamWTensor per
// parameter.
namespace fasttax {

struct AdamWLists {
  const std::vector<Tensor>&params, &grads, &exp_avgs, &exp_avg_sqs, &max_exp_avg_sqs, &steps,
      &anchors, &fishers, &scales;
};

inline std::vector<AdamWTensor> adamw_lists(const char* op, const AdamWLists& x, AdamWMode held) {
  ewc_check_list(op, "params", x.params, x.params);
  ewc_check_list(op, "grads", x.grads, x.params);
  ewc_check_list(op, "exp_avgs", x.exp_avgs, x.params);
  ewc_check_list(op, "exp_avg_sqs", x.exp_avg_sqs, x.params);
  if (!x.max_exp_avg_sqs.empty())
    ewc_check_list(op, "max_exp_avg_sqs", x.max_exp_avg_sqs, x.params);
  ewc_check_count(op, "steps", x.steps, x.params);
  ewc_check_count(op, "anchors", x.anchors, x.params);
  ewc_check_count(op, "fishers", x.fishers, x.params);
  FASTTAX_CHECK(x.scales.empty() || x.scales.size() == x.params.size(), op,
                "scales: expected none, or one tensor per parameter");
  std::vector<AdamWTensor> out;
  out.reserve(x.params.size());
  for (size_t i = 0; i < x.params.size(); ++i) {
    AdamWTensor t{};
    t.numel = x.params[i].numel();
    t.mode = x.anchors[i].numel() == 0 ? AdamWMode::kPlain : held;
    const auto take = [&](AdamWOperand k, const Tensor& tensor, const char* name) {
      t.data[k] = ewc_pointer(tensor);
      t.types[k] = ewc_type(tensor, op, name);
    };
    take(kAwTheta, x.params[i], "params");
    take(kAwGrad, x.grads[i], "grads");
    take(kAwFirst, x.exp_avgs[i], "exp_avgs");
    take(kAwSecond, x.exp_avg_sqs[i], "exp_avg_sqs");
    if (!x.max_exp_avg_sqs.empty()) take(kAwMax, x.max_exp_avg_sqs[i], "max_exp_avg_sqs");
    if (t.mode != AdamWMode::kPlain) {
      t.types[kAwAnchor] = ewc_check_anchor(op, i, x.anchors[i], x.params);
      t.data[kAwAnchor] = ewc_pointer(x.anchors[i]);
      if (x.fishers[i].numel()) {
        ewc_check_one(op, "fishers", i, x.fishers[i], x.params);
        take(kAwFisher, x.fishers[i], "fishers");
        t.scales = ewc_check_scales(op, i, t.types[kAwFisher], x.scales, x.params);
      }
    }
    const ScalarType count = x.steps[i].scalar_type();
    FASTTAX_CHECK(
        x.steps[i].numel() == 1 && (count == ScalarType::Float || count == ScalarType::Double), op,
        "steps[", i, "]: expected one float32 or float64 value");
    ewc_check_place(op, "steps", i, x.steps[i], x.params[0]);
    t.step = ewc_pointer(x.steps[i]);
    t.step_double = count == ScalarType::Double;
    const bool wide = t.types[kAwTheta] == EwcType::kDouble;
    for (int k = 0; k < kAwOperands; ++k) {
      FASTTAX_CHECK(!t.data[k] || (t.types[k] == EwcType::kDouble) == wide, op,
                    "float64 goes with float64 throughout (parameter ", i, ")");
      FASTTAX_CHECK(k == kAwFisher || t.types[k] != EwcType::kU8Log, op,
                    "only fishers (u8log) and anchors (split) may be uint8");
    }
    out.push_back(t);
  }
  return out;
}

}  // namespace fasttax
