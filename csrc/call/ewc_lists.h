#pragma once

#include "check.h"
#include "../math/ewc_types.h"

// The lists of an EWC op, checked against each other and turned into one EwcTensor per parameter.
namespace fasttax {

inline EwcType ewc_type(const Tensor& t, const char* op, const char* name, bool anchor = false) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return EwcType::kFloat;
    case ScalarType::BFloat16: return EwcType::kBFloat16;
    case ScalarType::Half: return EwcType::kFloat16;
    case ScalarType::Double: return EwcType::kDouble;
    case ScalarType::Byte: return anchor ? EwcType::kSplit : EwcType::kU8Log;
    default:
      FASTTAX_CHECK(false, op, name,
                    ": dtype must be float32, float64, bfloat16 or float16 (or uint8 for a u8log "
                    "fisher or a split anchor)");
  }
  return EwcType::kFloat;
}

inline void ewc_check_place(const char* op, const char* name, size_t i, const Tensor& t,
                            const Tensor& first) {
  FASTTAX_CHECK(t.is_contiguous(), op, name, "[", i,
                "]: must be contiguous; call .contiguous() first");
  FASTTAX_CHECK(t.is_cpu() == first.is_cpu() && t.is_cuda() == first.is_cuda() &&
                    t.get_device_index() == first.get_device_index(),
                op, name, "[", i,
                "]: must be on the device of params[0]; call the op once per device");
}

inline void ewc_check_count(const char* op, const char* name, const std::vector<Tensor>& list,
                            const std::vector<Tensor>& params) {
  FASTTAX_CHECK(list.size() == params.size(), op, name, ": expected ", params.size(),
                " tensors, one per parameter, got ", list.size());
}

inline void ewc_check_one(const char* op, const char* name, size_t i, const Tensor& t,
                          const std::vector<Tensor>& params) {
  FASTTAX_CHECK(t.numel() == params[i].numel(), op, name, "[", i, "]: expected ", params[i].numel(),
                " elements as in params, got ", t.numel());
  ewc_check_place(op, name, i, t, params[0]);
}

inline void ewc_check_list(const char* op, const char* name, const std::vector<Tensor>& list,
                           const std::vector<Tensor>& params) {
  ewc_check_count(op, name, list, params);
  for (size_t i = 0; i < list.size(); ++i) ewc_check_one(op, name, i, list[i], params);
}

inline EwcType ewc_check_anchor(const char* op, size_t i, const Tensor& anchor,
                                const std::vector<Tensor>& params) {
  const EwcType type = ewc_type(anchor, op, "anchors", true);
  if (type != EwcType::kSplit) {
    ewc_check_one(op, "anchors", i, anchor, params);
    return type;
  }
  const int64_t bytes = (params[i].numel() + kEwcBlock - 1) / kEwcBlock * kSplitBytes;
  FASTTAX_CHECK(anchor.numel() == bytes, op, "anchors[", i, "]: a uint8 (split) anchor needs ",
                bytes, " bytes, got ", anchor.numel());
  ewc_check_place(op, "anchors", i, anchor, params[0]);
  return type;
}

// The (lo, step) of a u8log fisher, null for others.
inline const float* ewc_check_scales(const char* op, size_t i, EwcType fisher,
                                     const std::vector<Tensor>& scales,
                                     const std::vector<Tensor>& params) {
  if (fisher != EwcType::kU8Log) return nullptr;
  const int64_t blocks = (params[i].numel() + kEwcBlock - 1) / kEwcBlock;
  FASTTAX_CHECK(!scales.empty() && scales[i].scalar_type() == ScalarType::Float &&
                    scales[i].numel() == blocks * 2,
                op, "scales[", i, "]: a uint8 fisher needs contiguous float32 scales of shape (",
                blocks, ", 2)");
  ewc_check_place(op, "scales", i, scales[i], params[0]);
  return static_cast<const float*>(scales[i].const_data_ptr());
}

// One value beside the parameters that multiplies a call's scale.
inline bool ewc_is_wide(const char* op, const char* name, const Tensor& t,
                        const std::vector<Tensor>& params) {
  const ScalarType type = t.scalar_type();
  FASTTAX_CHECK(t.numel() == 1 && (type == ScalarType::Double || type == ScalarType::Float), op,
                name, ": expected one float32 or float64 value");
  ewc_check_place(op, name, 0, t, params[0]);
  return type == ScalarType::Double;
}

// written by ops that say so alone
inline void* ewc_pointer(const Tensor& t) { return const_cast<void*>(t.const_data_ptr()); }

inline std::vector<EwcTensor> ewc_lists(const char* op, const std::vector<Tensor>& params,
                                        const std::vector<Tensor>& anchors,
                                        const std::vector<Tensor>& fishers,
                                        const std::vector<Tensor>& scales,
                                        const std::vector<Tensor>* grads) {
  ewc_check_list(op, "params", params, params);
  ewc_check_count(op, "anchors", anchors, params);
  ewc_check_list(op, "fishers", fishers, params);
  if (grads) ewc_check_list(op, "grads", *grads, params);
  FASTTAX_CHECK(scales.empty() || scales.size() == params.size(), op,
                "scales: expected none, or one tensor per parameter");
  std::vector<EwcTensor> out;
  out.reserve(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    const EwcType anchor = ewc_check_anchor(op, i, anchors[i], params);
    EwcTensor x{{ewc_pointer(params[i]), ewc_pointer(anchors[i]), ewc_pointer(fishers[i]),
                 grads ? ewc_pointer((*grads)[i]) : nullptr},
                nullptr,
                params[i].numel(),
                0,
                {ewc_type(params[i], op, "params"), anchor, ewc_type(fishers[i], op, "fishers"),
                 grads ? ewc_type((*grads)[i], op, "grads") : EwcType::kFloat},
                false};
    const bool all_double = x.types[0] == EwcType::kDouble && x.types[1] == EwcType::kDouble &&
                            x.types[2] == EwcType::kDouble &&
                            (!grads || x.types[3] == EwcType::kDouble);
    for (int k = 0; k < 4; ++k)
      FASTTAX_CHECK(all_double || x.types[k] != EwcType::kDouble, op,
                    "a float64 parameter needs a float64 anchor, fisher and gradient (parameter ",
                    i, ")");
    for (int k : {0, 3})
      FASTTAX_CHECK(x.types[k] != EwcType::kU8Log, op,
                    "only fishers (u8log) and anchors (split) may be uint8");
    x.scales = ewc_check_scales(op, i, x.types[2], scales, params);
    out.push_back(x);
  }
  return out;
}

}  // namespace fasttax
