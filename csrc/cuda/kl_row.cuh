#pragma once

// One row's forward, by a team of blocks: one block; several that split a long row of a small
// batch, the last to arrive going on alone; or a cluster, each block with a slice of the row in its
// shared memory.

#include "kl_sums.cuh"

namespace fasttax {

struct KlState {
  KlRow r;
  Divergence forwards, backwards;  // token_stats
  double mass, mean, value, y;
};

// Who sums what: this block spans [begin, end) of `spans`, into own[span - base].
struct KlTeam {
  float* own;
  int spans, begin, end, base;
  int rank, size, each;  // cluster: each block has `each` spans
  int row;
};

struct KlShared {  // at the start of a block's dynamic shared memory; its spans' parts follow
  KlState state;
  float scratch[kKlWarps][kMostParts];
  uint32_t arrived;
  KlTeam team;  // of a cluster: here it takes no registers while sums are taken
};

__host__ __device__ inline size_t kl_header() { return (sizeof(KlShared) + 15) / 16 * 16; }

// --- clusters (sm_90 and later)

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define FASTTAX_CLUSTERS 0
#else
#define FASTTAX_CLUSTERS 1
#endif

__device__ __forceinline__ void kl_cluster_sync() {
#if FASTTAX_CLUSTERS
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
#else
  __syncthreads();
#endif
}

// the same variable in another block's shared memory
template <class T>
__device__ __forceinline__ T* kl_of_rank(T* shared, int rank) {
#if FASTTAX_CLUSTERS
  return static_cast<T*>(__cluster_map_shared_rank(shared, unsigned(rank)));
#else
  return shared;
#endif
}

template <bool kCluster>
__device__ __forceinline__ void kl_team_sync() {
  if (kCluster) kl_cluster_sync();
  else __syncthreads();
}

// --- what the sums say

// The row's state from its sums `t` in the frame of state.r.
template <KlOp op>
__device__ void kl_decide(const KlParams& k, KlSums& t, KlState& state) {
  KlRow& r = state.r;
  using P = KlParts<op>;
  Divergence f, b;
  if (P::kForwards) f = divergence(t, true);
  if (P::kBackwards) b = divergence(t, false);
  if (f.recentre() || b.recentre()) {
    // the frame of the smaller one, where digits are scarce
    const bool first = f.recentre() && !(b.recentre() && b.value < f.value);
    const float my = float(double(r.my) - (first ? f.gap : b.gap) / double(k.ref_row_scale));
    t.move(0, (double(my) - double(r.my)) * double(k.ref_row_scale));
    r.my = my;
    if (P::kForwards) f = divergence(t, true);
    if (P::kBackwards) b = divergence(t, false);
  }
  if constexpr (!kl_is_kind(op)) {
    state.forwards = f, state.backwards = b;
    state.mass = t.mass, state.mean = t.moment / t.mass, state.y = t.y;
    r.log_ratio = float(f.log_ratio);
    r.mean_gap = float(f.gap);
    r.ref_center = float(b.gap);
    r.inv_s = float(1 / t.mass);
    r.inv_s_ref = op == KlOp::kStats ? float(1 / t.y) : 0.0f;
  } else {
    if constexpr (kl_op_two_sweeps(op)) f = divergence(t, true);
    const Divergence v = P::kBackwards ? b : f;
    // of two sweeps 0 or NaN: what is_zero() leaves at that
    state.value = kl_op_two_sweeps(op) ? (t.s + t.y) * 0 : v.value;
    r.log_ratio = float(v.log_ratio);
    r.mean_gap = float(v.gap);
    r.inv_s = float(1 / t.s);
    r.inv_s_ref = float(1 / t.y);
  }
}

// --- a row's sums

// True in the block that is last to bring its share of a split row; what the others wrote is then
// there to be read.
__device__ inline bool kl_last_to_arrive(uint32_t* ticket, int blocks, KlShared& sh) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    sh.arrived = atomicAdd(ticket, 1u);
    if (sh.arrived == uint32_t(blocks) - 1) *ticket = 0;  // as it was found
    __threadfence();
  }
  __syncthreads();
  return sh.arrived == uint32_t(blocks) - 1;
}

template <bool kCluster>
__device__ __forceinline__ const volatile float* kl_part(const KlTeam& team, int span, int count) {
  if (!kCluster) return team.own + int64_t(span - team.base) * count;
  const int rank = span / team.each;
  return kl_of_rank(team.own, rank) + int64_t(span - rank * team.each) * count;
}

// The row's state out of its spans' parts, by one warp.
template <KlOp op, bool kCluster>
__device__ void kl_join_spans(const KlTeam& team, const KlParams& k, KlState& state) {
  using Part = KlPart<op>;
  constexpr int kCount = KlParts<op>::kCount;
  const int lane = int(threadIdx.x) % 32;
  KlLead lead{-kl_infinity(), -kl_infinity(), -kl_infinity(), team.spans};
  for (int i = lane; i < team.spans; i += 32)
    lead.join(Part::lead(kl_part<kCluster>(team, i, kCount), i));
#pragma unroll
  for (int bit = 16; bit > 0; bit /= 2)
    lead.join({__shfl_xor_sync(kWholeWarp, lead.lead, bit),
               __shfl_xor_sync(kWholeWarp, lead.other, bit),
               __shfl_xor_sync(kWholeWarp, lead.other_top, bit),
               __shfl_xor_sync(kWholeWarp, lead.index, bit)});
  KlSides<float> frame = Part::frame(k, lead);
  // a row of -inf: its sums are 0, or NaN where a NaN is in it
  if (frame.x == -kl_infinity()) frame.x = 0;
  if (frame.y == -kl_infinity()) frame.y = 0;
  KlSums t;
  for (int i = lane; i < team.spans; i += 32) {
    Part span = Part::read(kl_part<kCluster>(team, i, kCount));
    span.move_to(k, frame);
    t += span.sums;
  }
  kl_total<op>(t);
  if (lane != 0) return;
  state = KlState{};
  state.r.mx = frame.x;
  state.r.my = frame.y;
  kl_decide<op>(k, t, state);
}

// Sums the row and brings sh.state to its end; false in the blocks of a split row that are done
// with their share.
template <KlOp op, bool kCluster, class Source>
__device__ bool kl_row_sums(const Source& row, const KlArgs& a, const KlTeam& team, KlShared& sh) {
  constexpr int kCount = KlParts<op>::kCount;
  const int warp = int(threadIdx.x) / 32;
  for (int i = team.begin + warp; i < team.end; i += kKlWarps)
    kl_span_sums<op, kCluster>(
        row, a, i, [&] { return team.own + (i - team.base) * kCount; },
        [&] {
          unsigned thread = threadIdx.x;
          FASTTAX_OPAQUE(thread);  // not an address held through all spans
          return sh.scratch[thread / 32];
        });
  if (!kCluster && a.splits > 1 && !kl_last_to_arrive(a.tickets + team.row, a.splits, sh))
    return false;
  kl_team_sync<kCluster>();
  if (warp == 0) kl_join_spans<op, kCluster>(team, a.k, sh.state);
  // none writes parts anew before all have read them
  kl_team_sync<kCluster>();
  return true;
}

}  // namespace fasttax
