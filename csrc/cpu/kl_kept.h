#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "../math/kl_types.h"

namespace fasttax {

constexpr int64_t kLeastChunk = 512;  // of the instruction set with the shortest vectors

// What a task keeps of a row from one sweep to the next, each a row of floats or null: the capped
// logits; and, where the policy's gradient is all that is wanted and more than an exponential, what
// that is a product of. Two rows of 49152 entries are 393 KB of L2, and reading them there costs a
// tenth of making them again.
struct KlKept {
  float *x = nullptr, *y = nullptr;
  // An entry's part of the policy's gradient is weight * (value + a number of the row):
  //   jsd         p times the softcap's slope      log(m/p)
  //   policy_ref  e^ax times the softcap's slope   d, both in their chunk's frame
  float *weight = nullptr, *value = nullptr;
  KlRow* frames = nullptr;  // policy_ref: each chunk's
};

// The memory for it: a task's own, for one row after the other.
class KlKeptRows {
 public:
  // Whether the same call writes gradients, and whether that is the policy's alone.
  KlKeptRows(const KlParams& k, int64_t V, bool gradients, bool policy_alone) {
    const bool caps = k.cap > 0 || k.ref_cap > 0,
               by_chunks = policy_alone && caps && k.kind == KlKind::kPolicyRef,
               weighed = by_chunks || (policy_alone && k.kind == KlKind::kJsd),
               capped = caps && !by_chunks && (gradients || kl_two_sweeps(k.kind));
    if (!capped && !weighed) return;
    const int64_t length = (V + 2 * kLine - 1) / kLine * kLine;  // a vector may begin at V - 1
    memory_.reset(new float[size_t((capped ? 2 : 0) + (weighed ? 2 : 0)) * size_t(length) + kLine]);
    const uintptr_t unaligned = reinterpret_cast<uintptr_t>(memory_.get()) % (4 * kLine);
    float* next = memory_.get() + (unaligned ? kLine - int64_t(unaligned / 4) : 0);
    const auto take = [&] {
      next += length;
      return next - length;
    };
    if (capped) kept_.x = take();
    if (capped) kept_.y = take();
    if (weighed) kept_.weight = take();
    if (weighed) kept_.value = take();
    if (!by_chunks) return;
    frames_.resize(size_t(V / kLeastChunk + 1));
    kept_.frames = frames_.data();
  }
  const KlKept& rows() const { return kept_; }

 private:
  static constexpr int64_t kLine = 16;  // floats of a cache line, and of the longest vector
  std::unique_ptr<float[]> memory_;
  std::vector<KlRow> frames_;
  KlKept kept_;
};

}  // namespace fasttax
