// token_kl on the CPU: rows are shared out among the threads, a row pair is read once (jsd twice)
// and nothing of size N x V is written but the gradient. Passes over memory: forward 2, backward 3;
// both at once (token_kl_grad) 3.
#include "kl_layout.h"

#define FASTTAX_KERNELS "kl_kernels.h"
#include "isa.h"
#include "kl_double.h"

namespace fasttax {
namespace {

constexpr int64_t kStats = 8;
static_assert(sizeof(KlRow) == kStats * sizeof(float), "stats holds one KlRow a token");

// One call's rows: forward and backward of row n, in whichever of the two precisions the logits ask
// for.
struct RowWork {
  const Call& c;
  DoubleParams wide_params;
  Rows x, y;
  bool wide;

  RowWork(const Call& call, const Tensor& logits, const Tensor& ref_logits,
          const DoubleParams& params)
      : c(call),
        wide_params(params),
        x(logits),
        y(ref_logits),
        wide(call.type == FloatType::kDouble) {}

  ScalarType result_type() const { return wide ? ScalarType::Double : ScalarType::Float; }
  bool live(int64_t n) const { return !c.mask || c.mask[n]; }

  void forward(int64_t n, void* kl, void* stats) const {
    if (wide) {
      double* row = static_cast<double*>(stats) + n * kStats;
      if (!live(n)) std::fill(row, row + kStats, 0.0);
      static_cast<double*>(kl)[n] =
          live(n) ? kl_double_forward(static_cast<double*>(x[n]), static_cast<double*>(y[n]), c.V,
                                      wide_params, row)
                  : 0.0;
    } else {
      KlRow row{};
      static_cast<float*>(kl)[n] =
          live(n) ? FASTTAX_DISPATCH(kl_forward, c.type, x[n], y[n], c.V, c.k, row) : 0.0f;
      std::memcpy(static_cast<float*>(stats) + n * kStats, &row, sizeof row);
    }
  }

  void backward(int64_t n, const void* upstream, const void* stats, void* dx, void* dy) const {
    if (!live(n)) {
      const int64_t bytes = c.V * x.item;
      if (dx) std::memset(dx, 0, bytes);
      if (dy) std::memset(dy, 0, bytes);
    } else if (wide) {
      kl_double_backward(static_cast<double*>(x[n]), static_cast<double*>(y[n]), c.V, wide_params,
                         static_cast<const double*>(stats) + n * kStats,
                         static_cast<const double*>(upstream)[n], static_cast<double*>(dx),
                         static_cast<double*>(dy));
    } else {
      KlRow row;
      std::memcpy(&row, static_cast<const float*>(stats) + n * kStats, sizeof row);
      FASTTAX_DISPATCH(kl_backward, c.type, x[n], y[n], c.V, c.k, row,
                       static_cast<const float*>(upstream)[n], dx, dy);
    }
  }

  // Results and stats of the N tokens; `after(n)` runs while row n is still in cache.
  template <class F>
  std::tuple<Tensor, Tensor> forward_rows(const Tensor& logits, F&& after) const {
    std::vector<int64_t> sizes = sizes_of(logits, logits.dim() - 1);
    Tensor kl = torch::stable::empty(sizes, result_type());
    sizes.push_back(kStats);
    Tensor stats = torch::stable::empty(sizes, result_type());
    void *out = kl.mutable_data_ptr(), *kept = stats.mutable_data_ptr();
    torch::stable::parallel_for(0, c.N, rows_per_task(c.V), [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        forward(n, out, kept);
        after(n, kept);
      }
    });
    return {kl, stats};
  }

  const void* checked(const char* op, const char* name, const Tensor& t, int64_t numel) const {
    FASTTAX_CHECK(t.scalar_type() == result_type() && t.is_contiguous() && t.numel() == numel, op,
                  name, ": expected a contiguous ", wide ? "float64" : "float32", " tensor of ",
                  numel, " elements");
    return t.const_data_ptr();
  }
};

#define FASTTAX_KL_OPTIONS                                                                       \
  int64_t kind, double beta, double scale, double ref_scale, double softcap, double ref_softcap, \
      double inv_temperature, double ref_inv_temperature, bool inf_mask
#define FASTTAX_KL_CALL(op)                                                                   \
  const Call c = prepare(op, logits, ref_logits, mask, kind, beta, scale, ref_scale, softcap, \
                         ref_softcap, inv_temperature, ref_inv_temperature, inf_mask);        \
  const RowWork work(c, logits, ref_logits,                                                   \
                     {kind, inf_mask, beta, scale, ref_scale, softcap, ref_softcap,           \
                      inv_temperature, ref_inv_temperature})

std::tuple<Tensor, Tensor> token_kl(Tensor logits, Tensor ref_logits, std::optional<Tensor> mask,
                                    FASTTAX_KL_OPTIONS) {
  FASTTAX_KL_CALL("token_kl");
  return work.forward_rows(logits, [](int64_t, const void*) {});
}

// The tokens' weights are known: each row's gradient is written while the row is in cache. Bytes
// per cell: 2 reads, 1 write.
std::tuple<Tensor, Tensor, Tensor> token_kl_grad(Tensor token_weight, Tensor logits,
                                                 Tensor ref_logits, std::optional<Tensor> mask,
                                                 FASTTAX_KL_OPTIONS, bool need_policy,
                                                 bool need_ref) {
  FASTTAX_KL_CALL("token_kl_grad");
  const void* upstream = work.checked("token_kl_grad", "token_weight", token_weight, c.N);
  Target to_logits, to_ref;
  const Tensor d_logits = gradient_buffer(logits, need_policy, to_logits),
               d_ref = gradient_buffer(logits, need_ref, to_ref);
  const auto kl = std::get<0>(work.forward_rows(logits, [&](int64_t n, const void* stats) {
    work.backward(n, upstream, stats, to_logits[n], to_ref[n]);
  }));
  return {kl, d_logits, d_ref};
}

void backward(const char* op, const RowWork& work, const Tensor& grad, const Tensor& stats,
              const Target& d_logits, const Target& d_ref) {
  const void *upstream = work.checked(op, "grad", grad, work.c.N),
             *kept = work.checked(op, "stats", stats, work.c.N * kStats);
  torch::stable::parallel_for(0, work.c.N, rows_per_task(work.c.V),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t n = begin; n < end; ++n)
                                  work.backward(n, upstream, kept, d_logits[n], d_ref[n]);
                              });
}

// Gradients for both rows in one sweep; the one not asked for comes back empty.
std::tuple<Tensor, Tensor> token_kl_backward(Tensor grad, Tensor logits, Tensor ref_logits,
                                             std::optional<Tensor> mask, Tensor stats,
                                             FASTTAX_KL_OPTIONS, bool need_policy, bool need_ref) {
  FASTTAX_KL_CALL("token_kl_backward");
  Target to_logits, to_ref;
  const Tensor d_logits = gradient_buffer(logits, need_policy, to_logits),
               d_ref = gradient_buffer(logits, need_ref, to_ref);
  backward("token_kl_backward", work, grad, stats, to_logits, to_ref);
  return {d_logits, d_ref};
}

// The policy's gradient over the policy's logits, row by row as each is read for the last time.
Tensor token_kl_backward_(Tensor grad, Tensor logits, Tensor ref_logits, std::optional<Tensor> mask,
                          Tensor stats, FASTTAX_KL_OPTIONS, bool need_ref) {
  FASTTAX_KL_CALL("token_kl_backward_");
  Target to_logits{Rows(logits)}, to_ref;
  const Tensor d_ref = gradient_buffer(logits, need_ref, to_ref);
  backward("token_kl_backward_", work, grad, stats, to_logits, to_ref);
  return d_ref;
}

void advise_huge_pages(Tensor t) { prefer_huge_pages(t); }

}  // namespace
}  // namespace fasttax

STABLE_TORCH_LIBRARY_IMPL(fasttax, CPU, m) {
  m.impl("_prefer_huge_pages", TORCH_BOX(&fasttax::advise_huge_pages));
  m.impl("token_kl", TORCH_BOX(&fasttax::token_kl));
  m.impl("token_kl_grad", TORCH_BOX(&fasttax::token_kl_grad));
  m.impl("token_kl_backward", TORCH_BOX(&fasttax::token_kl_backward));
  m.impl("token_kl_backward_", TORCH_BOX(&fasttax::token_kl_backward_));
}
