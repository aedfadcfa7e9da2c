// Runs csrc/cuda/adamw.cuh on the SIMT machine against a float64 oracle: every mode, mixes of
// dtypes, misaligned bases, sizes around every boundary, more tensors than one launch holds, values
// on the device, a skipped step. Prints what it ran; exits 1 on a wrong value.
#include "ewc_operand.h"

#include "cuda/adamw.cuh"
#include "launch.h"

namespace {

struct Parameter {
  std::vector<Operand> operands;  // by AdamWOperand
  AdamWMode mode;
  bool amsgrad, own_fisher, step_double;
  double wide_step;
  float step;

  Parameter(const EwcType (&types)[kAwOperands], AdamWMode m, bool ams, bool own, int64_t n,
            int shift, int steps, std::mt19937& random)
      : mode(m),
        amsgrad(ams),
        own_fisher(own),
        step_double(steps % 2 == 1),
        wide_step(steps),
        step(float(steps)) {
    std::normal_distribution<double> normal;
    std::uniform_real_distribution<double> uniform;
    for (int k = 0; k < kAwOperands; ++k) {
      operands.emplace_back(types[k], n, shift ? (shift + k) % 4 : 0);
      Operand& x = operands.back();
      if (x.type == EwcType::kU8Log)
        for (int64_t b = 0; b < (n + 255) / 256; ++b)
          x.scales.push_back(float(-20 - uniform(random))),
              x.scales.push_back(float(0.01 + 0.07 * uniform(random)));
      for (int64_t i = 0; i < n; ++i) {
        const double positive = k == kAwFisher ? std::exp(normal(random)) : 0.1 + uniform(random);
        x.set(i, x.type == EwcType::kU8Log                         ? double(random() % 256)
                 : k == kAwFisher || k == kAwSecond || k == kAwMax ? positive
                                                                   : normal(random));
      }
    }
  }

  AdamWTensor tensor() {
    AdamWTensor x{};
    for (int k = 0; k < kAwOperands; ++k) {
      const bool there = (k != kAwMax || amsgrad) &&
                         (k != kAwAnchor || mode != AdamWMode::kPlain) &&
                         (k != kAwFisher || (mode != AdamWMode::kPlain && own_fisher));
      if (!there) continue;
      x.data[k] = operands[size_t(k)].data;
      x.types[k] = operands[size_t(k)].type;
    }
    x.scales = operands[kAwFisher].scales.data();
    x.step = step_double ? static_cast<void*>(&wide_step) : static_cast<void*>(&step);
    x.step_double = step_double;
    x.numel = operands[0].numel;
    x.mode = mode;
    return x;
  }
};

int launches = 0;
bool quick = false;  // a large table is 32 KB that each thread copies: not for TSan

// `large`: tables of 313 tensors
double run(std::vector<Parameter>& list, AdamWLaunch args, bool large, bool runs = true) {
  std::vector<AdamWTensor> tensors;
  for (Parameter& p : list) tensors.push_back(p.tensor());
  args.tensors = tensors.data(), args.count = int64_t(tensors.size());
  const int64_t chunks = adamw_total_chunks(args.tensors, args.count);
  std::vector<double> parts(size_t(chunks), std::nan(""));  // each is written before it is read
  double out = 0;
  args.parts = parts.data();
  args.out = &out, args.out_double = true;
  adamw_call(args, large, simt::Launcher{&launches, runs});
  return out;
}

// What a step of a model's 300 parameters launches.
bool check_count(const AdamWLaunch& args) {
  std::mt19937 random(4);
  std::vector<Parameter> list;
  const EwcType f = EwcType::kFloat, types[kAwOperands] = {f, f, f, f, f, f, f};
  for (int i = 0; i < 300; ++i)
    list.emplace_back(types, AdamWMode::kGrad, false, true, 5, 0, i % 4, random);
  const int before = launches;
  run(list, args, true, false);
  if (launches - before <= 2) return true;
  printf("300 parameters: %d launches\n", launches - before);
  return false;
}

bool check(const char* what, const AdamWLaunch& args,
           const std::function<std::vector<Parameter>()>& make) {
  std::vector<Parameter> before = make(), after = make(), again = make();
  const double value = run(after, args, false);
  bool ok = value == run(again, args, !quick);
  if (!ok) printf("%s: the value depends on the order of the threads, or on the table\n", what);
  const AdamWOptions& o = args.options;
  const double lr = args.lr ? *static_cast<const float*>(args.lr) : o.lr;
  const double unscale =
      (o.maximize ? -1 : 1) /
      (args.grad_scale ? double(*static_cast<const float*>(args.grad_scale)) : 1.0);
  const bool skipped = args.found_inf && *static_cast<const float*>(args.found_inf) != 0;
  double total = 0;
  for (size_t p = 0; p < before.size(); ++p) {
    const auto& x = before[p].operands;
    const AdamWMode mode = before[p].mode;
    const bool held = mode != AdamWMode::kPlain, own = before[p].own_fisher,
               ams = before[p].amsgrad;
    const double t = before[p].wide_step + 1;
    ok = ok && close("step", after[p].step_double ? after[p].wide_step : after[p].step,
                     skipped ? t - 1 : t, 0);
    const double inner = x[0].type == EwcType::kDouble                  ? 1e-14
                         : x[kAwFisher].type == EwcType::kU8Log && held ? 2e-5
                                                                        : 1e-6;
    for (int64_t i = 0; i < x[0].numel && ok; ++i) {
      double old[kAwOperands], want[kAwOperands], slack[kAwOperands] = {};
      for (int k = 0; k < kAwOperands; ++k) want[k] = old[k] = x[size_t(k)].get(i);
      if (!skipped) {
        double fisher = own     ? old[kAwFisher]
                        : t > 1 ? o.second_moment * old[kAwSecond] / (1 - std::pow(o.beta2, t - 1))
                                : 0;
        const double delta = old[kAwTheta] - old[kAwAnchor], raw = old[kAwGrad] * unscale;
        const double pull = held && mode == AdamWMode::kGrad ? o.strength * fisher * delta : 0,
                     g = raw + pull;
        want[kAwFirst] = o.beta1 * old[kAwFirst] + (1 - o.beta1) * g;
        want[kAwSecond] = o.beta2 * old[kAwSecond] + (1 - o.beta2) * g * g;
        if (ams) want[kAwMax] = std::max(old[kAwMax], want[kAwSecond]);
        if (held && !own && mode == AdamWMode::kProx)
          fisher = o.second_moment * want[kAwSecond] / (1 - std::pow(o.beta2, t));
        const double metric =
            std::sqrt((ams ? want[kAwMax] : want[kAwSecond]) / (1 - std::pow(o.beta2, t))) + o.eps;
        const double step = lr / (1 - std::pow(o.beta1, t)),
                     update = step * want[kAwFirst] / metric;
        const double u = old[kAwTheta] * (1 - lr * o.weight_decay) - update,
                     size = std::fabs(raw) + std::fabs(pull);
        want[kAwTheta] = held && mode == AdamWMode::kProx
                             ? old[kAwAnchor] + (u - old[kAwAnchor]) * metric /
                                                    (metric + lr * o.strength * fisher)
                             : u;
        if (held) total += fisher * delta * delta;
        slack[kAwFirst] = inner * (std::fabs(old[kAwFirst]) + size);
        slack[kAwSecond] = inner * (old[kAwSecond] + 4 * size * size);
        if (ams) slack[kAwMax] = slack[kAwSecond] + inner * old[kAwMax];
        slack[kAwTheta] = 4 * inner *
                              (std::fabs(old[kAwTheta]) + (held ? std::fabs(old[kAwAnchor]) : 0) +
                               std::fabs(update)) +
                          step / metric * slack[kAwFirst];
        for (int k : {kAwTheta, kAwFirst, kAwSecond, kAwMax})
          if (k != kAwMax || ams)
            slack[k] += std::fabs(want[k]) * x[size_t(k)].epsilon() +
                        (x[size_t(k)].type == EwcType::kFloat16 ? 0x1p-25 : 0);
      }
      for (int k = 0; k < kAwOperands; ++k)
        ok = ok && close(what, after[p].operands[size_t(k)].get(i), want[k], slack[k]);
    }
    for (int k = 0; k < kAwOperands; ++k)
      ok = ok && memcmp(after[p].operands[size_t(k)].data, again[p].operands[size_t(k)].data,
                        size_t(Operand::bytes(x[size_t(k)].type, x[size_t(k)].numel))) == 0;
  }
  ok =
      ok && close("value", value, o.strength / 2 * total, 2e-5 * std::fabs(o.strength / 2 * total));
  if (!ok) printf("failed: %s\n", what);
  return ok;
}

}  // namespace

int main(int arguments, char**) {
  using namespace fasttax;
  quick = arguments > 1;
  constexpr EwcType kFloats[3] = {EwcType::kFloat, EwcType::kBFloat16, EwcType::kFloat16};
  constexpr EwcType kAnchors[4] = {EwcType::kFloat, EwcType::kBFloat16, EwcType::kFloat16,
                                   EwcType::kSplit};
  constexpr EwcType kFishers[4] = {EwcType::kFloat, EwcType::kBFloat16, EwcType::kFloat16,
                                   EwcType::kU8Log};
  constexpr AdamWMode kModes[3] = {AdamWMode::kPlain, AdamWMode::kGrad, AdamWMode::kProx};
  // 1023 to 1025: one round of the block; 255 to 257: a u8log block; 0: no blocks, but a step to
  // count
  constexpr int64_t kSizes[] = {257, 0, 1, 1025, 3, 4, 5, 255, 256, 1023, 7};
  AdamWLaunch args{};
  args.options = {1e-2, 0.9, 0.99, 1e-3, 0.1, 0.7, 0, false};
  bool ok = true;
  const auto mixes = [&](bool ams, bool own) {
    return [=] {
      std::mt19937 random(1);
      std::vector<Parameter> list;
      for (int c = 0; c < 72; ++c) {
        const EwcType theta = kFloats[c % 3], moment = c % 4 == 3 ? EwcType::kFloat : theta;
        const EwcType types[kAwOperands] = {
            theta, kAnchors[c / 3 % 4], kFishers[c / 2 % 4], kFloats[c / 12 % 3], moment, moment,
            moment};
        list.emplace_back(types, kModes[c / 5 % 3], ams, own, kSizes[c % 11],
                          c % 3 == 2 || c % 7 == 0 ? 1 + c % 3 : 0, c % 5, random);
      }
      return list;
    };
  };
  ok &= check("every mix", args, mixes(false, true));
  const float lr = 3e-2f, grad_scale = 64, fine = 0, inf = 1;
  AdamWLaunch device = args;
  device.options.maximize = true;
  device.lr = &lr, device.grad_scale = &grad_scale, device.found_inf = &fine;
  ok &= check("values on the device, maximize, amsgrad", device, mixes(true, true));
  device.found_inf = &inf;
  ok &= check("a skipped step", device, mixes(true, true));
  AdamWLaunch second = args;
  second.options.second_moment = 3;
  ok &= check("second moment", second, mixes(false, false));
  ok &= check("float64", args, [&] {
    std::mt19937 random(3);
    std::vector<Parameter> list;
    const EwcType d = EwcType::kDouble, types[kAwOperands] = {d, d, d, d, d, d, d};
    for (int m = 0; m < 3; ++m)
      list.emplace_back(types, kModes[m], m == 1, true, m == 0 ? 1001 : 300, m == 2, m, random);
    return list;
  });
  // 32768 elements are one block's; any argument leaves these out, for TSan's sake
  if (arguments == 1)
    ok &= check("chunks", args, [&] {
      std::mt19937 random(2);
      std::vector<Parameter> list;
      const EwcType f = EwcType::kFloat, b = EwcType::kBFloat16;
      const EwcType mixes[3][kAwOperands] = {{f, f, f, f, f, f, f},
                                             {f, EwcType::kSplit, EwcType::kU8Log, b, f, f, f},
                                             {b, b, b, b, b, b, b}};
      const int64_t sizes[3] = {32769, 2 * 32768, 32768 + 2051};
      for (int m = 0; m < 3; ++m)
        list.emplace_back(mixes[m], kModes[m], false, true, sizes[m], 0, m, random);
      return list;
    });
  ok &= check("nothing", args, [&] { return std::vector<Parameter>(); });
  ok &= check_count(args);
  printf("%s: %d launches\n", ok ? "ok" : "FAILED", launches);
  return ok ? 0 : 1;
}
