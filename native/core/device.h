// One GPU as the executor uses it: its primary context, which TensorRT shares, and what is made in that context, each
// thing owned by an object. Freeing never throws: on a lost device every call fails, and nothing is left to free.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "cuda_driver.h"

namespace flowturbo {

struct DeviceMemoryInfo {
  uint64_t free = 0;
  uint64_t total = 0;
};

class Device {
 public:
  // Retains the primary context and makes it the calling thread's. Throws as examineCudaDevice does.
  static std::shared_ptr<const Device> open(int ordinal);
  ~Device();
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  // To be called on every thread that uses the device or TensorRT, all of which are this package's own: from then on
  // captures of other threads, such as those of TensorRT's builder, do not forbid the thread to allocate or to wait, and
  // are not made invalid by it. Throws Error.
  void makeCurrent() const;
  // Remembers until the process ends that the device is lost: `open` then fails with this error. TensorRT's own CUDA
  // runtime holds the primary context as long as the process lives, so nothing in the process can replace it.
  void lose(const Error& error) const;
  DeviceMemoryInfo memory() const;
  // Gives the error that a failure of TensorRT was: DEVICE_LOST where the device is lost, which TensorRT does not report;
  // otherwise the given one.
  Error explain(Error error) const;

  const CudaDriver& driver() const noexcept { return driver_; }
  const CudaDevice& properties() const noexcept { return properties_; }
  int ordinal() const noexcept { return ordinal_; }

 private:
  Device(const CudaDriver& driver, CudaDevice properties, int ordinal)
      : driver_(driver), properties_(std::move(properties)), ordinal_(ordinal) {}

  const CudaDriver& driver_;
  CudaDevice properties_;
  int ordinal_;
  CudaDeviceNumber handle_ = 0;
  CUctx_st* context_ = nullptr;
};

// Frees with a driver's function whatever the object owns.
template <typename Handle, CudaResult (*CudaDriver::*release)(Handle)>
class Owned {
 public:
  Owned() = default;
  Owned(const CudaDriver& driver, Handle handle) : driver_(&driver), handle_(handle) {}
  ~Owned() { reset(); }
  Owned(Owned&& other) noexcept : driver_(other.driver_), handle_(other.handle_) { other.handle_ = Handle{}; }
  Owned& operator=(Owned&& other) noexcept {
    if (this != &other) {
      reset();
      driver_ = other.driver_;
      handle_ = other.handle_;
      other.handle_ = Handle{};
    }
    return *this;
  }
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;

  Handle get() const noexcept { return handle_; }
  explicit operator bool() const noexcept { return handle_ != Handle{}; }
  void reset() noexcept {
    if (handle_ != Handle{}) (driver_->*release)(handle_);
    handle_ = Handle{};
  }

 private:
  const CudaDriver* driver_ = nullptr;
  Handle handle_{};
};

using OwnedMemory = Owned<DevicePointer, &CudaDriver::cuMemFree>;
using OwnedHostMemory = Owned<void*, &CudaDriver::cuMemFreeHost>;
using OwnedStream = Owned<CUstream_st*, &CudaDriver::cuStreamDestroy>;
using OwnedEvent = Owned<CUevent_st*, &CudaDriver::cuEventDestroy>;
using OwnedGraph = Owned<CUgraph_st*, &CudaDriver::cuGraphDestroy>;
using OwnedGraphExec = Owned<CUgraphExec_st*, &CudaDriver::cuGraphExecDestroy>;

// What an event is for. The end of a wait is an interrupt of the device, so that the thread sleeps meanwhile and takes no
// processor time from the process; an event that nobody waits for, in time or in a CUDA graph, should not cause one. A time
// stamp is written for those alone that are timed.
enum class EventUse {
  // The beginning of a launch, and both ends of one in a CUDA graph, whose end as a whole is waited for.
  kTime,
  // The end of a launch.
  kTimedWait,
  // The end of a submission.
  kWait,
};
constexpr size_t kEventUses = 3;

// Each throws Error.
OwnedStream createStream(const Device& device);
OwnedEvent createEvent(const Device& device, EventUse use);

// As long as it exists, the calling thread may not do what a capture of its own does not observe: allocate, free, wait.
class StrictCapture {
 public:
  // Throws Error.
  explicit StrictCapture(const Device& device);
  ~StrictCapture();
  StrictCapture(const StrictCapture&) = delete;
  StrictCapture& operator=(const StrictCapture&) = delete;

 private:
  const CudaDriver& driver_;
  int before_;
};

// Memory that is allocated again and again. A returned block is kept and reused for the next request of about its size.
// Only `take` and `trim` free memory, since blocks are returned on any thread; they belong to the thread that works on the
// stream, and not into a capture, which they would make invalid. All users of one pool work on one stream: a block may be
// reused while earlier work on it is still queued there.
template <typename Memory>
class MemoryPool : public std::enable_shared_from_this<MemoryPool<Memory>> {
 public:
  MemoryPool(std::shared_ptr<const Device> device, CUstream_st* stream) : device_(std::move(device)), stream_(stream) {}

  struct Block {
    Memory memory;
    uint64_t bytes = 0;

    auto address() const noexcept { return memory.get(); }
  };
  // The block returns to the pool when its last owner is destroyed.
  using Shared = std::shared_ptr<const Block>;

  // At least one byte, aligned to 256. Throws Error: DEVICE_MEMORY or OUT_OF_MEMORY with what is needed, CUDA.
  Shared take(uint64_t bytes);
  // Frees the unused blocks, after all work on the stream has ended.
  void trim();
  // Of all blocks, in use or kept.
  uint64_t bytes() const;

 private:
  std::shared_ptr<const Device> device_;
  CUstream_st* stream_;
  mutable std::mutex mutex_;
  std::vector<Block> kept_;
  uint64_t bytes_ = 0;
};

// On the device.
using DeviceMemoryPool = MemoryPool<OwnedMemory>;
// On the host, page-locked, so that the device can read and write it directly.
using PinnedMemoryPool = MemoryPool<OwnedHostMemory>;

}  // namespace flowturbo
