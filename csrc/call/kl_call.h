#pragma once

#include "../math/kl_types.h"
#include "../math/types.h"
#include "check.h"
#include "float_type.h"

// One call of an op over logits: its arguments, checked, for the CPU's kernels and CUDA's.

// An op's options, as torch hands them over, and as a KlOptions.
#define FASTTAX_KL_OPTIONS                                                                       \
  int64_t kind, double beta, double scale, double ref_scale, double softcap, double ref_softcap, \
      double inv_temperature, double ref_inv_temperature, bool inf_mask
#define FASTTAX_KL_VALUES \
  kind, beta, scale, ref_scale, softcap, ref_softcap, inv_temperature, ref_inv_temperature, inf_mask

// The same of token_stats, which has no kind.
#define FASTTAX_STATS_OPTIONS                                                                 \
  double scale, double ref_scale, double softcap, double ref_softcap, double inv_temperature, \
      double ref_inv_temperature
#define FASTTAX_STATS_VALUES \
  scale, ref_scale, softcap, ref_softcap, inv_temperature, ref_inv_temperature

namespace fasttax {

struct Call {
  FloatType type, ref_type;
  int64_t N = 1, V;
  KlOptions options;
  const bool* mask;  // nullptr: every token counts

  bool live(int64_t n) const { return !mask || mask[n]; }
};

// own_types: whether the kernels take a policy and a reference of different dtypes.
inline Call checked_call(const char* op, const Tensor& logits, const Tensor& ref_logits,
                         const std::optional<Tensor>& mask, const KlOptions& options,
                         bool own_types = false) {
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
  FASTTAX_CHECK(
      c.N == 0 || c.V == 1 ||
          (logits.stride(logits.dim() - 1) == 1 && ref_logits.stride(ref_logits.dim() - 1) == 1),
      op, "logits and ref_logits: the last dimension must be contiguous");
  c.type = float_type(logits, op, "logits");
  c.ref_type = float_type(ref_logits, op, "ref_logits");
  // float64 goes another way than the others
  const bool apart = c.type == FloatType::kDouble || c.ref_type == FloatType::kDouble || !own_types;
  FASTTAX_CHECK(c.type == c.ref_type || !apart, op, "logits and ref_logits must have one dtype");
  FASTTAX_CHECK(options.kind >= 0 && options.kind < kKlKinds, op, "kind must be in 0..",
                kKlKinds - 1, ", got ", options.kind);
  c.options = options;
  c.mask = nullptr;
  if (mask.has_value()) {
    FASTTAX_CHECK(
        mask->scalar_type() == ScalarType::Bool && mask->is_contiguous() && mask->numel() == c.N,
        op, "mask: expected a contiguous bool tensor of ", c.N, " elements");
    c.mask = static_cast<const bool*>(mask->const_data_ptr());
  }
  return c;
}

// token_stats' options; without a reference its parameters are the policy's: one row stands for
// both.
inline KlOptions stats_options(bool has_ref, FASTTAX_STATS_OPTIONS) {
  if (!has_ref) {
    ref_scale = scale;
    ref_softcap = softcap;
    ref_inv_temperature = inv_temperature;
  }
  return {0, 0, FASTTAX_STATS_VALUES, false};
}

inline std::vector<int64_t> sizes_of(const Tensor& t, int64_t dims) {
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d < dims; ++d) sizes.push_back(t.size(d));
  return sizes;
}

}  // namespace fasttax
