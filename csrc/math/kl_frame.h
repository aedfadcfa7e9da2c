#pragma once

#include "kl_kinds.h"

namespace fasttax {

// The numbers of a call of an op over logits, as its kernels read them.
struct KlParams {
  KlKind kind;
  bool plain;     // same scale on both rows, no softcap, no inf mask: the fast frame
  bool inf_mask;  // drop entries where either row is -inf
  float beta;
  float scale, ref_scale;          // inside the softcap
  float cap, ref_cap;              // 0: none
  float row_scale, ref_row_scale;  // from frame units to tempered logits
  float row_slope, ref_row_slope;  // d tempered / d raw (times 1 - tanh^2 under a softcap)
};

}  // namespace fasttax
