#pragma once

#include <cstdint>

#include "../math/kl_types.h"
#include "../math/types.h"
#include "kl_curves.h"

// The CUDA launchers of the ops over logits as their callers see them: raw pointers, sizes and a
// stream.
namespace fasttax {

// What a kernel computes: a divergence, by its kind's own number, or token_stats, with and without
// a reference.
// The kinds by their numbers. Each has a name because nvcc's host code can't spell a template's
// argument that has none.
enum class KlOp : int { k0, k1, k2, k3, k4, k5, k6, k7, kStats = 64, kAlone = 65 };
static_assert(kKlKinds <= 8, "a kind without a name in KlOp");

FASTTAX_HD constexpr KlOp kl_op(KlKind kind) { return KlOp(int(kind)); }
FASTTAX_HD constexpr bool kl_is_kind(KlOp op) { return int(op) < kKlKinds; }
FASTTAX_HD constexpr KlKind kl_kind(KlOp op) { return KlKind(int(op)); }
FASTTAX_HD constexpr bool kl_has_ref(KlOp op) { return op != KlOp::kAlone; }
FASTTAX_HD constexpr bool kl_op_two_sweeps(KlOp op) {
  return kl_is_kind(op) && kl_two_sweeps(kl_kind(op));
}
FASTTAX_HD constexpr bool kl_op_jsd(KlOp op) { return op == kl_op(KlKind::kJsd); }
FASTTAX_HD constexpr int kl_op_wants(KlOp op) {
  if (kl_is_kind(op)) return kl_wants(kl_kind(op));
  return kl_has_ref(op) ? kWantPolicyRef | kWantRefPolicy | kWantEntropy : kWantEntropy;
}
// Whether rows under one softcap have loops of their own: not those whose logs must have every
// digit, nor token_stats.
FASTTAX_HD constexpr bool kl_op_capped(KlOp op) {
  return kl_is_kind(op) && kl_kind(op) != KlKind::kRenyi;
}

constexpr int kSpan = 1024;  // entries of one warp in a row of up to 2^19; a multiple of it beyond
constexpr int kMaxSpans = 512;

inline int64_t kl_span(int64_t v) {
  return (v + int64_t(kSpan) * kMaxSpans - 1) / (int64_t(kSpan) * kMaxSpans) * kSpan;
}
inline int kl_spans(int64_t v) { return int((v + kl_span(v) - 1) / kl_span(v)); }

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
  float* saved;           // [n] KlRow or StatsRow
  float* parts;           // kl_workspace floats, where rows are split among blocks
  uint32_t* tickets;      // one a row, 0 before and after a launch
  KlParams k;
  JsdCurves jsd;
  CapCurves cap;
  int64_t n, v;              // rows and their entries: see set_size()
  int32_t span, spans;       // kl_span(v), kl_spans(v)
  FloatType x_type, y_type;  // of the rows and of their gradients
  int32_t splits;            // blocks a row
  int32_t cluster;

  // Every block would divide 64 bits by 64 to find the same spans.
  void set_size(int64_t rows, int64_t entries) {
    n = rows, v = entries;
    span = int32_t(kl_span(v)), spans = kl_spans(v);
    splits = cluster = 1;
  }
};

struct KlLaunch {
  KlOp op;
  FloatType type;  // of the kernels: the rows', or float32 where the two have types of their own
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
