#pragma once

// A policy and a reference of types of their own: the same bits, values and gradients, as from rows
// widened to float32 first, out of as many bytes as the rows have, wherever they lie.

#include "kl_run.h"

namespace {

template <class T>
Matrix<float> widened(const Matrix<T>& from) {
  Matrix<float> to(from.n, from.v, from.v, 0);
  for (int64_t r = 0; r < from.n; ++r)
    for (int64_t i = 0; i < from.v; ++i) to.set(r, i, from.get(r, i));
  return to;
}

template <class T>
bool rounded(const Matrix<T>& own, const Matrix<float>& wide) {
  bool same = true;
  for (int64_t r = 0; r < own.n; ++r)
    for (int64_t i = 0; i < own.v; ++i)
      same &= own.get(r, i) == double(kl_widen(kl_narrow<T>(float(wide.get(r, i)))));
  return same;
}

// shift: entries that both rows lie off an address of 16
template <class Tx, class Ty, KlOp op>
bool check_own_types(int64_t v, int shift, double cap) {
  constexpr int64_t n = 3;
  std::mt19937 random(3);
  std::normal_distribution<double> draw;
  Matrix<Tx> x(n, v, v + shift, shift);
  Matrix<Ty> y(n, v, v + 2 * shift, shift);
  for (int64_t r = 0; r < n; ++r)
    for (int64_t i = 0; i < v; ++i) {
      const double at = 2 * draw(random);
      x.set(r, i, at), y.set(r, i, at + 0.1 * draw(random));
    }
  Options options;
  options.cap = options.ref_cap = cap;
  std::vector<int64_t> ids(size_t(n), v / 2);
  std::vector<float> upstream(size_t(Run<Tx, op, Ty>::kValues * n), 0.7f);
  const int64_t* const of = kl_is_kind(op) ? nullptr : ids.data();
  const Matrix<float> wide_x = widened(x), wide_y = widened(y);
  Run<Tx, op, Ty> own(x, y, options, nullptr, of, upstream.data(), shift);
  Run<float, op> wide(wide_x, wide_y, options, nullptr, of, upstream.data());
  bool ok = true;
  size_t& streamed = simt::machine().streamed;
  wide.forward(1);
  wide.template gradient<true>();
  streamed = 0;
  own.forward(1);
  const size_t bytes = size_t(n * v) * (sizeof(Tx) + sizeof(Ty)) * (kl_op_two_sweeps(op) ? 2 : 1);
  // of rows that are not aligned, 16 bytes more a span
  if (shift == 0 && v % kSpan == 0 && streamed != bytes) {
    printf("own types, op %d: %zu bytes read of %zu\n", int(op), streamed, bytes);
    ok = false;
  }
  own.template gradient<true>();
  if (!(own.values == wide.values && rounded(own.dx, wide.dx) && rounded(own.dy, wide.dy))) {
    printf("own types, op %d, %zu and %zu bytes, V %lld, shift %d, cap %g: other bits\n", int(op),
           sizeof(Tx), sizeof(Ty), static_cast<long long>(v), shift, cap);
    ok = false;
  }
  return ok;
}

template <class Tx, class Ty>
bool check_own_types() {
  bool ok = true;
  for (const int64_t v : {3, 2048, 2051})
    for (const int shift : {0, 1, 2, 3})
      ok &= check_own_types<Tx, Ty, kl_op(KlKind::kPolicyRef)>(v, shift, 0);
  return ok & check_own_types<Tx, Ty, kl_op(KlKind::kRefPolicy)>(2051, 1, 30) &
         check_own_types<Tx, Ty, kl_op(KlKind::kJsd)>(2051, 1, 30) &
         check_own_types<Tx, Ty, kl_op(KlKind::kPolicyRef)>(2051, 1, 30) &
         check_own_types<Tx, Ty, KlOp::kStats>(2051, 1, 0) &
         check_own_types<Tx, Ty, kl_op(KlKind::kRenyi)>(1030, 1, 0);
}

// Rows of float32 that no address of 16 begins are read by whole vectors, 16 bytes more a span.
[[maybe_unused]] bool check_float_off_alignment() {
  bool ok = true;
  for (const int shift : {1, 2, 3}) {
    constexpr int64_t n = 2, v = 4 * kSpan;
    Matrix<float> x(n, v, v + 4, shift), y(n, v, v + 4, shift);
    std::mt19937 random(3);
    std::normal_distribution<double> draw;
    for (int64_t r = 0; r < n; ++r)
      for (int64_t i = 0; i < v; ++i) x.set(r, i, draw(random)), y.set(r, i, draw(random));
    Run<float, kl_op(KlKind::kPolicyRef)> run(x, y, {}, nullptr, nullptr, nullptr);
    size_t& streamed = simt::machine().streamed;
    streamed = 0;
    run.forward(1);
    const size_t bytes = size_t(2 * n * v) * sizeof(float), most = bytes + bytes / kSpan * 4;
    if (streamed < bytes || streamed > most) {
      printf("off alignment: %zu bytes read of %zu\n", streamed, bytes);
      ok = false;
    }
  }
  return ok;
}

}  // namespace
