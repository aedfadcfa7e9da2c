#pragma once

// An operand of an EWC kernel as the tests see it: any type, exactly as large as it says, readable
// and writable element by element in float64.
#include "simt_cuda.h"

#include "cuda/ewc_elements.cuh"

#include <memory>

namespace {

using namespace fasttax;

// exactly as large as it says, so that ASan sees one byte too many; `shift` elements off the
// allocator's alignment
struct Operand {
  EwcType type;
  std::unique_ptr<char[]> memory;
  char* data = nullptr;
  int64_t numel = 0;
  std::vector<float> scales;

  static int64_t size(EwcType t) {
    return t == EwcType::kDouble                          ? 8
           : t == EwcType::kFloat                         ? 4
           : t == EwcType::kU8Log || t == EwcType::kSplit ? 1
                                                          : 2;
  }

  static int64_t bytes(EwcType t, int64_t n) {
    return t == EwcType::kSplit ? (n + 255) / 256 * kSplitBytes : n * size(t);
  }

  Operand(EwcType t, int64_t n, int shift)
      : type(t),
        memory(new char[size_t(bytes(t, n) + shift * size(t))]()),
        data(memory.get() + shift * size(t)),
        numel(n) {
    // its bfloat16 stay on even addresses
    if (t == EwcType::kSplit && shift) data = memory.get() + (shift & ~1);
  }

  double get(int64_t i) const {
    switch (type) {
      case EwcType::kFloat: return reinterpret_cast<const float*>(data)[i];
      case EwcType::kDouble: return reinterpret_cast<const double*>(data)[i];
      case EwcType::kBFloat16:
        return __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(data)[i]);
      case EwcType::kFloat16: return __half2float(reinterpret_cast<const __half*>(data)[i]);
      case EwcType::kSplit: {
        const double hi = __bfloat162float(split_hi(i));
        return hi == 0 ? 0 : double(float(hi + split_lo(i) * double(float(split_step(hi)))));
      }
      default: {
        const int code = reinterpret_cast<const uint8_t*>(data)[i];
        return code == 0 ? 0.0
                         : std::exp2(double(scales[size_t(i / 256 * 2)]) +
                                     double(scales[size_t(i / 256 * 2 + 1)]) * (code - 1));
      }
    }
  }

  // ulp(hi) / 254, not by the kernels' own function, whose floats these are all the same
  static double split_step(double hi) {
    return std::exp2(std::floor(std::log2(std::fabs(hi)))) / 128 / 254;
  }
  __nv_bfloat16& split_hi(int64_t i) const {
    return reinterpret_cast<__nv_bfloat16*>(data + i / 256 * kSplitBytes)[i % 256];
  }
  int8_t& split_lo(int64_t i) const {
    return reinterpret_cast<int8_t*>(data + i / 256 * kSplitBytes + 512)[i % 256];
  }

  void set(int64_t i, double v) {
    switch (type) {
      case EwcType::kSplit: {
        split_hi(i) = __float2bfloat16(float(v));
        const double hi = __bfloat162float(split_hi(i));
        split_lo(i) = hi == 0 ? int8_t(0) : int8_t(std::lround((v - hi) / split_step(hi)));
        break;
      }
      case EwcType::kFloat: reinterpret_cast<float*>(data)[i] = float(v); break;
      case EwcType::kDouble: reinterpret_cast<double*>(data)[i] = v; break;
      case EwcType::kBFloat16:
        reinterpret_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16(float(v));
        break;
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

bool close(const char* what, double got, double want, double tolerance) {
  if (std::fabs(got - want) <= tolerance) return true;
  printf("%s: got %.9g, expected %.9g, tolerance %.3g\n", what, got, want, tolerance);
  return false;
}

}  // namespace
