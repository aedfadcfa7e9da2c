#include "launch.cuh"
#include "weigh.cuh"

namespace fasttax {
namespace {

int64_t token_blocks(int64_t n) { return (n + kWeighThreads - 1) / kWeighThreads; }

// Starts the kernel of float's or of double's arguments.
template <class Kernel>
const char* start(const WeighLaunch& x, int64_t blocks, int threads, Kernel* narrow, Kernel* wide) {
  return Launcher{x.stream}(blocks, threads, x.wide ? wide : narrow, x.args);
}

template <class T>
const char* scale(const ScaleArgs& args, int multiprocessors, void* stream) {
  const int64_t items = scale_items<T>(args), most = int64_t(multiprocessors) * kScaleBlocksPerSm;
  return Launcher{stream}(items < most ? items : most, kScaleThreads, scale_held_kernel<T>, args);
}

}  // namespace

const char* weigh_forward(const WeighLaunch& x) {
  if (x.args.output_count == 0) return nullptr;
  if (x.args.reduction != Reduction::kNone)
    return start(x, x.args.output_count, kWeighSumThreads, weigh_sum_kernel<float>,
                 weigh_sum_kernel<double>);
  if (x.args.n == 0) return nullptr;
  return start(x, token_blocks(x.args.n), kWeighThreads, weigh_tokens_kernel<float>,
               weigh_tokens_kernel<double>);
}

const char* weigh_backward(const WeighLaunch& x) {
  if (x.args.n == 0) return nullptr;
  return start(x, token_blocks(x.args.n), kWeighThreads, weigh_backward_kernel<float>,
               weigh_backward_kernel<double>);
}

const char* weigh_weights(const WeighLaunch& x) {
  if (x.args.n == 0) return nullptr;
  return start(x, token_blocks(x.args.n), kWeighThreads, weigh_weights_kernel<float>,
               weigh_weights_kernel<double>);
}

const char* scale_held(FloatType type, const ScaleArgs& args, void* stream) {
  if (args.rows == 0 || args.width == 0) return nullptr;
  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return cuda_words(error);
  switch (type) {
    case FloatType::kFloat: return scale<float>(args, multiprocessors, stream);
    case FloatType::kBFloat16: return scale<__nv_bfloat16>(args, multiprocessors, stream);
    case FloatType::kFloat16: return scale<__half>(args, multiprocessors, stream);
    case FloatType::kDouble: return scale<double>(args, multiprocessors, stream);
  }
  return nullptr;
}

}  // namespace fasttax
