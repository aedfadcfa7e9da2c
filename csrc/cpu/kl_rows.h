#pragma once

// What the ops over logits share: one call's arguments, checked, and the addresses of rows.
#include "../check.h"
#include "kl_params.h"
#include "memory.h"

namespace fasttax {

// Addresses of the rows of a tensor (..., V) whose last stride is 1 and whose leading strides are free: the shifted
// logits[:, :-1] of a language model are read where they lie. 64-bit throughout.
struct Rows {
  char* base;
  int64_t item;
  std::vector<int64_t> sizes, strides;

  explicit Rows(const Tensor& t) : base(static_cast<char*>(const_cast<void*>(t.const_data_ptr()))), item(element_size(t.scalar_type())) {
    for (int64_t d = 0; d + 1 < t.dim(); ++d) {
      sizes.push_back(t.size(d));
      strides.push_back(t.stride(d));
    }
  }
  void* operator[](int64_t row) const {
    int64_t offset = 0;
    for (size_t d = sizes.size(); d-- > 0;) {
      offset += row % sizes[d] * strides[d];
      row /= sizes[d];
    }
    return base + offset * item;
  }
};

struct Call {
  LogitType type;
  int64_t N = 1, V;
  KlParams k;
  const bool* mask;  // nullptr: every token counts
};

inline Call prepare(const char* op, const Tensor& logits, const Tensor& ref_logits, const std::optional<Tensor>& mask, int64_t kind,
                    double beta, double scale, double ref_scale, double softcap, double ref_softcap, double inv_temperature,
                    double ref_inv_temperature, bool inf_mask) {
  FASTTAX_CHECK(logits.dim() >= 1 && logits.dim() == ref_logits.dim(), op,
                "logits and ref_logits: expected the same number of dimensions, at least 1");
  Call c;
  for (int64_t d = 0; d < logits.dim(); ++d) {
    FASTTAX_CHECK(logits.size(d) == ref_logits.size(d), op, "ref_logits: size ", ref_logits.size(d), " in dimension ", d, ", expected ",
                  logits.size(d), " as in logits");
    if (d + 1 < logits.dim()) c.N *= logits.size(d);
  }
  c.V = logits.size(logits.dim() - 1);
  FASTTAX_CHECK(c.V >= 1, op, "logits: the vocabulary (last dimension) is empty");
  FASTTAX_CHECK(c.V == 1 || (logits.stride(logits.dim() - 1) == 1 && ref_logits.stride(ref_logits.dim() - 1) == 1), op,
                "logits and ref_logits: the last dimension must be contiguous");
  FASTTAX_CHECK(logits.scalar_type() == ref_logits.scalar_type(), op, "logits and ref_logits must have one dtype");
  FASTTAX_CHECK(kind >= 0 && kind <= 2, op, "kind must be 0, 1 or 2, got ", kind);
  switch (logits.scalar_type()) {
    case ScalarType::Float: c.type = LogitType::kFloat; break;
    case ScalarType::BFloat16: c.type = LogitType::kBFloat16; break;
    case ScalarType::Half: c.type = LogitType::kFloat16; break;
    case ScalarType::Double: c.type = LogitType::kDouble; break;
    default: FASTTAX_CHECK(false, op, "logits: dtype must be float32, float64, bfloat16 or float16");
  }
  c.mask = nullptr;
  if (mask.has_value()) {
    FASTTAX_CHECK(mask->scalar_type() == ScalarType::Bool && mask->is_contiguous() && mask->numel() == c.N, op,
                  "mask: expected a contiguous bool tensor of ", c.N, " elements");
    c.mask = static_cast<const bool*>(mask->const_data_ptr());
  }
  KlParams& k = c.k;
  k.kind = static_cast<KlKind>(kind);
  k.inf_mask = inf_mask;
  k.beta = float(beta);
  k.scale = float(scale);
  k.ref_scale = float(ref_scale);
  k.cap = float(softcap);
  k.ref_cap = float(ref_softcap);
  k.row_scale = float(softcap > 0 ? inv_temperature : scale * inv_temperature);
  k.ref_row_scale = float(ref_softcap > 0 ? ref_inv_temperature : ref_scale * ref_inv_temperature);
  k.row_slope = float(scale * inv_temperature);
  k.ref_row_slope = float(ref_scale * ref_inv_temperature);
  k.plain = !inf_mask && k.cap == 0 && k.ref_cap == 0 && k.row_scale == k.ref_row_scale;
  return c;
}

inline int64_t rows_per_task(int64_t V) { return std::max<int64_t>(1, 32768 / V); }

inline std::vector<int64_t> sizes_of(const Tensor& t, int64_t dims) {
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d < dims; ++d) sizes.push_back(t.size(d));
  return sizes;
}

// Where a gradient goes: nothing, or rows of its own strides (in place: those of the logits themselves).
struct Target {
  std::optional<Rows> rows;
  void* operator[](int64_t n) const { return rows ? (*rows)[n] : nullptr; }
};

inline Tensor gradient_buffer(const Tensor& logits, bool need, Target& target) {
  const Tensor d = torch::stable::empty(need ? sizes_of(logits, logits.dim()) : std::vector<int64_t>{0}, logits.scalar_type());
  prefer_huge_pages(d);
  if (need) target.rows.emplace(d);
  return d;
}

}  // namespace fasttax
