// sums += weight * grad^2 over a run of elements, float32 sums; gradients of any dtype are staged
// to float (ewc_stage.h).
#include "ewc_stage.h"

#if defined(FASTTAX_ISA)  // isa.h: once per instruction set
namespace fasttax {
namespace FASTTAX_ISA_NS {

inline void square_run(float* sums, void* grads, EwcType type, float weight, int64_t begin,
                       int64_t end) {
  alignas(64) float staged[kStage];
  const Operand grad{grads, type, nullptr};
  for (int64_t start = begin; start < end; start += kStage) {
    const int64_t n = std::min(kStage, end - start);
    const float* g = stage(grad, start, n, staged);
    float* s = sums + start;
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes)
      store(s + i, fma(load(g + i) * weight, load(g + i), load(s + i)));
    for (; i < n; ++i) s[i] += g[i] * weight * g[i];
  }
}

}  // namespace FASTTAX_ISA_NS
}  // namespace fasttax
#endif
