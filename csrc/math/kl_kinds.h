#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#include "macros.h"

// The divergences of token_kl, and what the kernels ask of one. A new kind is an entry here and its
// KlFormula in kl_slope.h: what sums, launches and checks goes by the functions below.
namespace fasttax {

enum class KlKind : int64_t { kPolicyRef = 0, kRefPolicy = 1, kJsd = 2, kRenyi = 3 };

constexpr int kKlKinds = 4;

// Which sums a sweep over a row pair takes (KlSums).
constexpr int kWantPolicyRef = 1, kWantRefPolicy = 2, kWantEntropy = 4;

// A kind is read from the sums of one sweep, or, of which there are none, from a second sweep over
// p, q and u = log p - log q, which need the first one's S and Y.
FASTTAX_HD constexpr int kl_wants(KlKind kind) {
  if (kind == KlKind::kPolicyRef) return kWantPolicyRef;
  return kind == KlKind::kRefPolicy ? kWantRefPolicy : 0;
}
FASTTAX_HD constexpr bool kl_two_sweeps(KlKind kind) { return kl_wants(kind) == 0; }

template <KlKind kind>
using KlKindIs = std::integral_constant<KlKind, kind>;

// f(KlKindIs<kind>()); a kind that there is not is taken for the last one.
template <int first = 0, class F>
decltype(auto) with_kind(KlKind kind, F&& f) {
  if constexpr (first + 1 < kKlKinds)
    if (int64_t(kind) != first) return with_kind<first + 1>(kind, std::forward<F>(f));
  return f(KlKindIs<KlKind(first)>());
}

}  // namespace fasttax
