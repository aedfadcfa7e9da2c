// token_stats on the CPU: one sweep over both rows (or the policy's alone) gives every value, one
// sweep back the gradient of any mix of them. Passes over memory: forward 2, backward 2 and one for
// each gradient.
#include "kl_layout.h"
#include "parallel.h"
#include "stats_double.h"

#define FASTTAX_KERNELS "stats_kernels.h"
#include "isa.h"

namespace fasttax {
namespace {

static_assert(sizeof(StatsRow) == kStatsSaved * sizeof(float),
              "`saved` holds one StatsRow a token");

const int64_t* checked_ids(const char* op, const std::optional<Tensor>& ids, const Call& c) {
  if (!ids.has_value()) return nullptr;
  FASTTAX_CHECK(
      ids->scalar_type() == ScalarType::Long && ids->is_contiguous() && ids->numel() == c.N, op,
      "ids: expected a contiguous int64 tensor of ", c.N, " elements");
  const int64_t* at = static_cast<const int64_t*>(ids->const_data_ptr());
  for (int64_t n = 0; n < c.N; ++n)
    FASTTAX_CHECK(!c.live(n) || (at[n] >= 0 && at[n] < c.V), op, "ids: expected values in [0, ",
                  c.V, "), got ", at[n], " at token ", n);
  return at;
}

// One call's rows. `saved` is what the forward leaves for the backward.
struct StatsWork {
  const char* const name;
  const Call c;
  const KlParams narrow;
  const DoubleParams exact;
  const Layout x;
  const std::optional<Layout> y;
  const int64_t* const ids;
  const bool wide;

  StatsWork(const char* op, const Tensor& logits, const std::optional<Tensor>& ref_logits,
            const std::optional<Tensor>& wanted, const std::optional<Tensor>& mask,
            const KlOptions& options)
      : name(op),
        c(checked_call(op, logits, ref_logits.has_value() ? *ref_logits : logits, mask, options)),
        narrow(kl_params<float>(options)),
        exact(kl_params<double>(options)),
        x(logits),
        y(ref_logits.has_value() ? std::optional<Layout>(*ref_logits) : std::nullopt),
        ids(checked_ids(op, wanted, c)),
        wide(c.type == FloatType::kDouble) {}

  ScalarType result_type() const { return wide ? ScalarType::Double : ScalarType::Float; }
  int64_t id(int64_t n) const { return ids ? ids[n] : -1; }
  void* ref(int64_t n) const { return y ? (*y)[n] : nullptr; }

  template <class R>
  void forward(int64_t n, R* values, StatsRowOf<R>* saved) const {
    R out[kTokenStats] = {};
    StatsRowOf<R> row{};
    if (c.live(n)) forward_row(n, out, row);
    for (int64_t s = 0; s < kTokenStats; ++s) values[s * c.N + n] = out[s];
    saved[n] = row;
  }
  void forward_row(int64_t n, float* out, StatsRow& saved) const {
    FASTTAX_DISPATCH(stats_forward, c.type, x[n], ref(n), c.V, narrow, id(n), saved, out);
  }
  void forward_row(int64_t n, double* out, DoubleStatsRow& saved) const {
    stats_double_forward(static_cast<double*>(x[n]), static_cast<double*>(ref(n)), c.V, exact,
                         id(n), saved, out);
  }

  template <class R>
  void backward(int64_t n, const R* grads, const StatsRowOf<R>* saved, void* dx, void* dy) const {
    R g[kTokenStats];
    bool any = false;
    for (int64_t s = 0; s < kTokenStats; ++s) {
      g[s] = grads[s * c.N + n];
      any |= g[s] != 0;
    }
    if (c.live(n) && any) backward_row(n, g, saved[n], dx, dy);
    else zero_rows(c, x.item, dx, dy);
  }
  void backward_row(int64_t n, const float* g, const StatsRow& saved, void* dx, void* dy) const {
    FASTTAX_DISPATCH(stats_backward, c.type, x[n], ref(n), c.V, narrow, id(n), saved, g, dx, dy);
  }
  void backward_row(int64_t n, const double* g, const DoubleStatsRow& saved, void* dx,
                    void* dy) const {
    stats_double_backward(static_cast<double*>(x[n]), static_cast<double*>(ref(n)), c.V, exact,
                          id(n), saved, g, static_cast<double*>(dx), static_cast<double*>(dy));
  }

  template <class R>
  void forward_rows(void* values, void* saved) const {
    interruptible_for(name, 0, c.N, rows_per_task(c.V), [&](int64_t begin, int64_t end, Watch&) {
      for (int64_t n = begin; n < end; ++n)
        forward(n, static_cast<R*>(values), static_cast<StatsRowOf<R>*>(saved));
    });
  }
  template <class R>
  void backward_rows(const void* grads, const void* saved, const Target& d_logits,
                     const Target& d_ref) const {
    interruptible_for(name, 0, c.N, rows_per_task(c.V), [&](int64_t begin, int64_t end, Watch&) {
      for (int64_t n = begin; n < end; ++n)
        backward(n, static_cast<const R*>(grads), static_cast<const StatsRowOf<R>*>(saved),
                 d_logits[n], d_ref[n]);
    });
  }
};

// (values (6, ...), saved (..., 11)); a value that lacks its ids or its reference is 0.
std::tuple<Tensor, Tensor> token_stats(Tensor logits, std::optional<Tensor> ref_logits,
                                       std::optional<Tensor> ids, std::optional<Tensor> mask,
                                       FASTTAX_STATS_OPTIONS) {
  const KlOptions options = stats_options(ref_logits.has_value(), FASTTAX_STATS_VALUES);
  const StatsWork work("token_stats", logits, ref_logits, ids, mask, options);
  std::vector<int64_t> sizes = sizes_of(logits, logits.dim() - 1), values_sizes = sizes;
  values_sizes.insert(values_sizes.begin(), kTokenStats);
  sizes.push_back(kStatsSaved);
  Tensor values = torch::stable::empty(values_sizes, work.result_type());
  Tensor saved = torch::stable::empty(sizes, work.result_type());
  if (work.wide) work.forward_rows<double>(values.mutable_data_ptr(), saved.mutable_data_ptr());
  else work.forward_rows<float>(values.mutable_data_ptr(), saved.mutable_data_ptr());
  return {values, saved};
}

// Gradients of sum_s,n grads[s, n] values[s, n] for both rows in one sweep; the one not asked for
// comes back empty.
std::tuple<Tensor, Tensor> token_stats_backward(Tensor grads, Tensor logits,
                                                std::optional<Tensor> ref_logits,
                                                std::optional<Tensor> ids,
                                                std::optional<Tensor> mask, Tensor saved,
                                                FASTTAX_STATS_OPTIONS, bool need_policy,
                                                bool need_ref) {
  const char* op = "token_stats_backward";
  const KlOptions options = stats_options(ref_logits.has_value(), FASTTAX_STATS_VALUES);
  const StatsWork work(op, logits, ref_logits, ids, mask, options);
  const int64_t N = work.c.N;
  FASTTAX_CHECK(ref_logits.has_value() || !need_ref, op, "need_ref: there is no reference");
  const void* upstream = checked_numbers(op, "grads", grads, work.wide, N * kTokenStats);
  const void* rows = checked_numbers(op, "saved", saved, work.wide, N * kStatsSaved);
  Target to_logits, to_ref;
  const Tensor d_logits = gradient_buffer(logits, need_policy, to_logits);
  const Tensor d_ref = gradient_buffer(logits, need_ref, to_ref);
  if (work.wide) work.backward_rows<double>(upstream, rows, to_logits, to_ref);
  else work.backward_rows<float>(upstream, rows, to_logits, to_ref);
  return {d_logits, d_ref};
}

}  // namespace
}  // namespace fasttax

STABLE_TORCH_LIBRARY_IMPL(fasttax, CPU, m) {
  m.impl("token_stats", TORCH_BOX(&fasttax::token_stats));
  m.impl("token_stats_backward", TORCH_BOX(&fasttax::token_stats_backward));
}
