// Sums over an example's rows, squared: biases, elementwise weights, embeddings. A few columns at a
// time over all rows, the sums in registers: grad_outputs (and the norm's inputs) are read once,
// and so is each row of out.
#include "rows.h"

#if defined(FASTTAX_ISA)  // isa.h: once per instruction set
namespace fasttax {
namespace FASTTAX_ISA_NS {

constexpr int64_t kWide = 4 * kLanes;  // columns at a time
// Rows that are added in float before their sum joins the others', and examples before theirs joins
// a double: one by one, 1e6 examples would be 1e-2 off.
constexpr int64_t kFoldRows = 256, kFoldRuns = 64;

struct Wide {
  VF v[4];
};

// The sums of d (times x) at kWide columns over rows `order[begin .. end)`, or rows begin .. end
// without an order.
template <class T>
__attribute__((always_inline)) inline Wide sum_rows(const T* x, int64_t x_stride, const T* d,
                                                    int64_t d_stride, const int64_t* order,
                                                    int64_t begin, int64_t end) {
  Wide sum{};
  for (int64_t t = begin; t < end; ++t) {
    const int64_t row = order ? order[t] : t;
    const T* from = d + row * d_stride;
    if (x)
      for (int v = 0; v < 4; ++v)
        sum.v[v] = fma(load(x + row * x_stride + v * kLanes), load(from + v * kLanes), sum.v[v]);
    else
      for (int v = 0; v < 4; ++v) sum.v[v] += load(from + v * kLanes);
  }
  return sum;
}

__attribute__((noinline)) inline void fold_squares(const Wide& part, double* total) {
  for (int64_t j = 0; j < kWide; ++j) total[j] += double(part.v[j / kLanes][j % kLanes]);
}

// Runs first .. last, which go to one row of out: f[0 .. kWide) += w (sum of the run's rows)^2.
template <class T>
inline void add_squares(const T* x, int64_t x_stride, const T* d, int64_t d_stride,
                        const int64_t* order, const int64_t* starts, int64_t first, int64_t last,
                        const float* weights, float* f) {
  Wide part{};
  const auto add = [&](int64_t from, int64_t to) __attribute__((always_inline)) {
    for (int64_t r = from; r < to; ++r) {
      const int64_t end = starts[r + 1];
      Wide sum{};
      for (int64_t t = starts[r]; t < end; t += kFoldRows) {
        const Wide more =
            sum_rows(x, x_stride, d, d_stride, order, t, std::min(end, t + kFoldRows));
        for (int v = 0; v < 4; ++v) sum.v[v] += more.v[v];
      }
      const VF w = splat(weights ? weights[r] : 1.0f);
      for (int v = 0; v < 4; ++v) part.v[v] = fma(sum.v[v] * w, sum.v[v], part.v[v]);
    }
  };
  if (last - first <= kFoldRuns) {
    add(first, last);
    for (int v = 0; v < 4; ++v) store(f + v * kLanes, load(f + v * kLanes) + part.v[v]);
    return;
  }
  double total[kWide];
  for (int64_t j = 0; j < kWide; ++j) total[j] = double(f[j]);
  for (int64_t r = first; r < last; r += kFoldRuns) {
    part = Wide{};
    add(r, std::min(last, r + kFoldRuns));
    const Wide folded = part;
    fold_squares(folded, total);
  }
  for (int64_t j = 0; j < kWide; ++j) f[j] = float(total[j]);
}

// The columns [col, col + count) of out[to[r]] += w (sum of the rows of run r)^2, r's rows being
// starts[r] .. starts[r + 1]. The runs of one row of out stand side by side.
template <class T>
inline void square_runs(const T* x, int64_t x_stride, const T* d, int64_t d_stride,
                        const int64_t* order, const int64_t* starts, int64_t runs,
                        const int64_t* to, const float* weights, int64_t col, int64_t count,
                        float* out, int64_t out_stride) {
  for (int64_t first = 0, last; first < runs; first = last) {
    last = to ? first + 1 : runs;
    while (last < runs && to[last] == to[first]) ++last;
    float* f = out + (to ? to[first] : 0) * out_stride;
    int64_t j = col;
    for (; j + kWide <= col + count; j += kWide)
      add_squares(x ? x + j : x, x_stride, d + j, d_stride, order, starts, first, last, weights,
                  f + j);
    for (; j < col + count; ++j) {
      double total = double(f[j]);
      for (int64_t r = first; r < last; ++r) {
        double sum = 0;
        for (int64_t t = starts[r]; t < starts[r + 1]; ++t) {
          const int64_t row = order ? order[t] : t;
          const float factor = x ? to_float(x[row * x_stride + j]) : 1.0f;
          sum += double(to_float(d[row * d_stride + j]) * factor);
        }
        total += sum * sum * double(weights ? weights[r] : 1.0f);
      }
      f[j] = float(total);
    }
  }
}

inline void square_runs_of(FloatType type, const void* x, int64_t x_stride, const void* d,
                           int64_t d_stride, const int64_t* order, const int64_t* starts,
                           int64_t runs, const int64_t* to, const float* weights, int64_t col,
                           int64_t count, float* out, int64_t out_stride) {
  switch (type) {
    case FloatType::kBFloat16:
      square_runs(static_cast<const BFloat16*>(x), x_stride, static_cast<const BFloat16*>(d),
                  d_stride, order, starts, runs, to, weights, col, count, out, out_stride);
      break;
    case FloatType::kFloat16:
      square_runs(static_cast<const Float16*>(x), x_stride, static_cast<const Float16*>(d),
                  d_stride, order, starts, runs, to, weights, col, count, out, out_stride);
      break;
    default:
      square_runs(static_cast<const float*>(x), x_stride, static_cast<const float*>(d), d_stride,
                  order, starts, runs, to, weights, col, count, out, out_stride);
  }
}

}  // namespace FASTTAX_ISA_NS
}  // namespace fasttax
#endif
