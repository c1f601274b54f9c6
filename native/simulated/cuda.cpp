// The driver: libcuda.so.1 as far as the addon and the simulated TensorRT call it, with the rules that cuda.h gives for
// it. See simulated.h.

#include <sys/mman.h>

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

struct CUctx_st {
  int device = 0;
};
struct EventState;

namespace {

constexpr CUresult kSuccess = 0;
constexpr CUresult kInvalidValue = 1;
constexpr CUresult kOutOfMemory = 2;
constexpr CUresult kInvalidContext = 201;
constexpr CUresult kInvalidHandle = 400;
constexpr CUresult kNotReady = 600;
constexpr CUresult kContextIsDestroyed = 709;
constexpr CUresult kCaptureUnsupported = 900;
constexpr CUresult kCaptureInvalidated = 901;
constexpr CUresult kCaptureMerge = 902;
constexpr CUresult kCaptureUnmatched = 903;
constexpr CUresult kCaptureUnjoined = 904;
constexpr CUresult kCaptureIsolation = 905;
constexpr CUresult kCapturedEvent = 907;
constexpr CUresult kCaptureWrongThread = 908;

constexpr int kModeGlobal = 0;
constexpr int kModeRelaxed = 2;

constexpr unsigned kEventBlockingSync = 1;
constexpr unsigned kEventDisableTiming = 2;

// Addresses of the device: more than any test's capacity.
constexpr size_t kArenaBytes = size_t{32} << 30;
constexpr size_t kPage = 4096;

using Clock = std::chrono::steady_clock;
using Operation = std::function<void()>;

struct Block {
  size_t bytes = 0;
  bool device = false;
  // Which device, of memory that is on one.
  int ordinal = 0;
};

// One of the GPUs.
struct Gpu {
  explicit Gpu(int number) : ordinal(number) { renew(); }

  // As in a new process.
  void renew() {
    lost = 0;
    // The old contexts keep their addresses: what refers to them is not mistaken for the new one.
    contexts.push_back(std::make_unique<CUctx_st>(CUctx_st{ordinal}));
    context = contexts.back().get();
  }

  const int ordinal;
  // Microseconds that each kernel takes besides its own work.
  uint64_t delay = 0;
  // The error that every call on the context returns. TensorRT's own CUDA runtime holds the primary context until the
  // process ends, so that neither releasing nor retaining it makes it good again.
  int lost = 0;
  int retained = 0;
  uint64_t bytes = 0;
  uint64_t kernels = 0;
  std::vector<std::unique_ptr<CUctx_st>> contexts;
  CUctx_st* context = nullptr;
};

// The microseconds of FLOWTURBO_SIMULATED_DEVICES, divided by commas, one for each device; one device without it.
std::vector<uint64_t> delaysOfEnvironment() {
  const char* text = std::getenv("FLOWTURBO_SIMULATED_DEVICES");
  std::vector<uint64_t> delays;
  for (const char* at = text != nullptr && *text != 0 ? text : "0"; at != nullptr;) {
    delays.push_back(std::strtoull(at, nullptr, 10));
    at = std::strchr(at, ',');
    if (at != nullptr) at++;
  }
  return delays;
}

// A capture under way: what its streams were given, in that order. Guarded by Simulation::captureMutex.
struct Capture {
  CUstream_st* origin = nullptr;
  int mode = kModeGlobal;
  std::thread::id thread;
  // A rule was violated: it goes on until cuStreamEndCapture, which returns no graph.
  bool invalid = false;
  std::vector<Operation> operations;
  // Events that each run of the graph records.
  std::vector<std::shared_ptr<EventState>> events;
  std::set<CUstream_st*> streams;
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
  // All that there ever were; the first `devices` of them are there now.
  std::vector<std::unique_ptr<Gpu>> gpus;
  size_t devices = 0;

  Simulation() { setDevices(delaysOfEnvironment()); }

  void setDevices(const std::vector<uint64_t>& delays) {
    while (gpus.size() < delays.size()) gpus.push_back(std::make_unique<Gpu>(static_cast<int>(gpus.size())));
    devices = delays.size();
    for (size_t index = 0; index < devices; index++) gpus[index]->delay = delays[index];
  }

  std::vector<double> kernelTimes;
  // The device's addresses, which the host can neither read nor write, and the memory behind them.
  uint8_t* arena = nullptr;
  uint8_t* behind = nullptr;

  std::mutex captureMutex;
  std::condition_variable captureChanged;
  std::set<std::shared_ptr<Capture>> captures;
  bool refusesCaptures = false;
  bool pausesCaptures = false;

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
thread_local int captureMode = kModeGlobal;
// On the thread of a stream: whether what runs is part of a CUDA graph, and the stream's device.
thread_local bool replaying = false;
thread_local int streamDevice = -1;

// The device of what runs on the calling thread.
int deviceHere() { return streamDevice >= 0 ? streamDevice : current != nullptr ? current->device : 0; }

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

// Counts a call that no lost context prevents. A result other than zero is what the call has to return.
CUresult enter(const char* call) {
  Simulation& all = simulation();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.counts.calls++;
  if (all.failAt != 0 && all.counts.calls == all.failAt) {
    all.failed = call;
    Gpu& gpu = *all.gpus[static_cast<size_t>(deviceHere())];
    if (isSticky(all.failCode) && gpu.retained > 0) gpu.lost = all.failCode;
    return all.failCode;
  }
  return kSuccess;
}

CUresult enterContext(const char* call) {
  const CUresult result = enter(call);
  if (result != kSuccess) return result;
  if (current == nullptr) {
    violate(call);
    return kInvalidContext;
  }
  const std::lock_guard<std::mutex> lock(simulation().mutex);
  const Gpu& gpu = *simulation().gpus[static_cast<size_t>(current->device)];
  return current == gpu.context ? gpu.lost : kContextIsDestroyed;
}

// For calls that are "potentially unsafe" in a capture (cuThreadExchangeStreamCaptureMode in cuda.h): those that allocate,
// free or wait. The captures that forbid them become invalid.
CUresult enterUnsafe(const char* call) {
  const CUresult result = enterContext(call);
  if (result != kSuccess || captureMode == kModeRelaxed) return result;
  Simulation& all = simulation();
  const std::lock_guard<std::mutex> lock(all.captureMutex);
  bool forbidden = false;
  for (const std::shared_ptr<Capture>& capture : all.captures) {
    const bool own = capture->thread == std::this_thread::get_id();
    if (own ? capture->mode == kModeRelaxed : captureMode != kModeGlobal || capture->mode != kModeGlobal) continue;
    capture->invalid = true;
    forbidden = true;
  }
  return forbidden ? kCaptureUnsupported : kSuccess;
}

// Where the host finds what is at an address of the device.
uint8_t* hostOf(uintptr_t address, bool device) {
  auto* pointer = reinterpret_cast<uint8_t*>(address);
  return device ? simulation().behind + (pointer - simulation().arena) : pointer;
}

// @param ordinal of the device that the memory has to be on
bool within(uintptr_t address, size_t bytes, bool device, int ordinal) {
  Simulation& all = simulation();
  const std::lock_guard<std::mutex> lock(all.mutex);
  auto block = all.blocks.upper_bound(address);
  if (block == all.blocks.begin()) return false;
  --block;
  return block->second.device == device && (!device || block->second.ordinal == ordinal) &&
         address + bytes <= block->first + block->second.bytes;
}

}  // namespace

// Shared with the work that records it: a driver keeps an event until that work has run.
struct EventState {
  EventState(unsigned given, int on) : flags(given), device(on) {}

  const unsigned flags;
  const int device;
  std::mutex mutex;
  std::condition_variable changed;
  uint64_t recorded = 0;
  uint64_t happened = 0;
  Clock::time_point when;
  // Where it was recorded last, if that was in a capture. Guarded by Simulation::captureMutex.
  std::shared_ptr<Capture> capture;
  CUstream_st* stream = nullptr;
  uint64_t position = 0;

  void record() {
    const std::lock_guard<std::mutex> lock(mutex);
    recorded++;
  }

  void happen() {
    if (flags & kEventBlockingSync) {
      const std::lock_guard<std::mutex> lock(simulation().mutex);
      simulation().counts.interrupts++;
    }
    const std::lock_guard<std::mutex> lock(mutex);
    happened++;
    when = Clock::now();
    changed.notify_all();
  }

  void waitFor(uint64_t records) {
    std::unique_lock<std::mutex> lock(mutex);
    changed.wait(lock, [&] { return happened >= records; });
  }
};

struct CUevent_st {
  CUevent_st(unsigned flags, int device) : state(std::make_shared<EventState>(flags, device)) {}
  const std::shared_ptr<EventState> state;
};

struct CUgraph_st {
  std::vector<Operation> operations;
  std::vector<std::shared_ptr<EventState>> events;
};

struct CUgraphExec_st {
  std::vector<Operation> operations;
  std::vector<std::shared_ptr<EventState>> events;
};

struct CUstream_st {
  explicit CUstream_st(int on) : device(on), worker([this] { work(); }) {}
  ~CUstream_st() {
    {
      const std::lock_guard<std::mutex> lock(mutex);
      ending = true;
      changed.notify_all();
    }
    worker.join();
  }

  // To the capture that the stream belongs to, or to the device.
  CUresult add(Operation operation) {
    {
      const std::lock_guard<std::mutex> lock(simulation().captureMutex);
      if (capture) {
        if (capture->invalid) return kCaptureInvalidated;
        capture->operations.push_back(std::move(operation));
        given++;
        return kSuccess;
      }
    }
    const std::lock_guard<std::mutex> lock(mutex);
    queue.push_back(std::move(operation));
    changed.notify_all();
    return kSuccess;
  }

  void drain() {
    std::unique_lock<std::mutex> lock(mutex);
    changed.wait(lock, [&] { return queue.empty() && !running; });
  }

  bool capturing() {
    const std::lock_guard<std::mutex> lock(simulation().captureMutex);
    return capture != nullptr;
  }

  // A call that conflicts with a capture of this stream whatever the thread's mode is.
  CUresult conflict() {
    const std::lock_guard<std::mutex> lock(simulation().captureMutex);
    if (!capture) return kSuccess;
    capture->invalid = true;
    return kCaptureUnsupported;
  }

  void work() {
    streamDevice = device;
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

  const int device;
  std::mutex mutex;
  std::condition_variable changed;
  std::deque<Operation> queue;
  // Guarded by Simulation::captureMutex: the capture, what this stream has given to it, and how much of that the others
  // wait for.
  std::shared_ptr<Capture> capture;
  uint64_t given = 0;
  uint64_t joined = 0;
  bool running = false;
  bool ending = false;
  std::thread worker;
};

namespace {

CUresult lostCode(int device) {
  Simulation& all = simulation();
  const std::lock_guard<std::mutex> lock(all.mutex);
  return all.gpus[static_cast<size_t>(device)]->lost;
}

// Whether the device of the stream whose thread this is, is lost.
bool isLost() { return lostCode(deviceHere()) != 0; }

// What is given to a stream has to come from a thread with the context of its device.
bool isForeign(const CUstream_st* stream, const char* call) {
  if (current != nullptr && stream->device == current->device) return false;
  violate((std::string(call) + " on a stream of another device").c_str());
  return true;
}

// A transfer of bytes, checked when it is queued and again when it runs.
CUresult transfer(CUstream_st* stream, uintptr_t to, bool toDevice, uintptr_t from, bool fromDevice, size_t bytes,
                  uint64_t SimulatedCounts::*counter, const char* call) {
  if (isForeign(stream, call)) return kInvalidHandle;
  const int device = stream->device;
  const auto valid = [=] { return within(to, bytes, toDevice, device) && within(from, bytes, fromDevice, device); };
  if (!valid()) {
    violate(call);
    return kInvalidValue;
  }
  const std::string name = call;
  return stream->add([=] {
    if (isLost()) return;
    if (!valid()) {
      violate((name + " of memory that was freed").c_str());
      return;
    }
    std::memcpy(hostOf(to, toDevice), hostOf(from, fromDevice), bytes);
    Simulation& all = simulation();
    const std::lock_guard<std::mutex> lock(all.mutex);
    all.counts.*counter += 1;
  });
}

// A lost device does not touch memory any more.
void drainIfLost() {
  const std::lock_guard<std::mutex> lock(simulation().streamsMutex);
  for (CUstream_st* stream : simulation().streams)
    if (lostCode(stream->device) != 0) stream->drain();
}

size_t pagesOf(size_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

// The first gap among the device's blocks, with a page after each block that belongs to none. Holding the mutex.
uint8_t* placeFor(size_t bytes) {
  Simulation& all = simulation();
  const auto map = [](int protection) {
    void* memory =
        mmap(nullptr, kArenaBytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return memory == MAP_FAILED ? nullptr : static_cast<uint8_t*>(memory);
  };
  if (all.arena == nullptr) all.arena = map(PROT_NONE);
  if (all.behind == nullptr) all.behind = map(PROT_READ | PROT_WRITE);
  if (all.arena == nullptr || all.behind == nullptr) return nullptr;
  uint8_t* place = all.arena;
  const auto begin = all.blocks.lower_bound(reinterpret_cast<uintptr_t>(all.arena));
  const auto end = all.blocks.lower_bound(reinterpret_cast<uintptr_t>(all.arena + kArenaBytes));
  for (auto block = begin; block != end; ++block) {
    if (reinterpret_cast<uintptr_t>(place) + pagesOf(bytes) + kPage <= block->first) return place;
    place = reinterpret_cast<uint8_t*>(block->first) + pagesOf(block->second.bytes) + kPage;
  }
  return place + pagesOf(bytes) <= all.arena + kArenaBytes ? place : nullptr;
}

CUresult allocate(void** pointer, size_t bytes, bool device) {
  Simulation& all = simulation();
  const std::lock_guard<std::mutex> lock(all.mutex);
  if (bytes == 0) return kInvalidValue;
  Gpu& gpu = *all.gpus[static_cast<size_t>(deviceHere())];
  if (device && gpu.bytes + bytes > all.capacity) return kOutOfMemory;
  void* memory = nullptr;
  if (device)
    memory = placeFor(bytes);
  else if (posix_memalign(&memory, 512, bytes) != 0)
    memory = nullptr;
  if (memory == nullptr) return kOutOfMemory;
  const auto address = reinterpret_cast<uintptr_t>(memory);
  // Memory that was never written reads as NaN.
  std::memset(hostOf(address, device), 0xff, bytes);
  all.blocks[address] = {bytes, device, gpu.ordinal};
  (device ? all.counts.deviceBlocks : all.counts.hostBlocks) += 1;
  if (device) {
    all.counts.deviceBytes += bytes;
    gpu.bytes += bytes;
  }
  *pointer = memory;
  return kSuccess;
}

CUresult release(void* memory, bool device, const char* call) {
  Simulation& all = simulation();
  std::unique_lock<std::mutex> lock(all.mutex);
  const auto address = reinterpret_cast<uintptr_t>(memory);
  const auto block = all.blocks.find(address);
  if (block == all.blocks.end() || block->second.device != device) {
    lock.unlock();
    violate(call);
    return kInvalidValue;
  }
  (device ? all.counts.deviceBlocks : all.counts.hostBlocks) -= 1;
  if (device) {
    all.counts.deviceBytes -= block->second.bytes;
    all.gpus[static_cast<size_t>(block->second.ordinal)]->bytes -= block->second.bytes;
    madvise(hostOf(address, true), pagesOf(block->second.bytes), MADV_DONTNEED);
  } else {
    std::free(memory);
  }
  all.blocks.erase(block);
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

bool isDevice(int ordinal) { return ordinal >= 0 && static_cast<size_t>(ordinal) < simulation().devices; }

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
                                          {400, "invalid resource handle"},
                                          {600, "device not ready"},
                                          {700, "an illegal memory access was encountered"},
                                          {709, "context is destroyed"},
                                          {719, "unspecified launch failure"},
                                          {900, "operation not permitted when stream is capturing"},
                                          {901, "operation failed due to a previous error during capture"},
                                          {904, "capturing stream has unjoined work"},
                                          {905, "dependency created on uncaptured work in another stream"},
                                          {907, "operation not permitted on an event last recorded in a capturing stream"},
                                          {908, "attempt to terminate a thread-local capture sequence from another thread"}};
  const auto found = known.find(result);
  *words = found != known.end() ? found->second : "simulated error";
  return kSuccess;
}

EXPORT CUresult cuDeviceGetCount(int* number) {
  const CUresult result = enter("cuDeviceGetCount");
  const std::lock_guard<std::mutex> lock(simulation().mutex);
  *number = static_cast<int>(simulation().devices);
  return result;
}

EXPORT CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  *device = ordinal;
  return isDevice(ordinal) ? enter("cuDeviceGet") : kInvalidValue;
}

// Devices of one speed have one name, as GPUs of one kind do.
EXPORT CUresult cuDeviceGetName(char* name, int size, CUdevice device) {
  std::string text = "Simulated GPU";
  {
    const std::lock_guard<std::mutex> lock(simulation().mutex);
    const uint64_t delay = isDevice(device) ? simulation().gpus[static_cast<size_t>(device)]->delay : 0;
    if (delay > 0) text += " " + std::to_string(delay);
  }
  std::strncpy(name, text.c_str(), static_cast<size_t>(size));
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

EXPORT CUresult cuDevicePrimaryCtxRetain(CUctx_st** context, CUdevice device) {
  const CUresult result = enter("cuDevicePrimaryCtxRetain");
  if (result != kSuccess) return result;
  Simulation& all = simulation();
  const std::lock_guard<std::mutex> lock(all.mutex);
  Gpu& gpu = *all.gpus.at(static_cast<size_t>(device));
  gpu.retained++;
  all.counts.contexts++;
  *context = gpu.context;
  return kSuccess;
}

EXPORT CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) {
  const CUresult result = enter("cuDevicePrimaryCtxRelease");
  Simulation& all = simulation();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.counts.contexts--;
  all.gpus.at(static_cast<size_t>(device))->retained--;
  return result;
}

EXPORT CUresult cuCtxSetCurrent(CUctx_st* context) {
  const CUresult result = enter("cuCtxSetCurrent");
  if (result == kSuccess) current = context;
  return result;
}

EXPORT CUresult cuCtxGetCurrent(CUctx_st** context) {
  *context = current;
  return enter("cuCtxGetCurrent");
}

EXPORT CUresult cuCtxGetDevice(CUdevice* device) {
  *device = current != nullptr ? current->device : 0;
  return enterContext("cuCtxGetDevice");
}

EXPORT CUresult cuThreadExchangeStreamCaptureMode(int* mode) {
  const CUresult result = enter("cuThreadExchangeStreamCaptureMode");
  if (result != kSuccess) return result;
  if (*mode < kModeGlobal || *mode > kModeRelaxed) return kInvalidValue;
  std::swap(*mode, captureMode);
  return kSuccess;
}

EXPORT CUresult cuMemGetInfo_v2(size_t* free, size_t* total) {
  const CUresult result = enterContext("cuMemGetInfo");
  const std::lock_guard<std::mutex> lock(simulation().mutex);
  *total = simulation().capacity;
  const uint64_t used = simulation().gpus[static_cast<size_t>(deviceHere())]->bytes;
  *free = simulation().capacity - std::min(simulation().capacity, used);
  return result;
}

EXPORT CUresult cuMemAlloc_v2(CUdeviceptr* pointer, size_t bytes) {
  const CUresult result = enterUnsafe("cuMemAlloc");
  if (result != kSuccess) return result;
  void* memory = nullptr;
  const CUresult done = allocate(&memory, bytes, true);
  *pointer = reinterpret_cast<CUdeviceptr>(memory);
  return done;
}

EXPORT CUresult cuMemFree_v2(CUdeviceptr pointer) {
  const CUresult result = enterUnsafe("cuMemFree");
  if (result == kCaptureUnsupported) return result;
  drainIfLost();
  const CUresult done = release(reinterpret_cast<void*>(pointer), true, "cuMemFree");
  return result != kSuccess ? result : done;
}

EXPORT CUresult cuMemAllocHost_v2(void** pointer, size_t bytes) {
  const CUresult result = enterUnsafe("cuMemAllocHost");
  return result != kSuccess ? result : allocate(pointer, bytes, false);
}

EXPORT CUresult cuMemFreeHost(void* pointer) {
  const CUresult result = enterUnsafe("cuMemFreeHost");
  if (result == kCaptureUnsupported) return result;
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
  if (isForeign(stream, "cuMemsetD8Async")) return kInvalidHandle;
  const int device = stream->device;
  if (!within(to, bytes, true, device)) {
    violate("cuMemsetD8Async");
    return kInvalidValue;
  }
  return stream->add([=] {
    if (isLost()) return;
    if (within(to, bytes, true, device))
      std::memset(hostOf(to, true), value, bytes);
    else
      violate("cuMemsetD8Async of memory that was freed");
  });
}

EXPORT CUresult cuStreamCreate(CUstream_st** stream, unsigned) {
  const CUresult result = enterContext("cuStreamCreate");
  if (result != kSuccess) return result;
  *stream = new CUstream_st(current->device);
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
  CUresult result = enterUnsafe("cuStreamSynchronize");
  if (result == kSuccess) result = stream->conflict();
  if (result != kSuccess) return result;
  stream->drain();
  return lostCode(stream->device);
}

// What a stream was given before waits for an event that another one has recorded. In a capture this is how a second
// stream joins it, and how the first one waits for the second.
EXPORT CUresult cuStreamWaitEvent(CUstream_st* stream, CUevent_st* event, unsigned) {
  const CUresult result = enterContext("cuStreamWaitEvent");
  if (result != kSuccess) return result;
  const std::shared_ptr<EventState> state = event->state;
  {
    const std::lock_guard<std::mutex> lock(simulation().captureMutex);
    if (state->capture) {
      Capture& from = *state->capture;
      if (simulation().captures.count(state->capture) == 0) return kCapturedEvent;
      if (from.invalid) return kCaptureInvalidated;
      if (!stream->capture) {
        stream->capture = state->capture;
        stream->given = stream->joined = 0;
        from.streams.insert(stream);
      } else if (stream->capture != state->capture) {
        from.invalid = stream->capture->invalid = true;
        return kCaptureMerge;
      }
      if (state->stream != stream) state->stream->joined = std::max(state->stream->joined, state->position);
      return kSuccess;
    }
    if (stream->capture) {
      stream->capture->invalid = true;
      return kCaptureIsolation;
    }
  }
  uint64_t records = 0;
  {
    const std::lock_guard<std::mutex> lock(state->mutex);
    records = state->recorded;
  }
  return stream->add([state, records] { state->waitFor(records); });
}

EXPORT CUresult cuStreamBeginCapture_v2(CUstream_st* stream, int mode) {
  const CUresult result = enterContext("cuStreamBeginCapture");
  if (result != kSuccess) return result;
  if (isFaulty("refuse-capture")) return kCaptureUnsupported;
  if (mode < kModeGlobal || mode > kModeRelaxed) return kInvalidValue;
  Simulation& all = simulation();
  std::unique_lock<std::mutex> lock(all.captureMutex);
  if (stream->capture) return kInvalidValue;
  const auto capture = std::make_shared<Capture>();
  capture->origin = stream;
  capture->mode = mode;
  capture->thread = std::this_thread::get_id();
  capture->streams.insert(stream);
  stream->capture = capture;
  stream->given = stream->joined = 0;
  all.captures.insert(capture);
  count(&SimulatedCounts::captures, 1);
  all.captureChanged.wait(lock, [&] { return !all.pausesCaptures; });
  return kSuccess;
}

EXPORT CUresult cuStreamEndCapture(CUstream_st* stream, CUgraph_st** graph) {
  const CUresult result = enterContext("cuStreamEndCapture");
  *graph = nullptr;
  Simulation& all = simulation();
  const std::lock_guard<std::mutex> lock(all.captureMutex);
  const std::shared_ptr<Capture> capture = stream->capture;
  if (!capture) return result != kSuccess ? result : kInvalidValue;
  if (capture->mode != kModeRelaxed && capture->thread != std::this_thread::get_id()) {
    capture->invalid = true;
    return kCaptureWrongThread;
  }
  if (capture->origin != stream) {
    capture->invalid = true;
    return kCaptureUnmatched;
  }
  bool unjoined = false;
  for (CUstream_st* other : capture->streams) {
    unjoined = unjoined || (other != stream && other->given > other->joined);
    other->capture.reset();
  }
  all.captures.erase(capture);
  if (result != kSuccess) return result;
  if (capture->invalid) return kCaptureInvalidated;
  if (unjoined) return kCaptureUnjoined;
  *graph = new CUgraph_st{std::move(capture->operations), std::move(capture->events)};
  count(&SimulatedCounts::graphs, 1);
  return kSuccess;
}

EXPORT CUresult cuStreamIsCapturing(CUstream_st* stream, int* status) {
  const CUresult result = enterContext("cuStreamIsCapturing");
  if (result == kSuccess) *status = stream->capturing() ? 1 : 0;
  return result;
}

EXPORT CUresult cuEventCreate(CUevent_st** event, unsigned flags) {
  const CUresult result = enterContext("cuEventCreate");
  if (result != kSuccess) return result;
  *event = new CUevent_st(flags, current->device);
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
  const std::shared_ptr<EventState> state = event->state;
  const bool external = flags == 1;
  if (isForeign(stream, "cuEventRecordWithFlags") || state->device != stream->device) return kInvalidHandle;
  {
    const std::lock_guard<std::mutex> lock(simulation().captureMutex);
    const std::shared_ptr<Capture> capture = stream->capture;
    // An external record is a part of the graph, and makes no sense outside of one.
    if (external && !capture) return kInvalidValue;
    if (capture && capture->invalid) return kCaptureInvalidated;
    if (capture && external) {
      capture->events.push_back(state);
    } else {
      state->capture = capture;
      state->stream = stream;
      state->position = stream->given;
    }
    if (capture && !external) return kSuccess;
  }
  if (!external) state->record();
  return stream->add([state] { state->happen(); });
}

EXPORT CUresult cuEventSynchronize(CUevent_st* event) {
  const CUresult result = enterUnsafe("cuEventSynchronize");
  if (result != kSuccess) return result;
  EventState& state = *event->state;
  {
    const std::lock_guard<std::mutex> lock(simulation().captureMutex);
    if (state.capture) {
      state.capture->invalid = true;
      return kCapturedEvent;
    }
  }
  if (!(state.flags & kEventBlockingSync)) count(&SimulatedCounts::spins, 1);
  uint64_t records = 0;
  {
    const std::lock_guard<std::mutex> lock(state.mutex);
    records = state.recorded;
  }
  state.waitFor(records);
  return lostCode(state.device);
}

EXPORT CUresult cuEventElapsedTime(float* milliseconds, CUevent_st* start, CUevent_st* end) {
  const CUresult result = enterContext("cuEventElapsedTime");
  if (result != kSuccess) return result;
  Clock::time_point times[2];
  for (const int which : {0, 1}) {
    EventState& state = *(which == 0 ? start : end)->state;
    const std::lock_guard<std::mutex> lock(state.mutex);
    if ((state.flags & kEventDisableTiming) || state.recorded == 0) return kInvalidHandle;
    if (state.happened < state.recorded) return kNotReady;
    times[which] = state.when;
  }
  *milliseconds = std::chrono::duration<float, std::milli>(times[1] - times[0]).count();
  return kSuccess;
}

EXPORT CUresult cuGraphInstantiateWithFlags(CUgraphExec_st** executable, CUgraph_st* graph, unsigned long long) {
  const CUresult result = enterContext("cuGraphInstantiateWithFlags");
  if (result != kSuccess) return result;
  *executable = new CUgraphExec_st{graph->operations, graph->events};
  count(&SimulatedCounts::graphs, 1);
  return kSuccess;
}

EXPORT CUresult cuGraphLaunch(CUgraphExec_st* executable, CUstream_st* stream) {
  const CUresult result = enterContext("cuGraphLaunch");
  if (result != kSuccess) return result;
  if (isForeign(stream, "cuGraphLaunch")) return kInvalidHandle;
  if (const CUresult conflict = stream->conflict()) return conflict;
  for (const auto& event : executable->events) event->record();
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
    for (const std::unique_ptr<Gpu>& gpu : all.gpus) {
      if (gpu->lost != 0) gpu->renew();
      gpu->kernels = 0;
    }
    all.setDevices(delaysOfEnvironment());
    all.failAt = 0;
    all.failKernel = 0;
    all.failed.clear();
    all.violation.clear();
    all.kernelTimes.clear();
    all.capacity = uint64_t{8} << 30;
    for (auto counter : {&SimulatedCounts::calls, &SimulatedCounts::kernels, &SimulatedCounts::uploads,
                         &SimulatedCounts::downloads, &SimulatedCounts::copies, &SimulatedCounts::graphLaunches,
                         &SimulatedCounts::deserialised, &SimulatedCounts::violations, &SimulatedCounts::captures,
                         &SimulatedCounts::spins, &SimulatedCounts::interrupts})
      all.counts.*counter = 0;
  }
  simulatedLet(-1);
  simulatedRefuseCaptures(false);
  simulatedPauseCaptures(false);
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

EXPORT void simulatedDevices(const uint64_t* delays, size_t size) {
  const std::lock_guard<std::mutex> lock(simulation().mutex);
  simulation().setDevices(std::vector<uint64_t>(delays, delays + size));
}

EXPORT uint64_t simulatedKernelsOn(int device) {
  const std::lock_guard<std::mutex> lock(simulation().mutex);
  return simulation().gpus.at(static_cast<size_t>(device))->kernels;
}

EXPORT void simulatedLoseDevice(int device, int code) {
  const std::lock_guard<std::mutex> lock(simulation().mutex);
  simulation().gpus.at(static_cast<size_t>(device))->lost = code;
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

EXPORT void simulatedRefuseCaptures(bool refuse) {
  const std::lock_guard<std::mutex> lock(simulation().captureMutex);
  simulation().refusesCaptures = refuse;
}

EXPORT void simulatedPauseCaptures(bool pause) {
  const std::lock_guard<std::mutex> lock(simulation().captureMutex);
  simulation().pausesCaptures = pause;
  simulation().captureChanged.notify_all();
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

EXPORT void simulatedLose(int code) { simulatedLoseDevice(deviceHere(), code); }

EXPORT bool simulatedIsDevice(const void* address, size_t bytes) {
  return within(reinterpret_cast<uintptr_t>(address), bytes, true, deviceHere());
}

EXPORT void* simulatedHost(const void* address) { return hostOf(reinterpret_cast<uintptr_t>(address), true); }

EXPORT bool simulatedIsCapturing(CUstream_st* stream) { return stream->capturing(); }

EXPORT int simulatedQueue(CUstream_st* stream, void (*run)(void*), void* data, void (*destroy)(void*)) {
  const auto work = std::make_shared<Kernel>(run, data, destroy);
  return stream->add([work] {
    if (!isLost()) work->run(work->data);
  });
}

EXPORT int simulatedLaunch(CUstream_st* stream, void (*run)(void*), void* data, void (*destroy)(void*)) {
  const auto kernel = std::make_shared<Kernel>(run, data, destroy);
  if (isForeign(stream, "a launch")) return kInvalidHandle;
  {
    const std::lock_guard<std::mutex> lock(simulation().captureMutex);
    if (stream->capture && simulation().refusesCaptures) {
      stream->capture->invalid = true;
      return kCaptureUnsupported;
    }
  }
  return stream->add([kernel] {
    waitWhileHeld();
    Simulation& all = simulation();
    uint64_t delay = 0;
    {
      const std::lock_guard<std::mutex> lock(all.mutex);
      Gpu& gpu = *all.gpus[static_cast<size_t>(deviceHere())];
      delay = gpu.delay;
      gpu.kernels++;
      all.counts.kernels++;
      all.kernelTimes.push_back(std::chrono::duration<double>(Clock::now().time_since_epoch()).count());
      if (all.failKernel != 0 && all.counts.kernels == all.failKernel) {
        all.failed = "a kernel";
        gpu.lost = all.failKernelCode;
      }
      if (gpu.lost != 0) return;
    }
    if (delay > 0) std::this_thread::sleep_for(std::chrono::microseconds(delay));
    if (!(replaying && isFaulty("skip-replay"))) kernel->run(kernel->data);
  });
}
