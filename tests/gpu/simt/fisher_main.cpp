// Runs csrc/cuda/fisher.cuh on the SIMT machine against float64: every dtype of gradient, sizes
// around every boundary of the kernel, misaligned bases, more tensors than one launch holds. Prints
// what it ran; exits 1 on a wrong value.
#include "ewc_operand.h"

#include "cuda/fisher.cuh"
#include "launch.h"

namespace {

struct Pair {
  Operand sum, grad;

  Pair(EwcType grad_type, int64_t n, int shift, std::mt19937& random)
      : sum(grad_type == EwcType::kDouble ? EwcType::kDouble : EwcType::kFloat, n, shift),
        grad(grad_type, n, shift ? (shift + 1) % 4 : 0) {
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < n; ++i)
      sum.set(i, std::exp(normal(random))), grad.set(i, normal(random));
  }

  EwcTensor tensor() const {
    return {{sum.data, sum.data, sum.data, grad.data}, nullptr, sum.numel, 0,
            {sum.type, sum.type, sum.type, grad.type}, false};
  }
};

int launches = 0;

// `large`: tables of 510 tensors
bool check(const char* what, std::vector<Pair>& list, bool large) {
  constexpr double kWeight = 0.3;
  std::vector<std::vector<double>> before;
  std::vector<EwcTensor> tensors;
  for (const Pair& p : list) {
    std::vector<double>& values = before.emplace_back();
    for (int64_t i = 0; i < p.sum.numel; ++i) values.push_back(p.sum.get(i));
    tensors.push_back(p.tensor());
  }
  square_call(tensors.data(), int64_t(tensors.size()), kWeight, large, simt::Launcher{&launches});
  bool ok = true;
  for (size_t p = 0; p < list.size(); ++p)
    for (int64_t i = 0; i < list[p].sum.numel && ok; ++i) {
      // no term is negative
      const double grad = list[p].grad.get(i), want = before[p][size_t(i)] + kWeight * grad * grad;
      ok = close(what, list[p].sum.get(i), want,
                 want * (list[p].sum.type == EwcType::kDouble ? 4e-16 : 3e-7));
    }
  if (!ok) printf("failed: %s\n", what);
  return ok;
}

}  // namespace

int main(int arguments, char**) {
  constexpr EwcType kTypes[4] = {EwcType::kFloat, EwcType::kBFloat16, EwcType::kFloat16,
                                 EwcType::kDouble};
  // 1024: a group of 4 for each thread; 2048: a round; 4, 8: the groups themselves; 0 takes no
  // place in a launch
  constexpr int64_t kSizes[] = {257, 0, 1, 1023, 1024, 1028, 3, 4, 8, 2047, 2048, 2052, 3075, 7};
  std::mt19937 random(1);
  std::vector<Pair> mixes, chunks, nothing;
  for (int c = 0; c < 84; ++c)
    mixes.emplace_back(kTypes[c % 4], kSizes[c % 14], c % 3 == 2 ? 1 + c % 3 : 0, random);
  bool ok = check("every mix", mixes, false) & check("in a large table", mixes, true) &
            check("nothing", nothing, true);
  // 65536 elements are one block's; any argument leaves these out, for TSan's sake
  if (arguments == 1) {
    for (int c = 0; c < 4; ++c)
      chunks.emplace_back(kTypes[c], 65536 * (1 + c % 2) + (c < 2 ? 5 : 0), 0, random);
    ok &= check("chunks", chunks, true);
  }
  printf("%s: %d launches\n", ok ? "ok" : "FAILED", launches);
  return ok ? 0 : 1;
}
