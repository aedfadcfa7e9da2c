#pragma once

#include <cstdint>

namespace fasttax {

// Examples [first, last) and a group of row blocks. a: [column block][step][columns], of all
// examples; d: [row block][step][rows], of these; strides in floats a block; starts: the steps at
// which examples begin; weights: of the examples, or null; bf16x2: a step is a pair of bfloat16
// tokens.
struct FisherBatch {
  const float *a, *d;
  int64_t a_stride, d_stride;
  const int64_t* starts;
  int64_t first, last, blocks;
  const float* weights;
  bool bf16x2;
};

}  // namespace fasttax
