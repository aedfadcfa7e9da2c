#pragma once

// Put before csrc/cuda/*_torch.cpp by -include: what they do for CUDA tensors they do for the
// CPU's, as ops of fasttax_ptx, and every tensor that they make is told to the PTX machine's
// memory.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

extern "C" void (*ptx_made)(void* data, uint64_t bytes, int grain, int written);

namespace torch::stable {

inline Tensor ptx_told(const Tensor& t, bool written) {
  const int grain = int(t.element_size());
  if (ptx_made && t.numel() > 0)
    ptx_made(const_cast<void*>(t.const_data_ptr()), uint64_t(t.numel()) * uint64_t(grain), grain,
             written);
  return t;
}
inline Tensor ptx_new_empty(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef size,
                            std::optional<torch::headeronly::ScalarType> type = std::nullopt) {
  return ptx_told(new_empty(like, size, type), false);
}
inline Tensor ptx_new_zeros(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef size,
                            std::optional<torch::headeronly::ScalarType> type = std::nullopt) {
  return ptx_told(new_zeros(like, size, type), true);
}
inline Tensor ptx_empty_like(const Tensor& like) { return ptx_told(empty_like(like), false); }
inline Tensor ptx_contiguous(const Tensor& t) { return ptx_told(contiguous(t), true); }

namespace accelerator {
struct NoGuard {
  explicit NoGuard(int32_t) {}
};
}  // namespace accelerator
}  // namespace torch::stable

inline AOTITorchError ptx_no_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

#define is_cuda is_cpu
#define new_empty ptx_new_empty
#define new_zeros ptx_new_zeros
#define empty_like ptx_empty_like
#define contiguous(t) ptx_contiguous(t)
#define DeviceGuard NoGuard
#define aoti_torch_get_current_cuda_stream ptx_no_stream
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(library, key, m) \
  _STABLE_TORCH_LIBRARY_IMPL(fasttax_ptx, CPU, m, C10_UID)
