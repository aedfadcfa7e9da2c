#pragma once

#include <cstdint>

#include "../math/kl_frame.h"
#include "../math/types.h"

// The CUDA launchers of the ops over logits as their callers see them: raw pointers, sizes and a
// stream.
namespace fasttax {

// kStats: token_stats; kAlone: without a reference
enum class KlOp : int { kPolicyRef, kRefPolicy, kJsd, kStats, kAlone };

constexpr int kKlDims = 4;

// rows of (..., V) whose last stride is 1: row n lies at base + sum over d of index_d * strides[d]
// bytes
struct KlLayout {
  char* base;  // null: there is no such tensor
  int64_t sizes[kKlDims], strides[kKlDims];
  int32_t dims;
};

struct KlArgs {
  KlLayout x, y, dx, dy;
  const bool* mask;       // [n], null: every token counts
  const int64_t* ids;     // [n], token_stats
  const float* upstream;  // [n] (token_stats: [6][n]): coefficients of the gradient
  float* values;          // [n] (token_stats: [6][n])
  float* kept;            // [n] KlRow or StatsRow
  float* parts;           // kl_workspace floats, where rows are split among blocks
  uint32_t* tickets;      // one a row, 0 before and after a launch
  KlParams k;
  int64_t n, v;
  int32_t splits;  // blocks a row
  int32_t cluster;
};

struct KlLaunch {
  KlOp op;
  FloatType type;
  KlArgs args;
  void* stream;  // cudaStream_t
};

// Each returns null, or CUDA's words for what failed. Asynchronous: nothing here waits for the
// device. sets args.splits; how many of each a forward needs
const char* kl_plan(KlLaunch& launch, int64_t& parts, int64_t& tickets);
const char* kl_forward(const KlLaunch& launch);
const char* kl_gradient(const KlLaunch& launch);
// forward, and the policy's gradient while the rows are near; float32 and bfloat16
const char* kl_both(const KlLaunch& launch);

}  // namespace fasttax
