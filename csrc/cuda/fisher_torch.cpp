// The Fisher on CUDA tensors, torch's side: check, find the stream, call the launcher.
#include "../call/square_lists.h"
#include "fisher.h"
#include "launch_torch.h"

namespace fasttax {
namespace {

void accumulate_sqgrad_(std::vector<Tensor> sums, std::vector<Tensor> grads, double weight) {
  const char* op = "accumulate_sqgrad_";
  const auto tensors = square_lists(sums, grads);
  if (sums.empty()) return;
  check_on_gpu(op, "sums", sums[0]);
  launch_on(op, sums[0], [&](void* stream) {
    return square_launch(tensors.data(), int64_t(tensors.size()), weight, stream);
  });
}

}  // namespace
}  // namespace fasttax

STABLE_TORCH_LIBRARY_IMPL(fasttax, CUDA, m) {
  m.impl("accumulate_sqgrad_", TORCH_BOX(&fasttax::accumulate_sqgrad_));
}
