// Runs csrc/cuda/ewc.cuh on the SIMT machine against a float64 oracle: all four modes, every mix of dtypes, sizes around every boundary of
// the kernel, misaligned bases, more tensors than one launch holds. Prints what it ran; exits 1 on a wrong value.
#include "simt_cuda.h"

#include "cuda/ewc.cuh"

#include <memory>

namespace {

using namespace fasttax;

struct Operand {  // exactly as large as it says, so that ASan sees one byte too many; `shift` elements off the allocator's alignment
  EwcType type;
  std::unique_ptr<char[]> memory;
  char* data = nullptr;
  int64_t numel = 0;
  std::vector<float> scales;

  static int64_t size(EwcType t) { return t == EwcType::kDouble ? 8 : t == EwcType::kFloat ? 4 : t == EwcType::kU8Log || t == EwcType::kSplit ? 1 : 2; }

  static int64_t bytes(EwcType t, int64_t n) { return t == EwcType::kSplit ? (n + 255) / 256 * kSplitBytes : n * size(t); }

  Operand(EwcType t, int64_t n, int shift)
      : type(t), memory(new char[size_t(bytes(t, n) + shift * size(t))]()), data(memory.get() + shift * size(t)), numel(n) {
    if (t == EwcType::kSplit && shift) data = memory.get() + (shift & ~1);  // its bfloat16 stay on even addresses
  }

  double get(int64_t i) const {
    switch (type) {
      case EwcType::kFloat: return reinterpret_cast<const float*>(data)[i];
      case EwcType::kDouble: return reinterpret_cast<const double*>(data)[i];
      case EwcType::kBFloat16: return __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(data)[i]);
      case EwcType::kFloat16: return __half2float(reinterpret_cast<const __half*>(data)[i]);
      case EwcType::kSplit: return ewc_join(__bfloat162float(split_hi(i)), split_lo(i));
      default: {
        const int code = reinterpret_cast<const uint8_t*>(data)[i];
        return code == 0 ? 0.0 : std::exp2(double(scales[size_t(i / 256 * 2)]) + double(scales[size_t(i / 256 * 2 + 1)]) * (code - 1));
      }
    }
  }

  __nv_bfloat16& split_hi(int64_t i) const { return reinterpret_cast<__nv_bfloat16*>(data + i / 256 * kSplitBytes)[i % 256]; }
  int8_t& split_lo(int64_t i) const { return reinterpret_cast<int8_t*>(data + i / 256 * kSplitBytes + 512)[i % 256]; }

  void set(int64_t i, double v) {
    switch (type) {
      case EwcType::kSplit: {
        split_hi(i) = __float2bfloat16(float(v));
        const double hi = __bfloat162float(split_hi(i)), step = std::exp2(std::floor(std::log2(std::fabs(hi)))) / 128 / 254;
        split_lo(i) = hi == 0 ? int8_t(0) : int8_t(std::lround((v - hi) / step));
        break;
      }
      case EwcType::kFloat: reinterpret_cast<float*>(data)[i] = float(v); break;
      case EwcType::kDouble: reinterpret_cast<double*>(data)[i] = v; break;
      case EwcType::kBFloat16: reinterpret_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16(float(v)); break;
      case EwcType::kFloat16: reinterpret_cast<__half*>(data)[i] = __float2half(float(v)); break;
      default: reinterpret_cast<uint8_t*>(data)[i] = uint8_t(v);
    }
  }

  double epsilon() const {  // of one rounding to this type
    switch (type) {
      case EwcType::kDouble: return 1e-16;
      case EwcType::kBFloat16: return 0x1p-8;
      case EwcType::kFloat16: return 0x1p-11;
      default: return 0x1p-24;
    }
  }
};

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
          x.scales.push_back(float(-20 * uniform(random))), x.scales.push_back(float(0.01 + 0.07 * uniform(random)));
      for (int64_t i = 0; i < n; ++i)
        x.set(i, x.type == EwcType::kU8Log ? double(random() % 256) : k == 2 ? std::exp(2 * normal(random)) : normal(random));
    }
  }

  EwcTensor tensor(bool with_grad) {
    EwcTensor x{};
    for (int k = 0; k < (with_grad ? 4 : 3); ++k) x.data[k] = operands[size_t(k)].data;
    for (int k = 0; k < 4; ++k) x.types[k] = with_grad || k < 3 ? operands[size_t(k)].type : EwcType::kFloat;
    x.scales = operands[2].scales.data();
    x.numel = operands[0].numel;
    return x;
  }
};

int launches = 0;

template <EwcMode mode>
double run(std::vector<Parameter>& list, double scale, const double* upstream, double factor) {
  std::vector<EwcTensor> tensors;
  for (Parameter& p : list) tensors.push_back(p.tensor(mode == EwcMode::kAdd || mode == EwcMode::kWrite));
  const int64_t count = int64_t(tensors.size()), chunks = ewc_total_chunks(tensors.data(), count);
  std::unique_ptr<double[]> parts(new double[size_t(chunks)]);
  EwcArgs args{};
  args.parts = parts.get();
  args.scale = scale;
  args.upstream = upstream;
  args.upstream_double = true;
  ewc_for_each_table(tensors.data(), count, args, [&](const EwcArgs& table, int64_t blocks) -> const char* {
    ++launches;
    simt::launch(dim3(unsigned(blocks)), dim3(kEwcThreads), 0, [&] { ewc_kernel<mode>(table); });
    return nullptr;
  });
  double out = 0;
  if (mode == EwcMode::kValue || mode == EwcMode::kAdd)
    simt::launch(dim3(1), dim3(kEwcFinishThreads), 0, [&] { ewc_finish(parts.get(), chunks, factor, &out, true); });
  return out;
}

bool close(const char* what, double got, double want, double tolerance) {
  if (std::fabs(got - want) <= tolerance) return true;
  printf("%s: got %.9g, expected %.9g, tolerance %.3g\n", what, got, want, tolerance);
  return false;
}

// One mode on copies of `list` (made anew from the seed), every written element and the value checked.
template <EwcMode mode>
bool check(const char* what, const std::function<std::vector<Parameter>()>& make) {
  constexpr double kScale = 0.37, kUpstream = 1.7, kFactor = 0.25;
  const double upstream = kUpstream, scale = mode == EwcMode::kWrite ? kScale * kUpstream : kScale;
  std::vector<Parameter> before = make(), after = make(), again = make();
  const double value = run<mode>(after, kScale, &upstream, kFactor);
  bool ok = value == run<mode>(again, kScale, &upstream, kFactor);
  if (!ok) printf("%s: the value depends on the order of the threads\n", what);
  double total = 0;
  for (size_t p = 0; p < before.size(); ++p) {
    const auto& x = before[p].operands;
    for (int64_t i = 0; i < x[0].numel && ok; ++i) {
      const double theta = x[0].get(i), anchor = x[1].get(i), fisher = x[2].get(i), old = x[3].get(i), pull = fisher * (theta - anchor);
      const double inner = x[0].type == EwcType::kDouble ? 1e-15 : x[2].type == EwcType::kU8Log ? 1e-5 : 4e-7;  // of the formula itself
      total += pull * (theta - anchor);
      double want[4] = {theta, anchor, fisher, old}, slack[4] = {0, 0, 0, 0};
      if (mode == EwcMode::kAdd) {
        want[3] = old + scale * pull;
        slack[3] = (std::fabs(old) + std::fabs(scale * pull)) * inner + std::fabs(want[3]) * x[3].epsilon();
      }
      if (mode == EwcMode::kWrite) {
        want[3] = scale * pull;
        slack[3] = std::fabs(want[3]) * (inner + x[3].epsilon());
      }
      if (mode == EwcMode::kProx) {
        want[0] = anchor + (theta - anchor) / (1 + scale * fisher);
        slack[0] = (std::fabs(anchor) + std::fabs(theta)) * inner + std::fabs(want[0]) * x[0].epsilon();
      }
      for (int k = 0; k < 4; ++k) {
        const double tiny = x[size_t(k)].type == EwcType::kFloat16 ? 0x1p-25 : 0;  // half a step of float16's subnormals
        ok = ok && close(what, after[p].operands[size_t(k)].get(i), want[k], slack[k] > 0 ? slack[k] + tiny : 0);
      }
    }
    for (int k = 0; k < 4; ++k)
      ok = ok && memcmp(after[p].operands[size_t(k)].data, again[p].operands[size_t(k)].data,
                        size_t(Operand::bytes(x[size_t(k)].type, x[size_t(k)].numel))) == 0;
  }
  if (mode == EwcMode::kValue || mode == EwcMode::kAdd) ok = ok && close("value", value, kFactor * total, 4e-6 * std::fabs(kFactor * total));
  if (!ok) printf("failed: %s, mode %d\n", what, int(mode));
  return ok;
}

bool check_all(const char* what, const std::function<std::vector<Parameter>(bool)>& make) {
  const auto any = [&] { return make(false); };
  const auto same = [&] { return make(true); };  // kWrite's gradient has theta's type
  return check<EwcMode::kValue>(what, any) & check<EwcMode::kAdd>(what, any) & check<EwcMode::kWrite>(what, same) & check<EwcMode::kProx>(what, any);
}

}  // namespace

int main(int arguments, char**) {
  using namespace fasttax;
  constexpr EwcType kFloats[3] = {EwcType::kFloat, EwcType::kBFloat16, EwcType::kFloat16};
  constexpr EwcType kFishers[4] = {EwcType::kFloat, EwcType::kBFloat16, EwcType::kFloat16, EwcType::kU8Log};
  // 1023 to 1025: one round of the block; 255 to 257: a u8log block; 0: takes no place in a launch
  constexpr int64_t kSizes[] = {257, 0, 1, 1025, 3, 4, 5, 255, 256, 1023, 1024, 2051, 7};
  bool ok = true;
  constexpr EwcType kAnchors[4] = {EwcType::kFloat, EwcType::kBFloat16, EwcType::kFloat16, EwcType::kSplit};
  // 144 mixes, three launches; every third list starts off alignment
  ok &= check_all("every mix", [&](bool same) {
    std::mt19937 random(1);
    std::vector<Parameter> list;
    for (int c = 0; c < 144; ++c) {
      const EwcType theta = kFloats[c % 3], types[4] = {theta, kAnchors[c / 3 % 4], kFishers[c / 12 % 4], same ? theta : kFloats[c / 48]};
      list.emplace_back(types, kSizes[c % 13], c % 3 == 2 || c % 7 == 0 ? 1 + c % 3 : 0, random);
    }
    return list;
  });
  // 65536 elements are one block's; any argument leaves these out, for TSan's sake
  if (arguments == 1) ok &= check_all("chunks", [&](bool same) {
    std::mt19937 random(2);
    std::vector<Parameter> list;
    const EwcType f = EwcType::kFloat, b = EwcType::kBFloat16;
    const EwcType mixes[3][4] = {{f, EwcType::kSplit, f, f}, {f, b, EwcType::kU8Log, same ? f : b}, {b, b, b, b}};
    const int64_t sizes[3] = {65537, 2 * 65536, 65536 + 2051};
    for (int m = 0; m < 3; ++m) list.emplace_back(mixes[m], sizes[m], 0, random);
    return list;
  });
  ok &= check_all("float64", [&](bool) {
    std::mt19937 random(3);
    std::vector<Parameter> list;
    const EwcType d = EwcType::kDouble, types[4] = {d, d, d, d};
    for (int64_t n : {int64_t(1), int64_t(1001), int64_t(65536 + 5)}) list.emplace_back(types, n, n == 1001, random);
    return list;
  });
  ok &= check_all("nothing", [&](bool) { return std::vector<Parameter>(); });
  printf("%s: %d launches\n", ok ? "ok" : "FAILED", launches);
  return ok ? 0 : 1;
}
