#pragma once

// <cuda_runtime.h> to csrc/cuda's launchers where g++ compiles them for the fake CUDA: the C API is
// CUDA's own, and a kernel is a function that the SIMT machine runs.

#include <cuda_runtime_api.h>

#include <typeinfo>

#include "simt_cuda.h"

extern "C" void fake_cuda_arguments(size_t bytes, const char* types);
extern "C" int64_t fake_cuda_blocks();

template <class... Takes, class... Given>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Takes...),
                               Given&&... given) {
  fake_cuda_arguments((sizeof(Takes) + ... + 0), typeid(kernel).name());
  const cudaError_t error =
      cudaLaunchKernelExC(config, reinterpret_cast<const void*>(kernel), nullptr);
  const int64_t grid = config->gridDim.x, wanted = fake_cuda_blocks();
  if (error != cudaSuccess || wanted == 0) return error;
  const int cluster = config->numAttrs ? int(config->attrs[0].val.clusterDim.x) : 1;
  simt::machine().first = wanted < grid ? unsigned((grid - wanted) / cluster * cluster) : 0;
  simt::launch(
      config->gridDim, config->blockDim, config->dynamicSmemBytes, [&] { kernel(given...); },
      cluster);
  simt::machine().first = 0;
  return cudaSuccess;
}

template <class... Takes>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Takes...), cudaFuncAttribute attribute, int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}

template <class... Takes>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, void (*kernel)(Takes...),
                                           const cudaLaunchConfig_t* config) {
  return cudaOccupancyMaxActiveClusters(clusters, reinterpret_cast<const void*>(kernel), config);
}
