// A row of numbers as it lies: its type chosen, its entries widened.
#include "../math/types.h"

#if defined(FASTTAX_ISA)  // isa.h: once per instruction set
namespace fasttax {
namespace FASTTAX_ISA_NS {

// f(p) with p as what `type` says that it is.
template <class F>
inline void typed(FloatType type, const void* p, F&& f) {
  switch (type) {
    case FloatType::kBFloat16: f(static_cast<const BFloat16*>(p)); break;
    case FloatType::kFloat16: f(static_cast<const Float16*>(p)); break;
    default: f(static_cast<const float*>(p));
  }
}

template <class T>
inline void widen_row(const T* src, int64_t n, float* dst) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(dst + i, load(src + i));
  for (; i < n; ++i) dst[i] = to_float(src[i]);
}

template <class T>
inline void narrow_row(const float* src, int64_t n, T* dst) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(dst + i, load(src + i));
  if (i < n) store(dst + i, load(src + i, n - i, 0.0f), n - i);
}

// Pairs of a row of n bfloat16, which are one word each as they lie, with a zero for the last one's
// partner.
inline void bf16x2_of(const BFloat16* src, int64_t n, float* dst) {
  if (n % 2 != 0) dst[n / 2] = 0;
  std::memcpy(dst, src, size_t(n) * sizeof(BFloat16));
}

}  // namespace FASTTAX_ISA_NS
}  // namespace fasttax
#endif
