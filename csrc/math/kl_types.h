#pragma once

#include <cstdint>
#include <type_traits>

#include "kl_kinds.h"

// What the kernels of token_kl and token_stats are told, and what they leave of a row. No torch.
namespace fasttax {

// An op's options, as it takes them.
struct KlOptions {
  int64_t kind;
  double beta, scale, ref_scale, softcap, ref_softcap, inv_temperature, ref_inv_temperature;
  bool inf_mask;
};

// The numbers of a call, as the kernels read them.
template <class R>
struct KlParamsOf {
  KlKind kind;
  bool plain;     // same scale on both rows, no softcap, no inf mask: the fast frame
  bool inf_mask;  // drop entries where either row is -inf
  // one scale, softcap and temperature on both rows: their capped difference keeps digits (cap())
  bool joint_cap;
  R beta;
  R cap, ref_cap;              // 0: none
  R inside, ref_inside;        // scale / cap, where there is one
  R row_scale, ref_row_scale;  // from frame units to tempered logits
  R row_slope, ref_row_slope;  // d tempered / d raw (times 1 - tanh^2 under a softcap)
  R beta_rest;                 // 1 - beta, which a beta near 1 in R would not give
};
using KlParams = KlParamsOf<float>;

template <class R>
KlParamsOf<R> kl_params(const KlOptions& x) {
  KlParamsOf<R> k;
  k.kind = KlKind(x.kind);
  k.inf_mask = x.inf_mask;
  k.beta = R(x.beta);
  k.beta_rest = R(1 - x.beta);
  k.cap = R(x.softcap);
  k.ref_cap = R(x.ref_softcap);
  k.inside = k.cap > 0 ? R(x.scale / x.softcap) : R(0);
  k.ref_inside = k.ref_cap > 0 ? R(x.ref_scale / x.ref_softcap) : R(0);
  k.row_slope = R(x.scale * x.inv_temperature);
  k.ref_row_slope = R(x.ref_scale * x.ref_inv_temperature);
  k.row_scale = x.softcap > 0 ? R(x.inv_temperature) : k.row_slope;
  k.ref_row_scale = x.ref_softcap > 0 ? R(x.ref_inv_temperature) : k.ref_row_slope;
  k.joint_cap = !std::is_same<R, double>::value && k.cap > 0 && k.cap == k.ref_cap &&
                k.inside == k.ref_inside && k.row_scale == k.ref_row_scale;
  k.plain = !k.inf_mask && k.cap == 0 && k.ref_cap == 0 && k.row_scale == k.ref_row_scale;
  return k;
}

// What a forward leaves of a row for its backward: the op's second output, 8 numbers a token.
template <class R>
struct KlRowOf {
  R mx, my;     // frames, in the units of the raw logits (softcap: of the capped ones)
  R unused;     // 0: Triton's rows have a number of theirs here
  R inv_s;      // 1 / S
  R log_ratio;  // L = log(S_x / S_y); u_j = log p_j - log q_j = d_j - L
  // policy_ref and token_stats: E_p[d].  ref_policy: E_q[d].  jsd: KL(p||m).  renyi: the log of the
  // largest weight
  R mean_gap;
  // jsd: KL(q||m).  renyi: the log of the weights over it.  token_stats: E_q[d]
  R ref_center;
  R inv_s_ref;  // 1 / (S + G)
};
using KlRow = KlRowOf<float>;
constexpr int kKlSaved = 8;

// What token_stats gives, in this order.
enum TokenStat { kLogp, kRefLogp, kEntropy, kLse, kKlPolicyRef, kKlRefPolicy, kTokenStats };

template <class R>
struct StatsRowOf {  // what a forward leaves of a row for its backward: 11 numbers a token
  KlRowOf<R> kl;
  R mean;            // E_p[ax]
  R logp, ref_logp;  // of the id
};
using StatsRow = StatsRowOf<float>;
constexpr int kStatsSaved = 11;

}  // namespace fasttax
