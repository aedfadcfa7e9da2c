#pragma once

// The end of the functions of tokens, and gradients that a forward has left.
//
// A few numbers a token: one launch takes all results of a call at once, where torch's ops are 30
// launches for each estimate. What counts the unmasked tokens reads the mask whole in every block
// (n bytes, out of L2): no second launch, no counter that must be 0. Sums are in double and in one
// order, a block for each result.
//
// scale_held_kernel goes over a gradient of N x V only where there is something to multiply: each
// block reads the factor and is done where it is 1, and the grid is a few blocks an SM whatever the
// gradient's size (8192 x 151936 bf16 entries are 152 000 chunks, each a block to start and end).

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include "../math/weigh.h"
#include "weigh.h"

namespace fasttax {

constexpr int kWeighThreads = 256, kWeighSumThreads = 1024;

template <class N>
__device__ __forceinline__ N weigh_block_sum(N mine) {  // the same in every thread
  __shared__ N of_warps[32];
  for (int by = 16; by > 0; by /= 2) mine += __shfl_xor_sync(0xffffffffu, mine, by);
  __syncthreads();  // who still reads an earlier sum's
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = mine;
  __syncthreads();
  N total = 0;
  for (unsigned w = 0; w < blockDim.x / 32; ++w) total += of_warps[w];
  return total;
}

// What a mean divides by: the unmasked tokens, at least 1.
__device__ __forceinline__ int64_t weigh_count(const WeighArgs& a) {
  if (!a.mask) return a.n > 0 ? a.n : 1;
  const bool aligned = reinterpret_cast<uintptr_t>(a.mask) % 16 == 0;
  const int64_t vectors = aligned ? a.n / 16 : 0;
  const uint4* const wide = reinterpret_cast<const uint4*>(a.mask);
  int mine = 0;
  for (int64_t i = threadIdx.x; i < vectors; i += blockDim.x) {
    const uint4 four = wide[i];  // bytes of 0 and 1
    mine += __popc(four.x) + __popc(four.y) + __popc(four.z) + __popc(four.w);
  }
  for (int64_t i = vectors * 16 + threadIdx.x; i < a.n; i += blockDim.x) mine += a.mask[i];
  const int count = weigh_block_sum(mine);
  return count > 0 ? count : 1;
}

__device__ __forceinline__ bool weigh_live(const WeighArgs& a, int64_t i) {
  return !a.mask || a.mask[i];
}

template <class R>
__device__ __forceinline__ R weigh_at(const void* numbers, int64_t i) {
  return static_cast<const R*>(numbers)[i];
}

// Of an unmasked token, without a mean's divisor.
template <class R>
__device__ __forceinline__ R weigh_factor(const WeighArgs& a, int64_t i) {
  return a.weight ? weigh_at<R>(a.weight, i) * R(a.scale) : R(a.scale);
}

template <class R>
__device__ __forceinline__ Estimate<R> weigh_estimate(const WeighArgs& a, int64_t i) {
  const bool old = a.pair[2] >= 0;
  return {weigh_at<R>(a.rows[a.pair[0]], i),
          weigh_at<R>(a.rows[a.pair[1]], i),
          old ? weigh_at<R>(a.rows[a.pair[2]], i) : R(0),
          old,
          a.clip,
          a.exp_clip};
}

template <class R>
__device__ __forceinline__ R weigh_value(const WeighArgs& a, int output, int64_t i) {
  return output >= 0 ? weigh_at<R>(a.rows[output], i) : weigh_estimate<R>(a, i).value(output);
}

// Grid: tokens.
template <class R>
__global__ void __launch_bounds__(kWeighThreads)
    weigh_tokens_kernel(const __grid_constant__ WeighArgs a) {
  const int64_t i = int64_t(blockIdx.x) * kWeighThreads + threadIdx.x;
  if (i >= a.n) return;
  const bool live = weigh_live(a, i);
  const R factor = live ? weigh_factor<R>(a, i) : R(0);
#pragma unroll 1
  for (int k = 0; k < a.output_count; ++k)
    static_cast<R*>(a.results[k])[i] = live ? weigh_value<R>(a, a.outputs[k], i) * factor : R(0);
}

// Grid: outputs.
template <class R>
__global__ void __launch_bounds__(kWeighSumThreads)
    weigh_sum_kernel(const __grid_constant__ WeighArgs a) {
  const int output = a.outputs[blockIdx.x];
  double mine = 0;
#pragma unroll 1
  for (int64_t i = threadIdx.x; i < a.n; i += kWeighSumThreads)
    if (weigh_live(a, i)) mine += double(weigh_value<R>(a, output, i)) * weigh_factor<R>(a, i);
  double total = weigh_block_sum(mine);
  if (a.reduction == Reduction::kMean) total /= double(weigh_count(a));
  if (threadIdx.x == 0) *static_cast<R*>(a.results[blockIdx.x]) = R(total);
}

// Grid: tokens.
template <class R>
__global__ void __launch_bounds__(kWeighThreads)
    weigh_weights_kernel(const __grid_constant__ WeighArgs a) {
  const R count = a.reduction == Reduction::kMean ? R(weigh_count(a)) : R(1);
  const int64_t i = int64_t(blockIdx.x) * kWeighThreads + threadIdx.x;
  if (i >= a.n) return;
  // without a weight a masked token has the others'
  const bool live = !a.weight || weigh_live(a, i);
  static_cast<R*>(a.by_row)[i] = live ? weigh_factor<R>(a, i) / count : R(0);
}

// What a result has of one row's gradient, by one.
template <class R>
__device__ __forceinline__ R weigh_slope(const WeighArgs& a, int output, int row, int64_t i) {
  if (output >= 0) return R(output == row);
  for (int by = 0; by < 3; ++by) {
    if (a.pair[by] != row) continue;
    const Estimate<R> of = weigh_estimate<R>(a, i);
    if (!a.reverse) return of.slope(output, by);
    return by == 0 ? of.reverse_slope() : R(0);
  }
  return 0;
}

// Grid: tokens.
template <class R>
__global__ void __launch_bounds__(kWeighThreads)
    weigh_backward_kernel(const __grid_constant__ WeighArgs a) {
  const R count = a.reduction == Reduction::kMean ? R(weigh_count(a)) : R(1);
  const int64_t i = int64_t(blockIdx.x) * kWeighThreads + threadIdx.x;
  if (i >= a.n) return;
  const bool live = weigh_live(a, i);
  const R factor = live ? weigh_factor<R>(a, i) / count : R(0);
#pragma unroll 1
  for (int row = 0; row < a.row_count; ++row) {
    R d = 0;
#pragma unroll 1
    for (int k = 0; k < a.output_count; ++k) {
      if (!a.grads[k] || !live) continue;
      const R slope = weigh_slope<R>(a, a.outputs[k], row, i);
      const R upstream = factor * weigh_at<R>(a.grads[k], a.shared_grad[k] ? 0 : i);
      // a row that the result is not made of, and a token without a gradient, get no NaN of it
      if (slope != 0) d += times(upstream, slope);
    }
    static_cast<R*>(a.by_row)[row * a.n + i] = d;
  }
}

// --- gradients that a forward has left

constexpr int kScaleThreads = 256, kScaleLoads = 4, kScaleBlocksPerSm = 8;

// entries that a block takes at a time
template <class T>
constexpr int64_t kScaleChunk = int64_t(kScaleThreads) * kScaleLoads * (16 / int64_t(sizeof(T)));

template <class T>
inline int64_t scale_items(const ScaleArgs& a) {
  return a.rows * ((a.width + kScaleChunk<T> - 1) / kScaleChunk<T>);
}

// Entries are multiplied in float32, of float64 in float64, and rounded once.
__device__ __forceinline__ double scale_entry(double x, double by) { return x * by; }
__device__ __forceinline__ float scale_entry(float x, double by) { return x * float(by); }
__device__ __forceinline__ __nv_bfloat16 scale_entry(__nv_bfloat16 x, double by) {
  return __float2bfloat16(__bfloat162float(x) * float(by));
}
__device__ __forceinline__ __half scale_entry(__half x, double by) {
  return __float2half(__half2float(x) * float(by));
}

template <class T>
__device__ __forceinline__ void scale_span(T* at, int64_t count, double by) {
  constexpr int kLanes = 16 / int(sizeof(T));
  struct alignas(16) Lanes {
    T entry[kLanes];
  };
  int64_t done = 0;
  if (reinterpret_cast<uintptr_t>(at) % 16 == 0) {
    Lanes* const wide = reinterpret_cast<Lanes*>(at);
    const int64_t vectors = count / kLanes;
    if (vectors == kScaleThreads * kScaleLoads) {  // all loads of a thread before its first store
      Lanes held[kScaleLoads];
#pragma unroll
      for (int k = 0; k < kScaleLoads; ++k) held[k] = wide[k * kScaleThreads + threadIdx.x];
#pragma unroll
      for (int k = 0; k < kScaleLoads; ++k) {
#pragma unroll
        for (int j = 0; j < kLanes; ++j) held[k].entry[j] = scale_entry(held[k].entry[j], by);
        wide[k * kScaleThreads + threadIdx.x] = held[k];
      }
      return;
    }
#pragma unroll 1
    for (int64_t i = threadIdx.x; i < vectors; i += kScaleThreads) {
      Lanes held = wide[i];
#pragma unroll
      for (int j = 0; j < kLanes; ++j) held.entry[j] = scale_entry(held.entry[j], by);
      wide[i] = held;
    }
    done = vectors * kLanes;
  }
#pragma unroll 1
  for (int64_t i = done + threadIdx.x; i < count; i += kScaleThreads)
    at[i] = scale_entry(at[i], by);
}

// Grid: some blocks, that take items in turn.
template <class T>
__global__ void __launch_bounds__(kScaleThreads)
    scale_held_kernel(const __grid_constant__ ScaleArgs a) {
  constexpr int64_t kChunk = kScaleChunk<T>;
  const int64_t chunks = (a.width + kChunk - 1) / kChunk;
#pragma unroll 1
  for (int64_t item = blockIdx.x; item < a.rows * chunks; item += gridDim.x) {
    const int64_t row = item / chunks, begin = item % chunks * kChunk;
    const double by = a.factor_is_wide ? static_cast<const double*>(a.factor)[row]
                                       : double(static_cast<const float*>(a.factor)[row]);
    if (by == 1) {
      if (a.rows == 1) return;
      continue;
    }
    const int64_t left = a.width - begin;
    scale_span(static_cast<T*>(a.held) + row * a.width + begin, left < kChunk ? left : kChunk, by);
  }
}

}  // namespace fasttax
