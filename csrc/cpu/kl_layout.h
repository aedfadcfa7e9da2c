#pragma once

// What the ops over logits share on the CPU: the addresses of rows, and where gradients go.
#include "../call/kl_call.h"
#include "memory.h"

namespace fasttax {

// Addresses of the rows of a tensor (..., V) whose last stride is 1 and whose leading strides are
// free: the shifted logits[:, :-1] of a language model are read where they lie. 64-bit throughout.
struct Rows {
  char* base;
  int64_t item;
  std::vector<int64_t> sizes, strides;

  explicit Rows(const Tensor& t)
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

// Where a gradient goes: nothing, or rows of its own strides (in place: those of the logits
// themselves).
struct Target {
  std::optional<Rows> rows;
  void* operator[](int64_t n) const { return rows ? (*rows)[n] : nullptr; }
};

inline Tensor gradient_buffer(const Tensor& logits, bool need, Target& target) {
  const Tensor d = recycled_empty(need ? sizes_of(logits, logits.dim()) : std::vector<int64_t>{0},
                                  logits.scalar_type());
  if (need) target.rows.emplace(d);
  return d;
}

}  // namespace fasttax
