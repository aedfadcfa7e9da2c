#pragma once

#include "check.h"
#include "../math/types.h"

namespace fasttax {

inline FloatType float_type(const Tensor& t, const char* op, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return FloatType::kFloat;
    case ScalarType::BFloat16: return FloatType::kBFloat16;
    case ScalarType::Half: return FloatType::kFloat16;
    case ScalarType::Double: return FloatType::kDouble;
    default:
      FASTTAX_CHECK(false, op, name, ": dtype must be float32, float64, bfloat16 or float16");
  }
  return FloatType::kFloat;
}

}  // namespace fasttax
