#pragma once

// token_kl and token_stats over rows of logits. Bytes a cell: forward reads both rows (kinds of two
// sweeps: twice); gradient reads them and writes one or two; kl_both does forward and the policy's
// gradient with the row pair on chip (2 reads, 1 write) where shared memory holds it, and in two
// sweeps, the second backwards into what the first left in L2, where not. In flight: 128 bytes a
// thread (float32: 256) while sums are taken, 64 in gradients; with 2 and 3 blocks of 256 on an SM
// that is 48 KB and more, where an H100 needs about 40. Deterministic and batch invariant: see
// kl_sums.cuh. No host sync, and no atomics but a ticket a split row.

#include "../math/double_math.h"
#include "kl_row.cuh"
#include "kl_slope.cuh"

namespace fasttax {

constexpr int kTile = kSpan * kKlWarps;  // entries of a gradient's block

// --- launch geometry, shared by the launcher and the tests

__host__ __device__ inline size_t kl_shared_bytes(KlOp op, int spans) {
  return kl_header() + size_t(spans) * size_t(kl_parts_count(op)) * sizeof(float);
}

// Blocks a row: one, unless that would leave the device half empty. The sums are the same bits
// either way.
inline int kl_splits(int64_t n, int64_t v, int multiprocessors) {
  const int64_t rounds = (kl_spans(v) + kKlWarps - 1) / kKlWarps,
                wanted = 2 * int64_t(multiprocessors);
  if (n <= 0 || n >= wanted) return 1;
  return int((wanted + n - 1) / n < rounds ? (wanted + n - 1) / n : rounds);
}

struct KlResidence {  // how a row pair is held on chip
  int cluster = 0;    // blocks a row, a power of two; 0: it does not fit
  int each = 0;       // spans a block
  size_t bytes = 0;   // of shared memory a block
};

// pair_item: bytes of an entry of both rows. The smallest cluster that leaves room for a second
// block on the SM, so that one computes while the other loads; else the smallest that fits.
inline KlResidence kl_residence(KlOp op, int64_t v, int pair_item, int largest_cluster,
                                size_t block_limit, size_t sm_limit) {
  const int spans = kl_spans(v);
  KlResidence found;
  if (kl_span(v) > kSpan) return found;  // longer than any cluster's memory
  for (int cluster = 1; cluster <= largest_cluster; cluster *= 2) {
    const int each = (spans + cluster - 1) / cluster;
    const size_t bytes =
        kl_shared_bytes(op, each) + 16 + size_t(each) * size_t(kl_span(v)) * size_t(pair_item);
    // every block has something to hold
    if (bytes > block_limit || (cluster - 1) * each >= spans) continue;
    const bool two = 2 * (bytes + 1024) <= sm_limit;
    if (two || !found.cluster) found = {cluster, each, bytes};
    if (two) break;
  }
  return found;
}

// --- forward

// What a row's state gives: values and what backward needs of it.
template <KlOp op, class Source>
__device__ void kl_finish(const Source& rows, const KlArgs& a, int64_t row, const KlState& state) {
  // NaN passes through these two
  const auto at_least_zero = [](double v) { return v < 0 ? 0.0f : float(v); };
  if constexpr (kl_is_kind(op)) {
    a.values[row] = at_least_zero(state.value);
    if (a.saved) reinterpret_cast<KlRow*>(a.saved)[row] = state.r;
  } else {
    const auto at_most_zero = [](double v) { return v > 0 ? 0.0f : float(v); };
    constexpr bool pair = kl_has_ref(op);
    StatsRow saved{state.r, float(state.mean), 0, 0};
    float out[kTokenStats] = {};
    const int64_t id = a.ids ? a.ids[row] : -1;
    const double log_mass = log(state.mass);
    if (id < 0 || id >= a.v) {  // to look for such ids on the host would be a sync
      if (a.ids) out[kLogp] = out[kRefLogp] = __builtin_nanf("");
    } else {  // by the sweep's own arithmetic: what it rounds off the id's entry is in the sums too
      float ax, ay, d;
      const KlDeviceFrame frame(a, state.r);
      float x = rows.x.one(id), y = pair ? rows.y.one(id) : x;
      frame.careful(x, y, ax, ay, d);
      // equal rows get equal bits
      const bool same = state.forwards.value == 0 && state.forwards.log_ratio == 0;
      out[kLogp] = at_most_zero(double(ax) - log_mass);
      if (pair) out[kRefLogp] = at_most_zero(double(ay) - (same ? log_mass : log(state.y)));
    }
    saved.logp = out[kLogp];
    saved.ref_logp = out[kRefLogp];
    out[kEntropy] =
        state.mean == state.mean ? at_least_zero(log_mass - state.mean) : float(state.mean);
    out[kLse] = float(double(state.r.mx) * double(a.k.row_scale) + log_mass);
    out[kKlPolicyRef] = at_least_zero(state.forwards.value);
    out[kKlRefPolicy] = at_least_zero(state.backwards.value);
#pragma unroll
    for (int s = 0; s < kTokenStats; ++s) a.values[s * a.n + row] = out[s];
    reinterpret_cast<StatsRow*>(a.saved)[row] = saved;
  }
}

template <KlOp op>
__device__ inline void kl_finish_masked(const KlArgs& a, int64_t row) {
  constexpr bool stats = !kl_is_kind(op);
  for (int s = 0; s < (stats ? int(kTokenStats) : 1); ++s) a.values[s * a.n + row] = 0;
  if (!a.saved) return;
  if (stats) reinterpret_cast<StatsRow*>(a.saved)[row] = StatsRow{};
  else reinterpret_cast<KlRow*>(a.saved)[row] = KlRow{};
}

__device__ __forceinline__ KlTeam kl_whole_team(const KlArgs& a, float* own, int64_t row) {
  return {own, a.spans, 0, a.spans, 0, 0, 1, a.spans, int(row)};
}

// Grid: n rows times `splits` blocks, a row's blocks beside each other.
template <class T, KlOp op>
__global__ void __launch_bounds__(kKlThreads, kl_has_ref(op) ? 2 : 3)
    kl_forward_kernel(const __grid_constant__ KlArgs a) {
  FASTTAX_DYNAMIC_SHARED(memory);
  KlShared& sh = *reinterpret_cast<KlShared*>(memory);
  const int64_t row = blockIdx.x / unsigned(a.splits);
  const int share = int(blockIdx.x % unsigned(a.splits));
  if (a.mask && !a.mask[row]) {
    if (threadIdx.x == 0 && share == 0) kl_finish_masked<op>(a, row);
    return;
  }
  const KlGlobal<T, true> rows(a, row, kl_has_ref(op));
  KlTeam team = kl_whole_team(a, reinterpret_cast<float*>(memory + kl_header()), row);
  if (a.splits > 1) {  // whole rounds of the block's warps, as even as they go
    const int rounds = (team.spans + kKlWarps - 1) / kKlWarps;
    team.own = a.parts + row * team.spans * KlParts<op>::kCount;
    team.begin = int(int64_t(rounds) * share / a.splits) * kKlWarps;
    team.end = int(int64_t(rounds) * (share + 1) / a.splits) * kKlWarps;
    team.end = team.end < team.spans ? team.end : team.spans;
  }
  constexpr bool kShared = sizeof(T) == 4;  // whose entries leave no registers for it
  if (kShared && threadIdx.x == 0) sh.team = team;
  if (kShared) __syncthreads();
  const KlTeam& own = kShared ? sh.team : team;
  if (!kl_row_sums<op, false>(rows, a, own, sh)) return;
  if (threadIdx.x == 0) kl_finish<op>(rows, a, own.row, sh.state);
}

// --- the second sweep of kinds that need p, q and u

// All lanes' parts in every lane, always in the same order.
template <class F, class M>
__device__ __forceinline__ void kl_warp_join(KlThree<typename M::S>& all) {
#pragma unroll
  for (int bit = 16; bit > 0; bit /= 2) {
    KlThree<typename M::S> other;
    other.value = __shfl_xor_sync(kWholeWarp, all.value, bit);
    other.first = __shfl_xor_sync(kWholeWarp, all.first, bit);
    other.second = __shfl_xor_sync(kWholeWarp, all.second, bit);
    F::template join<M>(all, other);
  }
}

template <KlOp op, class Source>
__device__ void kl_span_second(const Source& rows, const KlDeviceFrame& frame, int64_t begin,
                               int64_t end, float* part) {
  constexpr KlKind kind = kl_kind(op);
  using T = typename Source::Entry;
  constexpr int n = KlVector<T>::kEntries, kRound = 32 * n;
  const int lane = int(threadIdx.x) % 32;
  using F = KlFormula<kind>;
  const KlLogs<float> logs(frame.r);
  KlThree<float> all = F::template none<float>();
  const auto add = [&](float x, float y) {
    const KlRow& r = frame.r;
    float ax, ay, d;
    frame.careful(x, y, ax, ay, d);
    const KlEntry<float> entry{kl_exp2(ax * kLog2e) * r.inv_s, kl_exp2(ay * kLog2e) * r.inv_s_ref,
                               d - r.log_ratio, ax + logs.x, ay + logs.y};
    F::template join<DeviceMath>(all, F::template terms<DeviceMath>(entry, frame.k.beta));
  };
  int64_t i = begin;
#pragma unroll 1
  for (; i + kRound <= end; i += kRound) {
    float x[n], y[n];
    kl_widen(rows.x.at(i + lane * n), x);
    kl_widen(rows.y.at(i + lane * n), y);
#pragma unroll
    for (int j = 0; j < n; ++j) add(x[j], y[j]);
  }
#pragma unroll 1
  for (i += lane; i < end; i += 32) add(rows.x.one(i), rows.y.one(i));
  kl_warp_join<F, DeviceMath>(all);
  if (lane == 0) part[0] = all.value, part[1] = all.first, part[2] = all.second;
}

// jsd's: KL(q||m) is what the value leaves of KL(p||m).
template <KlWay kWay, class Source>
__device__ __forceinline__ JsdLanes kl_mix_lanes(const Source& rows, const KlArgs& a,
                                                 const KlDeviceFrame& frame, int64_t begin,
                                                 int64_t end) {
  using T = typename Source::Entry;
  constexpr int n = KlVector<T>::kEntries, kRound = 32 * n;
  const int lane = int(threadIdx.x) % 32;
  [[maybe_unused]] const float to_u = frame.to_u();
  JsdLanes lanes;
  const auto any = [&](auto precise, float ax2, float ay2, float u) {
    lanes.any<decltype(precise)::value>(a.jsd, frame.k, kl_exp2(ax2) * frame.r.inv_s,
                                        kl_exp2(ay2) * frame.r.inv_s_ref, u);
  };
  const auto one = [&](float x, float y) {
    float ax, ay, d;
    frame.careful(x, y, ax, ay, d);
    any(std::true_type{}, ax * kLog2e, ay * kLog2e, d - frame.r.log_ratio);
  };
  int64_t i = begin;
  if (begin + kRound <= end) {  // the next vectors are under way while one is summed
    KlVector<T> x_bits = rows.x.at(i + lane * n), y_bits = rows.y.at(i + lane * n);
#pragma unroll 1
    for (; i + kRound <= end; i += kRound) {
      float x[n], y[n];
      [[maybe_unused]] float u[n], widest = 0;
      kl_widen(x_bits, x);
      kl_widen(y_bits, y);
      if (i + 2 * kRound <= end) {
        x_bits = rows.x.at(i + kRound + lane * n);
        y_bits = rows.y.at(i + kRound + lane * n);
      }
      if constexpr (kWay == KlWay::kCareful) {
#pragma unroll
        for (int j = 0; j < n; ++j) one(x[j], y[j]);
      } else {
        if (kWay == KlWay::kCapped) KlCap{a.cap}.all(x, y);
#pragma unroll
        for (int j = 0; j < n; ++j) {
          u[j] = frame.gap<kWay>(x[j], y[j], to_u);
          widest = kl_max_or_nan(widest, fabsf(u[j]));
        }
        if (widest <= kJsdUnit) {
#pragma unroll
          for (int j = 0; j < n; ++j) lanes.near(a.jsd, kl_exp2(frame.ax2<kWay>(x[j])), u[j]);
        } else {
#pragma unroll
          for (int j = 0; j < n; ++j) {
            const float ax2 = frame.ax2<kWay>(x[j]);
            any(std::false_type{}, ax2, frame.ay2<kWay>(ax2, y[j]), u[j]);
          }
        }
      }
    }
  }
#pragma unroll 1
  for (i += lane; i < end; i += 32) one(rows.x.one(i), rows.y.one(i));
  return lanes;
}

template <class Source>
__device__ void kl_span_mix(const Source& rows, const KlArgs& a, const KlDeviceFrame& frame,
                            int64_t begin, int64_t end, float* part) {
  const auto by = [&](auto way) {
    return kl_mix_lanes<decltype(way)::value>(rows, a, frame, begin, end);
  };
  JsdLanes lanes;
  switch (frame.way()) {
    case KlWay::kFast: lanes = by(KlWayIs<KlWay::kFast>()); break;
    case KlWay::kCapped: lanes = by(KlWayIs<KlWay::kCapped>()); break;
    default: lanes = by(KlWayIs<KlWay::kCareful>());
  }
  float sums[2] = {fmaf(lanes.value, frame.r.inv_s, lanes.far_value),
                   fmaf(lanes.log_m, frame.r.inv_s, lanes.far_log_m)};
  const float sum = kl_warp_sums<2>(sums);
  const int lane = int(threadIdx.x) % 32;
  if (lane % 16 == 0) part[lane / 16] = lane == 0 ? sum : -sum;
  if (lane == 1) part[2] = 0;
}

// From sh.state with the row's sums to its value, in one block's team or a cluster's; as
// kl_row_sums.
template <KlOp op, bool kCluster, class Source>
__device__ bool kl_row_second(const Source& rows, const KlArgs& a, KlTeam& team, uint32_t* ticket,
                              KlShared& sh) {
  constexpr KlKind kind = kl_kind(op);
  if (KlFormula<kind>::is_zero(a.k.beta))
    return ticket == nullptr || kl_last_to_arrive(ticket, a.splits, sh);  // 0, or NaN: known
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const int64_t span = a.span;
  const KlDeviceFrame frame(a, sh.state.r);
  for (int i = team.begin + warp; i < team.end; i += kKlWarps) {
    const int64_t begin = i * span, end = begin + span < a.v ? begin + span : a.v;
    float* const part = team.own + int64_t(i - team.base) * kSecondParts;
    if constexpr (kl_op_jsd(op)) kl_span_mix(rows, a, frame, begin, end, part);
    else kl_span_second<op>(rows, frame, begin, end, part);
  }
  if (ticket && !kl_last_to_arrive(ticket, a.splits, sh)) return false;
  kl_team_sync<kCluster>();
  if (warp == 0) {
    using F = KlFormula<kind>;
    KlThree<double> total = F::template none<double>();
    for (int i = lane; i < team.spans; i += 32) {
      const volatile float* part = kl_part<kCluster>(team, i, kSecondParts);
      F::template join<DoubleMath>(total, {double(part[0]), double(part[1]), double(part[2])});
    }
    kl_warp_join<F, DoubleMath>(total);
    if (kl_op_jsd(op)) {
      const double beta = double(a.k.beta);
      total.second = (total.value - (1 - beta) * total.first) / beta;
    }
    if (lane == 0) {
      const KlThree<double> out = F::finish(total, a.k.beta);
      sh.state.value = out.value;
      sh.state.r.mean_gap = float(out.first);
      sh.state.r.ref_center = float(out.second);
    }
  }
  kl_team_sync<kCluster>();
  return true;
}

// After kl_forward_kernel<T, op>, whose `saved` it reads and completes.
template <class T, KlOp op>
__global__ void __launch_bounds__(kKlThreads, 2)
    kl_second_kernel(const __grid_constant__ KlArgs a) {
  FASTTAX_DYNAMIC_SHARED(memory);
  KlShared& sh = *reinterpret_cast<KlShared*>(memory);
  const int64_t row = blockIdx.x / unsigned(a.splits);
  const int share = int(blockIdx.x % unsigned(a.splits));
  if (a.mask && !a.mask[row]) return;
  if (threadIdx.x == 0) {
    sh.state = KlState{};
    sh.state.r = reinterpret_cast<const KlRow*>(a.saved)[row];
    sh.state.value = a.values[row];
  }
  __syncthreads();
  const KlGlobal<T> rows(a, row, true);
  KlTeam team = kl_whole_team(a, reinterpret_cast<float*>(memory + kl_header()), row);
  if (a.splits > 1) {
    team.own = a.parts + row * team.spans * kSecondParts;
    team.begin = int(int64_t(team.spans) * share / a.splits);
    team.end = int(int64_t(team.spans) * (share + 1) / a.splits);
  }
  if (!kl_row_second<op, false>(rows, a, team, a.splits > 1 ? a.tickets + row : nullptr, sh))
    return;
  if (threadIdx.x == 0) kl_finish<op>(rows, a, row, sh.state);
}

// --- gradient

template <KlOp op>
__device__ __forceinline__ StatsRow kl_saved(const KlArgs& a, int64_t row) {
  if (!kl_is_kind(op)) return reinterpret_cast<const StatsRow*>(a.saved)[row];
  return StatsRow{reinterpret_cast<const KlRow*>(a.saved)[row], 0, 0, 0};
}

// How many blocks share a multiprocessor: as many as leave registers enough.
template <class T, KlOp op, bool kBoth>
constexpr int kl_gradient_blocks() {
  if (!kl_has_ref(op)) return 4;
  return kBoth && sizeof(T) == 4 ? 2 : 3;
}

// Grid: (n rows, tiles of kTile entries). kBoth: the reference's gradient too; dx may then be null.
template <class T, KlOp op, bool kBoth>
__global__ void __launch_bounds__(kKlThreads, kl_gradient_blocks<T, op, kBoth>())
    kl_gradient_kernel(const __grid_constant__ KlArgs a) {
  constexpr bool stats = !kl_is_kind(op);
  const int64_t row = blockIdx.x, first = int64_t(blockIdx.y) * kTile,
                begin = first + int(threadIdx.x / 32) * kSpan;
  const int64_t end = begin + kSpan < a.v ? begin + kSpan : a.v;
  const KlTarget<T> dx(a.dx, a.x_type, row), dy(kBoth ? a.dy : KlLayout{}, a.y_type, row);
  bool live = !a.mask || a.mask[row];
  if (stats && live) {
    live = false;
    for (int s = 0; s < kTokenStats; ++s) live |= a.upstream[s * a.n + row] != 0;
  }
  if (!live) {
    if (begin < end) kl_span_zero(begin, end, dx, dy);
    return;
  }
  const KlGlobal<T> rows(a, row, kl_has_ref(op));
  const KlSlope<op, kBoth> slope(a, kl_saved<op>(a, row), a.upstream + row, a.n);
  if (begin < end) kl_span_gradient(rows, slope, begin, end, dx, dy);
  if constexpr (stats) {
    const int64_t id = a.ids ? a.ids[row] : -1;
    if (id < first || id >= first + kTile || id >= a.v) return;
    __syncthreads();  // whoever wrote this entry has done so
    if (threadIdx.x == 0) {
      float for_x, for_y;
      slope.any(rows.x.one(id), kl_has_ref(op) ? rows.y.one(id) : rows.x.one(id), for_x, for_y,
                true);
      dx.one(id, for_x);
      dy.one(id, for_y);
    }
  }
}

// --- forward and the policy's gradient

// Both rows are of T: kernels that hold all that both sweeps need have no registers to look at
// types while they run. Halves have theirs in T.
constexpr FloatType kKlOwn = FloatType::kFloat;

// again_of(): where the rows are read from for the last time.
template <KlOp op, bool kCluster, class Source, class Again>
__device__ void kl_both_row(const Source& rows, const Again& again_of, const KlArgs& a,
                            KlTeam& team, KlShared& sh) {
  using T = typename Source::Entry;
  kl_row_sums<op, kCluster>(rows, a, team, sh);
  if constexpr (kl_op_two_sweeps(op)) kl_row_second<op, kCluster>(rows, a, team, nullptr, sh);
  __syncthreads();
  const int64_t row = team.row;
  const auto again = again_of();
  if (threadIdx.x == 0 && team.rank == 0) kl_finish<op>(again, a, row, sh.state);
  const int64_t span = a.span;
  const KlSlope<op, false> slope(a, StatsRow{sh.state.r, 0, 0, 0}, a.upstream + row, a.n);
  const KlTarget<T> dx(a.dx, kKlOwn, row), dy({}, kKlOwn, row);
  // backwards: what was read last is nearest
  for (int i = team.end - 1 - int(threadIdx.x / 32); i >= team.begin; i -= kKlWarps)
    kl_span_gradient(again, slope, i * span, (i + 1) * span < a.v ? (i + 1) * span : a.v, dx, dy);
}

// Two sweeps over rows that do not fit on chip. Grid: n.
template <class T, KlOp op>
__global__ void __launch_bounds__(kKlThreads, 2)
    kl_two_sweeps_kernel(const __grid_constant__ KlArgs a) {
  FASTTAX_DYNAMIC_SHARED(memory);
  const int64_t row = blockIdx.x;
  KlTeam team = kl_whole_team(a, reinterpret_cast<float*>(memory + kl_header()), row);
  if (a.mask && !a.mask[row]) {
    const KlTarget<T> dx(a.dx, kKlOwn, row), dy({}, kKlOwn, row);
    if (threadIdx.x == 0) kl_finish_masked<op>(a, row);
    const int64_t span = a.span;
    for (int i = int(threadIdx.x / 32); i < team.spans; i += kKlWarps)
      kl_span_zero(i * span, (i + 1) * span < a.v ? (i + 1) * span : a.v, dx, dy);
    return;
  }
  KlShared& sh = *reinterpret_cast<KlShared*>(memory);
  constexpr bool kShared = sizeof(T) == 4;  // whose entries leave no registers for it
  if (kShared && threadIdx.x == 0) sh.team = team;
  if (kShared) __syncthreads();
  kl_both_row<op, false>(
      KlGlobal<T, true>(a, row, kKlOwn), [&] { return KlGlobal<T>(a, blockIdx.x, kKlOwn); }, a,
      kShared ? sh.team : team, sh);
}

// Entries [first, last) of a row, to shared memory.
template <class T>
__device__ __forceinline__ void kl_stage(const char* row, int64_t v, int64_t first, int64_t last,
                                         char* to) {
  constexpr int n = KlVector<T>::kEntries;
  const KlBits<T> bits(row, v);
  const int64_t vectors = (last - first) / n;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < vectors; i += kKlThreads)
    reinterpret_cast<uint4*>(to)[i] = bits.at(first + i * n).bits;
  for (int64_t i = vectors * n + threadIdx.x; i < last - first; i += kKlThreads)
    reinterpret_cast<T*>(to)[i] = bits.row[first + i];
}

// A row pair held in the shared memory of a.cluster blocks, a slice of whole spans each: logits are
// read once. Grid: n * a.cluster.
template <class T, KlOp op>
__global__ void __launch_bounds__(kKlThreads, 2)
    kl_resident_kernel(const __grid_constant__ KlArgs a) {
  FASTTAX_DYNAMIC_SHARED(memory);
  KlShared& sh = *reinterpret_cast<KlShared*>(memory);
  const int64_t row = blockIdx.x / unsigned(a.cluster), span = a.span;
  KlTeam team = kl_whole_team(a, reinterpret_cast<float*>(memory + kl_header()), row);
  team.size = a.cluster;
  team.rank = int(blockIdx.x % unsigned(a.cluster));
  team.each = (team.spans + team.size - 1) / team.size;
  team.base = team.begin = team.rank * team.each;
  team.end = team.begin + team.each < team.spans ? team.begin + team.each : team.spans;
  const int64_t first = team.begin * span, last = team.end * span < a.v ? team.end * span : a.v;
  if (a.mask && !a.mask[row]) {
    const KlTarget<T> dx(a.dx, kKlOwn, row), dy({}, kKlOwn, row);
    if (threadIdx.x == 0 && team.rank == 0) kl_finish_masked<op>(a, row);
    for (int i = team.begin + int(threadIdx.x / 32); i < team.end; i += kKlWarps)
      kl_span_zero(i * span, (i + 1) * span < a.v ? (i + 1) * span : a.v, dx, dy);
    return;
  }
  char* const slices = reinterpret_cast<char*>(memory);
  char* const x = slices + (kl_shared_bytes(op, team.each) + 15) / 16 * 16;
  char* const y = x + team.each * span * int64_t(sizeof(T));
  kl_stage<T>(kl_row_at(a.x, row), a.v, first, last, x);
  kl_stage<T>(kl_row_at(a.y, row), a.v, first, last, y);
  if (threadIdx.x == 0) sh.team = team;
  __syncthreads();
  const KlStaged<T> staged(x, y, first);
  kl_both_row<op, true>(staged, [&] { return staged; }, a, sh.team, sh);
  kl_cluster_sync();  // no block may leave while another reads its parts
}

}  // namespace fasttax
