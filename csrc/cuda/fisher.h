#pragma once

#include "../math/ewc_types.h"

// The CUDA launcher as its caller sees it: raw pointers, sizes and a stream, so that neither side
// includes the other's world.
namespace fasttax {

// sums (data[0]) += weight * grads (data[3])^2. Null, or CUDA's words for the launch that failed.
// Asynchronous; stream: a cudaStream_t.
const char* square_launch(const EwcTensor* tensors, int64_t count, double weight, void* stream);

}  // namespace fasttax
