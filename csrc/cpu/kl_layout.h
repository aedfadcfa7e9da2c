#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "../call/kl_call.h"
#include "memory.h"

// What the ops over logits share on the CPU: where rows lie, and where gradients go.
namespace fasttax {

// The layout of a tensor (..., V) whose last stride is 1 and whose leading strides are free: the
// shifted logits[:, :-1] of a language model are read where they lie. 64-bit throughout.
struct Layout {
  char* base;
  int64_t item;
  std::vector<int64_t> sizes, strides;

  explicit Layout(const Tensor& t)
      : base(static_cast<char*>(const_cast<void*>(t.const_data_ptr()))),
        item(element_size(t.scalar_type())) {
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

inline int64_t rows_per_task(int64_t V) { return std::max<int64_t>(1, 32768 / V); }

// Where a gradient goes: nothing, or rows of its own layout (in place: that of the logits
// themselves).
struct Target {
  std::optional<Layout> layout;
  void* operator[](int64_t n) const { return layout ? (*layout)[n] : nullptr; }
};

inline Tensor gradient_buffer(const Tensor& logits, bool need, Target& target) {
  const Tensor d = recycled_empty(need ? sizes_of(logits, logits.dim()) : std::vector<int64_t>{0},
                                  logits.scalar_type());
  if (need) target.layout.emplace(d);
  return d;
}

// What a row without a gradient gets.
inline void zero_rows(const Call& c, int64_t item, void* dx, void* dy) {
  if (dx) std::memset(dx, 0, size_t(c.V * item));
  if (dy) std::memset(dy, 0, size_t(c.V * item));
}

// The numbers of an argument that a kernel reads as they lie.
inline const void* checked_numbers(const char* op, const char* name, const Tensor& t, bool wide,
                                   int64_t numel) {
  FASTTAX_CHECK(t.scalar_type() == (wide ? ScalarType::Double : ScalarType::Float) &&
                    t.is_contiguous() && t.numel() == numel,
                op, name, ": expected a contiguous ", wide ? "float64" : "float32", " tensor of ",
                numel, " elements");
  return t.const_data_ptr();
}

}  // namespace fasttax
