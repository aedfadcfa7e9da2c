#pragma once

#include "../math/adamw_types.h"

// The CUDA launcher as its caller sees it: raw pointers, sizes and a stream.
namespace fasttax {

struct AdamWLaunch {
  const AdamWTensor* tensors;
  int64_t count;
  AdamWOptions options;
  const void* lr;          // on the device, or null: options.lr
  const void* grad_scale;  // on the device, or null
  const void* found_inf;   // on the device, or null; not 0: nothing is written
  bool lr_double, grad_scale_double, found_inf_double;
  double* parts;  // adamw_workspace() doubles on the device
  // 0-d result on the device: strength/2 * sum fisher * (theta - anchor)^2 before the step
  void* out;
  bool out_double;
  void* stream;  // cudaStream_t
};

int64_t adamw_workspace(const AdamWTensor* tensors, int64_t count);

// Null, or CUDA's words for the launch that failed. Asynchronous.
const char* adamw_launch(const AdamWLaunch& launch);

}  // namespace fasttax
