// _project_: logits of a chunk of tokens from hidden states and a head, for linear_token_kl and
// what else makes logits a chunk at a time. One sum for each logit, in one order, whatever the
// number of tokens and threads.
#include "../call/float_type.h"
#include "gemm_amx.h"
#include "parallel.h"

#define FASTTAX_KERNELS "project_kernels.h"
#include "isa.h"

namespace fasttax {
namespace {

// out (N, V) float32 = hidden (N, H) weight (V, H)^T; rows contiguous.
void project_(Tensor out, Tensor hidden, Tensor weight) {
  const char* op = "_project_";
  const FloatType hidden_type = float_type(hidden, op, "hidden"),
                  weight_type = float_type(weight, op, "weight");
  FASTTAX_CHECK(out.dim() == 2 && hidden.dim() == 2 && weight.dim() == 2 &&
                    out.scalar_type() == ScalarType::Float && hidden_type != FloatType::kDouble &&
                    weight_type != FloatType::kDouble,
                op, "expected out (N, V) float32, hidden (N, H) and weight (V, H), none float64");
  const int64_t N = hidden.size(0), H = hidden.size(1), V = weight.size(0);
  FASTTAX_CHECK(out.size(0) == N && out.size(1) == V && weight.size(1) == H && H > 0, op,
                "shapes do not fit");
  FASTTAX_CHECK((out.stride(1) == 1 || V == 1) && (hidden.stride(1) == 1 || H == 1) &&
                    (weight.stride(1) == 1 || H == 1),
                op, "rows must be contiguous");
  if (N == 0 || V == 0) return;
  const int64_t lanes = FASTTAX_DISPATCH(token_lanes), unit = FASTTAX_DISPATCH(word_unit),
                units = (V + unit - 1) / unit;
  const bool halves = hidden_type == FloatType::kBFloat16 && weight_type == FloatType::kBFloat16;
  // its rows as they lie times the tokens, which are packed once; what is left is turned
  if (halves && isa_amx())
    return gemm_amx(V, N, H, {weight_type, weight.const_data_ptr(), weight.stride(0), true},
                    {hidden_type, hidden.const_data_ptr(), hidden.stride(0), true},
                    {out.mutable_data_ptr(), out.stride(0), true}, false);
  const bool bf16x2 = halves && isa_bf16();
  const int64_t steps = FASTTAX_DISPATCH(project_steps, bf16x2, H);
  std::vector<float> packed(size_t((N + lanes - 1) / lanes * lanes * steps));
  FASTTAX_DISPATCH(pack_tokens, hidden_type, bf16x2, hidden.const_data_ptr(), hidden.stride(0), N,
                   H, packed.data());
  float* to = static_cast<float*>(out.mutable_data_ptr());
  const void* from = weight.const_data_ptr();
  const int64_t out_stride = out.stride(0), weight_stride = weight.stride(0);
  interruptible_for(op, 0, units, 1, [&](int64_t begin, int64_t end, Watch&) {
    std::vector<float> scratch(size_t(unit * steps));
    FASTTAX_DISPATCH(project_words, weight_type, bf16x2, from, weight_stride, packed.data(), N, H,
                     begin * unit, std::min(V, end * unit), to, out_stride, scratch.data());
  });
}

}  // namespace
}  // namespace fasttax

STABLE_TORCH_LIBRARY_IMPL(fasttax, CPU, m) { m.impl("_project_", TORCH_BOX(&fasttax::project_)); }
