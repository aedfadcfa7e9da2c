// Devices, memory, copies and errors.
#include "fake_cuda.h"

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>

namespace fake {

World& world() {
  static World* one = [] {
    auto* made = new World;
    if (const char* driver = getenv("FAKE_CUDA_DRIVER")) made->driver = atoi(driver);
    for (int d = 0; d < kDevices; ++d) made->legacy[d].device = d;
    return made;
  }();
  return *one;
}

int& current() {
  static thread_local int device = 0;
  return device;
}

namespace {
thread_local cudaError_t last = cudaSuccess;
thread_local cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;

void* reserve(size_t bytes, int device) {  // costs no memory before it is written
  const size_t whole = (bytes + 4095) / 4096 * 4096;
  void* at = mmap(nullptr, whole, PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED) return nullptr;
  world().memory[uintptr_t(at)] = {whole, device};
  return at;
}

cudaError_t give_back(void* at) {
  const auto found = world().memory.find(uintptr_t(at));
  if (found == world().memory.end()) return say(cudaErrorInvalidValue);
  munmap(at, found->second.bytes);
  world().memory.erase(found);
  return cudaSuccess;
}
}  // namespace

cudaError_t say(cudaError_t error) {
  if (error != cudaSuccess) last = error;
  return error;
}

std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    out += c;
  }
  return out + '"';
}

cudaError_t note(const char* call, const std::string& rest) {
  World& w = world();
  const std::lock_guard<std::recursive_mutex> lock(w.mutex);
  w.log.push_back("{\"call\": " + quoted(call) + ", \"device\": " + std::to_string(current()) +
                  ", \"capturing\": " + (w.capturing.empty() ? "false" : "true") +
                  (rest.empty() ? "" : ", " + rest) + "}");
  const bool here =
      !w.fail_call.empty() && (w.fail_call == call || rest.find(w.fail_call) != std::string::npos);
  if (!here || w.fail_after-- > 0) return cudaSuccess;
  w.fail_call.clear();
  return say(w.fail_error);
}

cudaError_t unsafe(const char* call) {
  World& w = world();
  if (mode != cudaStreamCaptureModeRelaxed)
    for (const Graph* graph : w.capturing)
      if (graph->mode != cudaStreamCaptureModeRelaxed) {
        note("refused", "\"what\": " + quoted(call));
        return say(cudaErrorStreamCaptureUnsupported);
      }
  return note(call);
}

const Range* range_of(const void* pointer) {
  World& w = world();
  auto next = w.memory.upper_bound(uintptr_t(pointer));
  if (next == w.memory.begin()) return nullptr;
  --next;
  return uintptr_t(pointer) < next->first + next->second.bytes ? &next->second : nullptr;
}

}  // namespace fake

using namespace fake;

// --- what the tests ask

FAKE_CUDA void fake_cuda_clear() {
  const std::lock_guard<std::recursive_mutex> lock(world().mutex);
  world().log.clear();
}

FAKE_CUDA void fake_cuda_reset() {
  fake_cuda_clear();
  World& w = world();
  w.limits = Limits();
  w.fail_call.clear();
  w.run_blocks = 0;
  last = cudaSuccess;
}

FAKE_CUDA const char* fake_cuda_log() {
  World& w = world();
  const std::lock_guard<std::recursive_mutex> lock(w.mutex);
  static std::string all;
  all.clear();
  for (const std::string& line : w.log) all += line + "\n";
  return all.c_str();
}

FAKE_CUDA void fake_cuda_limits(int multiprocessors, int major, int block_shared, int sm_shared,
                                int largest_cluster) {
  world().limits = {multiprocessors, major, 0, block_shared, sm_shared, largest_cluster};
}

// A call of this name, or with these words in its record, fails, after so many that do not.
FAKE_CUDA void fake_cuda_fail(const char* call, int error, int after) {
  World& w = world();
  w.fail_call = call, w.fail_error = cudaError_t(error), w.fail_after = after;
}

// How many blocks of each launch of csrc/cuda's kernels run on the SIMT machine: the last ones
// along x, of which no fewer than a cluster. None while a graph is captured.
FAKE_CUDA void fake_cuda_run(int64_t blocks) { world().run_blocks = blocks; }

FAKE_CUDA int64_t fake_cuda_blocks() {
  const World& w = world();
  return w.capturing.empty() ? w.run_blocks : 0;
}

// --- devices

FAKE_CUDA cudaError_t cudaGetDeviceCount(int* count) {
  *count = 0;
  if (world().driver < 12000) return say(cudaErrorInsufficientDriver);
  *count = kDevices;
  return cudaSuccess;
}

FAKE_CUDA cudaError_t cudaGetDevice(int* device) {
  *device = current();
  return cudaSuccess;
}

FAKE_CUDA cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= kDevices) return say(cudaErrorInvalidDevice);
  current() = device;
  return cudaSuccess;
}

FAKE_CUDA cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  const Limits& limits = world().limits;
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = limits.multiprocessors; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = limits.block_shared; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = limits.sm_shared; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 48 * 1024; break;
    case cudaDevAttrComputeCapabilityMajor: *value = limits.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = limits.minor; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrMaxGridDimX: *value = 0x7fffffff; break;
    default: *value = 0;
  }
  return note("cudaDeviceGetAttribute", "\"of\": " + std::to_string(device));
}

FAKE_CUDA cudaError_t cudaGetDeviceProperties(cudaDeviceProp* out, int) {
  const Limits& limits = world().limits;
  memset(static_cast<void*>(out), 0, sizeof(*out));
  strcpy(out->name, "fake GPU");
  out->major = limits.major, out->minor = limits.minor;
  out->multiProcessorCount = limits.multiprocessors;
  out->warpSize = 32;
  out->maxThreadsPerBlock = 1024, out->maxThreadsPerMultiProcessor = 2048;
  out->maxGridSize[0] = 0x7fffffff, out->maxGridSize[1] = out->maxGridSize[2] = 65535;
  out->sharedMemPerBlock = 48 * 1024;
  out->sharedMemPerBlockOptin = size_t(limits.block_shared);
  out->sharedMemPerMultiprocessor = size_t(limits.sm_shared);
  out->totalGlobalMem = size_t(80) << 30;
  out->regsPerBlock = out->regsPerMultiprocessor = 65536;
  return cudaSuccess;
}

FAKE_CUDA cudaError_t cudaDriverGetVersion(int* version) {
  *version = world().driver;
  return cudaSuccess;
}

FAKE_CUDA cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

FAKE_CUDA cudaError_t cudaDeviceGetPCIBusId(char* text, int, int) {
  strcpy(text, "0000:00:00.0");
  return cudaSuccess;
}

FAKE_CUDA cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
  *can = 0;
  return cudaSuccess;
}

FAKE_CUDA cudaError_t cudaDeviceSynchronize() { return unsafe("cudaDeviceSynchronize"); }

FAKE_CUDA cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned,
                                                       unsigned long long,
                                                       cudaDriverEntryPointQueryResult* found) {
  *function = nullptr;
  if (found) *found = cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

// --- errors

FAKE_CUDA cudaError_t cudaGetLastError() {
  const cudaError_t error = last;
  last = cudaSuccess;
  return error;
}

FAKE_CUDA cudaError_t cudaPeekAtLastError() { return last; }

FAKE_CUDA const char* cudaGetErrorName(cudaError_t) { return "cudaError"; }

FAKE_CUDA const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInvalidResourceHandle: return "invalid resource handle";
    case cudaErrorInsufficientDriver:
      return "CUDA driver version is insufficient for CUDA runtime version";
    case cudaErrorNoKernelImageForDevice:
      return "no kernel image is available for execution on the device";
    case cudaErrorLaunchOutOfResources: return "too many resources requested for launch";
    case cudaErrorStreamCaptureUnsupported:
      return "operation not permitted when stream is capturing";
    case cudaErrorIllegalAddress: return "an illegal memory access was encountered";
    default: return "an error of the fake CUDA";
  }
}

// --- memory

FAKE_CUDA cudaError_t cudaMalloc(void** out, size_t bytes) {
  if (const cudaError_t error = unsafe("cudaMalloc")) return error;
  *out = reserve(bytes, current());
  return *out ? cudaSuccess : say(cudaErrorMemoryAllocation);
}

FAKE_CUDA cudaError_t cudaFree(void* at) {
  if (!at) return cudaSuccess;
  if (const cudaError_t error = unsafe("cudaFree")) return error;
  return give_back(at);
}

FAKE_CUDA cudaError_t cudaHostAlloc(void** out, size_t bytes, unsigned) {
  if (const cudaError_t error = unsafe("cudaHostAlloc")) return error;
  *out = reserve(bytes, -1);
  return *out ? cudaSuccess : say(cudaErrorMemoryAllocation);
}

FAKE_CUDA cudaError_t cudaFreeHost(void* at) { return give_back(at); }

FAKE_CUDA cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  *free = *total = size_t(80) << 30;
  return cudaSuccess;
}

FAKE_CUDA cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* out, const void* pointer) {
  memset(static_cast<void*>(out), 0, sizeof(*out));
  const Range* range = range_of(pointer);
  out->type = !range              ? cudaMemoryTypeUnregistered
              : range->device < 0 ? cudaMemoryTypeHost
                                  : cudaMemoryTypeDevice;
  out->device = range && range->device >= 0 ? range->device : 0;
  out->devicePointer = out->hostPointer = const_cast<void*>(pointer);
  return cudaSuccess;
}

FAKE_CUDA cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  if (const cudaError_t error = unsafe("cudaMemcpy")) return error;
  memcpy(to, from, bytes);
  return cudaSuccess;
}

FAKE_CUDA cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                      cudaStream_t handle) {
  const Range* ends[] = {range_of(to), range_of(from)};
  const bool pageable = !ends[0] || !ends[1];
  const bool within = !pageable && ends[0]->device >= 0 && ends[0]->device == ends[1]->device;
  Stream& stream = stream_of(handle);
  // one that is captured would read memory that may be gone when the graph is replayed
  if (stream.captured && pageable) {
    note("refused", "\"what\": \"cudaMemcpyAsync of pageable memory\"");
    return say(cudaErrorStreamCaptureUnsupported);
  }
  if (const cudaError_t error =
          note("cudaMemcpyAsync", "\"stream\": " + std::to_string(uintptr_t(handle)) +
                                      ", \"bytes\": " + std::to_string(bytes) +
                                      ", \"pageable\": " + (pageable ? "true" : "false") +
                                      ", \"within\": " + (within ? "true" : "false")))
    return error;
  if (!stream.captured) memcpy(to, from, bytes);
  return cudaSuccess;
}

FAKE_CUDA cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  if (const cudaError_t error = unsafe("cudaMemset")) return error;
  memset(to, value, bytes);
  return cudaSuccess;
}

FAKE_CUDA cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t handle) {
  if (const cudaError_t error =
          note("cudaMemsetAsync", "\"stream\": " + std::to_string(uintptr_t(handle))))
    return error;
  if (!stream_of(handle).captured) memset(to, value, bytes);
  return cudaSuccess;
}

FAKE_CUDA cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* other) {
  std::swap(mode, *other);
  return cudaSuccess;
}
