// p (1 - p) over a row of logits, in place: the variance of each label's indicator, which a head's
// Fisher over all labels is made of.

#if defined(FASTTAX_ISA)  // isa.h: once per instruction set
namespace fasttax {
namespace FASTTAX_ISA_NS {

// e = exp(x - max). Without the maxima, whose e is 1, the sum of e is `rest` and theirs `ties`: Z -
// 1 is then ties - 1 + rest with no cancellation, and p (1 - p) = e ((Z - 1) + (1 - e)) / Z^2 keeps
// its relative error also where the row has collapsed onto one label.
inline void label_variance_row(float* x, int64_t V) {
  constexpr float inf = std::numeric_limits<float>::infinity();
  constexpr int64_t chunk = 128 * kLanes;  // a lane adds 128 terms in float, double adds the chunks
  VF most = splat(-inf);
  int64_t i = 0;
  // a NaN is passed over here and reaches the sums by exp
  for (; i + kLanes <= V; i += kLanes) most = max_keep_nan(load(x + i), most);
  if (i < V) most = max_keep_nan(load(x + i, V - i, -inf), most);
  const float top = max_of(most);

  double rest = 0, ties = 0;
  for (int64_t begin = 0; begin < V; begin += chunk) {
    VF sum{}, count{};
    const auto gather = [&](VF v) {
      const VF e = exp_flushed(v - top);
      const VI is_top = v == top;
      sum += is_top ? splat(0.0f) : e;
      count += is_top ? splat(1.0f) : splat(0.0f);
      return e;
    };
    const int64_t end = std::min(V, begin + chunk);
    for (i = begin; i + kLanes <= end; i += kLanes) store(x + i, gather(load(x + i)));
    if (i < end) store(x + i, gather(load(x + i, end - i, -inf)), end - i);
    rest += fasttax::FASTTAX_ISA_NS::sum(sum);
    ties += fasttax::FASTTAX_ISA_NS::sum(count);
  }

  const double others = ties - 1 + rest, total = others + 1;
  const float factor = float(1 / (total * total));
  const auto variance = [&](VF e) { return e * ((1.0f - e) + float(others)) * factor; };
  for (i = 0; i + kLanes <= V; i += kLanes) store(x + i, variance(load(x + i)));
  if (i < V) store(x + i, variance(load(x + i, V - i, 0.0f)), V - i);
}

}  // namespace FASTTAX_ISA_NS
}  // namespace fasttax
#endif
