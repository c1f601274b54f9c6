// The driver: libcuda.so.1 as far as the addon calls it. See simulated.h.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "simulated.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

using CUresult = int;
using CUdevice = int;
using CUdeviceptr = unsigned long long;

struct CUctx_st {};

namespace {

constexpr CUresult kSuccess = 0;
constexpr CUresult kInvalidValue = 1;
constexpr CUresult kOutOfMemory = 2;
constexpr CUresult kInvalidContext = 201;
constexpr CUresult kCaptureUnsupported = 900;

using Clock = std::chrono::steady_clock;
using Operation = std::function<void()>;

struct Block {
  size_t bytes = 0;
  bool device = false;
};

struct Simulation {
  std::mutex mutex;
  std::map<uintptr_t, Block> blocks;
  uint64_t capacity = uint64_t{8} << 30;
  SimulatedCounts counts{};
  uint64_t failAt = 0;
  int failCode = 0;
  uint64_t failKernel = 0;
  int failKernelCode = 0;
  std::string failed;
  std::string violation;
  // The error that every call on the context returns.
  int lost = 0;
  int retained = 0;
  CUctx_st context;
  std::vector<double> kernelTimes;

  std::mutex streamsMutex;
  std::set<CUstream_st*> streams;

  std::mutex holdMutex;
  std::condition_variable holdChanged;
  bool held = false;
  int64_t allowed = 0;
};

Simulation& simulation() {
  static auto* instance = new Simulation();
  return *instance;
}

thread_local CUctx_st* current = nullptr;
// On the thread of a stream: whether what runs is part of a CUDA graph.
thread_local bool replaying = false;

// Whether FLOWTURBO_SIMULATED_FAULT names this: "refuse-capture" (no stream can be captured), "skip-replay" (CUDA graphs
// are launched, and their kernels do not run). tensorrt.cpp has the faults of single graphs.
bool isFaulty(const char* fault) {
  static const char* named = std::getenv("FLOWTURBO_SIMULATED_FAULT");
  return named != nullptr && std::strcmp(named, fault) == 0;
}

bool isSticky(int code) {
  for (const int sticky : {4, 46, 214, 220, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 999})
    if (code == sticky) return true;
  return false;
}

void violate(const char* what) {
  Simulation& all = simulation();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.counts.violations++;
  if (all.violation.empty()) all.violation = what;
}

// Counts a call. A result other than zero is what the call has to return.
CUresult enter(const char* call) {
  Simulation& all = simulation();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.counts.calls++;
  if (all.failAt != 0 && all.counts.calls == all.failAt) {
    all.failed = call;
    if (isSticky(all.failCode) && all.retained > 0) all.lost = all.failCode;
    return all.failCode;
  }
  return all.lost;
}

CUresult enterContext(const char* call) {
  const CUresult result = enter(call);
  if (result != kSuccess) return result;
  if (current == nullptr) {
    violate(call);
    return kInvalidContext;
  }
  return kSuccess;
}

bool within(uintptr_t address, size_t bytes, bool device) {
  Simulation& all = simulation();
  const std::lock_guard<std::mutex> lock(all.mutex);
  auto block = all.blocks.upper_bound(address);
  if (block == all.blocks.begin()) return false;
  --block;
  return block->second.device == device && address + bytes <= block->first + block->second.bytes;
}

}  // namespace

// Shared with the work that records it: a driver keeps an event until that work has run.
struct EventState {
  std::mutex mutex;
  std::condition_variable changed;
  uint64_t recorded = 0;
  uint64_t happened = 0;
  Clock::time_point when;

  void happen() {
    const std::lock_guard<std::mutex> lock(mutex);
    happened++;
    when = Clock::now();
    changed.notify_all();
  }
};

struct CUevent_st {
  const std::shared_ptr<EventState> state = std::make_shared<EventState>();
};

struct CUgraph_st {
  std::vector<Operation> operations;
};

struct CUgraphExec_st {
  std::vector<Operation> operations;
};

struct CUstream_st {
  CUstream_st() : worker([this] { work(); }) {}
  ~CUstream_st() {
    {
      const std::lock_guard<std::mutex> lock(mutex);
      ending = true;
      changed.notify_all();
    }
    worker.join();
  }

  // To the CUDA graph under construction, or to the device.
  void add(Operation operation) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (capture)
      capture->operations.push_back(std::move(operation));
    else
      queue.push_back(std::move(operation));
    changed.notify_all();
  }

  void drain() {
    std::unique_lock<std::mutex> lock(mutex);
    changed.wait(lock, [&] { return queue.empty() && !running; });
  }

  bool capturing() {
    const std::lock_guard<std::mutex> lock(mutex);
    return capture != nullptr;
  }

  void work() {
    std::unique_lock<std::mutex> lock(mutex);
    for (;;) {
      changed.wait(lock, [&] { return ending || !queue.empty(); });
      if (queue.empty()) return;
      {
        Operation operation = std::move(queue.front());
        queue.pop_front();
        running = true;
        lock.unlock();
        operation();
      }
      lock.lock();
      running = false;
      changed.notify_all();
    }
  }

  std::mutex mutex;
  std::condition_variable changed;
  std::deque<Operation> queue;
  std::unique_ptr<CUgraph_st> capture;
  bool running = false;
  bool ending = false;
  std::thread worker;
};

namespace {

bool isLost() {
  Simulation& all = simulation();
  const std::lock_guard<std::mutex> lock(all.mutex);
  return all.lost != 0;
}

CUresult lostCode() {
  Simulation& all = simulation();
  const std::lock_guard<std::mutex> lock(all.mutex);
  return all.lost;
}

// A transfer of bytes, checked when it is queued and again when it runs.
CUresult transfer(CUstream_st* stream, uintptr_t to, bool toDevice, uintptr_t from, bool fromDevice, size_t bytes,
                  uint64_t SimulatedCounts::*counter, const char* call) {
  const auto valid = [=] { return within(to, bytes, toDevice) && within(from, bytes, fromDevice); };
  if (!valid()) {
    violate(call);
    return kInvalidValue;
  }
  const std::string name = call;
  stream->add([=] {
    if (isLost()) return;
    if (!valid()) {
      violate((name + " of memory that was freed").c_str());
      return;
    }
    std::memcpy(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), bytes);
    Simulation& all = simulation();
    const std::lock_guard<std::mutex> lock(all.mutex);
    all.counts.*counter += 1;
  });
  return kSuccess;
}

// A lost device does not touch memory any more.
void drainIfLost() {
  if (!isLost()) return;
  const std::lock_guard<std::mutex> lock(simulation().streamsMutex);
  for (CUstream_st* stream : simulation().streams) stream->drain();
}

CUresult allocate(void** pointer, size_t bytes, bool device) {
  Simulation& all = simulation();
  const std::lock_guard<std::mutex> lock(all.mutex);
  if (bytes == 0) return kInvalidValue;
  if (device && all.counts.deviceBytes + bytes > all.capacity) return kOutOfMemory;
  void* memory = nullptr;
  if (posix_memalign(&memory, 512, bytes) != 0) return kOutOfMemory;
  // Memory that was never written reads as NaN.
  std::memset(memory, 0xff, bytes);
  all.blocks[reinterpret_cast<uintptr_t>(memory)] = {bytes, device};
  (device ? all.counts.deviceBlocks : all.counts.hostBlocks) += 1;
  if (device) all.counts.deviceBytes += bytes;
  *pointer = memory;
  return kSuccess;
}

CUresult release(void* memory, bool device, const char* call) {
  Simulation& all = simulation();
  std::unique_lock<std::mutex> lock(all.mutex);
  const auto block = all.blocks.find(reinterpret_cast<uintptr_t>(memory));
  if (block == all.blocks.end() || block->second.device != device) {
    lock.unlock();
    violate(call);
    return kInvalidValue;
  }
  (device ? all.counts.deviceBlocks : all.counts.hostBlocks) -= 1;
  if (device) all.counts.deviceBytes -= block->second.bytes;
  all.blocks.erase(block);
  std::free(memory);
  return kSuccess;
}

struct Kernel {
  Kernel(void (*body)(void*), void* argument, void (*end)(void*)) : run(body), data(argument), destroy(end) {}
  ~Kernel() { destroy(data); }
  Kernel(const Kernel&) = delete;
  Kernel& operator=(const Kernel&) = delete;

  void (*run)(void*);
  void* data;
  void (*destroy)(void*);
};

void waitWhileHeld() {
  Simulation& all = simulation();
  std::unique_lock<std::mutex> lock(all.holdMutex);
  all.holdChanged.wait(lock, [&] { return !all.held || all.allowed > 0; });
  if (all.held) all.allowed--;
}

void count(uint64_t SimulatedCounts::*counter, int change) {
  Simulation& all = simulation();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.counts.*counter += static_cast<uint64_t>(static_cast<int64_t>(change));
}

}  // namespace

// 1. The driver.

EXPORT CUresult cuInit(unsigned) { return enter("cuInit"); }

EXPORT CUresult cuDriverGetVersion(int* version) {
  *version = 13000;
  return enter("cuDriverGetVersion");
}

EXPORT CUresult cuGetErrorString(CUresult result, const char** words) {
  static std::map<int, const char*> known{{1, "invalid argument"},
                                          {2, "out of memory"},
                                          {100, "no CUDA-capable device is detected"},
                                          {201, "invalid device context"},
                                          {700, "an illegal memory access was encountered"},
                                          {719, "unspecified launch failure"},
                                          {900, "operation not permitted when stream is capturing"}};
  const auto found = known.find(result);
  *words = found != known.end() ? found->second : "simulated error";
  return kSuccess;
}

EXPORT CUresult cuDeviceGetCount(int* number) {
  *number = 1;
  return enter("cuDeviceGetCount");
}

EXPORT CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  *device = ordinal;
  return ordinal == 0 ? enter("cuDeviceGet") : kInvalidValue;
}

EXPORT CUresult cuDeviceGetName(char* name, int size, CUdevice) {
  std::strncpy(name, "Simulated GPU", static_cast<size_t>(size));
  return enter("cuDeviceGetName");
}

EXPORT CUresult cuDeviceTotalMem_v2(size_t* bytes, CUdevice) {
  const CUresult result = enter("cuDeviceTotalMem");
  const std::lock_guard<std::mutex> lock(simulation().mutex);
  *bytes = simulation().capacity;
  return result;
}

EXPORT CUresult cuDeviceGetAttribute(int* value, int attribute, CUdevice) {
  *value = attribute == 75 ? 8 : 9;
  return enter("cuDeviceGetAttribute");
}

EXPORT CUresult cuDevicePrimaryCtxRetain(CUctx_st** context, CUdevice) {
  const CUresult result = enter("cuDevicePrimaryCtxRetain");
  if (result != kSuccess) return result;
  Simulation& all = simulation();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.retained++;
  all.counts.contexts++;
  *context = &all.context;
  return kSuccess;
}

EXPORT CUresult cuDevicePrimaryCtxRelease_v2(CUdevice) {
  const CUresult result = enter("cuDevicePrimaryCtxRelease");
  Simulation& all = simulation();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.counts.contexts--;
  // A context without holders is destroyed, and its error with it.
  if (--all.retained == 0) all.lost = 0;
  return result;
}

EXPORT CUresult cuCtxSetCurrent(CUctx_st* context) {
  const CUresult result = enter("cuCtxSetCurrent");
  if (result == kSuccess) current = context;
  return result;
}

EXPORT CUresult cuMemGetInfo_v2(size_t* free, size_t* total) {
  const CUresult result = enterContext("cuMemGetInfo");
  const std::lock_guard<std::mutex> lock(simulation().mutex);
  *total = simulation().capacity;
  *free = simulation().capacity - std::min(simulation().capacity, simulation().counts.deviceBytes);
  return result;
}

EXPORT CUresult cuMemAlloc_v2(CUdeviceptr* pointer, size_t bytes) {
  const CUresult result = enterContext("cuMemAlloc");
  if (result != kSuccess) return result;
  void* memory = nullptr;
  const CUresult done = allocate(&memory, bytes, true);
  *pointer = reinterpret_cast<CUdeviceptr>(memory);
  return done;
}

EXPORT CUresult cuMemFree_v2(CUdeviceptr pointer) {
  const CUresult result = enterContext("cuMemFree");
  drainIfLost();
  const CUresult done = release(reinterpret_cast<void*>(pointer), true, "cuMemFree");
  return result != kSuccess ? result : done;
}

EXPORT CUresult cuMemAllocHost_v2(void** pointer, size_t bytes) {
  const CUresult result = enterContext("cuMemAllocHost");
  return result != kSuccess ? result : allocate(pointer, bytes, false);
}

EXPORT CUresult cuMemFreeHost(void* pointer) {
  const CUresult result = enterContext("cuMemFreeHost");
  drainIfLost();
  const CUresult done = release(pointer, false, "cuMemFreeHost");
  return result != kSuccess ? result : done;
}

EXPORT CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void* from, size_t bytes, CUstream_st* stream) {
  const CUresult result = enterContext("cuMemcpyHtoDAsync");
  return result != kSuccess ? result
                            : transfer(stream, to, true, reinterpret_cast<uintptr_t>(from), false, bytes,
                                       &SimulatedCounts::uploads, "cuMemcpyHtoDAsync");
}

EXPORT CUresult cuMemcpyDtoHAsync_v2(void* to, CUdeviceptr from, size_t bytes, CUstream_st* stream) {
  const CUresult result = enterContext("cuMemcpyDtoHAsync");
  return result != kSuccess ? result
                            : transfer(stream, reinterpret_cast<uintptr_t>(to), false, from, true, bytes,
                                       &SimulatedCounts::downloads, "cuMemcpyDtoHAsync");
}

EXPORT CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream_st* stream) {
  const CUresult result = enterContext("cuMemcpyDtoDAsync");
  return result != kSuccess
             ? result
             : transfer(stream, to, true, from, true, bytes, &SimulatedCounts::copies, "cuMemcpyDtoDAsync");
}

EXPORT CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t bytes, CUstream_st* stream) {
  const CUresult result = enterContext("cuMemsetD8Async");
  if (result != kSuccess) return result;
  if (!within(to, bytes, true)) {
    violate("cuMemsetD8Async");
    return kInvalidValue;
  }
  stream->add([=] {
    if (isLost()) return;
    if (within(to, bytes, true))
      std::memset(reinterpret_cast<void*>(to), value, bytes);
    else
      violate("cuMemsetD8Async of memory that was freed");
  });
  return kSuccess;
}

EXPORT CUresult cuStreamCreate(CUstream_st** stream, unsigned) {
  const CUresult result = enterContext("cuStreamCreate");
  if (result != kSuccess) return result;
  *stream = new CUstream_st();
  count(&SimulatedCounts::streams, 1);
  const std::lock_guard<std::mutex> lock(simulation().streamsMutex);
  simulation().streams.insert(*stream);
  return kSuccess;
}

EXPORT CUresult cuStreamDestroy_v2(CUstream_st* stream) {
  const CUresult result = enterContext("cuStreamDestroy");
  {
    const std::lock_guard<std::mutex> lock(simulation().streamsMutex);
    simulation().streams.erase(stream);
  }
  delete stream;
  count(&SimulatedCounts::streams, -1);
  return result;
}

EXPORT CUresult cuStreamSynchronize(CUstream_st* stream) {
  const CUresult result = enterContext("cuStreamSynchronize");
  if (result != kSuccess) return result;
  if (stream->capturing()) return kCaptureUnsupported;
  stream->drain();
  return lostCode();
}

EXPORT CUresult cuStreamBeginCapture_v2(CUstream_st* stream, int) {
  const CUresult result = enterContext("cuStreamBeginCapture");
  if (result != kSuccess) return result;
  if (isFaulty("refuse-capture")) return kCaptureUnsupported;
  const std::lock_guard<std::mutex> lock(stream->mutex);
  stream->capture = std::make_unique<CUgraph_st>();
  return kSuccess;
}

EXPORT CUresult cuStreamEndCapture(CUstream_st* stream, CUgraph_st** graph) {
  const CUresult result = enterContext("cuStreamEndCapture");
  const std::lock_guard<std::mutex> lock(stream->mutex);
  std::unique_ptr<CUgraph_st> captured = std::move(stream->capture);
  *graph = nullptr;
  if (result != kSuccess) return result;
  if (!captured) return kInvalidValue;
  *graph = captured.release();
  count(&SimulatedCounts::graphs, 1);
  return kSuccess;
}

EXPORT CUresult cuEventCreate(CUevent_st** event, unsigned) {
  const CUresult result = enterContext("cuEventCreate");
  if (result != kSuccess) return result;
  *event = new CUevent_st();
  count(&SimulatedCounts::events, 1);
  return kSuccess;
}

EXPORT CUresult cuEventDestroy_v2(CUevent_st* event) {
  const CUresult result = enterContext("cuEventDestroy");
  delete event;
  count(&SimulatedCounts::events, -1);
  return result;
}

EXPORT CUresult cuEventRecordWithFlags(CUevent_st* event, CUstream_st* stream, unsigned flags) {
  const CUresult result = enterContext("cuEventRecordWithFlags");
  if (result != kSuccess) return result;
  const bool capturing = stream->capturing();
  // Within a capture only an external event is recorded when the graph runs, and outside it would make no sense.
  if (capturing != (flags == 1)) {
    violate("cuEventRecordWithFlags");
    return kInvalidValue;
  }
  if (!capturing) {
    const std::lock_guard<std::mutex> lock(event->state->mutex);
    event->state->recorded++;
  }
  stream->add([state = event->state] { state->happen(); });
  return kSuccess;
}

EXPORT CUresult cuEventSynchronize(CUevent_st* event) {
  const CUresult result = enterContext("cuEventSynchronize");
  if (result != kSuccess) return result;
  {
    EventState& state = *event->state;
    std::unique_lock<std::mutex> lock(state.mutex);
    state.changed.wait(lock, [&] { return state.happened >= state.recorded; });
  }
  return lostCode();
}

EXPORT CUresult cuEventElapsedTime(float* milliseconds, CUevent_st* start, CUevent_st* end) {
  const CUresult result = enterContext("cuEventElapsedTime");
  if (result != kSuccess) return result;
  const auto at = [](CUevent_st* event) {
    EventState& state = *event->state;
    const std::lock_guard<std::mutex> lock(state.mutex);
    if (state.happened == 0 || state.happened < state.recorded) violate("cuEventElapsedTime before the event");
    return state.when;
  };
  *milliseconds = std::chrono::duration<float, std::milli>(at(end) - at(start)).count();
  return kSuccess;
}

EXPORT CUresult cuGraphInstantiateWithFlags(CUgraphExec_st** executable, CUgraph_st* graph, unsigned long long) {
  const CUresult result = enterContext("cuGraphInstantiateWithFlags");
  if (result != kSuccess) return result;
  *executable = new CUgraphExec_st{graph->operations};
  count(&SimulatedCounts::graphs, 1);
  return kSuccess;
}

EXPORT CUresult cuGraphLaunch(CUgraphExec_st* executable, CUstream_st* stream) {
  const CUresult result = enterContext("cuGraphLaunch");
  if (result != kSuccess) return result;
  if (stream->capturing()) return kCaptureUnsupported;
  stream->add([] { replaying = true; });
  for (const Operation& operation : executable->operations) stream->add(operation);
  stream->add([] { replaying = false; });
  count(&SimulatedCounts::graphLaunches, 1);
  return kSuccess;
}

EXPORT CUresult cuGraphExecDestroy(CUgraphExec_st* executable) {
  const CUresult result = enterContext("cuGraphExecDestroy");
  delete executable;
  count(&SimulatedCounts::graphs, -1);
  return result;
}

EXPORT CUresult cuGraphDestroy(CUgraph_st* graph) {
  const CUresult result = enterContext("cuGraphDestroy");
  delete graph;
  count(&SimulatedCounts::graphs, -1);
  return result;
}

// 2. For tests.

EXPORT void simulatedReset() {
  Simulation& all = simulation();
  {
    const std::lock_guard<std::mutex> lock(all.mutex);
    all.failAt = 0;
    all.failKernel = 0;
    all.failed.clear();
    all.violation.clear();
    all.kernelTimes.clear();
    all.capacity = uint64_t{8} << 30;
    for (auto counter : {&SimulatedCounts::calls, &SimulatedCounts::kernels, &SimulatedCounts::uploads,
                         &SimulatedCounts::downloads, &SimulatedCounts::copies, &SimulatedCounts::graphLaunches,
                         &SimulatedCounts::deserialised, &SimulatedCounts::violations})
      all.counts.*counter = 0;
  }
  simulatedLet(-1);
}

EXPORT SimulatedCounts simulatedCounts() {
  const std::lock_guard<std::mutex> lock(simulation().mutex);
  return simulation().counts;
}

EXPORT void simulatedFailAt(uint64_t call, int code) {
  Simulation& all = simulation();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.failAt = call == 0 ? 0 : all.counts.calls + call;
  all.failCode = code;
  all.failed.clear();
}

EXPORT void simulatedFailKernel(uint64_t kernel, int code) {
  Simulation& all = simulation();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.failKernel = kernel == 0 ? 0 : all.counts.kernels + kernel;
  all.failKernelCode = code;
}

EXPORT const char* simulatedFailed() {
  static thread_local std::string name;
  const std::lock_guard<std::mutex> lock(simulation().mutex);
  name = simulation().failed;
  return name.c_str();
}

EXPORT void simulatedCapacity(uint64_t bytes) {
  const std::lock_guard<std::mutex> lock(simulation().mutex);
  simulation().capacity = bytes;
}

EXPORT void simulatedHold() {
  const std::lock_guard<std::mutex> lock(simulation().holdMutex);
  simulation().held = true;
  simulation().allowed = 0;
}

EXPORT void simulatedLet(int64_t number) {
  const std::lock_guard<std::mutex> lock(simulation().holdMutex);
  if (number < 0)
    simulation().held = false;
  else
    simulation().allowed += number;
  simulation().holdChanged.notify_all();
}

EXPORT size_t simulatedKernelTimes(double* times, size_t size) {
  const std::lock_guard<std::mutex> lock(simulation().mutex);
  const std::vector<double>& all = simulation().kernelTimes;
  for (size_t index = 0; index < std::min(size, all.size()); index++) times[index] = all[index];
  return all.size();
}

EXPORT const char* simulatedViolation() {
  static thread_local std::string words;
  const std::lock_guard<std::mutex> lock(simulation().mutex);
  words = simulation().violation;
  return words.c_str();
}

// 3. For the other library.

EXPORT int simulatedEnter(const char* call) { return enterContext(call); }

EXPORT void simulatedReportViolation(const char* what) { violate(what); }

EXPORT void simulatedCount(SimulatedObject object, int change) {
  switch (object) {
    case kSimulatedRuntime:
      return count(&SimulatedCounts::runtimes, change);
    case kSimulatedEngine:
      return count(&SimulatedCounts::engines, change);
    case kSimulatedExecutionContext:
      return count(&SimulatedCounts::executionContexts, change);
  }
}

EXPORT void simulatedDeserialised() { count(&SimulatedCounts::deserialised, 1); }

EXPORT void simulatedLose(int code) {
  const std::lock_guard<std::mutex> lock(simulation().mutex);
  simulation().lost = code;
}

EXPORT bool simulatedIsDevice(const void* address, size_t bytes) {
  return within(reinterpret_cast<uintptr_t>(address), bytes, true);
}

EXPORT bool simulatedIsCapturing(CUstream_st* stream) { return stream->capturing(); }

EXPORT int simulatedLaunch(CUstream_st* stream, void (*run)(void*), void* data, void (*destroy)(void*)) {
  const auto kernel = std::make_shared<Kernel>(run, data, destroy);
  stream->add([kernel] {
    waitWhileHeld();
    Simulation& all = simulation();
    {
      const std::lock_guard<std::mutex> lock(all.mutex);
      all.counts.kernels++;
      all.kernelTimes.push_back(std::chrono::duration<double>(Clock::now().time_since_epoch()).count());
      if (all.failKernel != 0 && all.counts.kernels == all.failKernel) {
        all.failed = "a kernel";
        all.lost = all.failKernelCode;
      }
      if (all.lost != 0) return;
    }
    if (!(replaying && isFaulty("skip-replay"))) kernel->run(kernel->data);
  });
  return kSuccess;
}
