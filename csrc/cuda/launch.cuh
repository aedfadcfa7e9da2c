#pragma once

#include <cuda_runtime.h>

#include <cstdint>

// What the launchers of lists of tensors share.
namespace fasttax {

// Whether kernels take 32 764 bytes of arguments here, a question to the driver: with a library
// built by CUDA 12.1 or later, drivers of CUDA 12.0 (R525) load its kernels of 4 KB alone.
inline bool large_arguments() {
  static const bool known = [] {
    int version = 0;
    return cudaDriverGetVersion(&version) == cudaSuccess && version >= 12010;
  }();
  return known;
}

// Launches a kernel on a stream: null, or CUDA's words for what failed.
struct Launcher {
  void* stream;  // cudaStream_t

  template <class Kernel, class... Args>
  const char* operator()(int64_t blocks, int threads, Kernel* kernel, const Args&... args) const {
    if (blocks == 0) return nullptr;
    kernel<<<dim3(unsigned(blocks)), dim3(unsigned(threads)), 0,
             static_cast<cudaStream_t>(stream)>>>(args...);
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
  }
};

}  // namespace fasttax
