#pragma once

#include <cstdint>
#include <cstring>

#include "macros.h"

// The two codes that EWC's operands are stored in, by blocks of 256 elements.
//   u8log, of fishers: 2^(lo + step (code - 1)), code 0 is 0; (lo, step) of each block.
//   split, of anchors: 256 bfloat16 `hi`, then 256 int8 `lo`; hi + lo * ulp(hi) / 254.
namespace fasttax {

// elements that share a u8log range or lie together in a split anchor
constexpr int64_t kEwcBlock = 256;
constexpr int64_t kSplitBytes = 3 * kEwcBlock;  // of such a block
// ulp(2^e) / 254 over 2^e: 127 steps reach half an ulp
constexpr float kSplitStep = 0x1p-7f / 254;

FASTTAX_HD float split_unit(float hi) {  // ulp(hi) / 254
  uint32_t bits;
  memcpy(&bits, &hi, sizeof bits);
  bits &= 0x7f800000u;
  float power;
  memcpy(&power, &bits, sizeof power);
  return power * kSplitStep;
}

FASTTAX_HD float u8log_log2(uint32_t code, float lo, float step) {  // of the code's value; code > 0
  return lo + step * float(int(code) - 1);
}

}  // namespace fasttax
