#pragma once

// Rows of logits, and every kernel of csrc/cuda/kl.cuh launched over them on the SIMT machine.

#include "simt_cuda.h"

#include "cuda/kl.cuh"

#include <memory>

#include "kl_oracle.h"

namespace {

using namespace fasttax;

int launches = 0;

// n rows of v, `stride` apart, `shift` entries off the allocator's alignment; exactly as large as
// that, so that ASan sees one too many.
template <class T>
struct Matrix {
  int64_t n, v, stride;
  std::unique_ptr<char[]> memory;
  T* data;

  Matrix(int64_t rows, int64_t entries, int64_t step, int shift)
      : n(rows),
        v(entries),
        stride(step),
        memory(new char[size_t((shift + (n - 1) * stride + v) * int64_t(sizeof(T)))]),
        data(reinterpret_cast<T*>(memory.get()) + shift) {}
  double get(int64_t row, int64_t i) const { return double(kl_widen(data[row * stride + i])); }
  void set(int64_t row, int64_t i, double value) {
    data[row * stride + i] = kl_narrow<T>(float(value));
  }
  std::vector<double> row(int64_t r) const {
    std::vector<double> out(static_cast<size_t>(v));
    for (int64_t i = 0; i < v; ++i) out[size_t(i)] = get(r, i);
    return out;
  }
  KlLayout layout() const {  // as two dimensions where the rows are even in number
    const int64_t bytes = stride * int64_t(sizeof(T));
    if (n % 2) return {reinterpret_cast<char*>(data), {n}, {bytes}, 1};
    return {reinterpret_cast<char*>(data), {n / 2, 2}, {2 * bytes, bytes}, 2};
  }
};

template <class T>
constexpr FloatType type_of() {
  if (sizeof(T) == 4) return FloatType::kFloat;
  return std::is_same<T, __half>::value ? FloatType::kFloat16 : FloatType::kBFloat16;
}

// Tx, Ty: of the rows; T: of the kernels.
template <class Tx, KlOp op, class Ty = Tx>
struct Run {
  using T = std::conditional_t<std::is_same<Tx, Ty>::value, Tx, float>;
  static constexpr bool kStatsOp = !kl_is_kind(op);
  static constexpr int kValues = kStatsOp ? int(kTokenStats) : 1,
                       kSaved = int((kStatsOp ? sizeof(StatsRow) : sizeof(KlRow)) / sizeof(float));
  const Matrix<Tx>& x;
  const Matrix<Ty>& y;
  Matrix<Tx> dx;
  Matrix<Ty> dy;
  std::vector<float> values, saved, parts;
  std::vector<uint32_t> tickets;
  KlArgs a{};

  Run(const Matrix<Tx>& policy, const Matrix<Ty>& ref, const Options& options, const bool* mask,
      const int64_t* ids, const float* upstream, int shift = 0)
      : x(policy),
        y(ref),
        dx(x.n, x.v, x.v + shift, shift),
        dy(x.n, x.v, x.v + shift, shift),
        values(size_t(kValues * x.n), -7),
        saved(size_t(kSaved * x.n), -7) {
    a.x = x.layout(), a.y = y.layout(), a.dx = dx.layout(), a.dy = dy.layout();
    a.mask = mask, a.ids = ids, a.upstream = upstream, a.values = values.data(),
    a.saved = saved.data();
    a.jsd = JsdCurves(options.beta);
    a.cap = CapCurves(options.scale, options.cap);
    a.k = options.params(op);
    a.set_size(x.n, x.v);
    a.x_type = type_of<Tx>(), a.y_type = type_of<Ty>();
  }
  void forward(int splits) {
    a.splits = splits;
    parts.assign(size_t(splits > 1 ? a.n * kl_spans(a.v) * kl_parts_count(op) : 0), -7);
    tickets.assign(size_t(a.n), 0);
    a.parts = parts.data(), a.tickets = tickets.data();
    const dim3 grid(unsigned(a.n * splits));
    const size_t bytes = kl_shared_bytes(op, splits > 1 ? 0 : kl_spans(a.v));
    ++launches;
    simt::launch(grid, dim3(kKlThreads), bytes, [&] { kl_forward_kernel<T, op>(a); });
    if constexpr (kl_op_two_sweeps(op))
      simt::launch(grid, dim3(kKlThreads), bytes, [&] { kl_second_kernel<T, op>(a); });
  }
  template <bool kBoth>
  void gradient(bool policy = true) {
    KlArgs args = a;
    if (!policy) args.dx.base = nullptr;
    if (!kBoth) args.dy.base = nullptr;
    ++launches;
    simt::launch(dim3(unsigned(a.n), unsigned((a.v + kTile - 1) / kTile)), dim3(kKlThreads), 0,
                 [&] { kl_gradient_kernel<T, op, kBoth>(args); });
  }
  void both(int cluster) {  // 0: two sweeps
    a.cluster = cluster;
    ++launches;
    if constexpr (!kStatsOp) {
      if (cluster == 0) {
        simt::launch(dim3(unsigned(a.n)), dim3(kKlThreads), kl_shared_bytes(op, kl_spans(a.v)),
                     [&] { kl_two_sweeps_kernel<T, op>(a); });
      } else {
        const int each = (kl_spans(a.v) + cluster - 1) / cluster;
        const size_t bytes = kl_shared_bytes(op, each) + 16 +
                             size_t(each * kl_span(a.v)) * (sizeof(Tx) + sizeof(Ty));
        simt::launch(
            dim3(unsigned(a.n * cluster)), dim3(kKlThreads), bytes,
            [&] { kl_resident_kernel<T, op>(a); }, cluster);
      }
    }
  }
};

}  // namespace
