// EWC over a run of elements of one tensor. Everything is staged to float in blocks of 256 that stay in L1
// (a float operand is used where it lies), so one loop serves every mix of dtypes: at 20 bytes an element the
// loop waits for memory (48 cycles per 16 elements at 23 GB/s a core), and a conversion costs 5 of them.
namespace fasttax {
namespace FASTTAX_ISA_NS {

struct Operand {
  void* data;
  EwcType type;
  const float* scales;  // u8log: (lo, step) per 256 elements
};

constexpr int64_t kStage = 256;

template <class T>
inline void widen(const T* src, int64_t n, float* dst) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(dst + i, load(src + i));
  for (; i < n; ++i) dst[i] = to_float(src[i]);
}

// fisher = 2^(lo + step * (code - 1)), code 0 is 0
inline void decode_u8log(const uint8_t* codes, const float* scale, int64_t n, float* dst) {
  constexpr float kLn2 = 0.693147180559945f;
  for (int64_t i = 0; i < n; i += kLanes) {
    VF code{};
    const int64_t k = std::min<int64_t>(kLanes, n - i);
    for (int64_t j = 0; j < k; ++j) code[j] = codes[i + j];
    const VF value = exp(fma(code - 1.0f, splat(scale[1]), splat(scale[0])) * kLn2);
    store(dst + i, code == 0.0f ? splat(0.0f) : value, k);
  }
}

// The n <= 256 elements from `start` (a multiple of 256) as floats: in place, or in `buffer`.
inline const float* stage(const Operand& x, int64_t start, int64_t n, float* buffer) {
  switch (x.type) {
    case EwcType::kFloat: return static_cast<const float*>(x.data) + start;
    case EwcType::kBFloat16: widen(static_cast<const BFloat16*>(x.data) + start, n, buffer); return buffer;
    case EwcType::kFloat16: widen(static_cast<const Float16*>(x.data) + start, n, buffer); return buffer;
    default: decode_u8log(static_cast<const uint8_t*>(x.data) + start, x.scales + start / kStage * 2, n, buffer); return buffer;
  }
}

template <class T>
inline void narrow(const float* src, int64_t n, T* dst) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(dst + i, load(src + i));
  if (i < n) store(dst + i, load(src + i, n - i, 0.0f), n - i);
}

inline void unstage(const Operand& x, int64_t start, int64_t n, const float* buffer) {
  switch (x.type) {
    case EwcType::kBFloat16: narrow(buffer, n, static_cast<BFloat16*>(x.data) + start); break;
    case EwcType::kFloat16: narrow(buffer, n, static_cast<Float16*>(x.data) + start); break;
    default: break;  // float was written in place
  }
}

// grad += scale * fisher * (theta - anchor)   [kAdd]     grad = the same   [kWrite]     value only   [kValue]
// Returns sum fisher * (theta - anchor)^2 of the run.
template <EwcMode mode>
inline double ewc_run(const Operand& theta, const Operand& anchor, const Operand& fisher, const Operand& grad, int64_t begin, int64_t end,
                      float scale) {
  alignas(64) float tb[kStage], ab[kStage], fb[kStage], gb[kStage];
  double total = 0;
  for (int64_t start = begin; start < end; start += kStage) {
    const int64_t n = std::min(kStage, end - start);
    const float* t = stage(theta, start, n, tb);
    const float* a = stage(anchor, start, n, ab);
    const float* f = stage(fisher, start, n, fb);
    float* g = gb;
    if (mode == EwcMode::kAdd) g = const_cast<float*>(stage(grad, start, n, gb));
    if (mode == EwcMode::kWrite && grad.type == EwcType::kFloat) g = static_cast<float*>(grad.data) + start;
    VF acc0{}, acc1{};
    int64_t i = 0;
    auto step = [&](int64_t at, VF& acc) {
      const VF tv = load(t + at), av = load(a + at), fv = load(f + at);
      const VF pull = ewc_pull(tv, av, fv);
      acc = fma(pull, tv - av, acc);
      if (mode == EwcMode::kAdd) store(g + at, fma(pull, splat(scale), load(g + at)));
      if (mode == EwcMode::kWrite) store(g + at, pull * scale);
    };
    for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
      step(i, acc0);
      step(i + kLanes, acc1);
    }
    double tail = 0;
    for (; i < n; ++i) {
      const float pull = ewc_pull(t[i], a[i], f[i]);
      tail += double(pull) * (t[i] - a[i]);
      if (mode == EwcMode::kAdd) g[i] += scale * pull;
      if (mode == EwcMode::kWrite) g[i] = scale * pull;
    }
    total += sum(acc0 + acc1) + tail;
    if (mode != EwcMode::kValue) unstage(grad, start, n, g);
  }
  return total;
}

inline void ewc_prox_run(const Operand& theta, const Operand& anchor, const Operand& fisher, int64_t begin, int64_t end, float step) {
  alignas(64) float tb[kStage], ab[kStage], fb[kStage];
  for (int64_t start = begin; start < end; start += kStage) {
    const int64_t n = std::min(kStage, end - start);
    float* t = const_cast<float*>(stage(theta, start, n, tb));
    const float* a = stage(anchor, start, n, ab);
    const float* f = stage(fisher, start, n, fb);
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(t + i, ewc_prox(load(t + i), load(a + i), load(f + i), splat(step), splat(1.0f)));
    for (; i < n; ++i) t[i] = ewc_prox(t[i], a[i], f[i], step, 1.0f);
    unstage(theta, start, n, t);
  }
}

inline double ewc_task(EwcMode mode, const void* const* data, const EwcType* types, const float* scales, int64_t begin, int64_t end,
                       float scale) {
  Operand x[4];
  for (int k = 0; k < 4; ++k) x[k] = {const_cast<void*>(data[k]), types[k], k == 2 ? scales : nullptr};
  switch (mode) {
    case EwcMode::kValue: return ewc_run<EwcMode::kValue>(x[0], x[1], x[2], x[3], begin, end, scale);
    case EwcMode::kAdd: return ewc_run<EwcMode::kAdd>(x[0], x[1], x[2], x[3], begin, end, scale);
    case EwcMode::kWrite: return ewc_run<EwcMode::kWrite>(x[0], x[1], x[2], x[3], begin, end, scale);
    default: ewc_prox_run(x[0], x[1], x[2], begin, end, scale); return 0;
  }
}

}  // namespace FASTTAX_ISA_NS
}  // namespace fasttax
