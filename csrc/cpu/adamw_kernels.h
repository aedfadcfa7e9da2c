// AdamW with EWC over a run of elements of one tensor, in blocks of 256 that stay in L1
// (ewc_stage.h): 28 bytes an element for AdamW in float32 and 8 for fisher and anchor, each once.
// Memory sets the pace: on Zen 4 16 elements in L2 take 8 ns, and those of a large model the 15
// that their 24 bytes each take to be read at 26 GB/s.
#include "../math/adamw.h"
#include "ewc_stage.h"

#if defined(FASTTAX_ISA)  // isa.h: once per instruction set
namespace fasttax {
namespace FASTTAX_ISA_NS {

// What a block of at most kStage elements is read from and written to, as floats. Held: what anchor
// and fisher are read as (ewc_stage.h).
template <class Held>
struct AdamWBlock {
  float* at[kAwOperands];
  const Held *anchors, *fishers;
  bool from_second;  // the Fisher is the second moment
  int64_t n;
};

// A function of its own: inlined into the walk over blocks, GCC keeps none of the eleven factors in
// a register, and elements that are in L2 take a fifth longer on Zen 4.
template <AdamWMode mode, bool amsgrad, class Held>
__attribute__((noinline)) double adamw_block(const AdamWBlock<Held>& x, const AdamWStep<float>& k) {
  const auto root = [](float a) { return std::sqrt(a); };
  const auto roots = [](VF a) { return sqrt(a); };
  const auto round = [](float a) { return rounded(a); };
  const auto rounds = [](VF a) { return rounded(a); };
  const AdamWStep<VF> ks{
      splat(k.grad_factor),     splat(k.decay),  splat(k.one_minus_beta1), splat(k.beta2),
      splat(k.one_minus_beta2), splat(k.step),   splat(k.root_factor),     splat(k.eps),
      splat(k.first),           splat(k.second), splat(k.fisher_factor)};
  constexpr bool penalised = mode != AdamWMode::kPlain;
  const bool from_second = x.from_second;
  float *const thetas = x.at[kAwTheta], *const grads = x.at[kAwGrad],
               *const firsts = x.at[kAwFirst], *const seconds = x.at[kAwSecond],
               *const mosts = x.at[kAwMax];
  VF sums{};
  int64_t i = 0;
  for (; i + kLanes <= x.n; i += kLanes) {
    if (kAhead != 0) {
      ahead(thetas + i), ahead(grads + i), ahead(firsts + i), ahead(seconds + i);
      if (amsgrad) ahead(mosts + i);
      if (penalised) ahead(x.anchors + i), ahead(x.fishers + i);
    }
    VF theta = load(thetas + i), m = load(firsts + i), v = load(seconds + i), anchor{}, fisher{},
       most{};
    if (penalised) anchor = load(x.anchors + i);
    if (penalised && !from_second) fisher = load(x.fishers + i);
    if (amsgrad) most = load(mosts + i);
    sums += adamw_element<mode>(theta, anchor, fisher, load(grads + i), m, v, most, amsgrad,
                                from_second, ks, roots, rounds, splat(1.0f));
    store(thetas + i, theta);
    store(firsts + i, m);
    store(seconds + i, v);
    if (amsgrad) store(mosts + i, most);
  }
  double total = penalised ? sum(sums) : 0;
  for (; i < x.n; ++i) {
    const float anchor = penalised ? to_float(x.anchors[i]) : 0;
    const float fisher = penalised && !from_second ? to_float(x.fishers[i]) : 0;
    float unused = 0;
    total += double(adamw_element<mode>(thetas[i], anchor, fisher, grads[i], firsts[i], seconds[i],
                                        amsgrad ? mosts[i] : unused, amsgrad, from_second, k, root,
                                        round, 1.0f));
  }
  return total;
}

template <AdamWMode mode, bool amsgrad, class Held>
inline double adamw_run(const Operand (&x)[kAwOperands], int64_t begin, int64_t end,
                        const AdamWStep<float>& k) {
  alignas(64) float buffers[kAwOperands][kStage];
  constexpr bool penalised = mode != AdamWMode::kPlain;
  AdamWBlock<Held> block{};
  block.from_second = penalised && !x[kAwFisher].data;
  double total = 0;
  for (int64_t start = begin; start < end; start += kStage) {
    const int64_t n = block.n = std::min(kStage, end - start);
    for (int o : {kAwTheta, kAwGrad, kAwFirst, kAwSecond, kAwMax})
      block.at[o] = x[o].data ? const_cast<float*>(stage(x[o], start, n, buffers[o])) : buffers[o];
    if (penalised) block.anchors = held<Held>(x[kAwAnchor], start, n, buffers[kAwAnchor]);
    block.fishers = penalised && !block.from_second
                        ? held<Held>(x[kAwFisher], start, n, buffers[kAwFisher])
                        : block.anchors;
    total += adamw_block<mode, amsgrad>(block, k);
    for (int o : {kAwTheta, kAwFirst, kAwSecond}) unstage(x[o], start, n, block.at[o]);
    if (amsgrad) unstage(x[kAwMax], start, n, block.at[kAwMax]);
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
