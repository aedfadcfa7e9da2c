#pragma once

#include <cstdint>

#include "gemm.h"

// What a product's kernels are told.
namespace fasttax {

struct GemmArgs {  // out (M, N), rows out_stride apart
  int64_t M, N, K;
  float* out;
  int64_t out_stride;
  bool add, bf16x2;
};

// What the next fold reads of a matrix, rows a page apart and more, fetched into L2 a few lines a
// run.
struct GemmAhead {
  const char* row = nullptr;
  int64_t stride = 0, bytes = 0, rows = 0, at = 0;

  int64_t lines() const { return rows * ((bytes + 63) / 64); }
  void fetch(int64_t count) {
    for (; count > 0 && rows > 0; --count) {
      __builtin_prefetch(row + at, 0, 2);
      if ((at += 64) < bytes) continue;
      at = 0;
      row += stride;
      --rows;
    }
  }
};

}  // namespace fasttax
