#include "device.h"

#include <algorithm>
#include <map>
#include <string>

namespace flowturbo {
namespace {

constexpr unsigned kStreamNonBlocking = 1;
constexpr unsigned kEventBlockingSync = 1;
constexpr unsigned kEventDisableTiming = 2;

constexpr int kCaptureThreadLocal = 1;
constexpr int kCaptureRelaxed = 2;

// Unused blocks that a pool keeps: a scheduler creates and releases registers by the dozen.
constexpr size_t kKeptBlocks = 256;
constexpr uint64_t kGranule = uint64_t{64} << 10;

uint64_t rounded(uint64_t bytes) { return (std::max<uint64_t>(bytes, 1) + kGranule - 1) / kGranule * kGranule; }

CudaResult allocate(const CudaDriver& driver, DevicePointer& pointer, uint64_t bytes) {
  return driver.cuMemAlloc(&pointer, bytes);
}
CudaResult allocate(const CudaDriver& driver, void*& pointer, uint64_t bytes) {
  return driver.cuMemAllocHost(&pointer, bytes);
}

Error exhausted(const Device& device, DevicePointer, uint64_t bytes) {
  Error error("DEVICE_MEMORY", "the device has too little memory");
  error.needed = bytes;
  error.available = device.memory().free;
  return error;
}
Error exhausted(const Device&, void*, uint64_t bytes) {
  Error error("OUT_OF_MEMORY", "the machine has too little memory for the transfer to and from the device");
  error.needed = bytes;
  return error;
}

// Contexts that are lost, with the error that says so. Strings only: nothing has to be destroyed when the process exits.
struct Losses {
  std::mutex mutex;
  std::map<const CUctx_st*, std::string> errors;
};

Losses& losses() {
  static auto* instance = new Losses();
  return *instance;
}

}  // namespace

std::shared_ptr<const Device> Device::open(int ordinal) {
  const CudaDriver& driver = CudaDriver::open();
  std::shared_ptr<Device> device;
  try {
    device.reset(new Device(driver, examineCudaDevice(ordinal), ordinal));
    driver.check(driver.cuDeviceGet(&device->handle_, ordinal), "cuDeviceGet");
    driver.check(driver.cuDevicePrimaryCtxRetain(&device->context_, device->handle_), "cuDevicePrimaryCtxRetain");
  } catch (const Error& error) {
    // What was never had is not lost: another process may have the device for itself at present.
    if (error.code() == "DEVICE_LOST") throw Error("CUDA", error.what());
    throw;
  }
  {
    const std::lock_guard<std::mutex> lock(losses().mutex);
    const auto lost = losses().errors.find(device->context_);
    if (lost != losses().errors.end()) throw Error("DEVICE_LOST", lost->second);
  }
  device->makeCurrent();
  return device;
}

Device::~Device() {
  if (context_ != nullptr) driver_.cuDevicePrimaryCtxRelease(handle_);
}

void Device::makeCurrent() const {
  driver_.check(driver_.cuCtxSetCurrent(context_), "cuCtxSetCurrent");
  int mode = kCaptureRelaxed;
  driver_.check(driver_.cuThreadExchangeStreamCaptureMode(&mode), "cuThreadExchangeStreamCaptureMode");
}

void Device::lose(const Error& error) const {
  const std::lock_guard<std::mutex> lock(losses().mutex);
  losses().errors.emplace(context_, error.what());
}

DeviceMemoryInfo Device::memory() const {
  size_t free = 0;
  size_t total = 0;
  driver_.check(driver_.cuMemGetInfo(&free, &total), "cuMemGetInfo");
  return {free, total};
}

Error Device::explain(Error error) const {
  size_t free = 0;
  size_t total = 0;
  // It returns errors of earlier work too.
  const CudaResult result = driver_.cuMemGetInfo(&free, &total);
  if (result == kCudaSuccess) return error;
  Error cause = driver_.failure(result, "cuMemGetInfo");
  if (cause.code() != "DEVICE_LOST") return error;
  cause.log = std::move(error.log);
  cause.launch = error.launch;
  return cause;
}

OwnedStream createStream(const Device& device) {
  CUstream_st* stream = nullptr;
  device.driver().check(device.driver().cuStreamCreate(&stream, kStreamNonBlocking), "cuStreamCreate");
  return {device.driver(), stream};
}

OwnedEvent createEvent(const Device& device, EventUse use) {
  const unsigned flags = (use == EventUse::kTime ? 0 : kEventBlockingSync) |
                         (use == EventUse::kWait ? kEventDisableTiming : 0);
  CUevent_st* event = nullptr;
  device.driver().check(device.driver().cuEventCreate(&event, flags), "cuEventCreate");
  return {device.driver(), event};
}

StrictCapture::StrictCapture(const Device& device) : driver_(device.driver()), before_(kCaptureThreadLocal) {
  driver_.check(driver_.cuThreadExchangeStreamCaptureMode(&before_), "cuThreadExchangeStreamCaptureMode");
}

// Where this fails the thread stays strict, which forbids nothing outside of its captures.
StrictCapture::~StrictCapture() { driver_.cuThreadExchangeStreamCaptureMode(&before_); }

template <typename Memory>
typename MemoryPool<Memory>::Shared MemoryPool<Memory>::take(uint64_t bytes) {
  const uint64_t size = rounded(bytes);
  auto block = std::make_unique<Block>();
  bool tooMany = false;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    // The smallest block that is large enough and of which at least half is used.
    auto best = kept_.end();
    for (auto kept = kept_.begin(); kept != kept_.end(); ++kept)
      if (kept->bytes >= size && kept->bytes <= 2 * size && (best == kept_.end() || kept->bytes < best->bytes))
        best = kept;
    if (best != kept_.end()) {
      *block = std::move(*best);
      kept_.erase(best);
    }
    tooMany = kept_.size() > kKeptBlocks;
  }
  if (tooMany) trim();
  if (!block->memory) {
    const CudaDriver& driver = device_->driver();
    auto pointer = decltype(block->address()){};
    CudaResult result = allocate(driver, pointer, size);
    if (result == kCudaOutOfMemory) {
      trim();
      result = allocate(driver, pointer, size);
    }
    if (result == kCudaOutOfMemory) throw exhausted(*device_, pointer, size);
    driver.check(result, "an allocation");
    block->memory = Memory(driver, pointer);
    block->bytes = size;
    const std::lock_guard<std::mutex> lock(mutex_);
    bytes_ += size;
    // So that returning a block never allocates.
    kept_.reserve(kept_.size() + 64);
  }
  return Shared(block.release(), [pool = this->shared_from_this()](const Block* returned) {
    const std::unique_ptr<Block> owned(const_cast<Block*>(returned));
    const std::lock_guard<std::mutex> lock(pool->mutex_);
    pool->kept_.push_back(std::move(*owned));
  });
}

template <typename Memory>
void MemoryPool<Memory>::trim() {
  device_->driver().check(device_->driver().cuStreamSynchronize(stream_), "cuStreamSynchronize");
  std::vector<Block> dropped;
  const std::lock_guard<std::mutex> lock(mutex_);
  dropped.swap(kept_);
  for (const Block& block : dropped) bytes_ -= block.bytes;
  kept_.reserve(dropped.capacity());
}

template <typename Memory>
uint64_t MemoryPool<Memory>::bytes() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return bytes_;
}

template class MemoryPool<OwnedMemory>;
template class MemoryPool<OwnedHostMemory>;

}  // namespace flowturbo
