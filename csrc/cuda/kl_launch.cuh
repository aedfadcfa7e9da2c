#pragma once

// What the launchers share: the device's limits, and kernels started for a type and an op.

#include "kl.cuh"
#include "launch.cuh"

namespace fasttax {

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
  if (!cuda_can(kl_allow_shared(kernel, shared_bytes))) return false;
  if (cluster > 8 &&
      !cuda_can(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1)))
    return false;
  const KlConfig launch(blocks, shared_bytes, cluster);
  int clusters = 0;
  return cuda_can(cudaOccupancyMaxActiveClusters(&clusters, kernel, &launch.config)) &&
         clusters > 0;
}

// Starts kernel(args) in `blocks`; cluster > 1: in clusters of so many.
inline const char* kl_start(void (*kernel)(KlArgs), dim3 blocks, size_t shared_bytes,
                            const KlLaunch& x, int cluster = 1) {
  const cudaError_t error = kl_allow_shared(kernel, shared_bytes);
  if (error != cudaSuccess) return cuda_words(error);
  KlConfig launch(blocks, shared_bytes, cluster);
  launch.config.stream = static_cast<cudaStream_t>(x.stream);
  return cuda_words(cudaLaunchKernelEx(&launch.config, kernel, x.args));
}

}  // namespace fasttax
