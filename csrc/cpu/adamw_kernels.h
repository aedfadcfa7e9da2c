// AdamW with EWC over a run of elements of one tensor, in blocks of 256 that stay in L1
// (ewc_stage.h): 28 bytes an element for AdamW in float32 and 8 for fisher and anchor, each once;
// square root and two divisions (about 40 cycles per 16 elements on Zen 4) hide behind the 120 that
// memory takes.
#include "../math/adamw.h"
#include "ewc_stage.h"

#if defined(FASTTAX_ISA)  // isa.h: once per instruction set
namespace fasttax {
namespace FASTTAX_ISA_NS {

// Held: what anchor and fisher are read as (ewc_stage.h).
template <AdamWMode mode, bool amsgrad, class Held>
inline double adamw_run(const Operand (&x)[kAwOperands], int64_t begin, int64_t end,
                        const AdamWStep<float>& k) {
  alignas(64) float buffers[kAwOperands][kStage];
  const auto root = [](float a) { return std::sqrt(a); };
  const auto roots = [](VF a) { return sqrt(a); };
  const auto round = [](float a) { return rounded(a); };
  const auto rounds = [](VF a) { return rounded(a); };
  const AdamWStep<VF> ks{
      splat(k.grad_factor),     splat(k.decay),  splat(k.one_minus_beta1), splat(k.beta2),
      splat(k.one_minus_beta2), splat(k.step),   splat(k.root_factor),     splat(k.eps),
      splat(k.first),           splat(k.second), splat(k.fisher_factor)};
  const bool from_second = mode != AdamWMode::kPlain && !x[kAwFisher].data;
  double total = 0;
  for (int64_t start = begin; start < end; start += kStage) {
    const int64_t n = std::min(kStage, end - start);
    float* at[kAwOperands];
    for (int o : {kAwTheta, kAwGrad, kAwFirst, kAwSecond, kAwMax})
      at[o] = x[o].data ? const_cast<float*>(stage(x[o], start, n, buffers[o])) : buffers[o];
    const Held* anchors = mode != AdamWMode::kPlain
                              ? held<Held>(x[kAwAnchor], start, n, buffers[kAwAnchor])
                              : nullptr;
    const Held* fishers = mode != AdamWMode::kPlain && !from_second
                              ? held<Held>(x[kAwFisher], start, n, buffers[kAwFisher])
                              : anchors;
    VF sums{};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      if (kAhead != 0) {
        // of a buffer on the stack: nothing to fetch
        for (int o : {kAwTheta, kAwGrad, kAwFirst, kAwSecond, kAwMax}) ahead(at[o] + i);
        if (mode != AdamWMode::kPlain) ahead(anchors + i);
        if (mode != AdamWMode::kPlain) ahead(fishers + i);
      }
      VF theta = load(at[kAwTheta] + i), m = load(at[kAwFirst] + i), v = load(at[kAwSecond] + i),
         anchor{}, fisher{}, most{};
      if (mode != AdamWMode::kPlain) anchor = load(anchors + i);
      if (mode != AdamWMode::kPlain && !from_second) fisher = load(fishers + i);
      if (amsgrad) most = load(at[kAwMax] + i);
      sums += adamw_element<mode>(theta, anchor, fisher, load(at[kAwGrad] + i), m, v, most, amsgrad,
                                  from_second, ks, roots, rounds, splat(1.0f));
      store(at[kAwTheta] + i, theta);
      store(at[kAwFirst] + i, m);
      store(at[kAwSecond] + i, v);
      if (amsgrad) store(at[kAwMax] + i, most);
    }
    for (; i < n; ++i) {
      const float anchor = mode != AdamWMode::kPlain ? to_float(anchors[i]) : 0;
      const float fisher = mode != AdamWMode::kPlain && !from_second ? to_float(fishers[i]) : 0;
      float unused = 0;
      total += double(adamw_element<mode>(
          at[kAwTheta][i], anchor, fisher, at[kAwGrad][i], at[kAwFirst][i], at[kAwSecond][i],
          amsgrad ? at[kAwMax][i] : unused, amsgrad, from_second, k, root, round, 1.0f));
    }
    if (mode != AdamWMode::kPlain) total += sum(sums);
    for (int o : {kAwTheta, kAwFirst, kAwSecond}) unstage(x[o], start, n, at[o]);
    if (amsgrad) unstage(x[kAwMax], start, n, at[kAwMax]);
  }
  return total;
}

template <AdamWMode mode, class Held>
inline double adamw_mode(const Operand (&x)[kAwOperands], int64_t begin, int64_t end,
                         const AdamWStep<float>& k) {
  return x[kAwMax].data ? adamw_run<mode, true, Held>(x, begin, end, k)
                        : adamw_run<mode, false, Held>(x, begin, end, k);
}

inline double adamw_task(const AdamWTensor& t, int64_t begin, int64_t end,
                         const AdamWStep<float>& k) {
  Operand x[kAwOperands];
  for (int o = 0; o < kAwOperands; ++o)
    x[o] = {t.data[o], t.types[o], o == kAwFisher ? t.scales : nullptr};
  const bool halves = lie_as_bfloat16(x[kAwAnchor], x[kAwFisher]);
  switch (t.mode) {
    case AdamWMode::kGrad:
      return halves ? adamw_mode<AdamWMode::kGrad, BFloat16>(x, begin, end, k)
                    : adamw_mode<AdamWMode::kGrad, float>(x, begin, end, k);
    case AdamWMode::kProx:
      return halves ? adamw_mode<AdamWMode::kProx, BFloat16>(x, begin, end, k)
                    : adamw_mode<AdamWMode::kProx, float>(x, begin, end, k);
    default: return adamw_mode<AdamWMode::kPlain, float>(x, begin, end, k);
  }
}

}  // namespace FASTTAX_ISA_NS
}  // namespace fasttax
#endif
