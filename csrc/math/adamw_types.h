#pragma once

#include "ewc_types.h"

// What an AdamW+EWC kernel is told. No torch: shared by the CPU and the CUDA kernels.
namespace fasttax {

enum AdamWOperand : int {
  kAwTheta,
  kAwAnchor,
  kAwFisher,
  kAwGrad,
  kAwFirst,
  kAwSecond,
  kAwMax,
  kAwOperands
};

// of one parameter: not held; pull in the gradient; closed form
enum class AdamWMode : uint8_t { kPlain, kGrad, kProx };

struct AdamWTensor {
  void* data[kAwOperands];  // anchor and fisher null where there is none; max null without amsgrad
  const float* scales;      // u8log fisher
  void* step;               // 0-d float32 or float64 count of the steps taken before this one
  int64_t numel;
  int64_t first_chunk;  // CUDA: its first block within the launch
  EwcType types[kAwOperands];
  AdamWMode mode;
  bool step_double;
  bool aligned;  // CUDA
};

struct AdamWOptions {
  double lr, beta1, beta2, eps, weight_decay, strength;
  double second_moment;  // > 0: fisher = second_moment * exp_avg_sq / (1 - beta2^t), none is read
  bool maximize;
};

// An op's options at one tensor's step, t counting from 1.
template <class S>
struct AdamWStep {
  S grad_factor;  // of the gradient as it comes: -1 for maximize, 1 / GradScaler's scale
  S decay, one_minus_beta1, beta2, one_minus_beta2, step, root_factor, eps;
  S first, second;  // strength (kGrad) or lr * strength (kProx), as a product (ewc_step)
  // > 0: fisher = fisher_factor * exp_avg_sq, before this step's update (kGrad) or after it (kProx)
  S fisher_factor;
};

}  // namespace fasttax
