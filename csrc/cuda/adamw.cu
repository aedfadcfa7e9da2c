#include "adamw.h"

#include "adamw.cuh"
#include "launch.cuh"

namespace fasttax {

int64_t adamw_workspace(const AdamWTensor* tensors, int64_t count) {
  return adamw_total_chunks(tensors, count);
}

const char* adamw_launch(const AdamWLaunch& x) {
  return adamw_call(x, large_arguments(), Launcher{x.stream});
}

}  // namespace fasttax
