#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "../call/check.h"

namespace fasttax {

// Calls start(stream) on torch's current stream of the tensor's device, where its own ops go; start
// returns null or CUDA's words for what failed.
template <class Start>
void launch_on(const char* op, const Tensor& device_of, Start&& start) {
  const int32_t device = device_of.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const char* failed = start(stream);
  FASTTAX_CHECK(failed == nullptr, op, "the CUDA launch failed: ", failed ? failed : "");
}

inline void check_on_gpu(const char* op, const char* name, const Tensor& t) {
  FASTTAX_CHECK(t.is_cuda(), op, name, "[0]: must be on the GPU as another argument is");
}

}  // namespace fasttax
