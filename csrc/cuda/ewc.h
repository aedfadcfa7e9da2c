#pragma once

#include "../math/ewc_types.h"

// The CUDA launcher as its caller sees it: raw pointers, sizes and a stream, so that neither side
// includes the other's world.
namespace fasttax {

struct EwcLaunch {
  EwcMode mode;
  const EwcTensor* tensors;
  int64_t count;
  double scale;  // kAdd, kWrite: factor of the gradient; kProx: strength * lr
  // one value on the device that multiplies scale (kWrite: the penalty's gradient), or null
  const void* upstream;
  bool upstream_double;
  double* parts;  // kValue, kAdd: ewc_workspace() doubles on the device
  // kValue, kAdd: 0-d result on the device, factor * sum fisher * (theta - anchor)^2
  void* out;
  bool out_double;
  double factor;
  void* stream;  // cudaStream_t
};

int64_t ewc_workspace(const EwcTensor* tensors, int64_t count);

// Null, or CUDA's words for the launch that failed. Asynchronous: nothing here waits for the
// device.
const char* ewc_launch(const EwcLaunch& launch);

}  // namespace fasttax
