// Kernels: what they are called, what they may be launched with, and their launches.
#include "fake_cuda.h"

#include <cxxabi.h>
#include <dlfcn.h>

#include <cstdlib>

using namespace fake;

namespace {

// How many bytes of arguments the launch that follows has; csrc/cuda's tell, torch's do not.
thread_local size_t argument_bytes = 0;
thread_local const char* argument_types = "";

std::string readable(const char* name) {
  int status = 0;
  char* text = abi::__cxa_demangle(name, nullptr, nullptr, &status);
  const std::string out = status == 0 ? text : name;
  free(text);
  return out;
}

Kernel& kernel_of(const void* function) {
  World& w = world();
  Kernel*& kernel = w.kernels[function];
  if (kernel) return *kernel;
  kernel = new Kernel;
  const auto found = w.registered.find(function);
  Dl_info info;
  if (found != w.registered.end()) kernel->name = readable(found->second);
  else if (dladdr(function, &info) && info.dli_sname && info.dli_saddr == function)
    kernel->name = readable(info.dli_sname);
  else kernel->name = readable(argument_types);  // one of internal linkage
  return *kernel;
}

cudaError_t launch(Kernel& kernel, dim3 grid, dim3 block, size_t shared, cudaStream_t handle,
                   unsigned cluster) {
  World& w = world();
  const Stream& stream = stream_of(handle);
  const size_t bytes = argument_bytes;
  argument_bytes = 0;
  const auto numbers = [](const dim3& of) {
    return "[" + std::to_string(of.x) + ", " + std::to_string(of.y) + ", " + std::to_string(of.z) +
           "]";
  };
  if (const cudaError_t error =
          note("launch", "\"kernel\": " + quoted(kernel.name) +
                             ", \"stream\": " + std::to_string(uintptr_t(handle)) +
                             ", \"grid\": " + numbers(grid) + ", \"block\": " + numbers(block) +
                             ", \"shared\": " + std::to_string(shared) + ", \"cluster\": " +
                             std::to_string(cluster) + ", \"arguments\": " + std::to_string(bytes)))
    return error;
  if (stream.device != current()) return say(cudaErrorInvalidResourceHandle);
  // the legacy stream waits for all others, those that are captured too
  if (uintptr_t(handle) == 0 && !w.capturing.empty()) return say(cudaErrorStreamCaptureImplicit);
  const size_t threads = size_t(block.x) * block.y * block.z;
  const bool fits = grid.x && grid.y && grid.z && grid.x <= 0x7fffffffu && grid.y <= 65535 &&
                    grid.z <= 65535 && threads && threads <= 1024 && block.z <= 64;
  if (!fits) return say(cudaErrorInvalidConfiguration);
  if (shared > size_t(kernel.shared)) return say(cudaErrorInvalidValue);
  if (bytes > (w.driver >= 12010 ? 32764u : 4096u)) return say(cudaErrorInvalidValue);
  const bool clusters = cluster == 1 || (w.limits.major >= 9 && grid.x % cluster == 0 &&
                                         int(cluster) <= w.limits.largest_cluster &&
                                         cluster <= (kernel.any_cluster ? 16u : 8u));
  return clusters ? cudaSuccess : say(cudaErrorInvalidConfiguration);
}

unsigned cluster_of(const cudaLaunchConfig_t& config) {
  for (unsigned i = 0; i < config.numAttrs; ++i)
    if (config.attrs[i].id == cudaLaunchAttributeClusterDimension)
      return config.attrs[i].val.clusterDim.x;
  return 1;
}

}  // namespace

FAKE_CUDA void fake_cuda_arguments(size_t bytes, const char* types) {
  argument_bytes = bytes;
  argument_types = types;
}

// --- what nvcc's code registers when it is loaded

FAKE_CUDA void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
FAKE_CUDA void __cudaRegisterFatBinaryEnd(void**) {}
FAKE_CUDA void __cudaUnregisterFatBinary(void**) {}
FAKE_CUDA void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
FAKE_CUDA char __cudaInitModule(void**) { return 0; }
FAKE_CUDA void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int,
                                      uint3*, uint3*, dim3*, dim3*, int*) {
  world().registered.emplace(host, name);
}

// --- launches

namespace {
thread_local cudaLaunchConfig_t pushed;
}

FAKE_CUDA unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared,
                                               CUstream_st* stream) {
  pushed.gridDim = grid, pushed.blockDim = block;
  pushed.dynamicSmemBytes = shared, pushed.stream = stream;
  return 0;
}
FAKE_CUDA cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared,
                                                 void* stream) {
  *grid = pushed.gridDim, *block = pushed.blockDim, *shared = pushed.dynamicSmemBytes;
  *static_cast<cudaStream_t*>(stream) = pushed.stream;
  return cudaSuccess;
}
FAKE_CUDA cudaError_t __cudaGetKernel(cudaKernel_t* out, const void* function) {
  *out = reinterpret_cast<cudaKernel_t>(&kernel_of(function));
  return cudaSuccess;
}
FAKE_CUDA cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void**,
                                         size_t shared, cudaStream_t stream) {
  return launch(*reinterpret_cast<Kernel*>(kernel), grid, block, shared, stream, 1);
}
FAKE_CUDA cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void**,
                                       size_t shared, cudaStream_t stream) {
  return launch(kernel_of(function), grid, block, shared, stream, 1);
}
FAKE_CUDA cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function,
                                          void**) {
  return launch(kernel_of(function), config->gridDim, config->blockDim, config->dynamicSmemBytes,
                config->stream, cluster_of(*config));
}

// --- what kernels may have

FAKE_CUDA cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute,
                                           int value) {
  Kernel& kernel = kernel_of(function);
  if (const cudaError_t error = note("cudaFuncSetAttribute", "\"value\": " + std::to_string(value)))
    return error;
  if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) kernel.any_cluster = value != 0;
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value > world().limits.block_shared) return say(cudaErrorInvalidValue);
  kernel.shared = value;
  return cudaSuccess;
}
FAKE_CUDA cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* out, const void*) {
  *out = cudaFuncAttributes();
  out->maxThreadsPerBlock = 1024;
  return cudaSuccess;
}
FAKE_CUDA cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks,
                                                                             const void*, int,
                                                                             size_t, unsigned) {
  *blocks = 1;
  return cudaSuccess;
}
FAKE_CUDA cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* function,
                                                     const cudaLaunchConfig_t* config) {
  const Limits& limits = world().limits;
  const int cluster = int(cluster_of(*config));
  if (config->dynamicSmemBytes > size_t(kernel_of(function).shared))
    return say(cudaErrorInvalidValue);
  *clusters = cluster <= limits.largest_cluster ? limits.multiprocessors / cluster : 0;
  return note("cudaOccupancyMaxActiveClusters");
}
