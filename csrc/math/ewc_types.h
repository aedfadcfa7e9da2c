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

}  // namespace fasttax
