#include "fisher.h"

#include "fisher.cuh"
#include "launch.cuh"

namespace fasttax {

const char* square_launch(const EwcTensor* tensors, int64_t count, double weight, void* stream) {
  return square_call(tensors, count, weight, large_arguments(), Launcher{stream});
}

}  // namespace fasttax
