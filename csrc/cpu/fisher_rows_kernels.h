// Sums over an example's rows, squared: biases, elementwise weights, embeddings. A few columns at a
// time over all rows, the sums in registers: grad_outputs (and the norm's inputs) are read once,
// and out once an example at most.
#include "rows.h"

#if defined(FASTTAX_ISA)  // isa.h: once per instruction set
namespace fasttax {
namespace FASTTAX_ISA_NS {

constexpr int64_t kWide = 4 * kLanes;  // columns at a time

// sum[0 .. kWide) of d (times x) over rows `order[begin .. end)`, or rows begin .. end without an
// order.
template <class T>
inline void sum_rows(const T* x, int64_t x_stride, const T* d, int64_t d_stride,
                     const int64_t* order, int64_t begin, int64_t end, VF* sum) {
  for (int v = 0; v < 4; ++v) sum[v] = VF{};
  for (int64_t t = begin; t < end; ++t) {
    const int64_t row = order ? order[t] : t;
    const T* from = d + row * d_stride;
    if (x)
      for (int v = 0; v < 4; ++v)
        sum[v] = fma(load(x + row * x_stride + v * kLanes), load(from + v * kLanes), sum[v]);
    else
      for (int v = 0; v < 4; ++v) sum[v] += load(from + v * kLanes);
  }
}

// The columns [col, col + count) of out[to[r]] += w (sum of the rows of run r)^2, r's rows being
// starts[r] .. starts[r + 1].
template <class T>
inline void square_runs(const T* x, int64_t x_stride, const T* d, int64_t d_stride,
                        const int64_t* order, const int64_t* starts, int64_t runs,
                        const int64_t* to, const float* weights, int64_t col, int64_t count,
                        float* out, int64_t out_stride) {
  int64_t j = col;
  for (; j + kWide <= col + count; j += kWide)
    for (int64_t r = 0; r < runs; ++r) {
      VF sum[4];
      sum_rows(x ? x + j : x, x_stride, d + j, d_stride, order, starts[r], starts[r + 1], sum);
      float* f = out + (to ? to[r] : 0) * out_stride + j;
      const VF w = splat(weights ? weights[r] : 1.0f);
      for (int v = 0; v < 4; ++v)
        store(f + v * kLanes, fma(sum[v] * w, sum[v], load(f + v * kLanes)));
    }
  for (; j < col + count; ++j)
    for (int64_t r = 0; r < runs; ++r) {
      float sum = 0;
      for (int64_t t = starts[r]; t < starts[r + 1]; ++t) {
        const int64_t row = order ? order[t] : t;
        sum += to_float(d[row * d_stride + j]) * (x ? to_float(x[row * x_stride + j]) : 1.0f);
      }
      out[(to ? to[r] : 0) * out_stride + j] += sum * sum * (weights ? weights[r] : 1.0f);
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
