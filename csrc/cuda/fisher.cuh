#pragma once

// sums += weight * grad^2 over a model's whole gradient list, on EWC's tables and chunks.
//
// Bytes: read sum and gradient, write the sum: 12 per element in float32, 10 with half gradients. A
// thread has two groups of 4 elements a round and loads all of it before it converts any: 64 bytes
// in flight in float32, 48 with half gradients, so 64 and 48 KB per SM at 4 blocks of 256, where an
// H100 needs about 25. Deterministic: an element belongs to one thread.

#include "ewc_tables.cuh"

namespace fasttax {

// Elements [0, end), end a multiple of 4; w_grad: bytes of a gradient.
template <int w_grad>
__device__ __forceinline__ void square_grouped(const EwcView& x, int end, float weight) {
  constexpr int kStep = kEwcThreads * kEwcGroup;
  const bool bfloat = x.types[kGrad] == EwcType::kBFloat16;
#pragma unroll 1
  for (int i = int(threadIdx.x) * kEwcGroup; i < end; i += 2 * kStep) {
    const bool two = i + kStep < end;
    // loaded twice rather than not at all: no branch between the loads
    const int other = two ? i + kStep : i;
    const EwcFour<4> raw[2] = {ewc_load<4>(x, kTheta, i), ewc_load<4>(x, kTheta, other)};
    const EwcFour<w_grad> raw_grad[2] = {ewc_load<w_grad>(x, kGrad, i),
                                         ewc_load<w_grad>(x, kGrad, other)};
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      float sum[4], grad[4];
      ewc_widen(raw[k], false, sum);
      ewc_widen(raw_grad[k], bfloat, grad);
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[j] = fmaf(grad[j] * weight, grad[j], sum[j]);
      if (k == 0 || two) ewc_store(&ewc_at<EwcFour<4>>(x, kTheta, (k ? other : i) / 4), false, sum);
    }
  }
}

template <class S>
__device__ __forceinline__ void square_singly(const EwcView& x, int begin, int end, S weight) {
#pragma unroll 1
  for (int i = begin + int(threadIdx.x); i < end; i += kEwcThreads) {
    const S grad = ewc_get<S>(x, kGrad, i);
    ewc_put<S>(x, kTheta, i, ewc_get<S>(x, kTheta, i) + grad * weight * grad);
  }
}

// args.scale is the weight.
template <int most>
__global__ void __launch_bounds__(kEwcThreads, kEwcBlocksPerSm)
    square_kernel(const __grid_constant__ EwcArgs<most> args) {
  const EwcTensor& tensor = args.tensors[ewc_tensor_of(args, blockIdx.x)];
  const int64_t begin = (int64_t(blockIdx.x) - tensor.first_chunk) * kEwcChunk;
  const int end = int(tensor.numel - begin < kEwcChunk ? tensor.numel - begin : kEwcChunk);
  const EwcView x = ewc_view(tensor, begin);
  if (tensor.types[kTheta] == EwcType::kDouble) {
    square_singly<double>(x, 0, end, args.scale);
    return;
  }
  const int whole = tensor.aligned ? end - end % kEwcGroup : 0;
  const float weight = float(args.scale);
  if (tensor.types[kGrad] == EwcType::kFloat) square_grouped<4>(x, whole, weight);
  else square_grouped<2>(x, whole, weight);
  square_singly<float>(x, whole, end, weight);
}

// A call, by launch(blocks, threads, kernel, table), which returns null or an error text.
template <class Launch>
const char* square_call(const EwcTensor* tensors, int64_t count, double weight, bool large,
                        Launch&& launch) {
  EwcCall call{};
  call.scale = weight;
  return ewc_for_each_table(
      tensors, count, call, large, [&](const auto& table, int64_t blocks) -> const char* {
        constexpr int most = int(sizeof(table.tensors) / sizeof(table.tensors[0]));
        return launch(blocks, kEwcThreads, square_kernel<most>, table);
      });
}

}  // namespace fasttax
