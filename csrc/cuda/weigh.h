#pragma once

#include <cstdint>

#include "../math/types.h"

// The CUDA launchers of what becomes of the tokens' values (fasttax/kl/weigh.py) and of gradients
// that a forward has left (fasttax/kl/gradients.py): raw pointers, sizes and a stream.
namespace fasttax {

// of one call: token_stats' six rows for each model, and a divergence's of its own for each output
constexpr int kWeighRows = 16, kWeighOutputs = 10;

enum class Reduction : int { kNone, kSum, kMean };

// All pointers to numbers are to float, or to double.
struct WeighArgs {
  const void* rows[kWeighRows];      // [n] each
  void* results[kWeighOutputs];      // forward: [n], reduced one number
  const void* grads[kWeighOutputs];  // backward: of the results; null: none
  bool shared_grad[kWeighOutputs];   // one number for all tokens
  int32_t outputs[kWeighOutputs];    // a row, or kK1, kK2, kK3
  int32_t pair[3];                   // rows of log-probs: policy, reference, who sampled (-1: none)
  void* by_row;                      // backward: [row_count][n]; token_weights: [n]
  const bool* mask;                  // [n], null: every token counts
  const void* weight;                // [n], null: 1
  double scale, clip, exp_clip;
  int64_t n;
  int32_t row_count, output_count;
  Reduction reduction;
  bool reverse;  // estimates have the gradient of KL(policy || ref)
};

struct WeighLaunch {
  WeighArgs args;
  bool wide;     // double
  void* stream;  // cudaStream_t
};

// A gradient that a forward has made, (rows, width), to be multiplied in place.
struct ScaleArgs {
  void* held;
  const void* factor;  // on the device: one, or one a row
  bool factor_is_wide;
  int64_t rows, width;  // rows: 1 where there is one factor
};

// Each returns null, or CUDA's words for what failed. Asynchronous.
const char* weigh_forward(const WeighLaunch& launch);
const char* weigh_backward(const WeighLaunch& launch);
const char* weigh_weights(const WeighLaunch& launch);
const char* scale_held(FloatType type, const ScaleArgs& args, void* stream);

}  // namespace fasttax
