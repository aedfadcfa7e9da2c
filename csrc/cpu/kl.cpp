// token_kl on the CPU: rows are shared out among the threads, a row pair is read once (jsd twice) and nothing of
// size N x V is written but the gradient. Passes over memory: forward 2, backward 3; both at once (token_kl_grad) 3.
#include "../check.h"
#include "memory.h"

namespace fasttax {

enum class KlKind : int64_t { kPolicyRef = 0, kRefPolicy = 1, kJsd = 2 };
enum class LogitType { kFloat, kBFloat16, kFloat16, kDouble };

struct KlParams {
  KlKind kind;
  bool plain;     // same scale on both rows, no softcap, no inf mask: the fast frame
  bool inf_mask;  // drop entries where either row is -inf
  float beta;
  float scale, ref_scale;          // inside the softcap
  float cap, ref_cap;              // 0: none
  float row_scale, ref_row_scale;  // from frame units to tempered logits
  float row_slope, ref_row_slope;  // d tempered / d raw (times 1 - tanh^2 under a softcap)
};

}  // namespace fasttax

#define FASTTAX_KERNELS "kl_kernels.h"
#include "isa.h"
#include "kl_double.h"

namespace fasttax {
namespace {

constexpr int64_t kStats = 8;
static_assert(sizeof(KlRow) == kStats * sizeof(float), "stats holds one KlRow a token");

// Addresses of the rows of a tensor (..., V) whose last stride is 1 and whose leading strides are free: the shifted
// logits[:, :-1] of a language model are read where they lie. 64-bit throughout.
struct Rows {
  char* base;
  int64_t item;
  std::vector<int64_t> sizes, strides;

  explicit Rows(const Tensor& t) : base(static_cast<char*>(const_cast<void*>(t.const_data_ptr()))), item(element_size(t.scalar_type())) {
    for (int64_t d = 0; d + 1 < t.dim(); ++d) {
      sizes.push_back(t.size(d));
      strides.push_back(t.stride(d));
    }
  }
  void* operator[](int64_t row) const {
    int64_t offset = 0;
    for (size_t d = sizes.size(); d-- > 0;) {
      offset += row % sizes[d] * strides[d];
      row /= sizes[d];
    }
    return base + offset * item;
  }
};

struct Call {
  LogitType type;
  int64_t N = 1, V;
  KlParams k;
  const bool* mask;  // nullptr: every token counts
};

Call prepare(const char* op, const Tensor& logits, const Tensor& ref_logits, const std::optional<Tensor>& mask, int64_t kind, double beta,
             double scale, double ref_scale, double softcap, double ref_softcap, double inv_temperature, double ref_inv_temperature,
             bool inf_mask) {
  FASTTAX_CHECK(logits.dim() >= 1 && logits.dim() == ref_logits.dim(), op,
                "logits and ref_logits: expected the same number of dimensions, at least 1");
  Call c;
  for (int64_t d = 0; d < logits.dim(); ++d) {
    FASTTAX_CHECK(logits.size(d) == ref_logits.size(d), op, "ref_logits: size ", ref_logits.size(d), " in dimension ", d, ", expected ",
                  logits.size(d), " as in logits");
    if (d + 1 < logits.dim()) c.N *= logits.size(d);
  }
  c.V = logits.size(logits.dim() - 1);
  FASTTAX_CHECK(c.V >= 1, op, "logits: the vocabulary (last dimension) is empty");
  FASTTAX_CHECK(c.V == 1 || (logits.stride(logits.dim() - 1) == 1 && ref_logits.stride(ref_logits.dim() - 1) == 1), op,
                "logits and ref_logits: the last dimension must be contiguous");
  FASTTAX_CHECK(logits.scalar_type() == ref_logits.scalar_type(), op, "logits and ref_logits must have one dtype");
  FASTTAX_CHECK(kind >= 0 && kind <= 2, op, "kind must be 0, 1 or 2, got ", kind);
  switch (logits.scalar_type()) {
    case ScalarType::Float: c.type = LogitType::kFloat; break;
    case ScalarType::BFloat16: c.type = LogitType::kBFloat16; break;
    case ScalarType::Half: c.type = LogitType::kFloat16; break;
    case ScalarType::Double: c.type = LogitType::kDouble; break;
    default: FASTTAX_CHECK(false, op, "logits: dtype must be float32, float64, bfloat16 or float16");
  }
  c.mask = nullptr;
  if (mask.has_value()) {
    FASTTAX_CHECK(mask->scalar_type() == ScalarType::Bool && mask->is_contiguous() && mask->numel() == c.N, op,
                  "mask: expected a contiguous bool tensor of ", c.N, " elements");
    c.mask = static_cast<const bool*>(mask->const_data_ptr());
  }
  KlParams& k = c.k;
  k.kind = static_cast<KlKind>(kind);
  k.inf_mask = inf_mask;
  k.beta = float(beta);
  k.scale = float(scale);
  k.ref_scale = float(ref_scale);
  k.cap = float(softcap);
  k.ref_cap = float(ref_softcap);
  k.row_scale = float(softcap > 0 ? inv_temperature : scale * inv_temperature);
  k.ref_row_scale = float(ref_softcap > 0 ? ref_inv_temperature : ref_scale * ref_inv_temperature);
  k.row_slope = float(scale * inv_temperature);
  k.ref_row_slope = float(ref_scale * ref_inv_temperature);
  k.plain = !inf_mask && k.cap == 0 && k.ref_cap == 0 && k.row_scale == k.ref_row_scale;
  return c;
}

int64_t rows_per_task(int64_t V) { return std::max<int64_t>(1, 32768 / V); }

std::vector<int64_t> sizes_of(const Tensor& t, int64_t dims) {
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d < dims; ++d) sizes.push_back(t.size(d));
  return sizes;
}

// One call's rows: forward and backward of row n, in whichever of the two precisions the logits ask for.
struct RowWork {
  const Call& c;
  DoubleParams wide_params;
  Rows x, y;
  bool wide;

  RowWork(const Call& call, const Tensor& logits, const Tensor& ref_logits, const DoubleParams& params)
      : c(call), wide_params(params), x(logits), y(ref_logits), wide(call.type == LogitType::kDouble) {}

  ScalarType result_type() const { return wide ? ScalarType::Double : ScalarType::Float; }
  bool live(int64_t n) const { return !c.mask || c.mask[n]; }

  void forward(int64_t n, void* kl, void* stats) const {
    if (wide) {
      double* row = static_cast<double*>(stats) + n * kStats;
      if (!live(n)) std::fill(row, row + kStats, 0.0);
      static_cast<double*>(kl)[n] =
          live(n) ? kl_double_forward(static_cast<double*>(x[n]), static_cast<double*>(y[n]), c.V, wide_params, row) : 0.0;
    } else {
      KlRow row{};
      static_cast<float*>(kl)[n] = live(n) ? FASTTAX_DISPATCH(kl_forward, c.type, x[n], y[n], c.V, c.k, row) : 0.0f;
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
                         static_cast<const double*>(stats) + n * kStats, static_cast<const double*>(upstream)[n], static_cast<double*>(dx),
                         static_cast<double*>(dy));
    } else {
      KlRow row;
      std::memcpy(&row, static_cast<const float*>(stats) + n * kStats, sizeof row);
      FASTTAX_DISPATCH(kl_backward, c.type, x[n], y[n], c.V, c.k, row, static_cast<const float*>(upstream)[n], dx, dy);
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
    FASTTAX_CHECK(t.scalar_type() == result_type() && t.is_contiguous() && t.numel() == numel, op, name, ": expected a contiguous ",
                  wide ? "float64" : "float32", " tensor of ", numel, " elements");
    return t.const_data_ptr();
  }
};

// Where a gradient goes: nothing, or rows of its own strides (in place: those of the logits themselves).
struct Target {
  std::optional<Rows> rows;
  void* operator[](int64_t n) const { return rows ? (*rows)[n] : nullptr; }
};

Tensor gradient_buffer(const Tensor& logits, bool need, Target& target) {
  const Tensor d = torch::stable::empty(need ? sizes_of(logits, logits.dim()) : std::vector<int64_t>{0}, logits.scalar_type());
  prefer_huge_pages(d);
  if (need) target.rows.emplace(d);
  return d;
}

#define FASTTAX_KL_OPTIONS                                                                                               \
  int64_t kind, double beta, double scale, double ref_scale, double softcap, double ref_softcap, double inv_temperature, \
      double ref_inv_temperature, bool inf_mask
#define FASTTAX_KL_CALL(op)                                                                                                 \
  const Call c = prepare(op, logits, ref_logits, mask, kind, beta, scale, ref_scale, softcap, ref_softcap, inv_temperature, \
                         ref_inv_temperature, inf_mask);                                                                    \
  const RowWork work(c, logits, ref_logits,                                                                                 \
                     {kind, inf_mask, beta, scale, ref_scale, softcap, ref_softcap, inv_temperature, ref_inv_temperature})

std::tuple<Tensor, Tensor> token_kl(Tensor logits, Tensor ref_logits, std::optional<Tensor> mask, FASTTAX_KL_OPTIONS) {
  FASTTAX_KL_CALL("token_kl");
  return work.forward_rows(logits, [](int64_t, const void*) {});
}

// The tokens' weights are known: each row's gradient is written while the row is in cache. Bytes per cell: 2 reads, 1 write.
std::tuple<Tensor, Tensor, Tensor> token_kl_grad(Tensor token_weight, Tensor logits, Tensor ref_logits, std::optional<Tensor> mask,
                                                 FASTTAX_KL_OPTIONS, bool need_policy, bool need_ref) {
  FASTTAX_KL_CALL("token_kl_grad");
  const void* upstream = work.checked("token_kl_grad", "token_weight", token_weight, c.N);
  Target to_logits, to_ref;
  const Tensor d_logits = gradient_buffer(logits, need_policy, to_logits), d_ref = gradient_buffer(logits, need_ref, to_ref);
  const auto kl = std::get<0>(
      work.forward_rows(logits, [&](int64_t n, const void* stats) { work.backward(n, upstream, stats, to_logits[n], to_ref[n]); }));
  return {kl, d_logits, d_ref};
}

void backward(const char* op, const RowWork& work, const Tensor& grad, const Tensor& stats, const Target& d_logits, const Target& d_ref) {
  const void *upstream = work.checked(op, "grad", grad, work.c.N), *kept = work.checked(op, "stats", stats, work.c.N * kStats);
  torch::stable::parallel_for(0, work.c.N, rows_per_task(work.c.V), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) work.backward(n, upstream, kept, d_logits[n], d_ref[n]);
  });
}

// Gradients for both rows in one sweep; the one not asked for comes back empty.
std::tuple<Tensor, Tensor> token_kl_backward(Tensor grad, Tensor logits, Tensor ref_logits, std::optional<Tensor> mask, Tensor stats,
                                             FASTTAX_KL_OPTIONS, bool need_policy, bool need_ref) {
  FASTTAX_KL_CALL("token_kl_backward");
  Target to_logits, to_ref;
  const Tensor d_logits = gradient_buffer(logits, need_policy, to_logits), d_ref = gradient_buffer(logits, need_ref, to_ref);
  backward("token_kl_backward", work, grad, stats, to_logits, to_ref);
  return {d_logits, d_ref};
}

// The policy's gradient over the policy's logits, row by row as each is read for the last time.
Tensor token_kl_backward_(Tensor grad, Tensor logits, Tensor ref_logits, std::optional<Tensor> mask, Tensor stats, FASTTAX_KL_OPTIONS,
                          bool need_ref) {
  FASTTAX_KL_CALL("token_kl_backward_");
  Target to_logits{Rows(logits)}, to_ref;
  const Tensor d_ref = gradient_buffer(logits, need_ref, to_ref);
  backward("token_kl_backward_", work, grad, stats, to_logits, to_ref);
  return d_ref;
}

}  // namespace
}  // namespace fasttax

STABLE_TORCH_LIBRARY_IMPL(fasttax, CPU, m) {
  m.impl("token_kl", TORCH_BOX(&fasttax::token_kl));
  m.impl("token_kl_grad", TORCH_BOX(&fasttax::token_kl_grad));
  m.impl("token_kl_backward", TORCH_BOX(&fasttax::token_kl_backward));
  m.impl("token_kl_backward_", TORCH_BOX(&fasttax::token_kl_backward_));
}
