#include "ewc.h"

#include "ewc.cuh"
#include "launch.cuh"

namespace fasttax {

int64_t ewc_workspace(const EwcTensor* tensors, int64_t count) {
  return ewc_total_chunks(tensors, count);
}

const char* ewc_launch(const EwcLaunch& x) {
  return ewc_call(x, large_arguments(), Launcher{x.stream});
}

}  // namespace fasttax
