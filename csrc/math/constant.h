#if !defined(FASTTAX_MATH_CONSTANT)  // read for each instruction set: macros.h
#define FASTTAX_MATH_CONSTANT

#include <type_traits>

#include "macros.h"

namespace fasttax {
namespace FASTTAX_MATH_NS {

// A literal as S: as the scalar, or in every lane of the vector.
template <class S>
FASTTAX_HD S constant(double a) {
  if constexpr (std::is_floating_point<S>::value) return S(a);
  else return float(a) - S{};
}

// weight * value, where a weight of 0 makes 0 of an infinite value too.
template <class S>
FASTTAX_HD S times(S weight, S value) {
  return weight == 0 ? constant<S>(0) : weight * value;
}

}  // namespace FASTTAX_MATH_NS
}  // namespace fasttax
#endif
