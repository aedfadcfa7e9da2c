#include "ewc.h"

#include "ewc.cuh"

namespace fasttax {
namespace {

template <EwcMode mode>
const char* start(const EwcLaunch& x, EwcArgs& args) {
  const auto stream = static_cast<cudaStream_t>(x.stream);
  return ewc_for_each_table(
      x.tensors, x.count, args, [&](const EwcArgs& table, int64_t blocks) -> const char* {
        ewc_kernel<mode><<<dim3(unsigned(blocks)), dim3(kEwcThreads), 0, stream>>>(table);
        const cudaError_t error = cudaGetLastError();
        return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
      });
}

}  // namespace

int64_t ewc_workspace(const EwcTensor* tensors, int64_t count) {
  return ewc_total_chunks(tensors, count);
}

const char* ewc_launch(const EwcLaunch& x) {
  EwcArgs args{};
  args.parts = x.parts;
  args.scale = x.scale;
  args.upstream = x.upstream;
  args.upstream_double = x.upstream_double;
  switch (x.mode) {
    case EwcMode::kWrite: return start<EwcMode::kWrite>(x, args);
    case EwcMode::kProx: return start<EwcMode::kProx>(x, args);
    default: break;
  }
  const char* failed =
      x.mode == EwcMode::kAdd ? start<EwcMode::kAdd>(x, args) : start<EwcMode::kValue>(x, args);
  if (failed) return failed;
  ewc_finish<<<dim3(1), dim3(kEwcFinishThreads), 0, static_cast<cudaStream_t>(x.stream)>>>(
      x.parts, ewc_total_chunks(x.tensors, x.count), x.factor, x.out, x.out_double);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace fasttax
