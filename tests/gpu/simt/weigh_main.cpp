// Runs csrc/cuda/weigh.cuh on the SIMT machine against float64: every output and reduction, masks
// at every alignment, sizes around every boundary, impossible tokens; and gradients of every dtype
// scaled, of which none may be touched where the factor is 1. Prints what it ran; exits 1 on a
// wrong value.
#include "simt_cuda.h"

#include "cuda/weigh.cuh"

#include <memory>
#include <random>
#include <vector>

namespace {

using namespace fasttax;

constexpr double kInf = INFINITY, kClip = 3;
int launches = 0;

bool close(const char* what, double got, double want, double slack) {
  if (got == want || (std::isnan(got) && std::isnan(want))) return true;
  if (std::fabs(got - want) <= slack) return true;
  printf("%s: %.17g, expected %.17g\n", what, got, want);
  return false;
}

void launch(int64_t blocks, int threads, const std::function<void()>& kernel) {
  ++launches;
  simt::launch(dim3(unsigned(blocks)), dim3(unsigned(threads)), 0, kernel);
}

// --- a textbook

double gap(double a, double b) { return a == -kInf && b == -kInf ? 0 : a - b; }

double estimate(int kind, double r) {
  if (kind == kK1) return -r;
  if (kind == kK2) return r * r / 2;
  const double top = std::exp(kClip);
  return r > kClip ? (top - 1) * (r - kClip) + (top - 1 - kClip) : std::expm1(r) - r;
}

double ratio(double x) { return x > kClip ? std::exp(kClip) * (1 + x - kClip) : std::exp(x); }

struct Slopes {
  double value, by[3];
};

Slopes textbook(int kind, double logp, double ref, double old, bool has_old, bool reverse) {
  double r = gap(ref, logp), w = has_old ? ratio(gap(logp, old)) : 1;
  if (w == 0) r = 0;
  Slopes out{w * estimate(kind, r), {0, 0, 0}};
  if (reverse) {
    out.by[0] = logp == -kInf ? 0 : w * -r;  // where that is infinite, the largest number
    return out;
  }
  const double of_r = kind == kK1 ? -1 : kind == kK2 ? r : std::expm1(std::fmin(r, kClip));
  const bool same = logp == -kInf && ref == -kInf, unchanged = logp == -kInf && old == -kInf;
  const double by_r = same || w == 0 ? 0 : w * of_r;
  double by_w = 0;
  if (has_old && !unchanged && w != 0) by_w = std::fmin(w, std::exp(kClip)) * estimate(kind, r);
  out.by[0] = by_w - by_r, out.by[1] = by_r, out.by[2] = -by_w;
  return out;
}

// --- the kernels on tokens

struct Case {
  int64_t n;
  int shift;  // of the mask, from the allocator's alignment
  bool masked, weighed, old, reverse, shared;
  Reduction reduction;
};

template <class R>
bool check(const Case& c, std::mt19937& random) {
  std::normal_distribution<double> normal;
  constexpr int kRows = 4;
  const std::vector<int> outputs{3, kK3, kK1, kK2, 3, 0};
  std::vector<std::vector<R>> rows(kRows, std::vector<R>(size_t(c.n)));
  std::vector<R> weight(static_cast<size_t>(c.n));
  std::unique_ptr<bool[]> memory(new bool[size_t(c.n + c.shift)]);
  bool* const mask = memory.get() + c.shift;
  double live = 0;
  for (int64_t i = 0; i < c.n; ++i) {
    for (auto& row : rows) row[size_t(i)] = R(normal(random) * (i % 3 ? 0.3 : 4) - 3);
    if (i % 7 == 3) rows[0][size_t(i)] = R(-kInf);
    if (i % 11 == 4) rows[1][size_t(i)] = R(-kInf);
    if (i % 13 == 3) rows[2][size_t(i)] = R(-kInf);
    weight[size_t(i)] = R(normal(random));
    mask[i] = random() % 4 != 0;
    if (!mask[i] && c.masked)
      for (auto& row : rows) row[size_t(i)] = R(NAN);
    live += !c.masked || mask[i];
  }
  const bool sums = c.reduction != Reduction::kNone;
  if (sums)  // an infinite term would hide the others
    for (auto& row : rows)
      for (R& x : row)
        if (std::isinf(x)) x = R(-5);
  const int64_t size = sums ? 1 : c.n;
  std::vector<std::vector<R>> results(outputs.size(), std::vector<R>(size_t(size), R(-7)));
  std::vector<std::vector<R>> grads(outputs.size());
  for (auto& grad : grads)
    for (int64_t i = 0; i < (c.shared || sums ? 1 : c.n); ++i) grad.push_back(R(normal(random)));

  WeighArgs a{};
  a.scale = -0.3, a.clip = kClip, a.exp_clip = std::exp(kClip), a.n = c.n;
  a.row_count = kRows, a.output_count = int(outputs.size());
  a.reduction = c.reduction, a.reverse = c.reverse;
  a.pair[0] = 0, a.pair[1] = 1, a.pair[2] = c.old ? 2 : -1;
  a.mask = c.masked ? mask : nullptr, a.weight = c.weighed ? weight.data() : nullptr;
  for (int r = 0; r < kRows; ++r) a.rows[r] = rows[size_t(r)].data();
  for (size_t k = 0; k < outputs.size(); ++k) {
    a.outputs[k] = outputs[k], a.results[k] = results[k].data();
    // one result that nothing was made of
    a.grads[k] = k == 2 ? nullptr : grads[k].data(), a.shared_grad[k] = c.shared || sums;
  }
  const int64_t blocks = (c.n + kWeighThreads - 1) / kWeighThreads;
  if (sums) launch(a.output_count, kWeighSumThreads, [&] { weigh_sum_kernel<R>(a); });
  else launch(blocks, kWeighThreads, [&] { weigh_tokens_kernel<R>(a); });
  std::vector<R> by_row(size_t(kRows * c.n), R(-7)), weights(size_t(c.n), R(-7));
  a.by_row = by_row.data();
  launch(blocks, kWeighThreads, [&] { weigh_backward_kernel<R>(a); });
  a.by_row = weights.data();
  launch(blocks, kWeighThreads, [&] { weigh_weights_kernel<R>(a); });

  const double eps = sizeof(R) == 8 ? 1e-15 : 4e-7;
  const double count = c.reduction == Reduction::kMean ? std::fmax(1, live) : 1;
  std::vector<double> total(outputs.size()), size_of(outputs.size());
  bool ok = true;
  for (int64_t i = 0; i < c.n && ok; ++i) {
    const auto at = [&](int row) { return double(rows[size_t(row)][size_t(i)]); };
    const bool counts = !c.masked || mask[i];
    const double factor = (c.weighed ? double(weight[size_t(i)]) : 1) * a.scale;
    const double expected = c.weighed && !counts ? 0 : factor / count;
    ok = ok && close("weight", weights[size_t(i)], expected, eps * std::fabs(expected));
    double d[kRows] = {}, slack[kRows] = {};
    bool finite = true;
    for (size_t k = 0; k < outputs.size(); ++k) {
      Slopes of{0, {0, 0, 0}};
      if (counts && outputs[k] >= 0) of.value = at(outputs[k]);
      else if (counts) of = textbook(outputs[k], at(0), at(1), at(2), c.old, c.reverse);
      const double value = counts ? of.value * factor : 0;
      // the logs' rounding, as an exponential has it
      const double loose = 60 * eps * (std::fabs(value) + std::fabs(factor));
      total[k] += value, size_of[k] += loose;
      if (!sums) ok = ok && close("value", results[k][size_t(i)], value, loose);
      if (!a.grads[k] || !counts) continue;
      const double up = factor / count * double(grads[k][a.shared_grad[k] ? 0 : size_t(i)]);
      for (int r = 0; r < kRows; ++r) {
        const double by = outputs[k] >= 0 ? outputs[k] == r : r < 3 ? of.by[r] : 0;
        finite = finite && !std::isinf(c.reverse ? by : 0);
        d[r] += by == 0 ? 0 : up * by;
        slack[r] += 60 * eps * std::fabs(up) * (1 + std::fabs(by));
      }
    }
    for (int r = 0; r < kRows; ++r)
      if (finite) ok = ok && close("gradient", by_row[size_t(r * c.n + i)], d[r], slack[r]);
  }
  for (size_t k = 0; k < outputs.size() && sums; ++k)
    ok = ok && close("sum", results[k][0], total[k] / count, size_of[k] / count + 1e-30);
  if (!ok)
    printf("failed: n %ld shift %d masked %d weighed %d old %d reverse %d shared %d reduction %d\n",
           long(c.n), c.shift, c.masked, c.weighed, c.old, c.reverse, c.shared, int(c.reduction));
  return ok;
}

// --- gradients that are held

template <class T>
T narrow(double x) {
  if constexpr (sizeof(T) == 2) return T(float(x));
  else return T(x);
}
template <class T>
double wide(T x) {
  if constexpr (sizeof(T) == 2) return double(float(x));
  else return double(x);
}

template <class T>
bool check_scale(int64_t rows, int64_t width, int shift, bool wide_factor, int blocks,
                 std::mt19937& random) {
  std::normal_distribution<double> normal;
  std::unique_ptr<T[]> memory(new T[size_t(rows * width + shift)]);
  T* const held = memory.get() + shift;
  std::vector<T> before;
  std::vector<float> factors;
  std::vector<double> wide_factors;
  for (int64_t i = 0; i < rows * width; ++i) {
    held[i] = narrow<T>(normal(random));
    before.push_back(held[i]);
  }
  for (int64_t r = 0; r < rows; ++r) {
    factors.push_back(r % 3 == 1 ? 1.0f : 0.3f);
    wide_factors.push_back(double(factors.back()));
  }
  ScaleArgs a{held, factors.data(), wide_factor, rows, width};
  if (wide_factor) a.factor = wide_factors.data();
  launch(blocks, kScaleThreads, [&] { scale_held_kernel<T>(a); });
  bool ok = true;
  for (int64_t i = 0; i < rows * width && ok; ++i) {
    const double by = wide_factors[size_t(i / width)], was = wide(before[size_t(i)]);
    const double want = sizeof(T) == 8 ? was * by : wide(narrow<T>(double(float(was) * float(by))));
    ok = close("scaled", wide(held[i]), want, 0);
  }
  return ok;
}

}  // namespace

int main(int arguments, char**) {
  std::mt19937 random(1);
  bool ok = true;
  // around a mask's vectors and a block; 1025: a second turn of the sum's block
  std::vector<int64_t> sizes{1, 17, 257, 1025};
  const bool quick = arguments > 1;
  if (quick) sizes = {33, 257};
  int turn = 0;
  for (const int64_t n : sizes)
    for (const Reduction reduction : {Reduction::kNone, Reduction::kSum, Reduction::kMean})
      for (int flags = 0; flags < 16; flags += n > 100 || quick ? 5 : 1) {
        const Case c{n,
                     turn++ % 3,
                     bool(flags & 1),
                     bool(flags & 2),
                     bool(flags & 4),
                     bool(flags & 8),
                     turn % 2 == 0,
                     reduction};
        ok = ok && check<float>(c, random) && (quick || check<double>(c, random));
      }
  WeighArgs none{};
  float result = -7;
  none.reduction = Reduction::kMean, none.output_count = 1, none.results[0] = &result;
  launch(1, kWeighSumThreads, [&] { weigh_sum_kernel<float>(none); });
  ok = ok && close("no tokens", result, 0, 0);

  // a chunk, its neighbours, rows that are and are not 16-byte aligned, fewer blocks than items
  const auto scaled = [&](auto entry) {
    using T = decltype(entry);
    const int64_t chunk = kScaleChunk<T>;
    for (const int64_t width : {int64_t(1), int64_t(31), chunk - 1, chunk, 2 * chunk + 9})
      for (int way = 0; way < 4; ++way)
        ok = ok && check_scale<T>(way % 2 ? 4 : 1, width, way / 2, way == 1, 1 + way, random);
  };
  scaled(__nv_bfloat16());
  if (!quick) scaled(float()), scaled(double()), scaled(__half());
  const float one = 1;
  const ScaleArgs untouched{nullptr, &one, false, 1, int64_t(1) << 40};
  launch(3, kScaleThreads, [&] { scale_held_kernel<float>(untouched); });
  printf("%s: %d launches\n", ok ? "ok" : "FAILED", launches);
  return ok ? 0 : 1;
}
