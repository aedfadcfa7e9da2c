// CUDA's runtime as the launchers of csrc/cuda call it, without a GPU: kernels register, and a
// launch is handed to Python (tests/gpu/ptx/cuda.py), which runs it on the machine. Declared here
// and not included, so that one source does for every toolkit; linked into one library with the
// launchers, whose calls of it never leave that.
#include <cstdint>
#include <cstring>
#include <string>
#include <unordered_map>
#include <vector>

namespace {

struct Dim3 {
  unsigned x, y, z;
};
struct Attribute {  // cudaLaunchAttribute: a value of 64 bytes behind its id
  int id;
  char pad[4];
  unsigned value[16];
};
struct Config {  // cudaLaunchConfig_t
  Dim3 grid, block;
  size_t shared_bytes;
  void* stream;
  Attribute* attributes;
  unsigned count;
};
struct Kernel {
  std::string name, module;
  size_t allowed = 48 << 10;  // bytes of dynamic shared memory
  bool large_clusters = false;
};
struct Call {
  Dim3 grid, block;
  size_t shared_bytes;
  void* stream;
};
// What of a GPU a launcher asks for.
struct Device {
  int multiprocessors, block_limit, sm_limit, major, minor, driver;
};
using OnLaunch = int (*)(const char* kernel, const char* module, const unsigned* geometry,
                         size_t shared_bytes, void** arguments);

constexpr int kInvalidValue = 1, kUnknown = 999, kClusterDimension = 4;
constexpr int kMaxDynamicShared = 8, kLargeClusters = 14;  // cudaFuncAttribute

std::unordered_map<const void*, Kernel>& kernels() {
  static std::unordered_map<const void*, Kernel> all;
  return all;
}
std::vector<Call> calls;
Device device{132, 232448, 233472, 9, 0, 13000};
OnLaunch on_launch = nullptr;

// The text of a module's PTX, which lies uncompressed among what nvcc embeds.
std::string text_of(const void* data) {
  uint64_t bytes;
  memcpy(&bytes, static_cast<const char*>(data) + 8, 8);
  const std::string all(static_cast<const char*>(data), bytes + 16);
  const size_t begin = all.find("\n.version");
  return begin == std::string::npos ? "" : all.c_str() + begin;
}

int launch(const void* function, const Dim3& grid, const Dim3& block, size_t shared_bytes,
           void** arguments, unsigned cluster) {
  const auto found = kernels().find(function);
  if (found == kernels().end() || !on_launch) return kUnknown;
  const Kernel& kernel = found->second;
  const bool fits = uint64_t(block.x) * block.y * block.z <= 1024 &&
                    shared_bytes <= kernel.allowed && grid.x > 0 && grid.y > 0 && grid.z > 0 &&
                    grid.x < 1u << 31 && grid.y < 65536 && grid.z < 65536 &&
                    grid.x % cluster == 0 && cluster <= (kernel.large_clusters ? 16 : 8);
  if (!fits) return kInvalidValue;
  const unsigned geometry[] = {grid.x, grid.y, grid.z, block.x, block.y, block.z, cluster};
  return on_launch(kernel.name.c_str(), kernel.module.c_str(), geometry, shared_bytes, arguments);
}

}  // namespace

extern "C" {

#define OPEN __attribute__((visibility("default")))

OPEN void ptx_set_device(const Device* to) { device = *to; }
OPEN void ptx_set_launch(OnLaunch to) { on_launch = to; }

// Called for each tensor that the torch side makes (torch_side.h).
void (*ptx_made)(void* data, uint64_t bytes, int grain, int written) = nullptr;
OPEN void ptx_set_made(void (*to)(void*, uint64_t, int, int)) { ptx_made = to; }

void** __cudaRegisterFatBinary(void* wrapper) {
  void* data;
  memcpy(&data, static_cast<char*>(wrapper) + 8, 8);
  return reinterpret_cast<void**>(new std::string(text_of(data)));
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void** module, const char* function, char*, const char* name, int,
                            void*, void*, void*, void*, int*) {
  kernels()[function] = {name, *reinterpret_cast<std::string*>(module)};
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

unsigned __cudaPushCallConfiguration(Dim3 grid, Dim3 block, size_t shared_bytes, void* stream) {
  calls.push_back({grid, block, shared_bytes, stream});
  return 0;
}
int __cudaPopCallConfiguration(Dim3* grid, Dim3* block, size_t* shared_bytes, void* stream) {
  const Call call = calls.back();
  calls.pop_back();
  *grid = call.grid, *block = call.block, *shared_bytes = call.shared_bytes;
  memcpy(stream, &call.stream, sizeof(void*));
  return 0;
}
int __cudaGetKernel(const void** kernel, const void* function) {
  *kernel = function;
  return 0;
}
int __cudaLaunchKernel(const void* kernel, Dim3 grid, Dim3 block, void** arguments,
                       size_t shared_bytes, void*) {
  return launch(kernel, grid, block, shared_bytes, arguments, 1);
}
int cudaLaunchKernel(const void* function, Dim3 grid, Dim3 block, void** arguments,
                     size_t shared_bytes, void*) {
  return launch(function, grid, block, shared_bytes, arguments, 1);
}
int cudaLaunchKernelExC(const Config* config, const void* function, void** arguments) {
  unsigned cluster = 1;
  for (unsigned k = 0; k < config->count; ++k)
    if (config->attributes[k].id == kClusterDimension) cluster = config->attributes[k].value[0];
  return launch(function, config->grid, config->block, config->shared_bytes, arguments, cluster);
}
int cudaFuncSetAttribute(const void* function, int attribute, int value) {
  const auto found = kernels().find(function);
  if (found == kernels().end()) return kUnknown;
  if (attribute == kMaxDynamicShared) {
    if (value > device.block_limit) return kInvalidValue;
    found->second.allowed = size_t(value);
  }
  if (attribute == kLargeClusters) found->second.large_clusters = value != 0;
  return 0;
}
int cudaOccupancyMaxActiveClusters(int* clusters, const void*, const Config*) {
  *clusters = 1;
  return 0;
}
int cudaGetDevice(int* number) {
  *number = 0;
  return 0;
}
int cudaDeviceGetAttribute(int* value, int attribute, int) {
  switch (attribute) {
    case 16: *value = device.multiprocessors; return 0;
    case 75: *value = device.major; return 0;
    case 76: *value = device.minor; return 0;
    case 81: *value = device.sm_limit; return 0;
    case 97: *value = device.block_limit; return 0;
    default: return kInvalidValue;
  }
}
int cudaDriverGetVersion(int* version) {
  *version = device.driver;
  return 0;
}
int cudaGetLastError() { return 0; }
const char* cudaGetErrorString(int error) {
  return error == kInvalidValue ? "invalid argument" : "a fault on the PTX machine";
}

}  // extern "C"
