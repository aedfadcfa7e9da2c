#pragma once

#include <cmath>

#include "macros.h"

// The functions of one double, as a backend gives them to the formulas.
namespace fasttax {

struct DoubleMath {
  using S = double;
  using R = double;
  static constexpr bool kVector = false;
  FASTTAX_HD static double exp(double a) { return std::exp(a); }
  FASTTAX_HD static double log(double a) { return std::log(a); }
  FASTTAX_HD static double log1p(double a) { return std::log1p(a); }
  FASTTAX_HD static double tanh(double a) { return std::tanh(a); }
  FASTTAX_HD static double abs(double a) { return std::fabs(a); }
  FASTTAX_HD static double fma(double a, double b, double c) { return a * b + c; }
  FASTTAX_HD static double product(double a, double b) { return a * b; }
  FASTTAX_HD static double splat(double a) { return a; }
  FASTTAX_HD static double only(bool b, double a) { return b ? a : 0.0; }
  FASTTAX_HD static double if_lt(double a, double b, double yes, double no) {
    return a < b ? yes : no;
  }
  FASTTAX_HD static double if_le(double a, double b, double yes, double no) {
    return a <= b ? yes : no;
  }
  FASTTAX_HD static bool all_le(double a, double b) { return a <= b; }
  FASTTAX_HD static double total(double a) { return a; }
};

}  // namespace fasttax
