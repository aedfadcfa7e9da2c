// token_kl and token_stats on CUDA tensors, torch's side: check, allocate, find the stream, call
// the launchers. float64, which is there for gradcheck, goes to the reference.
#include "../call/kl_call.h"
#include "../math/kl_types.h"
#include "kl.h"
#include "launch_torch.h"

namespace fasttax {
namespace {

// --- arguments

// Rows of a tensor whose last stride is 1, neighbouring dimensions folded into one where their
// strides allow; false: more than kKlDims are left.
bool layout_of(const Tensor& t, KlLayout& rows) {
  const int64_t item = element_size(t.scalar_type());
  rows = KlLayout{};
  rows.base = static_cast<char*>(const_cast<void*>(t.const_data_ptr()));
  for (int64_t d = 0; d + 1 < t.dim(); ++d) {
    const int64_t size = t.size(d), stride = t.stride(d) * item;
    if (size == 1) continue;
    if (rows.dims > 0 && rows.strides[rows.dims - 1] == size * stride) {
      rows.sizes[rows.dims - 1] *= size;
      rows.strides[rows.dims - 1] = stride;
      continue;
    }
    if (rows.dims == kKlDims) return false;
    rows.sizes[rows.dims] = size;
    rows.strides[rows.dims++] = stride;
  }
  return true;
}

Tensor with_layout(const Tensor& t, KlLayout& rows) {  // t, or a contiguous copy of it
  if (layout_of(t, rows)) return t;
  const Tensor copy = torch::stable::contiguous(t);
  layout_of(copy, rows);
  return copy;
}

void check_place(const char* op, const char* name, const Tensor& t, const Tensor& logits) {
  FASTTAX_CHECK(t.is_cuda() && t.get_device_index() == logits.get_device_index(), op, name,
                ": must be on the device of logits");
}

const float* checked(const char* op, const char* name, const Tensor& t, int64_t numel,
                     const Tensor& logits) {
  FASTTAX_CHECK(t.scalar_type() == ScalarType::Float && t.is_contiguous() && t.numel() == numel, op,
                name, ": expected a contiguous float32 tensor of ", numel, " elements");
  check_place(op, name, t, logits);
  return static_cast<const float*>(t.const_data_ptr());
}

struct Work {
  const char* op;
  KlLaunch launch{};
  // kept until the launches are queued; torch's allocator orders reuse by stream
  Tensor x, y, parts, tickets;
  const Tensor &logits, &ref_logits;

  Work(const char* name, KlOp what, const Call& c, const Tensor& policy, const Tensor& ref,
       const std::optional<Tensor>& mask)
      : op(name), logits(policy), ref_logits(ref) {
    check_place(op, "logits", policy, policy);
    check_place(op, "ref_logits", ref, policy);
    if (mask.has_value()) check_place(op, "mask", *mask, policy);
    FASTTAX_CHECK(c.N < (int64_t(1) << 27) && c.V < (int64_t(1) << 28), op,
                  "logits: more than 2^27 tokens or 2^28 words in one call; split the batch");
    launch.op = what;
    launch.type = c.type == c.ref_type ? c.type : FloatType::kFloat;
    KlArgs& a = launch.args;
    a.x_type = c.type, a.y_type = c.ref_type;
    x = with_layout(policy, a.x);
    y = with_layout(ref, a.y);
    a.mask = c.mask;
    a.k = kl_params<float>(c.options);
    if (what == kl_op(KlKind::kJsd)) a.jsd = JsdCurves(c.options.beta);
    if (a.k.joint_cap) a.cap = CapCurves(c.options.scale, c.options.softcap);
    a.set_size(c.N, c.V);
  }

  Tensor fresh(const std::vector<int64_t>& sizes, ScalarType type = ScalarType::Float) const {
    return torch::stable::new_empty(logits, sizes, type);
  }

  // Room for the gradient of `of`, one of the two.
  Tensor target(const Tensor& of, bool need, KlLayout& rows) const {
    const Tensor d =
        fresh(need ? sizes_of(of, of.dim()) : std::vector<int64_t>{0}, of.scalar_type());
    if (need) layout_of(d, rows);
    return d;
  }

  void start(const char* (*launcher)(const KlLaunch&)) {
    if (launch.args.n == 0) return;
    launch_on(op, logits, [&](void* stream) {
      launch.stream = stream;
      return launcher(launch);
    });
  }

  void forward() {
    const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
    if (launch.args.n == 0) return;
    int64_t floats = 0, rows = 0;
    const char* failed = kl_plan(launch, floats, rows);
    FASTTAX_CHECK(failed == nullptr, op,
                  "CUDA does not tell of its device: ", failed ? failed : "");
    if (rows > 0) {
      parts = fresh({floats});
      tickets = torch::stable::new_zeros(logits, {rows}, ScalarType::Int);
      launch.args.parts = static_cast<float*>(parts.mutable_data_ptr());
      launch.args.tickets = static_cast<uint32_t*>(tickets.mutable_data_ptr());
    }
    start(kl_forward);
  }

  void then(const char* (*launcher)(const KlLaunch&)) {
    const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
    start(launcher);
  }
};

// The op's PyTorch reference, which is registered beside it as _reference_<op>.
template <int results, class... Arguments>
std::array<Tensor, results> reference(const char* op, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(arguments)> stack{torch::stable::detail::from(arguments)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher((std::string("fasttax::_reference_") + op).c_str(),
                                               "", stack.data(), TORCH_ABI_VERSION));
  std::array<Tensor, results> out;
  for (int i = 0; i < results; ++i)
    out[size_t(i)] = torch::stable::detail::to<Tensor>(stack[size_t(i)]);
  return out;
}

bool is_double(const Tensor& logits) { return logits.scalar_type() == ScalarType::Double; }

// --- token_kl

Work kl_work(const char* op, const Tensor& logits, const Tensor& ref_logits,
             const std::optional<Tensor>& mask, const KlOptions& options) {
  const Call call = checked_call(op, logits, ref_logits, mask, options, true);
  return Work(op, kl_op(KlKind(options.kind)), call, logits, ref_logits, mask);
}

std::tuple<Tensor, Tensor> token_kl(Tensor logits, Tensor ref_logits, std::optional<Tensor> mask,
                                    FASTTAX_KL_OPTIONS) {
  if (is_double(logits)) {
    const auto out = reference<2>("token_kl", logits, ref_logits, mask, FASTTAX_KL_VALUES);
    return {out[0], out[1]};
  }
  Work work = kl_work("token_kl", logits, ref_logits, mask, {FASTTAX_KL_VALUES});
  std::vector<int64_t> sizes = sizes_of(logits, logits.dim() - 1);
  Tensor kl = work.fresh(sizes);
  sizes.push_back(kKlSaved);
  Tensor saved = work.fresh(sizes);
  work.launch.args.values = static_cast<float*>(kl.mutable_data_ptr());
  work.launch.args.saved = static_cast<float*>(saved.mutable_data_ptr());
  work.forward();
  return {kl, saved};
}

void kl_backward(Work& work, const Tensor& grad, const Tensor& saved) {
  KlArgs& a = work.launch.args;
  a.upstream = checked(work.op, "grad", grad, a.n, work.logits);
  a.saved = const_cast<float*>(checked(work.op, "saved", saved, a.n * kKlSaved, work.logits));
  if (a.dx.base || a.dy.base) work.then(kl_gradient);
}

std::tuple<Tensor, Tensor> token_kl_backward(Tensor grad, Tensor logits, Tensor ref_logits,
                                             std::optional<Tensor> mask, Tensor saved,
                                             FASTTAX_KL_OPTIONS, bool need_policy, bool need_ref) {
  if (is_double(logits)) {
    const auto out = reference<2>("token_kl_backward", grad, logits, ref_logits, mask, saved,
                                  FASTTAX_KL_VALUES, need_policy, need_ref);
    return {out[0], out[1]};
  }
  Work work = kl_work("token_kl_backward", logits, ref_logits, mask, {FASTTAX_KL_VALUES});
  const Tensor d_logits = work.target(logits, need_policy, work.launch.args.dx),
               d_ref = work.target(ref_logits, need_ref, work.launch.args.dy);
  kl_backward(work, grad, saved);
  return {d_logits, d_ref};
}

Tensor token_kl_backward_(Tensor grad, Tensor logits, Tensor ref_logits, std::optional<Tensor> mask,
                          Tensor saved, FASTTAX_KL_OPTIONS, bool need_ref) {
  if (is_double(logits))
    return reference<1>("token_kl_backward_", grad, logits, ref_logits, mask, saved,
                        FASTTAX_KL_VALUES, need_ref)[0];
  Work work = kl_work("token_kl_backward_", logits, ref_logits, mask, {FASTTAX_KL_VALUES});
  FASTTAX_CHECK(layout_of(logits, work.launch.args.dx), work.op, "logits: more than ", kKlDims,
                " dimensions with strides of their own; pass inplace_backward=False");
  const Tensor d_ref = work.target(ref_logits, need_ref, work.launch.args.dy);
  kl_backward(work, grad, saved);
  return d_ref;
}

std::tuple<Tensor, Tensor, Tensor> token_kl_grad(Tensor token_weight, Tensor logits,
                                                 Tensor ref_logits, std::optional<Tensor> mask,
                                                 FASTTAX_KL_OPTIONS, bool need_policy,
                                                 bool need_ref) {
  if (is_double(logits)) {
    const auto out = reference<3>("token_kl_grad", token_weight, logits, ref_logits, mask,
                                  FASTTAX_KL_VALUES, need_policy, need_ref);
    return {out[0], out[1], out[2]};
  }
  // two launches where one has no kernel: the reference's gradient, rows of two types, and float16,
  // which a scaler's users ask for in backward
  const bool no_kernel =
      logits.scalar_type() != ref_logits.scalar_type() || logits.scalar_type() == ScalarType::Half;
  if (need_ref || !need_policy || no_kernel) {
    const auto [kl, saved] = token_kl(logits, ref_logits, mask, FASTTAX_KL_VALUES);
    const auto [d_logits, d_ref] = token_kl_backward(token_weight, logits, ref_logits, mask, saved,
                                                     FASTTAX_KL_VALUES, need_policy, need_ref);
    return {kl, d_logits, d_ref};
  }
  Work work = kl_work("token_kl_grad", logits, ref_logits, mask, {FASTTAX_KL_VALUES});
  KlArgs& a = work.launch.args;
  Tensor kl = work.fresh(sizes_of(logits, logits.dim() - 1));
  const Tensor d_logits = work.target(logits, true, a.dx),
               d_ref = work.target(ref_logits, false, a.dy);
  a.upstream = checked(work.op, "token_weight", token_weight, a.n, logits);
  a.values = static_cast<float*>(kl.mutable_data_ptr());
  work.then(kl_both);
  return {kl, d_logits, d_ref};
}

// --- token_stats

Work stats_work(const char* op, const Tensor& logits, const std::optional<Tensor>& ref_logits,
                const std::optional<Tensor>& ids, const std::optional<Tensor>& mask,
                FASTTAX_STATS_OPTIONS) {
  const bool pair = ref_logits.has_value();
  const Tensor& ref = pair ? *ref_logits : logits;
  const Call call =
      checked_call(op, logits, ref, mask, stats_options(pair, FASTTAX_STATS_VALUES), true);
  Work work(op, pair ? KlOp::kStats : KlOp::kAlone, call, logits, ref, mask);
  if (ids.has_value()) {
    FASTTAX_CHECK(ids->scalar_type() == ScalarType::Long && ids->is_contiguous() &&
                      ids->numel() == work.launch.args.n,
                  op, "ids: expected a contiguous int64 tensor of ", work.launch.args.n,
                  " elements");
    check_place(op, "ids", *ids, logits);
    work.launch.args.ids = static_cast<const int64_t*>(ids->const_data_ptr());
  }
  return work;
}

std::tuple<Tensor, Tensor> token_stats(Tensor logits, std::optional<Tensor> ref_logits,
                                       std::optional<Tensor> ids, std::optional<Tensor> mask,
                                       FASTTAX_STATS_OPTIONS) {
  if (is_double(logits)) {
    const auto out =
        reference<2>("token_stats", logits, ref_logits, ids, mask, FASTTAX_STATS_VALUES);
    return {out[0], out[1]};
  }
  Work work = stats_work("token_stats", logits, ref_logits, ids, mask, FASTTAX_STATS_VALUES);
  std::vector<int64_t> sizes = sizes_of(logits, logits.dim() - 1), values_sizes = sizes;
  values_sizes.insert(values_sizes.begin(), kTokenStats);
  sizes.push_back(kStatsSaved);
  Tensor values = work.fresh(values_sizes), saved = work.fresh(sizes);
  work.launch.args.values = static_cast<float*>(values.mutable_data_ptr());
  work.launch.args.saved = static_cast<float*>(saved.mutable_data_ptr());
  work.forward();
  return {values, saved};
}

std::tuple<Tensor, Tensor> token_stats_backward(Tensor grads, Tensor logits,
                                                std::optional<Tensor> ref_logits,
                                                std::optional<Tensor> ids,
                                                std::optional<Tensor> mask, Tensor saved,
                                                FASTTAX_STATS_OPTIONS, bool need_policy,
                                                bool need_ref) {
  if (is_double(logits)) {
    const auto out = reference<2>("token_stats_backward", grads, logits, ref_logits, ids, mask,
                                  saved, FASTTAX_STATS_VALUES, need_policy, need_ref);
    return {out[0], out[1]};
  }
  const char* op = "token_stats_backward";
  FASTTAX_CHECK(ref_logits.has_value() || !need_ref, op, "need_ref: there is no reference");
  Work work = stats_work(op, logits, ref_logits, ids, mask, FASTTAX_STATS_VALUES);
  KlArgs& a = work.launch.args;
  a.upstream = checked(op, "grads", grads, a.n * kTokenStats, logits);
  a.saved = const_cast<float*>(checked(op, "saved", saved, a.n * kStatsSaved, logits));
  const Tensor d_logits = work.target(logits, need_policy, a.dx),
               d_ref = work.target(work.ref_logits, need_ref, a.dy);
  if (need_policy || need_ref) work.then(kl_gradient);
  return {d_logits, d_ref};
}

}  // namespace
}  // namespace fasttax

STABLE_TORCH_LIBRARY_IMPL(fasttax, CUDA, m) {
  m.impl("token_kl", TORCH_BOX(&fasttax::token_kl));
  m.impl("token_kl_grad", TORCH_BOX(&fasttax::token_kl_grad));
  m.impl("token_kl_backward", TORCH_BOX(&fasttax::token_kl_backward));
  m.impl("token_kl_backward_", TORCH_BOX(&fasttax::token_kl_backward_));
  m.impl("token_stats", TORCH_BOX(&fasttax::token_stats));
  m.impl("token_stats_backward", TORCH_BOX(&fasttax::token_stats_backward));
}
