// Streams, events and graphs.
#include "fake_cuda.h"

#include <cstring>

namespace fake {

Stream& stream_of(cudaStream_t handle) {
  // 0, cudaStreamLegacy and cudaStreamPerThread are the device's own
  if (uintptr_t(handle) <= 2) return world().legacy[current()];
  return *reinterpret_cast<Stream*>(handle);
}

namespace {
std::string named(cudaStream_t handle) {
  return "\"stream\": " + std::to_string(uintptr_t(handle));
}

Graph* begin(Stream& stream, cudaStreamCaptureMode mode) {
  World& w = world();
  auto* graph = new Graph;
  graph->mode = mode;
  graph->id = ++w.captures;
  graph->streams.insert(&stream);
  stream.captured = graph;
  w.capturing.insert(graph);
  return graph;
}
}  // namespace

}  // namespace fake

using namespace fake;

// --- streams

FAKE_CUDA cudaError_t cudaStreamCreateWithPriority(cudaStream_t* out, unsigned, int) {
  auto* stream = new Stream;
  stream->device = current();
  *out = reinterpret_cast<cudaStream_t>(stream);
  return cudaSuccess;
}
FAKE_CUDA cudaError_t cudaStreamCreateWithFlags(cudaStream_t* out, unsigned flags) {
  return cudaStreamCreateWithPriority(out, flags, 0);
}
FAKE_CUDA cudaError_t cudaStreamCreate(cudaStream_t* out) {
  return cudaStreamCreateWithPriority(out, 0, 0);
}
FAKE_CUDA cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
FAKE_CUDA cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0, *greatest = -5;
  return cudaSuccess;
}
FAKE_CUDA cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) {
  *priority = 0;
  return cudaSuccess;
}

FAKE_CUDA cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  if (stream_of(handle).captured) {
    note("refused", "\"what\": \"cudaStreamSynchronize\"");
    return say(cudaErrorStreamCaptureUnsupported);
  }
  return note("cudaStreamSynchronize", named(handle));
}

FAKE_CUDA cudaError_t cudaStreamQuery(cudaStream_t handle) {
  return stream_of(handle).captured ? say(cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}

FAKE_CUDA cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event, unsigned) {
  Stream& stream = stream_of(handle);
  Graph* graph = reinterpret_cast<Event*>(event)->captured;
  if (graph && world().capturing.count(graph)) {  // it joins the capture
    stream.captured = graph;
    graph->streams.insert(&stream);
  }
  return note("cudaStreamWaitEvent",
              named(handle) + ", \"event\": " + std::to_string(uintptr_t(event)));
}

// --- events

FAKE_CUDA cudaError_t cudaEventCreateWithFlags(cudaEvent_t* out, unsigned) {
  auto* event = new Event;
  event->device = current();
  *out = reinterpret_cast<cudaEvent_t>(event);
  return cudaSuccess;
}
FAKE_CUDA cudaError_t cudaEventCreate(cudaEvent_t* out) { return cudaEventCreateWithFlags(out, 0); }
FAKE_CUDA cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete reinterpret_cast<Event*>(event);
  return cudaSuccess;
}
FAKE_CUDA cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t handle) {
  const Stream& stream = stream_of(handle);
  auto* of = reinterpret_cast<Event*>(event);
  if (of->device != stream.device) return say(cudaErrorInvalidResourceHandle);
  of->captured = stream.captured;
  return note("cudaEventRecord",
              named(handle) + ", \"event\": " + std::to_string(uintptr_t(event)));
}
FAKE_CUDA cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t handle, unsigned) {
  return cudaEventRecord(event, handle);
}
FAKE_CUDA cudaError_t cudaEventQuery(cudaEvent_t event) {
  const Graph* graph = reinterpret_cast<Event*>(event)->captured;
  return graph && world().capturing.count(const_cast<Graph*>(graph))
             ? say(cudaErrorStreamCaptureUnsupported)
             : cudaSuccess;
}
FAKE_CUDA cudaError_t cudaEventSynchronize(cudaEvent_t) { return unsafe("cudaEventSynchronize"); }
FAKE_CUDA cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) {
  *milliseconds = 1;
  return cudaSuccess;
}

// --- graphs: what is captured is written down, and not run again

FAKE_CUDA cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  if (uintptr_t(handle) == 0) return say(cudaErrorStreamCaptureUnsupported);
  begin(stream_of(handle), mode);
  return cudaSuccess;
}

FAKE_CUDA cudaError_t cudaStreamBeginCaptureToGraph(cudaStream_t handle, cudaGraph_t,
                                                    const cudaGraphNode_t*,
                                                    const cudaGraphEdgeData*, size_t,
                                                    cudaStreamCaptureMode mode) {
  return cudaStreamBeginCapture(handle, mode);
}

FAKE_CUDA cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* out) {
  Graph* graph = stream_of(handle).captured;
  if (!graph) return say(cudaErrorIllegalState);
  for (Stream* stream : graph->streams) stream->captured = nullptr;
  world().capturing.erase(graph);
  *out = reinterpret_cast<cudaGraph_t>(graph);
  return cudaSuccess;
}

FAKE_CUDA cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
  *status =
      stream_of(handle).captured ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

FAKE_CUDA cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, cudaStreamCaptureStatus* status,
                                               unsigned long long* id, cudaGraph_t* graph,
                                               const cudaGraphNode_t** dependencies,
                                               const cudaGraphEdgeData** edges, size_t* count) {
  Graph* captured = stream_of(handle).captured;
  cudaStreamIsCapturing(handle, status);
  if (id) *id = captured ? captured->id : 0;
  if (graph) *graph = reinterpret_cast<cudaGraph_t>(captured);
  if (dependencies) *dependencies = nullptr;
  if (edges) *edges = nullptr;
  if (count) *count = 0;
  return cudaSuccess;
}

FAKE_CUDA cudaError_t cudaStreamUpdateCaptureDependencies(cudaStream_t, cudaGraphNode_t*,
                                                          const cudaGraphEdgeData*, size_t,
                                                          unsigned) {
  return cudaSuccess;
}

FAKE_CUDA cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* out, cudaGraph_t graph,
                                                    unsigned long long) {
  *out = reinterpret_cast<cudaGraphExec_t>(graph);
  return cudaSuccess;
}
FAKE_CUDA cudaError_t cudaGraphInstantiate(cudaGraphExec_t* out, cudaGraph_t graph,
                                           unsigned long long flags) {
  return cudaGraphInstantiateWithFlags(out, graph, flags);
}
FAKE_CUDA cudaError_t cudaGraphGetNodes(cudaGraph_t, cudaGraphNode_t*, size_t* count) {
  *count = 1;
  return cudaSuccess;
}
FAKE_CUDA cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t handle) {
  return note("cudaGraphLaunch", named(handle));
}
FAKE_CUDA cudaError_t cudaGraphDestroy(cudaGraph_t) { return cudaSuccess; }
FAKE_CUDA cudaError_t cudaGraphExecDestroy(cudaGraphExec_t) { return cudaSuccess; }
