#pragma once

// What the launchers share: the device's limits, and kernels started for a type and an op.

#include "kl.cuh"

namespace fasttax {

inline const char* kl_words(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

struct KlDevice {
  int multiprocessors = 0, block_limit = 0, sm_limit = 0, major = 0;
  cudaError_t error;

  KlDevice() {
    int device = 0;
    error = cudaGetDevice(&device);
    const auto ask = [&](int& value, cudaDeviceAttr attribute) {
      if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, attribute, device);
    };
    ask(multiprocessors, cudaDevAttrMultiProcessorCount);
    ask(block_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin);
    ask(sm_limit, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    ask(major, cudaDevAttrComputeCapabilityMajor);
  }
};

// Calls start(entry type) for the logits' type; float64 does not come here.
template <class Start>
const char* kl_with_type(FloatType type, Start&& start) {
  switch (type) {
    case FloatType::kFloat: return start(float());
    case FloatType::kBFloat16: return start(__nv_bfloat16());
    case FloatType::kFloat16: return start(__half());
    default: return "float64 logits have no CUDA kernel";
  }
}

template <KlOp op>
using KlOpIs = std::integral_constant<KlOp, op>;

template <class Start>
const char* kl_with_op(KlOp op, Start&& start) {
  if (op == KlOp::kStats) return start(KlOpIs<KlOp::kStats>());
  if (op == KlOp::kAlone) return start(KlOpIs<KlOp::kAlone>());
  return with_kind(kl_kind(op), [&](auto kind) -> const char* {
    return start(KlOpIs<kl_op(decltype(kind)::value)>());
  });
}

// What a launch in clusters of `cluster` blocks asks for.
struct KlConfig {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute attribute = {};

  KlConfig(dim3 blocks, size_t shared_bytes, int cluster) {
    config.gridDim = blocks;
    config.blockDim = dim3(kKlThreads);
    config.dynamicSmemBytes = shared_bytes;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = unsigned(cluster);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.attrs = &attribute;
    config.numAttrs = cluster > 1 ? 1 : 0;
  }
  KlConfig(const KlConfig&) = delete;
};

inline cudaError_t kl_allow_shared(void (*kernel)(KlArgs), size_t bytes) {
  if (bytes <= 48 * 1024) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
}

// Whether the device holds one such cluster at all. Of more than 8 blocks it is not promised.
inline bool kl_cluster_fits(void (*kernel)(KlArgs), dim3 blocks, size_t shared_bytes, int cluster) {
  if (cluster == 1) return true;
  if (kl_allow_shared(kernel, shared_bytes) != cudaSuccess) return false;
  if (cluster > 8 && cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed,
                                          1) != cudaSuccess) {
    cudaGetLastError();  // taken back: the launch that follows is another
    return false;
  }
  const KlConfig launch(blocks, shared_bytes, cluster);
  int clusters = 0;
  if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &launch.config) == cudaSuccess)
    return clusters > 0;
  cudaGetLastError();
  return false;
}

// Starts kernel(args) in `blocks`; cluster > 1: in clusters of so many.
inline const char* kl_start(void (*kernel)(KlArgs), dim3 blocks, size_t shared_bytes,
                            const KlLaunch& x, int cluster = 1) {
  const cudaError_t error = kl_allow_shared(kernel, shared_bytes);
  if (error != cudaSuccess) return kl_words(error);
  KlConfig launch(blocks, shared_bytes, cluster);
  launch.config.stream = static_cast<cudaStream_t>(x.stream);
  return kl_words(cudaLaunchKernelEx(&launch.config, kernel, x.args));
}

}  // namespace fasttax
