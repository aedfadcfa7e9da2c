#pragma once

// AdamW with EWC over a whole parameter group, two launches for every 313 tensors: the penalty
// costs the reads of fisher and anchor, no pass of its own.
//
// Bytes per element in float32: read theta, grad, both moments, anchor, fisher, write theta and
// moments: 36, where AdamW alone has 28. Seven operands of three widths make too many loops to
// compile one for each: a load's width is chosen by uniform branches, and its bits are kept as they
// lie until all loads are under way, so that none waits for another: 6 x 16 bytes a thread in
// float32, 72 KB per SM at 3 blocks. Steps, lr, GradScaler's scale and found_inf are read on the
// device, once a block: no sync, and a CUDA graph replays with new values. Deterministic: block b
// owns chunk b and leaves its part of the penalty in parts[b]; ewc_finish adds them in a fixed
// order.

#include "../math/adamw.h"
#include "adamw.h"
#include "ewc.cuh"

namespace fasttax {

constexpr int kAdamWThreads = 256;
constexpr int kAdamWBlocksPerSm = 3;
constexpr int64_t kAdamWChunk = 1 << 15;  // elements per block; a multiple of 256
// per launch: ewc_tables.cuh
constexpr int kAdamWTensors = 36, kAdamWManyTensors = 313;

struct AdamWCall {
  AdamWOptions options;
  const void *lr, *grad_scale, *found_inf;
  double* parts;
  int32_t count;
  bool lr_double, grad_scale_double, found_inf_double;
};

template <int most>
struct AdamWArgs : AdamWCall {
  AdamWTensor tensors[most];  // first_chunk ascending
};
static_assert(sizeof(AdamWArgs<kAdamWTensors>) + sizeof(EwcSum) <= 4096, "kernel arguments");
static_assert(sizeof(AdamWArgs<kAdamWManyTensors>) + sizeof(EwcSum) <= 32764, "kernel arguments");

// --- launch geometry, shared by the launcher and the tests

inline int64_t adamw_chunks(int64_t numel) { return (numel + kAdamWChunk - 1) / kAdamWChunk; }

inline bool adamw_aligned(const AdamWTensor& x) {
  for (int k = 0; k < kAwOperands; ++k) {
    const uintptr_t width = x.types[k] == EwcType::kFloat   ? 16
                            : x.types[k] == EwcType::kU8Log ? 4
                                                            : 8;
    if (reinterpret_cast<uintptr_t>(x.data[k]) % width) return false;
  }
  return true;
}

inline int64_t adamw_total_chunks(const AdamWTensor* tensors, int64_t count) {
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) total += adamw_chunks(tensors[i].numel);
  return total;
}

// Calls start(args, blocks, last) for every table, and once where there is no tensor, until it
// returns an error text. Empty tensors take their place too: their step is counted.
template <int most, class Start>
const char* adamw_for_each_table(const AdamWTensor* tensors, int64_t count, const AdamWCall& call,
                                 Start&& start) {
  AdamWArgs<most> args{call};
  int64_t i = 0;
  do {
    int64_t blocks = 0;
    for (args.count = 0; args.count < most && i < count; ++i) {
      AdamWTensor& x = args.tensors[args.count++] = tensors[i];
      x.first_chunk = blocks;
      x.aligned = adamw_aligned(x);
      blocks += adamw_chunks(x.numel);
    }
    const AdamWArgs<most>& table = args;
    if (const char* failed = start(table, blocks, i == count)) return failed;
    args.parts += blocks;
  } while (i < count);
  return nullptr;
}

// --- one chunk, by one block

__device__ __forceinline__ double adamw_value(const void* p, bool wide) {
  return wide ? *static_cast<const double*>(p) : double(*static_cast<const float*>(p));
}

__device__ __forceinline__ bool adamw_skipped(const AdamWCall& call) {
  return call.found_inf && adamw_value(call.found_inf, call.found_inf_double) != 0;
}

struct AdamWView {  // the chunk: offsets within it are 32-bit
  char* data[kAwOperands];
  const float* scales;
  EwcType types[kAwOperands];
};

// bytes before element i, a multiple of 256
__device__ __forceinline__ int64_t adamw_offset(EwcType type, int64_t i) {
  const int64_t size = type == EwcType::kDouble  ? 8
                       : type == EwcType::kFloat ? 4
                       : type == EwcType::kSplit ? 3
                       : type == EwcType::kU8Log ? 1
                                                 : 2;
  return i * size;
}

// Four elements as they lie, in at most four words.
__device__ __forceinline__ uint4 adamw_load(const AdamWView& x, int k, int i) {
  const char* p = x.data[k];
  switch (x.types[k]) {
    case EwcType::kFloat: return __ldcs(reinterpret_cast<const uint4*>(p) + i / 4);
    case EwcType::kU8Log:
      return make_uint4(__ldcs(reinterpret_cast<const uint32_t*>(p) + i / 4), 0, 0, 0);
    case EwcType::kSplit: {
      const char* block = p + i / kEwcBlock * kSplitBytes;
      const int at = i % kEwcBlock;
      const uint2 hi = __ldcs(reinterpret_cast<const uint2*>(block + 2 * at));
      return make_uint4(hi.x, hi.y,
                        __ldcs(reinterpret_cast<const uint32_t*>(block + 2 * kEwcBlock + at)), 0);
    }
    default: {
      const uint2 half = __ldcs(reinterpret_cast<const uint2*>(p) + i / 4);
      return make_uint4(half.x, half.y, 0, 0);
    }
  }
}

__device__ __forceinline__ void adamw_widen(const AdamWView& x, int k, int i, const uint4& raw,
                                            float (&out)[4]) {
  switch (x.types[k]) {
    case EwcType::kFloat: ewc_widen(raw, false, out); break;
    case EwcType::kU8Log: {
      const float lo = x.scales[i / 256 * 2], step = x.scales[i / 256 * 2 + 1];
#pragma unroll
      for (int j = 0; j < 4; ++j) out[j] = ewc_u8log(raw.x >> 8 * j & 0xff, lo, step);
      break;
    }
    case EwcType::kSplit:
      ewc_widen(EwcSplitFour{make_uint2(raw.x, raw.y), raw.z}, true, out);
      break;
    default: ewc_widen(make_uint2(raw.x, raw.y), x.types[k] == EwcType::kBFloat16, out);
  }
}

__device__ __forceinline__ void adamw_store(const AdamWView& x, int k, int i, const float (&v)[4]) {
  if (x.types[k] == EwcType::kFloat)
    ewc_store(reinterpret_cast<uint4*>(x.data[k]) + i / 4, false, v);
  else ewc_store(reinterpret_cast<uint2*>(x.data[k]) + i / 4, x.types[k] == EwcType::kBFloat16, v);
}

struct AdamWRoot {
  template <class S>
  FASTTAX_HD S operator()(S a) const {
    return S(sqrt(a));
  }
};

struct AdamWAsItIs {
  template <class S>
  FASTTAX_HD S operator()(S a) const {
    return a;
  }
};

template <class S>
__device__ __forceinline__ S adamw_get(const AdamWView& x, int k, int i) {
  EwcView one;  // ewc_get knows anchors and fishers by their place
  const int place = k == kAwAnchor ? kAnchor : k == kAwFisher ? kFisher : kTheta;
  one.data[place] = x.data[k];
  one.types[place] = x.types[k];
  one.scales = x.scales;
  return ewc_get<S>(one, place, i);
}

template <class S>
__device__ __forceinline__ void adamw_put(const AdamWView& x, int k, int i, S v) {
  EwcView one;
  one.data[kTheta] = x.data[k];
  one.types[kTheta] = x.types[k];
  ewc_put<S>(one, kTheta, i, v);
}

// Elements [begin, end) one at a time: misaligned tensors, tails, float64.
template <AdamWMode mode, class S>
__device__ __forceinline__ double adamw_singly(const AdamWView& x, int begin, int end,
                                               const AdamWStep<S>& k) {
  const bool amsgrad = x.data[kAwMax], from_second = !x.data[kAwFisher];
  double total = 0;
#pragma unroll 1
  for (int i = begin + int(threadIdx.x); i < end; i += kAdamWThreads) {
    S theta = adamw_get<S>(x, kAwTheta, i), m = adamw_get<S>(x, kAwFirst, i),
      v = adamw_get<S>(x, kAwSecond, i);
    S most = amsgrad ? adamw_get<S>(x, kAwMax, i) : S(0);
    const S anchor = mode == AdamWMode::kPlain ? S(0) : adamw_get<S>(x, kAwAnchor, i);
    const S fisher =
        mode == AdamWMode::kPlain || from_second ? S(0) : adamw_get<S>(x, kAwFisher, i);
    total +=
        double(adamw_element<mode>(theta, anchor, fisher, adamw_get<S>(x, kAwGrad, i), m, v, most,
                                   amsgrad, from_second, k, AdamWRoot(), AdamWAsItIs(), S(1)));
    adamw_put<S>(x, kAwTheta, i, theta);
    adamw_put<S>(x, kAwFirst, i, m);
    adamw_put<S>(x, kAwSecond, i, v);
    if (amsgrad) adamw_put<S>(x, kAwMax, i, most);
  }
  return total;
}

// Elements [0, end), end a multiple of 4. A thread adds up to 32 sums of 4 terms in float, none of
// them negative.
template <AdamWMode mode>
__device__ __forceinline__ double adamw_grouped(const AdamWView& x, int end,
                                                const AdamWStep<float>& k) {
  const bool amsgrad = x.data[kAwMax], from_second = !x.data[kAwFisher];
  float total = 0;
#pragma unroll 1
  for (int i = int(threadIdx.x) * 4; i < end; i += kAdamWThreads * 4) {
    const uint4 raw_theta = adamw_load(x, kAwTheta, i), raw_grad = adamw_load(x, kAwGrad, i);
    const uint4 raw_m = adamw_load(x, kAwFirst, i), raw_v = adamw_load(x, kAwSecond, i);
    uint4 raw_anchor{}, raw_fisher{}, raw_most{};
    if (mode != AdamWMode::kPlain) raw_anchor = adamw_load(x, kAwAnchor, i);
    if (mode != AdamWMode::kPlain && !from_second) raw_fisher = adamw_load(x, kAwFisher, i);
    if (amsgrad) raw_most = adamw_load(x, kAwMax, i);
    float theta[4], grad[4], m[4], v[4], anchor[4] = {}, fisher[4] = {}, most[4] = {};
    adamw_widen(x, kAwTheta, i, raw_theta, theta);
    adamw_widen(x, kAwGrad, i, raw_grad, grad);
    adamw_widen(x, kAwFirst, i, raw_m, m);
    adamw_widen(x, kAwSecond, i, raw_v, v);
    if (mode != AdamWMode::kPlain) adamw_widen(x, kAwAnchor, i, raw_anchor, anchor);
    if (mode != AdamWMode::kPlain && !from_second) adamw_widen(x, kAwFisher, i, raw_fisher, fisher);
    if (amsgrad) adamw_widen(x, kAwMax, i, raw_most, most);
    float sum = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j)
      sum += adamw_element<mode>(theta[j], anchor[j], fisher[j], grad[j], m[j], v[j], most[j],
                                 amsgrad, from_second, k, AdamWRoot(), AdamWAsItIs(), 1.0f);
    total += sum;
    adamw_store(x, kAwTheta, i, theta);
    adamw_store(x, kAwFirst, i, m);
    adamw_store(x, kAwSecond, i, v);
    if (amsgrad) adamw_store(x, kAwMax, i, most);
  }
  return double(total);
}

template <AdamWMode mode>
__device__ __forceinline__ double adamw_chunk(const AdamWTensor& tensor, const AdamWView& x,
                                              int end, const AdamWStep<double>& k) {
  if (tensor.types[kAwTheta] == EwcType::kDouble) return adamw_singly<mode, double>(x, 0, end, k);
  const EwcStep product = ewc_step(k.first);
  const AdamWStep<float> narrow{float(k.grad_factor),
                                float(k.decay),
                                float(k.one_minus_beta1),
                                float(k.beta2),
                                float(k.one_minus_beta2),
                                float(k.step),
                                float(k.root_factor),
                                float(k.eps),
                                product.first,
                                product.second,
                                float(k.fisher_factor)};
  const int whole = tensor.aligned ? end - end % 4 : 0;
  return adamw_grouped<mode>(x, whole, narrow) + adamw_singly<mode, float>(x, whole, end, narrow);
}

template <int most>
__global__ void __launch_bounds__(kAdamWThreads, kAdamWBlocksPerSm)
    adamw_kernel(const __grid_constant__ AdamWArgs<most> args) {
  __shared__ AdamWStep<double> shared_step;
  const int64_t block = blockIdx.x;
  const AdamWTensor& tensor = args.tensors[ewc_tensor_of(args, block)];
  if (adamw_skipped(args)) {
    if (threadIdx.x == 0) args.parts[block] = 0;
    return;
  }
  if (threadIdx.x == 0) {
    const double lr = args.lr ? adamw_value(args.lr, args.lr_double) : args.options.lr;
    const double inv_grad_scale =
        args.grad_scale ? 1 / adamw_value(args.grad_scale, args.grad_scale_double) : 1;
    shared_step = adamw_step<double>(args.options, tensor.mode, lr, inv_grad_scale,
                                     adamw_value(tensor.step, tensor.step_double) + 1);
  }
  __syncthreads();
  const AdamWStep<double> k = shared_step;
  const int64_t begin = (block - tensor.first_chunk) * kAdamWChunk;
  const int end = int(tensor.numel - begin < kAdamWChunk ? tensor.numel - begin : kAdamWChunk);
  AdamWView x;
#pragma unroll
  for (int o = 0; o < kAwOperands; ++o) {
    x.types[o] = tensor.types[o];
    x.data[o] = tensor.data[o]
                    ? static_cast<char*>(tensor.data[o]) + adamw_offset(tensor.types[o], begin)
                    : nullptr;
  }
  x.scales = tensor.scales ? tensor.scales + begin / 256 * 2 : nullptr;
  double total;
  switch (tensor.mode) {
    case AdamWMode::kGrad: total = adamw_chunk<AdamWMode::kGrad>(tensor, x, end, k); break;
    case AdamWMode::kProx: total = adamw_chunk<AdamWMode::kProx>(tensor, x, end, k); break;
    default: total = adamw_chunk<AdamWMode::kPlain>(tensor, x, end, k);
  }
  total = ewc_block_sum<kAdamWThreads>(total);
  if (threadIdx.x == 0) args.parts[block] = total;
}

// By one block, after all blocks of a table have read the steps: counts them, and after the last
// table makes the value (sum.out).
template <int most>
__global__ void __launch_bounds__(kEwcFinishThreads)
    adamw_finish(const __grid_constant__ AdamWArgs<most> args, EwcSum sum) {
  static_assert(most <= kEwcFinishThreads, "a thread a tensor");
  const int i = int(threadIdx.x);
  if (i < args.count && !adamw_skipped(args)) {
    const AdamWTensor& x = args.tensors[i];
    if (x.step_double) *static_cast<double*>(x.step) += 1;
    else *static_cast<float*>(x.step) += 1;
  }
  if (sum.out) ewc_sum(sum);
}

// --- a call, by launch(blocks, threads, kernel, arguments...), which returns null or an error text

template <int most, class Launch>
const char* adamw_run(const AdamWLaunch& x, const AdamWCall& call, Launch&& launch) {
  const EwcSum all{x.parts, adamw_total_chunks(x.tensors, x.count), x.options.strength / 2, x.out,
                   x.out_double};
  return adamw_for_each_table<most>(
      x.tensors, x.count, call,
      [&](const AdamWArgs<most>& table, int64_t blocks, bool last) -> const char* {
        if (const char* failed = launch(blocks, kAdamWThreads, adamw_kernel<most>, table))
          return failed;
        return launch(1, kEwcFinishThreads, adamw_finish<most>, table, last ? all : EwcSum{});
      });
}

template <class Launch>
const char* adamw_call(const AdamWLaunch& x, bool large, Launch&& launch) {
  AdamWCall call{};
  call.options = x.options;
  call.lr = x.lr, call.grad_scale = x.grad_scale, call.found_inf = x.found_inf;
  call.lr_double = x.lr_double, call.grad_scale_double = x.grad_scale_double,
  call.found_inf_double = x.found_inf_double;
  call.parts = x.parts;
  if constexpr (kLargeArguments)
    if (large && x.count > kAdamWTensors) return adamw_run<kAdamWManyTensors>(x, call, launch);
  return adamw_run<kAdamWTensors>(x, call, launch);
}

}  // namespace fasttax
