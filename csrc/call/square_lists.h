#pragma once

#include "ewc_lists.h"

// The lists of accumulate_sqgrad_, checked against each other, as what EWC's chunks are cut from:
// data[0] the sums, data[3] the gradients.
namespace fasttax {

inline std::vector<EwcTensor> square_lists(const std::vector<Tensor>& sums,
                                           const std::vector<Tensor>& grads) {
  const char* op = "accumulate_sqgrad_";
  ewc_check_list(op, "sums", sums, sums);
  ewc_check_list(op, "grads", grads, sums);
  std::vector<EwcTensor> out;
  for (size_t i = 0; i < sums.size(); ++i) {
    const EwcType sum = ewc_type(sums[i], op, "sums"), grad = ewc_type(grads[i], op, "grads");
    FASTTAX_CHECK(
        sum == EwcType::kDouble ? grad == EwcType::kDouble
                                : sum == EwcType::kFloat && grad <= EwcType::kFloat16,
        op, "sums[", i,
        "]: must be float32, or float64 where the gradient is, and the gradient floating point");
    void *to = ewc_pointer(sums[i]), *from = ewc_pointer(grads[i]);
    out.push_back({{to, to, to, from}, nullptr, sums[i].numel(), 0, {sum, sum, sum, grad}, false});
  }
  return out;
}

}  // namespace fasttax
