// EWC over a run of elements of one tensor. Everything is staged to float in blocks of 256 that
// stay in L1 (a float operand is used where it lies), so one loop serves every mix of dtypes: at 20
// bytes an element the loop waits for memory (48 cycles per 16 elements at 23 GB/s a core), and a
// conversion costs 5 of them.
#include "../math/ewc.h"
#include "ewc_stage.h"

#if defined(FASTTAX_ISA)  // isa.h: once per instruction set
namespace fasttax {
namespace FASTTAX_ISA_NS {

// grad += scale * fisher * (theta - anchor)   [kAdd]     grad = the same   [kWrite]     value only
// [kValue] Returns sum fisher * (theta - anchor)^2 of the run. Held: what anchor and fisher are
// read as.
template <EwcMode mode, class Held>
inline double ewc_run(const Operand& theta, const Operand& anchor, const Operand& fisher,
                      const Operand& grad, int64_t begin, int64_t end, EwcStep scale) {
  alignas(64) float tb[kStage], ab[kStage], fb[kStage], gb[kStage];
  double total = 0;
  for (int64_t start = begin; start < end; start += kStage) {
    const int64_t n = std::min(kStage, end - start);
    const float* t = stage(theta, start, n, tb);
    const Held* a = held<Held>(anchor, start, n, ab);
    const Held* f = held<Held>(fisher, start, n, fb);
    float* g = gb;
    if (mode == EwcMode::kAdd) g = const_cast<float*>(stage(grad, start, n, gb));
    if (mode == EwcMode::kWrite && grad.type == EwcType::kFloat)
      g = static_cast<float*>(grad.data) + start;
    VF acc0{}, acc1{};
    int64_t i = 0;
    auto step = [&](int64_t at, VF& acc) {
      if (!std::is_same_v<Held, float>) {
        ahead(a + at);
        ahead(f + at);
      }
      const VF tv = load(t + at), av = load(a + at), fv = load(f + at);
      const VF pull = ewc_pull(tv, av, fv);
      acc = fma(pull, tv - av, acc);
      if (mode == EwcMode::kAdd)
        store(g + at, fma(pull * scale.first, splat(scale.second), load(g + at)));
      if (mode == EwcMode::kWrite) store(g + at, pull * scale.first * scale.second);
    };
    for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
      step(i, acc0);
      step(i + kLanes, acc1);
    }
    double tail = 0;
    for (; i < n; ++i) {
      const float pull = ewc_pull(t[i], to_float(a[i]), to_float(f[i]));
      tail += double(pull) * (t[i] - to_float(a[i]));
      if (mode == EwcMode::kAdd) g[i] += pull * scale.first * scale.second;
      if (mode == EwcMode::kWrite) g[i] = pull * scale.first * scale.second;
    }
    total += sum(acc0 + acc1) + tail;
    if (mode != EwcMode::kValue) unstage(grad, start, n, g);
  }
  return total;
}

inline void ewc_prox_run(const Operand& theta, const Operand& anchor, const Operand& fisher,
                         int64_t begin, int64_t end, EwcStep step) {
  alignas(64) float tb[kStage], ab[kStage], fb[kStage];
  for (int64_t start = begin; start < end; start += kStage) {
    const int64_t n = std::min(kStage, end - start);
    float* t = const_cast<float*>(stage(theta, start, n, tb));
    const float* a = stage(anchor, start, n, ab);
    const float* f = stage(fisher, start, n, fb);
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes)
      store(t + i, ewc_prox(load(t + i), load(a + i), splat(1.0f),
                            load(f + i) * step.first * step.second, splat(1.0f)));
    for (; i < n; ++i) t[i] = ewc_prox(t[i], a[i], 1.0f, f[i] * step.first * step.second, 1.0f);
    unstage(theta, start, n, t);
  }
}

template <class Held>
inline double ewc_modes(EwcMode mode, const Operand (&x)[4], int64_t begin, int64_t end,
                        EwcStep scale) {
  switch (mode) {
    case EwcMode::kValue:
      return ewc_run<EwcMode::kValue, Held>(x[0], x[1], x[2], x[3], begin, end, scale);
    case EwcMode::kAdd:
      return ewc_run<EwcMode::kAdd, Held>(x[0], x[1], x[2], x[3], begin, end, scale);
    case EwcMode::kWrite:
      return ewc_run<EwcMode::kWrite, Held>(x[0], x[1], x[2], x[3], begin, end, scale);
    default: ewc_prox_run(x[0], x[1], x[2], begin, end, scale); return 0;
  }
}

inline double ewc_task(EwcMode mode, const void* const* data, const EwcType* types,
                       const float* scales, int64_t begin, int64_t end, EwcStep scale) {
  Operand x[4];
  for (int k = 0; k < 4; ++k)
    x[k] = {const_cast<void*>(data[k]), types[k], k == 2 ? scales : nullptr};
  return lie_as_bfloat16(x[1], x[2]) ? ewc_modes<BFloat16>(mode, x, begin, end, scale)
                                     : ewc_modes<float>(mode, x, begin, end, scale);
}

}  // namespace FASTTAX_ISA_NS
}  // namespace fasttax
#endif
