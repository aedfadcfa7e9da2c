// EWC over a run of elements of one tensor. Everything is staged to float in blocks of 256 that stay in L1
// (a float operand is used where it lies), so one loop serves every mix of dtypes: at 20 bytes an element the
// loop waits for memory (48 cycles per 16 elements at 23 GB/s a core), and a conversion costs 5 of them.
#include "ewc_stage.h"

namespace fasttax {
namespace FASTTAX_ISA_NS {

// grad += scale * fisher * (theta - anchor)   [kAdd]     grad = the same   [kWrite]     value only   [kValue]
// Returns sum fisher * (theta - anchor)^2 of the run.
template <EwcMode mode>
inline double ewc_run(const Operand& theta, const Operand& anchor, const Operand& fisher, const Operand& grad, int64_t begin, int64_t end,
                      EwcStep scale) {
  alignas(64) float tb[kStage], ab[kStage], fb[kStage], gb[kStage];
  double total = 0;
  for (int64_t start = begin; start < end; start += kStage) {
    const int64_t n = std::min(kStage, end - start);
    const float* t = stage(theta, start, n, tb);
    const float* a = stage(anchor, start, n, ab);
    const float* f = stage(fisher, start, n, fb);
    float* g = gb;
    if (mode == EwcMode::kAdd) g = const_cast<float*>(stage(grad, start, n, gb));
    if (mode == EwcMode::kWrite && grad.type == EwcType::kFloat) g = static_cast<float*>(grad.data) + start;
    VF acc0{}, acc1{};
    int64_t i = 0;
    auto step = [&](int64_t at, VF& acc) {
      const VF tv = load(t + at), av = load(a + at), fv = load(f + at);
      const VF pull = ewc_pull(tv, av, fv);
      acc = fma(pull, tv - av, acc);
      if (mode == EwcMode::kAdd) store(g + at, fma(pull * scale.first, splat(scale.second), load(g + at)));
      if (mode == EwcMode::kWrite) store(g + at, pull * scale.first * scale.second);
    };
    for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
      step(i, acc0);
      step(i + kLanes, acc1);
    }
    double tail = 0;
    for (; i < n; ++i) {
      const float pull = ewc_pull(t[i], a[i], f[i]);
      tail += double(pull) * (t[i] - a[i]);
      if (mode == EwcMode::kAdd) g[i] += pull * scale.first * scale.second;
      if (mode == EwcMode::kWrite) g[i] = pull * scale.first * scale.second;
    }
    total += sum(acc0 + acc1) + tail;
    if (mode != EwcMode::kValue) unstage(grad, start, n, g);
  }
  return total;
}

inline void ewc_prox_run(const Operand& theta, const Operand& anchor, const Operand& fisher, int64_t begin, int64_t end, EwcStep step) {
  alignas(64) float tb[kStage], ab[kStage], fb[kStage];
  for (int64_t start = begin; start < end; start += kStage) {
    const int64_t n = std::min(kStage, end - start);
    float* t = const_cast<float*>(stage(theta, start, n, tb));
    const float* a = stage(anchor, start, n, ab);
    const float* f = stage(fisher, start, n, fb);
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes)
      store(t + i, ewc_prox(load(t + i), load(a + i), splat(1.0f), load(f + i) * step.first * step.second, splat(1.0f)));
    for (; i < n; ++i) t[i] = ewc_prox(t[i], a[i], 1.0f, f[i] * step.first * step.second, 1.0f);
    unstage(theta, start, n, t);
  }
}

inline double ewc_task(EwcMode mode, const void* const* data, const EwcType* types, const float* scales, int64_t begin, int64_t end,
                       EwcStep scale) {
  Operand x[4];
  for (int k = 0; k < 4; ++k) x[k] = {const_cast<void*>(data[k]), types[k], k == 2 ? scales : nullptr};
  switch (mode) {
    case EwcMode::kValue: return ewc_run<EwcMode::kValue>(x[0], x[1], x[2], x[3], begin, end, scale);
    case EwcMode::kAdd: return ewc_run<EwcMode::kAdd>(x[0], x[1], x[2], x[3], begin, end, scale);
    case EwcMode::kWrite: return ewc_run<EwcMode::kWrite>(x[0], x[1], x[2], x[3], begin, end, scale);
    default: ewc_prox_run(x[0], x[1], x[2], begin, end, scale); return 0;
  }
}

}  // namespace FASTTAX_ISA_NS
}  // namespace fasttax
