// token_kl on the CPU: rows are shared out among the threads, a row pair is read once (kinds of two
// sweeps: twice) and nothing of size N x V is written but the gradient. Passes over memory: forward
// 2, backward 3; both at once (token_kl_grad) 3.
#include "kl_double.h"
#include "kl_layout.h"
#include "parallel.h"

#define FASTTAX_KERNELS "kl_kernels.h"
#include "isa.h"

namespace fasttax {
namespace {

static_assert(sizeof(KlRow) == kKlSaved * sizeof(float), "`saved` holds one KlRow a token");

// One call's rows: forward and backward of row n, in whichever of the two precisions the logits ask
// for. `saved` is what the forward leaves for the backward.
struct RowWork {
  const char* const name;
  const Call c;
  const KlParams narrow;
  const DoubleParams exact;
  const Layout x, y;
  const bool wide;

  RowWork(const char* op, const Tensor& logits, const Tensor& ref_logits,
          const std::optional<Tensor>& mask, const KlOptions& options)
      : name(op),
        c(checked_call(op, logits, ref_logits, mask, options)),
        narrow(kl_params<float>(options)),
        exact(kl_params<double>(options)),
        x(logits),
        y(ref_logits),
        wide(c.type == FloatType::kDouble) {}

  ScalarType result_type() const { return wide ? ScalarType::Double : ScalarType::Float; }

  double forward_row(int64_t n, const KlKept&, DoubleRow& saved) const {
    return kl_double_forward(static_cast<double*>(x[n]), static_cast<double*>(y[n]), c.V, exact,
                             saved);
  }
  float forward_row(int64_t n, const KlKept& kept, KlRow& saved) const {
    return FASTTAX_DISPATCH(kl_forward, c.type, x[n], y[n], c.V, narrow, kept, saved);
  }

  void backward_row(int64_t n, double upstream, const DoubleRow& saved, void* dx, void* dy) const {
    kl_double_backward(static_cast<double*>(x[n]), static_cast<double*>(y[n]), c.V, exact, saved,
                       upstream, static_cast<double*>(dx), static_cast<double*>(dy));
  }
  void backward_row(int64_t n, float upstream, const KlRow& saved, void* dx, void* dy) const {
    FASTTAX_DISPATCH(kl_backward, c.type, x[n], y[n], c.V, narrow, saved, upstream, dx, dy);
  }

  // Value and gradients of a token whose weight is known.
  double gradient_row(int64_t n, double weight, const KlKept& kept, void* dx, void* dy) const {
    DoubleRow saved{};
    const double kl = forward_row(n, kept, saved);
    backward_row(n, weight, saved, dx, dy);
    return kl;
  }
  float gradient_row(int64_t n, float weight, const KlKept& kept, void* dx, void* dy) const {
    return FASTTAX_DISPATCH(kl_gradient, c.type, x[n], y[n], c.V, narrow, kept, weight, dx, dy);
  }

  template <class R>
  void forward(R* kl, KlRowOf<R>* saved) const {
    interruptible_for(name, 0, c.N, rows_per_task(c.V), [&](int64_t begin, int64_t end, Watch&) {
      const KlKeptRows kept(narrow, c.V, false, false);
      for (int64_t n = begin; n < end; ++n) {
        saved[n] = {};
        kl[n] = c.live(n) ? forward_row(n, kept.rows(), saved[n]) : R(0);
      }
    });
  }

  template <class R>
  void gradient(R* kl, const R* weight, const Target& d_logits, const Target& d_ref) const {
    interruptible_for(name, 0, c.N, rows_per_task(c.V), [&](int64_t begin, int64_t end, Watch&) {
      const KlKeptRows kept(narrow, c.V, true, d_logits.layout && !d_ref.layout);
      for (int64_t n = begin; n < end; ++n) {
        kl[n] = c.live(n) ? gradient_row(n, weight[n], kept.rows(), d_logits[n], d_ref[n]) : R(0);
        if (!c.live(n)) zero_rows(c, x.item, d_logits[n], d_ref[n]);
      }
    });
  }

  template <class R>
  void backward(const R* upstream, const KlRowOf<R>* saved, const Target& d_logits,
                const Target& d_ref) const {
    interruptible_for(name, 0, c.N, rows_per_task(c.V), [&](int64_t begin, int64_t end, Watch&) {
      for (int64_t n = begin; n < end; ++n) {
        if (c.live(n)) backward_row(n, upstream[n], saved[n], d_logits[n], d_ref[n]);
        else zero_rows(c, x.item, d_logits[n], d_ref[n]);
      }
    });
  }
  void backward(const char* op, const Tensor& grad, const Tensor& saved, const Target& d_logits,
                const Target& d_ref) const {
    const void* upstream = checked_numbers(op, "grad", grad, wide, c.N);
    const void* rows = checked_numbers(op, "saved", saved, wide, c.N * kKlSaved);
    if (wide)
      backward(static_cast<const double*>(upstream), static_cast<const DoubleRow*>(rows), d_logits,
               d_ref);
    else
      backward(static_cast<const float*>(upstream), static_cast<const KlRow*>(rows), d_logits,
               d_ref);
  }
};

std::tuple<Tensor, Tensor> token_kl(Tensor logits, Tensor ref_logits, std::optional<Tensor> mask,
                                    FASTTAX_KL_OPTIONS) {
  const RowWork work("token_kl", logits, ref_logits, mask, {FASTTAX_KL_VALUES});
  std::vector<int64_t> sizes = sizes_of(logits, logits.dim() - 1);
  Tensor kl = torch::stable::empty(sizes, work.result_type());
  sizes.push_back(kKlSaved);
  Tensor saved = torch::stable::empty(sizes, work.result_type());
  void *values = kl.mutable_data_ptr(), *rows = saved.mutable_data_ptr();
  if (work.wide) work.forward(static_cast<double*>(values), static_cast<DoubleRow*>(rows));
  else work.forward(static_cast<float*>(values), static_cast<KlRow*>(rows));
  return {kl, saved};
}

// The tokens' weights are known: each row's gradient is written while the row is in cache. Bytes
// per cell: 2 reads, 1 write.
std::tuple<Tensor, Tensor, Tensor> token_kl_grad(Tensor token_weight, Tensor logits,
                                                 Tensor ref_logits, std::optional<Tensor> mask,
                                                 FASTTAX_KL_OPTIONS, bool need_policy,
                                                 bool need_ref) {
  const char* op = "token_kl_grad";
  const RowWork work(op, logits, ref_logits, mask, {FASTTAX_KL_VALUES});
  const void* weight = checked_numbers(op, "token_weight", token_weight, work.wide, work.c.N);
  Target to_logits, to_ref;
  const Tensor d_logits = gradient_buffer(logits, need_policy, to_logits);
  const Tensor d_ref = gradient_buffer(logits, need_ref, to_ref);
  Tensor kl = torch::stable::empty(sizes_of(logits, logits.dim() - 1), work.result_type());
  void* values = kl.mutable_data_ptr();
  if (work.wide)
    work.gradient(static_cast<double*>(values), static_cast<const double*>(weight), to_logits,
                  to_ref);
  else
    work.gradient(static_cast<float*>(values), static_cast<const float*>(weight), to_logits,
                  to_ref);
  return {kl, d_logits, d_ref};
}

// Gradients for both rows in one sweep; the one not asked for comes back empty.
std::tuple<Tensor, Tensor> token_kl_backward(Tensor grad, Tensor logits, Tensor ref_logits,
                                             std::optional<Tensor> mask, Tensor saved,
                                             FASTTAX_KL_OPTIONS, bool need_policy, bool need_ref) {
  const char* op = "token_kl_backward";
  const RowWork work(op, logits, ref_logits, mask, {FASTTAX_KL_VALUES});
  Target to_logits, to_ref;
  const Tensor d_logits = gradient_buffer(logits, need_policy, to_logits);
  const Tensor d_ref = gradient_buffer(logits, need_ref, to_ref);
  work.backward(op, grad, saved, to_logits, to_ref);
  return {d_logits, d_ref};
}

// The policy's gradient over the policy's logits, row by row as each is read for the last time.
Tensor token_kl_backward_(Tensor grad, Tensor logits, Tensor ref_logits, std::optional<Tensor> mask,
                          Tensor saved, FASTTAX_KL_OPTIONS, bool need_ref) {
  const char* op = "token_kl_backward_";
  const RowWork work(op, logits, ref_logits, mask, {FASTTAX_KL_VALUES});
  Target to_logits{Layout(logits)}, to_ref;
  const Tensor d_ref = gradient_buffer(logits, need_ref, to_ref);
  work.backward(op, grad, saved, to_logits, to_ref);
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
