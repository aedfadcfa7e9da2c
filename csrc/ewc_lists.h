#pragma once

#include "check.h"
#include "ewc_types.h"

// The lists of an EWC op, checked against each other and turned into one EwcTensor per parameter.
namespace fasttax {

inline EwcType ewc_type(const Tensor& t, const char* op, const char* name) {
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

inline void ewc_check_place(const char* op, const char* name, size_t i, const Tensor& t, const Tensor& first) {
  FASTTAX_CHECK(t.is_contiguous(), op, name, "[", i, "]: must be contiguous; call .contiguous() first");
  FASTTAX_CHECK(t.is_cpu() == first.is_cpu() && t.is_cuda() == first.is_cuda() && t.get_device_index() == first.get_device_index(), op,
                name, "[", i, "]: must be on the device of params[0]; call the op once per device");
}

inline void ewc_check_list(const char* op, const char* name, const std::vector<Tensor>& list, const std::vector<Tensor>& params) {
  FASTTAX_CHECK(list.size() == params.size(), op, name, ": expected ", params.size(), " tensors, one per parameter, got ", list.size());
  for (size_t i = 0; i < list.size(); ++i) {
    FASTTAX_CHECK(list[i].numel() == params[i].numel(), op, name, "[", i, "]: expected ", params[i].numel(), " elements as in params, got ",
                  list[i].numel());
    ewc_check_place(op, name, i, list[i], params[0]);
  }
}

inline std::vector<EwcTensor> ewc_lists(const char* op, const std::vector<Tensor>& params, const std::vector<Tensor>& anchors,
                                        const std::vector<Tensor>& fishers, const std::vector<Tensor>& scales,
                                        const std::vector<Tensor>* grads) {
  ewc_check_list(op, "params", params, params);
  ewc_check_list(op, "anchors", anchors, params);
  ewc_check_list(op, "fishers", fishers, params);
  if (grads) ewc_check_list(op, "grads", *grads, params);
  FASTTAX_CHECK(scales.empty() || scales.size() == params.size(), op, "scales: expected none, or one tensor per parameter");
  std::vector<EwcTensor> out;
  out.reserve(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    const auto pointer = [](const Tensor& t) {
      return const_cast<void*>(t.const_data_ptr());
    };  // only theta and grad are written, by ops that say so
    EwcTensor x{{pointer(params[i]), pointer(anchors[i]), pointer(fishers[i]), grads ? pointer((*grads)[i]) : nullptr},
                nullptr,
                params[i].numel(),
                0,
                {ewc_type(params[i], op, "params"), ewc_type(anchors[i], op, "anchors"), ewc_type(fishers[i], op, "fishers"),
                 grads ? ewc_type((*grads)[i], op, "grads") : EwcType::kFloat},
                false};
    const bool all_double = x.types[0] == EwcType::kDouble && x.types[1] == EwcType::kDouble && x.types[2] == EwcType::kDouble &&
                            (!grads || x.types[3] == EwcType::kDouble);
    for (int k = 0; k < 4; ++k)
      FASTTAX_CHECK(all_double || x.types[k] != EwcType::kDouble, op,
                    "a float64 parameter needs a float64 anchor, fisher and gradient (parameter ", i, ")");
    for (int k : {0, 1, 3}) FASTTAX_CHECK(x.types[k] != EwcType::kU8Log, op, "only fishers may be uint8 (u8log)");
    if (x.types[2] == EwcType::kU8Log) {
      const int64_t blocks = (x.numel + 255) / 256;
      FASTTAX_CHECK(!scales.empty() && scales[i].scalar_type() == ScalarType::Float && scales[i].numel() == blocks * 2, op, "scales[", i,
                    "]: a uint8 fisher needs contiguous float32 scales of shape (", blocks, ", 2)");
      ewc_check_place(op, "scales", i, scales[i], params[0]);
      x.scales = static_cast<const float*>(scales[i].const_data_ptr());
    }
    out.push_back(x);
  }
  return out;
}

}  // namespace fasttax
