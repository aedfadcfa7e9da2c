// The driver's functions that torch's libcaffe2_nvrtc.so wants to find in libcuda.so.1, whose name
// this library has too. Contexts are there; what compiles, loads and launches by the driver is not.
#include "fake_cuda.h"

namespace {
constexpr int kNotSupported = 801;
char contexts[fake::kDevices];
}  // namespace

FAKE_CUDA int cuCtxGetCurrent(void** context) {
  *context = &contexts[fake::current()];
  return 0;
}
FAKE_CUDA int cuCtxSetCurrent(void*) { return 0; }
FAKE_CUDA int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return 0;
}
FAKE_CUDA int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) {
  *flags = 0, *active = 1;
  return 0;
}
FAKE_CUDA int cuDevicePrimaryCtxRetain(void** context, int device) {
  *context = &contexts[device];
  return 0;
}
FAKE_CUDA int cuGetErrorString(int, const char** text) {
  *text = "the fake driver has no such function";
  return 0;
}

#define FAKE_CUDA_ABSENT(name) \
  FAKE_CUDA int name() { return kNotSupported; }
FAKE_CUDA_ABSENT(cuDeviceGetAttribute)
FAKE_CUDA_ABSENT(cuFuncGetAttribute)
FAKE_CUDA_ABSENT(cuFuncSetAttribute)
FAKE_CUDA_ABSENT(cuFuncSetCacheConfig)
FAKE_CUDA_ABSENT(cuLaunchCooperativeKernel)
FAKE_CUDA_ABSENT(cuLaunchKernel)
FAKE_CUDA_ABSENT(cuLinkAddData_v2)
FAKE_CUDA_ABSENT(cuLinkComplete)
FAKE_CUDA_ABSENT(cuLinkCreate_v2)
FAKE_CUDA_ABSENT(cuModuleGetFunction)
FAKE_CUDA_ABSENT(cuModuleLoad)
FAKE_CUDA_ABSENT(cuModuleLoadData)
FAKE_CUDA_ABSENT(cuModuleLoadDataEx)
FAKE_CUDA_ABSENT(cuModuleUnload)
FAKE_CUDA_ABSENT(cuOccupancyMaxActiveBlocksPerMultiprocessor)
FAKE_CUDA_ABSENT(cuPointerGetAttribute)
FAKE_CUDA_ABSENT(cuTensorMapEncodeTiled)
