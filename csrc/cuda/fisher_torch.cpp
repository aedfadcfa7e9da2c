// The Fisher on CUDA tensors, torch's side: check, find the stream, call the launcher.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "../square_lists.h"
#include "fisher.h"

namespace fasttax {
namespace {

void accumulate_sqgrad_(std::vector<Tensor> sums, std::vector<Tensor> grads, double weight) {
  const char* op = "accumulate_sqgrad_";
  const auto tensors = square_lists(sums, grads);
  if (sums.empty()) return;
  FASTTAX_CHECK(sums[0].is_cuda(), op, "sums[0]: must be on the GPU as another argument is");
  const int32_t device = sums[0].get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const char* failed = square_launch(tensors.data(), int64_t(tensors.size()), weight, stream);
  FASTTAX_CHECK(failed == nullptr, op, "the CUDA launch failed: ", failed ? failed : "",
                "; see TORCH_CUDA_ARCH_LIST if the library was built for other GPUs");
}

}  // namespace
}  // namespace fasttax

STABLE_TORCH_LIBRARY_IMPL(fasttax, CUDA, m) { m.impl("accumulate_sqgrad_", TORCH_BOX(&fasttax::accumulate_sqgrad_)); }
