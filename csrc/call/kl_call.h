#pragma once

#include "float_type.h"
#include "../math/kl_frame.h"

// One call of an op over logits: its arguments, checked, for the CPU's kernels and CUDA's.
namespace fasttax {

struct Call {
  FloatType type;
  int64_t N = 1, V;
  KlParams k;
  const bool* mask;  // nullptr: every token counts
};

inline Call prepare(const char* op, const Tensor& logits, const Tensor& ref_logits,
                    const std::optional<Tensor>& mask, int64_t kind, double beta, double scale,
                    double ref_scale, double softcap, double ref_softcap, double inv_temperature,
                    double ref_inv_temperature, bool inf_mask) {
  FASTTAX_CHECK(logits.dim() >= 1 && logits.dim() == ref_logits.dim(), op,
                "logits and ref_logits: expected the same number of dimensions, at least 1");
  Call c;
  for (int64_t d = 0; d < logits.dim(); ++d) {
    FASTTAX_CHECK(logits.size(d) == ref_logits.size(d), op, "ref_logits: size ", ref_logits.size(d),
                  " in dimension ", d, ", expected ", logits.size(d), " as in logits");
    if (d + 1 < logits.dim()) c.N *= logits.size(d);
  }
  c.V = logits.size(logits.dim() - 1);
  FASTTAX_CHECK(c.V >= 1, op, "logits: the vocabulary (last dimension) is empty");
  FASTTAX_CHECK(c.V == 1 || (logits.stride(logits.dim() - 1) == 1 &&
                             ref_logits.stride(ref_logits.dim() - 1) == 1),
                op, "logits and ref_logits: the last dimension must be contiguous");
  FASTTAX_CHECK(logits.scalar_type() == ref_logits.scalar_type(), op,
                "logits and ref_logits must have one dtype");
  FASTTAX_CHECK(kind >= 0 && kind <= 2, op, "kind must be 0, 1 or 2, got ", kind);
  c.type = float_type(logits, op, "logits");
  c.mask = nullptr;
  if (mask.has_value()) {
    FASTTAX_CHECK(
        mask->scalar_type() == ScalarType::Bool && mask->is_contiguous() && mask->numel() == c.N,
        op, "mask: expected a contiguous bool tensor of ", c.N, " elements");
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

inline std::vector<int64_t> sizes_of(const Tensor& t, int64_t dims) {
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d < dims; ++d) sizes.push_back(t.size(d));
  return sizes;
}

}  // namespace fasttax
