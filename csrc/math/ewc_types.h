#pragma once

#include <cstdint>

#include "codes.h"

// What an EWC kernel is told about one parameter. No torch: shared by the CPU and the CUDA kernels.
namespace fasttax {

// kU8Log, of fishers, and kSplit, of anchors: codes.h.
enum class EwcType : uint8_t { kFloat, kBFloat16, kFloat16, kU8Log, kDouble, kSplit };
enum class EwcMode : uint8_t { kValue, kAdd, kWrite, kProx };

struct EwcTensor {
  void* data[4];        // theta, anchor, fisher, grad (null where the mode has none)
  const float* scales;  // u8log fisher: (lo, step) per 256 elements
  int64_t numel;
  int64_t first_chunk;  // CUDA: its first block within the launch
  EwcType types[4];
  // CUDA: every base allows 16-byte (float), 8-byte (half) and 4-byte (u8log) accesses
  bool aligned;
};

// step = first * second, in floats also where step is beyond float's range (up to 2^254): fisher *
// first * second then overflows only where the product itself does, and never at fisher = 0.
struct EwcStep {
  float first, second;
};

FASTTAX_HD EwcStep ewc_step(double step) {
  EwcStep out{0, 1.0f};
  while ((step > 0 ? step : -step) > 0x1p127 && out.second < 0x1p126f)
    step *= 0.5, out.second *= 2.0f;
  constexpr double kMost = 0x1.fffffep127;
  out.first = float(step > kMost ? kMost : step < -kMost ? -kMost : step);
  return out;
}

}  // namespace fasttax
