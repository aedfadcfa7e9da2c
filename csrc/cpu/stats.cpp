// token_stats on the CPU: one sweep over both rows (or the policy's alone) gives every value, one
// sweep back the gradient of any mix of them. Passes over memory: forward 2, backward 2 and one for
// each gradient.
#include "kl_layout.h"

#define FASTTAX_KERNELS "stats_kernels.h"
#include "isa.h"
#include "stats_double.h"

namespace fasttax {
namespace {

static_assert(sizeof(StatsRow) == kStatsKept * sizeof(float),
              "the second output holds one StatsRow a token");

struct StatsWork {
  const Call& c;
  DoubleParams wide_params;
  Rows x;
  std::optional<Rows> y;
  const int64_t* ids;
  bool wide;

  ScalarType result_type() const { return wide ? ScalarType::Double : ScalarType::Float; }
  bool live(int64_t n) const { return !c.mask || c.mask[n]; }
  int64_t id(int64_t n) const { return ids ? ids[n] : -1; }
  void* ref(int64_t n) const { return y ? (*y)[n] : nullptr; }

  template <class T>
  void forward(int64_t n, T* values, T* kept) const {
    T out[kTokenStats] = {}, row[kStatsKept] = {};
    if (live(n)) forward_row(n, out, row);
    for (int64_t s = 0; s < kTokenStats; ++s) values[s * c.N + n] = out[s];
    std::memcpy(kept + n * kStatsKept, row, sizeof row);
  }

  void forward_row(int64_t n, float* out, float* kept) const {
    StatsRow row{};
    FASTTAX_DISPATCH(stats_forward, c.type, x[n], ref(n), c.V, c.k, id(n), row, out);
    std::memcpy(kept, &row, sizeof row);
  }
  void forward_row(int64_t n, double* out, double* kept) const {
    stats_double_forward(static_cast<double*>(x[n]), static_cast<double*>(ref(n)), c.V, wide_params,
                         id(n), kept, out);
  }

  template <class T>
  void backward(int64_t n, const T* grads, const T* kept, void* dx, void* dy) const {
    T g[kTokenStats];
    bool any = false;
    for (int64_t s = 0; s < kTokenStats; ++s) any |= (g[s] = grads[s * c.N + n]) != 0;
    if (live(n) && any) return backward_row(n, g, kept + n * kStatsKept, dx, dy);
    if (dx) std::memset(dx, 0, size_t(c.V * x.item));
    if (dy) std::memset(dy, 0, size_t(c.V * x.item));
  }

  void backward_row(int64_t n, const float* g, const float* kept, void* dx, void* dy) const {
    StatsRow row;
    std::memcpy(&row, kept, sizeof row);
    FASTTAX_DISPATCH(stats_backward, c.type, x[n], ref(n), c.V, c.k, id(n), row, g, dx, dy);
  }
  void backward_row(int64_t n, const double* g, const double* kept, void* dx, void* dy) const {
    stats_double_backward(static_cast<double*>(x[n]), static_cast<double*>(ref(n)), c.V,
                          wide_params, id(n), kept, g, static_cast<double*>(dx),
                          static_cast<double*>(dy));
  }
};

const int64_t* checked_ids(const char* op, const std::optional<Tensor>& ids, const Call& c) {
  if (!ids.has_value()) return nullptr;
  FASTTAX_CHECK(
      ids->scalar_type() == ScalarType::Long && ids->is_contiguous() && ids->numel() == c.N, op,
      "ids: expected a contiguous int64 tensor of ", c.N, " elements");
  const int64_t* at = static_cast<const int64_t*>(ids->const_data_ptr());
  for (int64_t n = 0; n < c.N; ++n)
    FASTTAX_CHECK((c.mask && !c.mask[n]) || (at[n] >= 0 && at[n] < c.V), op,
                  "ids: expected values in [0, ", c.V, "), got ", at[n], " at token ", n);
  return at;
}

// Without a reference its parameters are the policy's: one row stands for both.
#define FASTTAX_STATS_OPTIONS                                                                 \
  double scale, double ref_scale, double softcap, double ref_softcap, double inv_temperature, \
      double ref_inv_temperature
#define FASTTAX_STATS_CALL(op)                                                                      \
  const bool has_ref = ref_logits.has_value();                                                      \
  if (!has_ref) ref_scale = scale, ref_softcap = softcap, ref_inv_temperature = inv_temperature;    \
  const Call c = prepare(op, logits, has_ref ? *ref_logits : logits, mask, 0, 0, scale, ref_scale,  \
                         softcap, ref_softcap, inv_temperature, ref_inv_temperature, false);        \
  const StatsWork work {                                                                            \
    c, {0, false, 0, scale, ref_scale, softcap, ref_softcap, inv_temperature, ref_inv_temperature}, \
        Rows(logits), has_ref ? std::optional<Rows>(Rows(*ref_logits)) : std::nullopt,              \
        checked_ids(op, ids, c), c.type == FloatType::kDouble                                       \
  }

// (values (6, ...), stats (..., 11)); a value that lacks its ids or its reference is 0.
std::tuple<Tensor, Tensor> token_stats(Tensor logits, std::optional<Tensor> ref_logits,
                                       std::optional<Tensor> ids, std::optional<Tensor> mask,
                                       FASTTAX_STATS_OPTIONS) {
  FASTTAX_STATS_CALL("token_stats");
  std::vector<int64_t> sizes = sizes_of(logits, logits.dim() - 1), values_sizes = sizes;
  values_sizes.insert(values_sizes.begin(), kTokenStats);
  sizes.push_back(kStatsKept);
  Tensor values = torch::stable::empty(values_sizes, work.result_type()),
         stats = torch::stable::empty(sizes, work.result_type());
  void *out = values.mutable_data_ptr(), *kept = stats.mutable_data_ptr();
  torch::stable::parallel_for(0, c.N, rows_per_task(c.V), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      if (work.wide) work.forward(n, static_cast<double*>(out), static_cast<double*>(kept));
      else work.forward(n, static_cast<float*>(out), static_cast<float*>(kept));
    }
  });
  return {values, stats};
}

// Gradients of sum_s,n grads[s, n] values[s, n] for both rows in one sweep; the one not asked for
// comes back empty.
std::tuple<Tensor, Tensor> token_stats_backward(Tensor grads, Tensor logits,
                                                std::optional<Tensor> ref_logits,
                                                std::optional<Tensor> ids,
                                                std::optional<Tensor> mask, Tensor stats,
                                                FASTTAX_STATS_OPTIONS, bool need_policy,
                                                bool need_ref) {
  const char* op = "token_stats_backward";
  FASTTAX_STATS_CALL(op);
  FASTTAX_CHECK(has_ref || !need_ref, op, "need_ref: there is no reference");
  const auto check = [&](const char* name, const Tensor& t, int64_t numel) {
    FASTTAX_CHECK(t.scalar_type() == work.result_type() && t.is_contiguous() && t.numel() == numel,
                  op, name, ": expected a contiguous ", work.wide ? "float64" : "float32",
                  " tensor of ", numel, " elements");
    return t.const_data_ptr();
  };
  const void *upstream = check("grads", grads, c.N * kTokenStats),
             *kept = check("stats", stats, c.N * kStatsKept);
  Target to_logits, to_ref;
  const Tensor d_logits = gradient_buffer(logits, need_policy, to_logits),
               d_ref = gradient_buffer(logits, need_ref, to_ref);
  torch::stable::parallel_for(0, c.N, rows_per_task(c.V), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      if (work.wide)
        work.backward(n, static_cast<const double*>(upstream), static_cast<const double*>(kept),
                      to_logits[n], to_ref[n]);
      else
        work.backward(n, static_cast<const float*>(upstream), static_cast<const float*>(kept),
                      to_logits[n], to_ref[n]);
    }
  });
  return {d_logits, d_ref};
}

}  // namespace
}  // namespace fasttax

STABLE_TORCH_LIBRARY_IMPL(fasttax, CPU, m) {
  m.impl("token_stats", TORCH_BOX(&fasttax::token_stats));
  m.impl("token_stats_backward", TORCH_BOX(&fasttax::token_stats_backward));
}
