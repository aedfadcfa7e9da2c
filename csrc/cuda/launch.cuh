#pragma once

#include <cuda_runtime.h>

#include <cstdint>

// What all launchers share: a launch on a stream, and what is said of one that failed.
namespace fasttax {

// Null, or CUDA's words for what failed, with a way out where this GPU or its driver can't run the
// library as it was built. The error is taken from the runtime, which would hand it to whoever asks
// for the last one next.
inline const char* cuda_words(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();
  switch (error) {
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
      return "no kernel image is available for execution on the device: the library was built for "
             "other GPUs; build it with this one's compute capability in TORCH_CUDA_ARCH_LIST, or "
             "set FASTTAX_BACKEND to triton or reference";
    case cudaErrorInsufficientDriver:
    case cudaErrorUnsupportedPtxVersion:
    case cudaErrorJitCompilerNotFound:
      return "the driver is older than the CUDA that the library was built by, or lacks its "
             "compiler of PTX; install a newer driver, or set FASTTAX_BACKEND to triton or "
             "reference";
    default: return cudaGetErrorString(error);
  }
}

// Whether a question was answered; the answer no leaves no error behind.
inline bool cuda_can(cudaError_t error) { return cuda_words(error) == nullptr; }

// Whether kernels take 32 764 bytes of arguments here, a question to the driver: with a library
// built by CUDA 12.1 or later, drivers of CUDA 12.0 (R525) load its kernels of 4 KB alone.
inline bool large_arguments() {
  static const bool known = [] {
    int version = 0;
    return cuda_can(cudaDriverGetVersion(&version)) && version >= 12010;
  }();
  return known;
}

// Launches a kernel on a stream: null, or words for what failed.
struct Launcher {
  void* stream;  // cudaStream_t

  template <class... Takes, class... Args>
  const char* operator()(int64_t blocks, int threads, void (*kernel)(Takes...),
                         const Args&... args) const {
    if (blocks == 0) return nullptr;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(unsigned(blocks));
    config.blockDim = dim3(unsigned(threads));
    config.stream = static_cast<cudaStream_t>(stream);
    return cuda_words(cudaLaunchKernelEx(&config, kernel, args...));
  }
};

}  // namespace fasttax
