#pragma once

// One row's forward, by a team of blocks: one block; several that split a long row of a small
// batch, the last to arrive going on alone; or a cluster, each block with a slice of the row in its
// shared memory.

#include "kl_sums.cuh"

namespace fasttax {

enum class KlNext : int { kDone, kAgain, kMaxima };  // what a row's sums call for

struct KlState {
  KlRow r;
  bool careful, exact, recentred;
  Divergence forwards, backwards;  // token_stats
  double mass, mean, value, y;
};

struct KlShared {  // at the start of a block's dynamic shared memory; its spans' parts follow
  KlState state;
  float max_x[kKlWarps], max_y[kKlWarps];
  float own_max[2];  // of the block's entries, for the cluster
  KlNext next;
  uint32_t arrived;
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

// Who sums what: this block spans [begin, end) of `spans`, into own[span - base].
struct KlTeam {
  float* own;
  int spans, begin, end, base;
  int rank, size, each;  // cluster: each block has `each` spans
};

template <bool kCluster>
__device__ __forceinline__ void kl_team_sync() {
  if (kCluster) kl_cluster_sync();
  else __syncthreads();
}

// --- maxima

// Of entries [begin, end), to sh.own_max: NaN is passed over here and reaches the sums through exp.
template <KlOp op, class Source>
__device__ void kl_block_maxima(const Source& row, const KlParams& k, int64_t begin, int64_t end,
                                KlShared& sh) {
  const KlDeviceFrame frame(k, KlRow{});
  float mx = -kl_infinity(), my = -kl_infinity();
  for (int64_t i = begin + threadIdx.x; i < end; i += kKlThreads) {
    float x = row.x_one(i), y = kl_has_ref(op) ? row.y_one(i) : x;
    if (!k.plain) frame.cap(x, y);
    mx = fmaxf(mx, x);
    my = fmaxf(my, kl_capped_y(x, y, k));
  }
#pragma unroll
  for (int bit = 16; bit > 0; bit /= 2) {
    mx = fmaxf(mx, __shfl_xor_sync(kWholeWarp, mx, bit));
    my = fmaxf(my, __shfl_xor_sync(kWholeWarp, my, bit));
  }
  if (threadIdx.x % 32 == 0) sh.max_x[threadIdx.x / 32] = mx, sh.max_y[threadIdx.x / 32] = my;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kKlWarps; ++w) mx = fmaxf(mx, sh.max_x[w]), my = fmaxf(my, sh.max_y[w]);
    sh.own_max[0] = mx, sh.own_max[1] = my;
  }
  __syncthreads();
}

// The frame of these maxima. A row of -inf gets 0: its sums are 0 then, and NaN if a NaN is in it.
__device__ inline void kl_new_frame(KlShared& sh, float mx, float my) {
  sh.state.r = KlRow{};
  sh.state.r.mx = mx > -kl_infinity() ? mx : 0.0f;
  sh.state.r.my = my > -kl_infinity() ? my : 0.0f;
}

// from own_max of the team's blocks
template <bool kCluster>
__device__ void kl_exact_frame(const KlTeam& team, KlShared& sh) {
  if (kCluster) kl_cluster_sync();
  if (threadIdx.x == 0) {
    float m[2] = {sh.own_max[0], sh.own_max[1]};
    for (int rank = 0; kCluster && rank < team.size; ++rank)
      for (int side = 0; side < 2; ++side)
        m[side] = fmaxf(m[side], *kl_of_rank(&sh.own_max[side], rank));
    kl_new_frame(sh, m[0], m[1]);
  }
}

// --- what the sums say

template <KlOp op>
__device__ KlNext kl_decide(const KlParams& k, const KlSums& t, KlState& state) {
  KlRow& r = state.r;
  constexpr double kTooHigh = 4.85e8;  // e^20
  if (!state.exact && (t.s > kTooHigh || t.y > kTooHigh || t.mass > kTooHigh)) {
    state.exact = true;
    state.recentred = false;
    return KlNext::kMaxima;
  }
  constexpr bool two_sweeps = kl_op_two_sweeps(op);
  if constexpr (!kl_is_kind(op)) {
    Divergence f, b;
    if (op == KlOp::kStats) f = divergence(t, true), b = divergence(t, false);
    if (!state.recentred) {
      state.forwards = f, state.backwards = b;
      const bool trusted = t.moment == t.moment &&
                           (op == KlOp::kAlone || (t.trusted(f.value) && t.trusted(b.value)));
      if (!state.careful && !trusted) {
        state.careful = true;
        return KlNext::kAgain;
      }
      state.mass = t.mass, state.mean = t.moment / t.mass, state.y = t.y;
      if (op == KlOp::kStats && (f.recentre() || b.recentre())) {
        // each keeps the better of its two values; the frame is that of the smaller one, where
        // digits are scarce
        const bool first = f.recentre() && !(b.recentre() && b.value < f.value);
        r.shift = float(first ? f.gap : b.gap);
        state.recentred = state.careful = true;
        return KlNext::kAgain;
      }
    } else {
      if (!(f.size > state.forwards.size)) state.forwards.value = f.value;
      if (!(b.size > state.backwards.size)) state.backwards.value = b.value;
      state.forwards.log_ratio = f.log_ratio;
      state.forwards.gap = f.gap;
      state.backwards.gap = b.gap;
      state.y = t.y;
    }
    r.log_ratio = float(state.forwards.log_ratio);
    r.mean_gap = float(state.forwards.gap);
    r.ref_center = float(state.backwards.gap);
    r.inv_s = float(1 / state.mass);
    r.inv_s_ref = op == KlOp::kStats ? float(1 / state.y) : 0.0f;
    return KlNext::kDone;
  } else {
    const Divergence v = divergence(t, kl_op_wants(op) != kWantRefPolicy);
    state.value = v.value;
    r.log_ratio = float(v.log_ratio);
    r.mean_gap = float(v.gap);
    if (!state.careful && (two_sweeps ? !(t.s > 0 && t.y > 0) : !t.trusted(v.value))) {
      state.careful = true;
      return KlNext::kAgain;
    }
    if (!two_sweeps && !state.recentred && v.recentre()) {
      r.shift = float(v.gap);
      state.recentred = state.careful = true;
      return KlNext::kAgain;
    }
    r.inv_s = float(1 / t.s);
    r.inv_s_ref = float(1 / t.y);
    if (two_sweeps) state.value = (t.s + t.y) * 0;  // 0 or NaN; what is_zero() leaves at that
    return KlNext::kDone;
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

// Sums the row and brings sh.state to its end; false in the blocks of a split row that are done
// with their share. `prime` reads any entry, `row` this team's.
template <KlOp op, bool kCluster, class Prime, class Source>
__device__ bool kl_row_sums(const Prime& prime, const Source& row, const KlArgs& a, KlTeam& team,
                            uint32_t* ticket, KlShared& sh) {
  constexpr int kCount = KlParts<op>::kCount;
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const int64_t span = kl_span(a.v);
  if (threadIdx.x == 0) {
    sh.state = KlState{};
    sh.state.exact = a.v <= kPrime;
  }
  const auto entries_to = [&](int64_t spans) { return spans * span < a.v ? spans * span : a.v; };
  kl_block_maxima<op>(prime, a.k, 0, a.v < kPrime ? a.v : kPrime, sh);
  if (sh.own_max[0] == -kl_infinity() || sh.own_max[1] == -kl_infinity()) {
    // rare; a block of a split row or a cluster reads it all then, as the others do
    kl_block_maxima<op>(prime, a.k, 0, a.v, sh);
    if (threadIdx.x == 0) sh.state.exact = true;
  }
  if (threadIdx.x == 0) kl_new_frame(sh, sh.own_max[0], sh.own_max[1]);
  bool shared = ticket != nullptr;
  for (int sweeps = 0; sweeps < kMostSweeps; ++sweeps) {
    __syncthreads();
    const KlDeviceFrame frame(a.k, sh.state.r);
    const bool careful = sh.state.careful || (KlParts<op>::kPair ? !frame.fast : a.k.cap > 0);
    for (int i = team.begin + warp; i < team.end; i += kKlWarps)
      kl_span_sums<op>(row, frame, careful, i * span, entries_to(i + 1),
                       team.own + int64_t(i - team.base) * kCount);
    if (shared) {
      if (!kl_last_to_arrive(ticket, a.splits, sh)) return false;
      team.begin = 0, team.end = team.spans;
      shared = false;
    }
    kl_team_sync<kCluster>();
    if (warp == 0) {
      KlSums t;
      for (int i = lane; i < team.spans; i += 32)
        kl_add_part<op>(kl_part<kCluster>(team, i, kCount), t);
      kl_total<op>(t);
      if (lane == 0) sh.next = kl_decide<op>(a.k, t, sh.state);
    }
    // the cluster's blocks decide alike; none writes parts anew before all have read them
    kl_team_sync<kCluster>();
    if (sh.next == KlNext::kDone) return true;
    if (sh.next == KlNext::kMaxima) {
      kl_block_maxima<op>(row, a.k, team.begin * span, entries_to(team.end), sh);
      kl_exact_frame<kCluster>(team, sh);
    }
  }
  return true;
}

}  // namespace fasttax
