#pragma once

// EWC over a model's whole parameter list: a launch for every 510 tensors, and one for the value.
//
// Bytes: read theta, anchor, fisher, grad, write grad, each once: 20 per element in float32, 9 with
// bf16 everywhere and a u8log fisher. Dtypes mix freely and in one launch: a block looks up its
// tensor and takes the loop for the operands' byte widths (36 for kAdd); bfloat16 or float16 is a
// predicate within the loop. A thread handles 4 elements a round, so that a warp's access is one
// contiguous run in every dtype: 16 bytes a lane in float32, 8 in half. In flight: a thread starts
// the loads of all operands before it converts the first: 64 bytes in float32, 44 with bf16 anchors
// and u8log fishers, 32 in bf16. At 4 blocks of 256 per SM (registers <= 64) that is 64, 44 and 32
// KB, where an H100 needs about 25 (3.35 TB/s for 1 us over 132 SMs). Issue: 33 instructions per 80
// bytes in float32; the leanest loop, 122 per 36 bytes, still could ask an H100 for 8.4 TB/s.
// Deterministic: block b owns chunk b, its part of the sum goes to parts[b], and one block adds the
// parts in a fixed order.

#include "../math/ewc.h"
#include "ewc.h"
#include "ewc_tables.cuh"

namespace fasttax {

constexpr int kEwcFinishThreads = 512;

// --- one element

template <class S>
struct EwcScale {
  S first, second;  // ewc_step
};

// out: the gradient before and after (kAdd, kWrite), or theta after (kProx). Returns the term of
// the penalty.
template <EwcMode mode, class S>
__device__ __forceinline__ S ewc_element(S theta, S anchor, S fisher, S& out,
                                         const EwcScale<S>& scale) {
  if (mode == EwcMode::kAdd) out += ewc_pull(theta, anchor, fisher) * scale.first * scale.second;
  if (mode == EwcMode::kWrite) out = ewc_pull(theta, anchor, fisher) * scale.first * scale.second;
  if (mode == EwcMode::kProx)
    out = ewc_prox(theta, anchor, S(1), fisher * scale.first * scale.second, S(1));
  return mode == EwcMode::kValue || mode == EwcMode::kAdd ? ewc_term(theta, anchor, fisher) : S(0);
}

// --- one chunk, by one block

// Elements [begin, end) one at a time, coalesced: misaligned tensors, tails, float64. A thread may
// have 256 of them: it adds in double, which at one a round hides behind the loads.
template <EwcMode mode, class S>
__device__ __forceinline__ double ewc_singly(const EwcView& x, int begin, int end,
                                             const EwcScale<S>& scale) {
  constexpr int kOut = mode == EwcMode::kProx ? kTheta : kGrad;
  double total = 0;
#pragma unroll 1
  for (int i = begin + int(threadIdx.x); i < end; i += kEwcThreads) {
    const S theta = ewc_get<S>(x, kTheta, i), anchor = ewc_get<S>(x, kAnchor, i),
            fisher = ewc_get<S>(x, kFisher, i);
    S out = mode == EwcMode::kAdd ? ewc_get<S>(x, kGrad, i) : S(0);
    total += double(ewc_element<mode>(theta, anchor, fisher, out, scale));
    if (mode != EwcMode::kValue) ewc_put<S>(x, kOut, i, out);
  }
  return total;
}

// Elements [0, end), end a multiple of 4, for operands of these byte widths (w_out: of what the
// mode writes). A thread adds up to 64 sums of 4 in float: relative error under 4e-6 at worst and
// 3e-7 as a rule, since no term is negative; everything above it is double.
template <EwcMode mode, int w_theta, int w_anchor, int w_fisher, int w_out>
__device__ __forceinline__ double ewc_grouped(const EwcView& x, int end,
                                              const EwcScale<float>& scale) {
  constexpr int kOut = mode == EwcMode::kProx ? kTheta : kGrad;
  constexpr EwcType kB = EwcType::kBFloat16;
  const bool bfloat[4] = {x.types[kTheta] == kB, x.types[kAnchor] == kB, x.types[kFisher] == kB,
                          x.types[kGrad] == kB};
  float total = 0;
#pragma unroll 1
  for (int i = int(threadIdx.x) * kEwcGroup; i < end; i += kEwcThreads * kEwcGroup) {
    const auto raw_theta = ewc_load<w_theta>(x, kTheta, i);
    const auto raw_anchor = ewc_load<w_anchor>(x, kAnchor, i);
    const auto raw_fisher = ewc_load<w_fisher>(x, kFisher, i);
    float theta[4], anchor[4], fisher[4], out[4] = {0, 0, 0, 0}, term[4];
    if constexpr (mode == EwcMode::kAdd)
      ewc_widen(ewc_load<w_out>(x, kGrad, i), bfloat[kGrad], out);
    if constexpr (w_fisher == 1) {
      const float lo = x.scales[i / 256 * 2], step = x.scales[i / 256 * 2 + 1];
#pragma unroll
      for (int j = 0; j < 4; ++j) fisher[j] = ewc_u8log(raw_fisher >> j * 8 & 0xff, lo, step);
    } else {
      ewc_widen(raw_fisher, bfloat[kFisher], fisher);
    }
    ewc_widen(raw_theta, bfloat[kTheta], theta);
    ewc_widen(raw_anchor, bfloat[kAnchor], anchor);
#pragma unroll
    for (int j = 0; j < 4; ++j)
      term[j] = ewc_element<mode>(theta[j], anchor[j], fisher[j], out[j], scale);
    total += (term[0] + term[1]) + (term[2] + term[3]);
    if constexpr (mode != EwcMode::kValue)
      ewc_store(&ewc_at<EwcFour<w_out>>(x, kOut, i / 4), bfloat[kOut], out);
  }
  return double(total);
}

// The loop for the operands' widths; bfloat16 or float16 is a predicate within it. kWrite and kProx
// write theta's type.
template <EwcMode mode>
__device__ __forceinline__ double ewc_grouped_any(const EwcView& x, int end,
                                                  const EwcScale<float>& scale) {
  const bool theta4 = x.types[kTheta] == EwcType::kFloat;
  const auto with_out = [&](auto t, auto a, auto f) {
    constexpr int w_t = decltype(t)::value, w_a = decltype(a)::value, w_f = decltype(f)::value;
    if constexpr (mode == EwcMode::kAdd) {
      return x.types[kGrad] == EwcType::kFloat ? ewc_grouped<mode, w_t, w_a, w_f, 4>(x, end, scale)
                                               : ewc_grouped<mode, w_t, w_a, w_f, 2>(x, end, scale);
    } else {
      return ewc_grouped<mode, w_t, w_a, w_f, w_t>(x, end, scale);
    }
  };
  const auto with_fisher = [&](auto t, auto a) {
    if (x.types[kFisher] == EwcType::kFloat) return with_out(t, a, EwcWidth<4>{});
    return x.types[kFisher] == EwcType::kU8Log ? with_out(t, a, EwcWidth<1>{})
                                               : with_out(t, a, EwcWidth<2>{});
  };
  const auto with_anchor = [&](auto t) {
    if (x.types[kAnchor] == EwcType::kFloat) return with_fisher(t, EwcWidth<4>{});
    return x.types[kAnchor] == EwcType::kSplit ? with_fisher(t, EwcWidth<3>{})
                                               : with_fisher(t, EwcWidth<2>{});
  };
  return theta4 ? with_anchor(EwcWidth<4>{}) : with_anchor(EwcWidth<2>{});
}

// valid in thread 0; always the same order
template <int kThreads>
__device__ __forceinline__ double ewc_block_sum(double value) {
  __shared__ double warps[kThreads / 32];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2)
    value += __shfl_xor_sync(0xffffffffu, value, offset);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  double total = 0;
  if (threadIdx.x == 0)
    for (int w = 0; w < kThreads / 32; ++w) total += warps[w];
  return total;
}

// Finite unless a factor is NaN, so that its product with a Fisher of 0 is 0.
__device__ __forceinline__ double ewc_scale(const EwcCall& call) {
  if (!call.upstream) return call.scale;
  const double scale =
      call.scale * (call.upstream_double ? *static_cast<const double*>(call.upstream)
                                         : double(*static_cast<const float*>(call.upstream)));
  constexpr double kMost = 0x1.fffffffffffffp1023;
  return scale > kMost ? kMost : scale < -kMost ? -kMost : scale;
}

template <EwcMode mode, int most>
__global__ void __launch_bounds__(kEwcThreads, kEwcBlocksPerSm)
    ewc_kernel(const __grid_constant__ EwcArgs<most> args) {
  const int64_t block = blockIdx.x;
  const EwcTensor& tensor = args.tensors[ewc_tensor_of(args, block)];
  const int64_t begin = (block - tensor.first_chunk) * kEwcChunk;
  const int end = int(tensor.numel - begin < kEwcChunk ? tensor.numel - begin : kEwcChunk);
  const EwcView x = ewc_view(tensor, begin);
  const double scale = ewc_scale(args);
  double total;
  if (tensor.types[0] == EwcType::kDouble) {
    total = ewc_singly<mode, double>(x, 0, end, {scale, 1.0});
  } else {
    const int whole = tensor.aligned ? end - end % kEwcGroup : 0;
    const EwcStep step = ewc_step(scale);
    total = ewc_grouped_any<mode>(x, whole, {step.first, step.second});
    total += ewc_singly<mode, float>(x, whole, end, {step.first, step.second});
  }
  if (mode == EwcMode::kValue || mode == EwcMode::kAdd) {
    total = ewc_block_sum<kEwcThreads>(total);
    if (threadIdx.x == 0) args.parts[block] = total;
  }
}

// *out = factor * sum of parts
struct EwcSum {
  const double* parts;
  int64_t count;
  double factor;
  void* out;
  bool out_double;
};

// By one block: 122,000 parts (8 B parameters) are 240 loads a thread.
__device__ __forceinline__ void ewc_sum(const EwcSum& x) {
  double total = 0;
  for (int64_t i = threadIdx.x; i < x.count; i += kEwcFinishThreads) total += x.parts[i];
  total = ewc_block_sum<kEwcFinishThreads>(total) * x.factor;
  if (threadIdx.x != 0) return;
  if (x.out_double) *static_cast<double*>(x.out) = total;
  else *static_cast<float*>(x.out) = float(total);
}

[[maybe_unused]] static __global__ void __launch_bounds__(kEwcFinishThreads) ewc_finish(EwcSum x) {
  ewc_sum(x);
}

// --- a call, by launch(blocks, threads, kernel, arguments...), which returns null or an error text

template <EwcMode mode, class Launch>
const char* ewc_run(const EwcLaunch& x, const EwcCall& call, bool large, Launch&& launch) {
  return ewc_for_each_table(
      x.tensors, x.count, call, large, [&](const auto& table, int64_t blocks) -> const char* {
        constexpr int most = int(sizeof(table.tensors) / sizeof(table.tensors[0]));
        return launch(blocks, kEwcThreads, ewc_kernel<mode, most>, table);
      });
}

template <class Launch>
const char* ewc_call(const EwcLaunch& x, bool large, Launch&& launch) {
  const EwcCall call{x.parts, x.scale, x.upstream, 0, x.upstream_double};
  switch (x.mode) {
    case EwcMode::kWrite: return ewc_run<EwcMode::kWrite>(x, call, large, launch);
    case EwcMode::kProx: return ewc_run<EwcMode::kProx>(x, call, large, launch);
    default: break;
  }
  const char* failed = x.mode == EwcMode::kAdd ? ewc_run<EwcMode::kAdd>(x, call, large, launch)
                                               : ewc_run<EwcMode::kValue>(x, call, large, launch);
  if (failed) return failed;
  const EwcSum sum{x.parts, ewc_total_chunks(x.tensors, x.count), x.factor, x.out, x.out_double};
  return launch(1, kEwcFinishThreads, ewc_finish, sum);
}

}  // namespace fasttax
