#pragma once

#include "check.h"
#include "kl_params.h"

namespace fasttax {

inline LogitType float_type(const Tensor& t, const char* op, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return LogitType::kFloat;
    case ScalarType::BFloat16: return LogitType::kBFloat16;
    case ScalarType::Half: return LogitType::kFloat16;
    case ScalarType::Double: return LogitType::kDouble;
    default: FASTTAX_CHECK(false, op, name, ": dtype must be float32, float64, bfloat16 or float16");
  }
  return LogitType::kFloat;
}

}  // namespace fasttax
