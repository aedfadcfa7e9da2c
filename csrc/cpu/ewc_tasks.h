#pragma once

#include <algorithm>
#include <vector>

#include "../math/ewc_types.h"

// A list of tensors cut into pieces for the threads, as ewc.cpp and fisher_squares.cpp walk them.
namespace fasttax {

constexpr int64_t kEwcTask = 1 << 16;  // elements; a multiple of 256, the u8log block

struct EwcTask : EwcTensor {
  int64_t begin, end;
};

inline std::vector<EwcTask> ewc_tasks(const std::vector<EwcTensor>& tensors) {
  std::vector<EwcTask> tasks;
  for (const EwcTensor& x : tensors)
    for (int64_t begin = 0; begin < x.numel; begin += kEwcTask)
      tasks.push_back({x, begin, std::min(x.numel, begin + kEwcTask)});
  return tasks;
}

}  // namespace fasttax
