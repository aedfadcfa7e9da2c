#include "fisher.h"

#include "fisher.cuh"

namespace fasttax {

const char* square_launch(const EwcTensor* tensors, int64_t count, double weight, void* stream) {
  EwcArgs args{};
  args.scale = weight;
  return ewc_for_each_table(tensors, count, args,
                            [&](const EwcArgs& table, int64_t blocks) -> const char* {
                              square_kernel<<<dim3(unsigned(blocks)), dim3(kEwcThreads), 0,
                                              static_cast<cudaStream_t>(stream)>>>(table);
                              const cudaError_t error = cudaGetLastError();
                              return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
                            });
}

}  // namespace fasttax
