// Runs csrc/cuda/ewc.cuh on the SIMT machine against a float64 oracle: all four
// modes, every mix of dtypes, sizes around every boundary of the kernel,
// misaligned bases, more tensors than one launch holds. Prints what it ran;
// exits 1 on a wrong value.
#include "ewc_operand.h"

#include "cuda/ewc.cuh"
#include "launch.h"

namespace {

struct Parameter {
  std::vector<Operand> operands;  // theta, anchor, fisher, grad

  Parameter(const EwcType (&types)[4], int64_t n, int shift, std::mt19937& random) {
    std::normal_distribution<double> normal;
    std::uniform_real_distribution<double> uniform;
    for (int k = 0; k < 4; ++k) {
      operands.emplace_back(types[k], n, shift ? (shift + k) % 4 : 0);
      Operand& x = operands.back();
      if (x.type == EwcType::kU8Log)
        for (int64_t b = 0; b < (n + 255) / 256; ++b)
          x.scales.push_back(float(-20 * uniform(random))),
              x.scales.push_back(float(0.01 + 0.07 * uniform(random)));
      for (int64_t i = 0; i < n; ++i)
        x.set(i, x.type == EwcType::kU8Log ? double(random() % 256)
                 : k == 2                  ? std::exp(2 * normal(random))
                                           : normal(random));
    }
  }

  EwcTensor tensor(bool with_grad) {
    EwcTensor x{};
    for (int k = 0; k < (with_grad ? 4 : 3); ++k) x.data[k] = operands[size_t(k)].data;
    for (int k = 0; k < 4; ++k)
      x.types[k] = with_grad || k < 3 ? operands[size_t(k)].type : EwcType::kFloat;
    x.scales = operands[2].scales.data();
    x.numel = operands[0].numel;
    return x;
  }
};

int launches = 0;
bool quick = false;  // a large table is 32 KB that each thread copies: not for TSan

// `large`: tables of 510 tensors
template <EwcMode mode>
double run(std::vector<Parameter>& list, bool large, double scale, const double* upstream,
           double factor, bool runs = true) {
  std::vector<EwcTensor> tensors;
  for (Parameter& p : list)
    tensors.push_back(p.tensor(mode == EwcMode::kAdd || mode == EwcMode::kWrite));
  const int64_t count = int64_t(tensors.size()), chunks = ewc_total_chunks(tensors.data(), count);
  std::vector<double> parts(size_t(chunks),
                            std::nan(""));  // each is written before it is read
  double out = 0;
  EwcLaunch call{};
  call.mode = mode;
  call.tensors = tensors.data(), call.count = count;
  call.scale = scale;
  call.upstream = upstream, call.upstream_double = true;
  call.parts = parts.data();
  call.out = &out, call.out_double = true;
  call.factor = factor;
  ewc_call(call, large, simt::Launcher{&launches, runs});
  return out;
}

// One mode on copies of `list` (made anew from the seed), every written element
// and the value checked.
template <EwcMode mode>
bool check(const char* what, const std::function<std::vector<Parameter>()>& make) {
  constexpr double kScale = 0.37, kUpstream = 1.7, kFactor = 0.25;
  const double upstream = kUpstream, scale = kScale * kUpstream;
  std::vector<Parameter> before = make(), after = make(), again = make();
  const double value = run<mode>(after, false, kScale, &upstream, kFactor);
  bool ok = value == run<mode>(again, !quick, kScale, &upstream, kFactor);
  if (!ok) printf("%s: the value depends on the order of the threads, or on the table\n", what);
  double total = 0;
  for (size_t p = 0; p < before.size(); ++p) {
    const auto& x = before[p].operands;
    for (int64_t i = 0; i < x[0].numel && ok; ++i) {
      const double theta = x[0].get(i), anchor = x[1].get(i), fisher = x[2].get(i),
                   old = x[3].get(i), pull = fisher * (theta - anchor);
      // of the formula itself
      const double inner = x[0].type == EwcType::kDouble  ? 1e-15
                           : x[2].type == EwcType::kU8Log ? 1e-5
                                                          : 4e-7;
      total += pull * (theta - anchor);
      double want[4] = {theta, anchor, fisher, old}, slack[4] = {0, 0, 0, 0};
      if (mode == EwcMode::kAdd) {
        want[3] = old + scale * pull;
        slack[3] = (std::fabs(old) + std::fabs(scale * pull)) * inner +
                   std::fabs(want[3]) * x[3].epsilon();
      }
      if (mode == EwcMode::kWrite) {
        want[3] = scale * pull;
        slack[3] = std::fabs(want[3]) * (inner + x[3].epsilon());
      }
      if (mode == EwcMode::kProx) {
        want[0] = anchor + (theta - anchor) / (1 + scale * fisher);
        slack[0] =
            (std::fabs(anchor) + std::fabs(theta)) * inner + std::fabs(want[0]) * x[0].epsilon();
      }
      for (int k = 0; k < 4; ++k) {
        // half a step of float16's subnormals
        const double tiny = x[size_t(k)].type == EwcType::kFloat16 ? 0x1p-25 : 0;
        ok = ok && close(what, after[p].operands[size_t(k)].get(i), want[k],
                         slack[k] > 0 ? slack[k] + tiny : 0);
      }
    }
    for (int k = 0; k < 4; ++k)
      ok = ok && memcmp(after[p].operands[size_t(k)].data, again[p].operands[size_t(k)].data,
                        size_t(Operand::bytes(x[size_t(k)].type, x[size_t(k)].numel))) == 0;
  }
  if (mode == EwcMode::kValue || mode == EwcMode::kAdd)
    ok = ok && close("value", value, kFactor * total, 4e-6 * std::fabs(kFactor * total));
  if (!ok) printf("failed: %s, mode %d\n", what, int(mode));
  return ok;
}

// What a call on so many parameters launches.
template <EwcMode mode>
bool check_count(int count, bool large, int most) {
  std::mt19937 random(4);
  std::vector<Parameter> list;
  const EwcType f = EwcType::kFloat, types[4] = {f, f, f, f};
  for (int i = 0; i < count; ++i) list.emplace_back(types, 5, 0, random);
  const int before = launches;
  run<mode>(list, large, 0.5, nullptr, 1, false);
  if (launches - before <= most) return true;
  printf("%d parameters, mode %d: %d launches\n", count, int(mode), launches - before);
  return false;
}

// A scale that no float holds, of Fishers so small that their product is an
// ordinary number.
template <EwcMode mode>
bool check_beyond_floats() {
  std::mt19937 random(5);
  const EwcType f = EwcType::kFloat, types[4] = {f, f, f, f};
  std::vector<Parameter> list;
  list.emplace_back(types, 6, 0, random);
  for (int64_t i = 0; i < 6; ++i) {
    const double values[4] = {3, 2, 0x1p-125, 0};
    for (size_t k = 0; k < 4; ++k) list[0].operands[k].set(i, values[k]);
  }
  run<mode>(list, false, 0x1p130, nullptr, 1);
  const bool prox = mode == EwcMode::kProx;
  const double want = prox ? 2 + 1 / 33.0 : 32;
  bool ok = true;
  for (int64_t i = 0; i < 6; ++i)
    ok = ok && close("2^130", list[0].operands[prox ? 0 : 3].get(i), want, 1e-6 * want);
  return ok;
}

// More parts than the block that adds them has threads.
bool check_many_parts() {
  std::vector<double> parts(2 * kEwcFinishThreads + 77);
  double want = 0, out = 0;
  for (size_t i = 0; i < parts.size(); ++i) want += parts[i] = double(i % 7);
  const EwcSum sum{parts.data(), int64_t(parts.size()), 0.5, &out, true};
  simt::launch(dim3(1), dim3(kEwcFinishThreads), 0, [&] { ewc_finish(sum); });
  return close("many parts", out, want / 2, 1e-9 * want);
}

bool check_all(const char* what, const std::function<std::vector<Parameter>(bool)>& make) {
  const auto any = [&] { return make(false); };
  const auto same = [&] { return make(true); };  // kWrite's gradient has theta's type
  return check<EwcMode::kValue>(what, any) & check<EwcMode::kAdd>(what, any) &
         check<EwcMode::kWrite>(what, same) & check<EwcMode::kProx>(what, any);
}

}  // namespace

int main(int arguments, char**) {
  using namespace fasttax;
  quick = arguments > 1;
  constexpr EwcType kFloats[3] = {EwcType::kFloat, EwcType::kBFloat16, EwcType::kFloat16};
  constexpr EwcType kFishers[4] = {EwcType::kFloat, EwcType::kBFloat16, EwcType::kFloat16,
                                   EwcType::kU8Log};
  // 1023 to 1025: one round of the block; 255 to 257: a u8log block; 0: takes
  // no place in a launch
  constexpr int64_t kSizes[] = {257, 0, 1, 1025, 3, 4, 5, 255, 256, 1023, 1024, 2051, 7};
  bool ok = true;
  constexpr EwcType kAnchors[4] = {EwcType::kFloat, EwcType::kBFloat16, EwcType::kFloat16,
                                   EwcType::kSplit};
  // 144 mixes, three small tables or a large one; every third list starts off
  // alignment
  ok &= check_all("every mix", [&](bool same) {
    std::mt19937 random(1);
    std::vector<Parameter> list;
    for (int c = 0; c < 144; ++c) {
      const EwcType theta = kFloats[c % 3],
                    types[4] = {theta, kAnchors[c / 3 % 4], kFishers[c / 12 % 4],
                                same ? theta : kFloats[c / 48]};
      list.emplace_back(types, kSizes[c % 13], c % 3 == 2 || c % 7 == 0 ? 1 + c % 3 : 0, random);
    }
    return list;
  });
  // 65536 elements are one block's; any argument leaves these out, for TSan's
  // sake
  if (arguments == 1)
    ok &= check_all("chunks", [&](bool same) {
      std::mt19937 random(2);
      std::vector<Parameter> list;
      const EwcType f = EwcType::kFloat, b = EwcType::kBFloat16;
      const EwcType mixes[3][4] = {
          {f, EwcType::kSplit, f, f}, {f, b, EwcType::kU8Log, same ? f : b}, {b, b, b, b}};
      const int64_t sizes[3] = {65537, 2 * 65536, 65536 + 2051};
      for (int m = 0; m < 3; ++m) list.emplace_back(mixes[m], sizes[m], 0, random);
      return list;
    });
  ok &= check_all("float64", [&](bool) {
    std::mt19937 random(3);
    std::vector<Parameter> list;
    const EwcType d = EwcType::kDouble, types[4] = {d, d, d, d};
    for (int64_t n : {1, 1001, quick ? 2051 : 65536 + 5})
      list.emplace_back(types, n, n == 1001, random);
    return list;
  });
  ok &= check_all("nothing", [&](bool) { return std::vector<Parameter>(); });
  ok &= check_count<EwcMode::kValue>(300, true, 2) & check_count<EwcMode::kAdd>(300, true, 2) &
        check_count<EwcMode::kWrite>(300, true, 1) & check_count<EwcMode::kProx>(300, true, 1);
  // tables that are full to the last place
  ok &= check_count<EwcMode::kWrite>(kEwcTensors, false, 1) &
        check_count<EwcMode::kWrite>(kEwcManyTensors, true, 1);
  ok &= check_beyond_floats<EwcMode::kAdd>() & check_beyond_floats<EwcMode::kWrite>() &
        check_beyond_floats<EwcMode::kProx>() & check_many_parts();
  printf("%s: %d launches\n", ok ? "ok" : "FAILED", launches);
  return ok ? 0 : 1;
}
