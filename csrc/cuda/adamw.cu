#include "adamw.h"

#include "adamw.cuh"

namespace fasttax {

int64_t adamw_workspace(const AdamWTensor* tensors, int64_t count) {
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) total += adamw_chunks(tensors[i].numel);
  return total;
}

const char* adamw_launch(const AdamWLaunch& x) {
  const auto stream = static_cast<cudaStream_t>(x.stream);
  AdamWArgs args{};
  args.options = x.options;
  args.lr = x.lr, args.grad_scale = x.grad_scale, args.found_inf = x.found_inf;
  args.lr_double = x.lr_double, args.grad_scale_double = x.grad_scale_double,
  args.found_inf_double = x.found_inf_double;
  args.parts = x.parts;
  const char* failed = adamw_for_each_table(
      x.tensors, x.count, args, [&](const AdamWArgs& table, int64_t blocks) -> const char* {
        if (blocks) adamw_kernel<<<dim3(unsigned(blocks)), dim3(kAdamWThreads), 0, stream>>>(table);
        adamw_count<<<dim3(1), dim3(kAdamWTensors), 0, stream>>>(table);
        const cudaError_t error = cudaGetLastError();
        return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
      });
  if (failed) return failed;
  ewc_finish<<<dim3(1), dim3(kEwcFinishThreads), 0, stream>>>(
      x.parts, adamw_workspace(x.tensors, x.count), x.options.strength / 2, x.out, x.out_double);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace fasttax
