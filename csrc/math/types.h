#pragma once

namespace fasttax {

// The entries of an array of floating point numbers: logits, hidden states, a head's weights,
// gradient rows.
enum class FloatType { kFloat, kBFloat16, kFloat16, kDouble };

}  // namespace fasttax
