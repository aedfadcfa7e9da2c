#pragma once

// A CUDA runtime without a GPU, for the tests of launches: what torch and csrc/cuda ask of
// libcudart, answered from this process and written down. Preloaded, it stands in for
// libcudart.so.13: torch's own allocator, streams, guards and graphs then work on "devices" whose
// memory is the host's.
//
// What it refuses is what CUDA refuses: grids, blocks, shared memory, clusters and arguments beyond
// the device's limits, streams of another device than the current one, and in a stream that is
// captured all that waits or allocates. Kernels do not run, but for those that
// include/cuda_runtime.h hands to the SIMT machine. Nothing here knows of time, or of an order
// between streams.

#include <cuda_runtime_api.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#define FAKE_CUDA extern "C" __attribute__((visibility("default")))

namespace fake {

constexpr int kDevices = 2;

struct Limits {  // of an H100
  int multiprocessors = 132, major = 9, minor = 0;
  int block_shared = 232448, sm_shared = 233472, largest_cluster = 16;
};

struct Stream {
  int device = 0;
  struct Graph* captured = nullptr;  // what its calls are kept in
};

struct Event {
  int device = 0;
  struct Graph* captured = nullptr;
};

struct Graph {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
  unsigned long long id = 0;
  std::set<Stream*> streams;
};

struct Range {
  size_t bytes = 0;
  int device = -1;  // -1: pinned memory of the host
};

struct Kernel {
  std::string name;
  int shared = 48 * 1024;  // dynamic bytes that it may be launched with
  bool any_cluster = false;
};

struct World {
  std::recursive_mutex mutex;
  Limits limits;
  int driver = 13000;  // FAKE_CUDA_DRIVER
  std::vector<std::string> log;
  std::map<uintptr_t, Range> memory;
  std::unordered_map<const void*, const char*> registered;  // by nvcc's code
  std::unordered_map<const void*, Kernel*> kernels;
  Stream legacy[kDevices];
  std::set<Graph*> capturing;
  unsigned long long captures = 0;
  std::string fail_call;  // a call of this name, or with this in its record, fails
  cudaError_t fail_error = cudaSuccess;
  int fail_after = 0;      // so many are let go
  int64_t run_blocks = 0;  // the last ones of a grid, which the SIMT machine runs
};

World& world();
int& current();  // device, of this thread
// Leaves it as the last error of this thread.
cudaError_t say(cudaError_t error);
// Writes {"call": call, "device": ..., <rest>}; the planted error, where this call has one.
cudaError_t note(const char* call, const std::string& rest = "");
// The error of a call that is not to be made while a stream is captured.
cudaError_t unsafe(const char* call);
Stream& stream_of(cudaStream_t handle);
const Range* range_of(const void* pointer);
std::string quoted(const std::string& text);

}  // namespace fake
