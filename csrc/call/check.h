#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

// The Python wrappers check shapes and dtypes and word the errors for people. What is checked here
// is what would otherwise read or write out of bounds when somebody calls torch.ops.fasttax.*
// directly.
#define FASTTAX_CHECK(cond, op, ...) STD_TORCH_CHECK(cond, "fasttax::", op, ": ", __VA_ARGS__)

namespace fasttax {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline bool is_half(ScalarType t) { return t == ScalarType::BFloat16 || t == ScalarType::Half; }

inline int64_t element_size(ScalarType t) {
  switch (t) {
    case ScalarType::Double:
    case ScalarType::Long: return 8;
    case ScalarType::Float:
    case ScalarType::Int: return 4;
    case ScalarType::BFloat16:
    case ScalarType::Half: return 2;
    default: return 1;
  }
}

}  // namespace fasttax
