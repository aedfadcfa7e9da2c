#pragma once

// A list of tensors as tables of pointers, passed by value, so that a CUDA graph keeps them: a
// block for every chunk of 64 Ki elements, and a launch for every 510 tensors, or 62 where kernels
// take no more than 4 KB of arguments. A short list goes as the small table: a launch copies all of
// it.

#include <cstdint>

#include "../math/ewc_types.h"
#include "ewc_elements.cuh"

namespace fasttax {

constexpr int kEwcThreads = 256;
constexpr int kEwcBlocksPerSm = 4;
constexpr int64_t kEwcChunk = 1 << 16;  // elements per block; a multiple of 256, the u8log block
constexpr int kEwcGroup = 4;
// per launch: what fits the 4 KB of kernel arguments that every CUDA takes, and the 32 764 bytes
// that CUDA 12.1 and its driver (R530) take on sm_70 and later
constexpr int kEwcTensors = 62, kEwcManyTensors = 510;
#if defined(CUDART_VERSION) && CUDART_VERSION < 12010
constexpr bool kLargeArguments = false;
#else
constexpr bool kLargeArguments = true;
#endif

struct EwcCall {
  double* parts;
  double scale;
  const void* upstream;  // on the device, multiplies scale; or null
  int32_t count;
  bool upstream_double;
};

template <int most>
struct EwcArgs : EwcCall {
  EwcTensor tensors[most];  // none of them empty, first_chunk ascending
};
static_assert(sizeof(EwcArgs<kEwcTensors>) <= 4096, "kernel arguments");
static_assert(sizeof(EwcArgs<kEwcManyTensors>) <= 32764, "kernel arguments");

// --- launch geometry, shared by the launcher and the tests

inline int64_t ewc_chunks(int64_t numel) { return (numel + kEwcChunk - 1) / kEwcChunk; }

inline int64_t ewc_total_chunks(const EwcTensor* tensors, int64_t count) {
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) total += ewc_chunks(tensors[i].numel);
  return total;
}

inline bool ewc_aligned(const EwcTensor& x) {
  const auto width = [](EwcType type) -> uintptr_t {
    return type == EwcType::kFloat ? 16 : type == EwcType::kU8Log ? 4 : 8;
  };
  for (int k = 0; k < 4; ++k)
    if (reinterpret_cast<uintptr_t>(x.data[k]) % width(x.types[k])) return false;
  return true;
}

template <int most, class Start>
const char* ewc_for_each_table_of(const EwcTensor* tensors, int64_t count, const EwcCall& call,
                                  Start&& start) {
  EwcArgs<most> args{call};
  int64_t blocks = 0;
  args.count = 0;
  for (int64_t i = 0; i <= count; ++i) {
    const bool last = i == count;
    if (args.count == most || (last && args.count)) {
      const EwcArgs<most>& table = args;
      if (const char* failed = start(table, blocks)) return failed;
      if (args.parts) args.parts += blocks;
      args.count = 0;
      blocks = 0;
    }
    if (last || tensors[i].numel == 0) continue;
    EwcTensor& x = args.tensors[args.count++] = tensors[i];
    x.first_chunk = blocks;
    x.aligned = ewc_aligned(x);
    blocks += ewc_chunks(x.numel);
  }
  return nullptr;
}

// Calls start(args, blocks) for every table, until it returns an error text. A table's grid is its
// chunks: at most 2^31 - 1, since 2^47 elements do not fit a GPU. `large`: kernels take 32 764
// bytes.
template <class Start>
const char* ewc_for_each_table(const EwcTensor* tensors, int64_t count, const EwcCall& call,
                               bool large, Start&& start) {
  if constexpr (kLargeArguments)
    if (large && count > kEwcTensors)
      return ewc_for_each_table_of<kEwcManyTensors>(tensors, count, call, start);
  return ewc_for_each_table_of<kEwcTensors>(tensors, count, call, start);
}

// The tensor whose chunks contain this block, of a table whose first_chunk ascend; an empty tensor
// begins where the next does.
template <class Args>
__device__ __forceinline__ int ewc_tensor_of(const Args& args, int64_t block) {
  int low = 0, high = args.count;  // first_chunk[low] <= block < first_chunk[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (args.tensors[middle].first_chunk <= block ? low : high) = middle;
  }
  return low;
}

}  // namespace fasttax
