#include "cuda_driver.h"

#include <mutex>

#include "shared_library.h"

namespace flowturbo {
namespace {

// From CUDA's driver API; its header is not needed for a table of functions.
constexpr int kComputeCapabilityMajor = 75;
constexpr int kComputeCapabilityMinor = 76;

const CudaDriver* load() {
  // Function pointers only: nothing here has to be torn down when the process exits.
  auto* table = new CudaDriver();
  try {
    const SharedLibrary driver("libcuda.so.1");
    const auto find = [&](auto& function, const char* symbol) {
      function = driver.require<std::remove_reference_t<decltype(function)>>(symbol);
    };
    find(table->cuInit, "cuInit");
    find(table->cuDriverGetVersion, "cuDriverGetVersion");
    find(table->cuGetErrorString, "cuGetErrorString");
    find(table->cuDeviceGetCount, "cuDeviceGetCount");
    find(table->cuDeviceGet, "cuDeviceGet");
    find(table->cuDeviceGetName, "cuDeviceGetName");
    find(table->cuDeviceTotalMem, "cuDeviceTotalMem_v2");
    find(table->cuDeviceGetAttribute, "cuDeviceGetAttribute");
    find(table->cuDevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain");
    find(table->cuDevicePrimaryCtxRelease, "cuDevicePrimaryCtxRelease_v2");
    find(table->cuCtxSetCurrent, "cuCtxSetCurrent");
    find(table->cuThreadExchangeStreamCaptureMode, "cuThreadExchangeStreamCaptureMode");
    find(table->cuMemGetInfo, "cuMemGetInfo_v2");
    find(table->cuMemAlloc, "cuMemAlloc_v2");
    find(table->cuMemFree, "cuMemFree_v2");
    find(table->cuMemAllocHost, "cuMemAllocHost_v2");
    find(table->cuMemFreeHost, "cuMemFreeHost");
    find(table->cuMemcpyHtoDAsync, "cuMemcpyHtoDAsync_v2");
    find(table->cuMemcpyDtoHAsync, "cuMemcpyDtoHAsync_v2");
    find(table->cuMemcpyDtoDAsync, "cuMemcpyDtoDAsync_v2");
    find(table->cuMemsetD8Async, "cuMemsetD8Async");
    find(table->cuStreamCreate, "cuStreamCreate");
    find(table->cuStreamDestroy, "cuStreamDestroy_v2");
    find(table->cuStreamSynchronize, "cuStreamSynchronize");
    find(table->cuStreamBeginCapture, "cuStreamBeginCapture_v2");
    find(table->cuStreamEndCapture, "cuStreamEndCapture");
    find(table->cuEventCreate, "cuEventCreate");
    find(table->cuEventDestroy, "cuEventDestroy_v2");
    find(table->cuEventRecordWithFlags, "cuEventRecordWithFlags");
    find(table->cuEventSynchronize, "cuEventSynchronize");
    find(table->cuEventElapsedTime, "cuEventElapsedTime");
    find(table->cuGraphInstantiateWithFlags, "cuGraphInstantiateWithFlags");
    find(table->cuGraphLaunch, "cuGraphLaunch");
    find(table->cuGraphExecDestroy, "cuGraphExecDestroy");
    find(table->cuGraphDestroy, "cuGraphDestroy");
  } catch (const Error& error) {
    delete table;
    throw Error("NO_DRIVER", error.what());
  }
  return table;
}

const char* codeOf(CudaResult result) {
  switch (result) {
    case kCudaOutOfMemory:
      return "DEVICE_MEMORY";
    case 100:  // CUDA_ERROR_NO_DEVICE
      return "NO_DEVICE";
    // Those after which every later call on the context fails too.
    case 4:    // CUDA_ERROR_DEINITIALIZED
    case 46:   // CUDA_ERROR_DEVICE_UNAVAILABLE
    case 214:  // CUDA_ERROR_ECC_UNCORRECTABLE
    case 220:  // CUDA_ERROR_NVLINK_UNCORRECTABLE
    case 226:  // CUDA_ERROR_CONTAINED
    case 700:  // CUDA_ERROR_ILLEGAL_ADDRESS
    case 702:  // CUDA_ERROR_LAUNCH_TIMEOUT
    case 709:  // CUDA_ERROR_CONTEXT_IS_DESTROYED
    case 710:  // CUDA_ERROR_ASSERT
    case 714:  // CUDA_ERROR_HARDWARE_STACK_ERROR
    case 715:  // CUDA_ERROR_ILLEGAL_INSTRUCTION
    case 716:  // CUDA_ERROR_MISALIGNED_ADDRESS
    case 717:  // CUDA_ERROR_INVALID_ADDRESS_SPACE
    case 718:  // CUDA_ERROR_INVALID_PC
    case 719:  // CUDA_ERROR_LAUNCH_FAILED
    case 999:  // CUDA_ERROR_UNKNOWN
      return "DEVICE_LOST";
    default:
      return "CUDA";
  }
}

CudaDevice examine(const CudaDriver& driver, int ordinal) {
  CudaDevice device;
  CudaDeviceNumber handle = 0;
  driver.check(driver.cuDeviceGet(&handle, ordinal), "cuDeviceGet");
  char name[256] = {};
  driver.check(driver.cuDeviceGetName(name, sizeof name - 1, handle), "cuDeviceGetName");
  device.name = name;
  size_t memory = 0;
  driver.check(driver.cuDeviceTotalMem(&memory, handle), "cuDeviceTotalMem");
  device.memoryBytes = memory;
  driver.check(driver.cuDeviceGetAttribute(&device.major, kComputeCapabilityMajor, handle), "cuDeviceGetAttribute");
  driver.check(driver.cuDeviceGetAttribute(&device.minor, kComputeCapabilityMinor, handle), "cuDeviceGetAttribute");
  return device;
}

int countDevices(const CudaDriver& driver) {
  driver.check(driver.cuInit(0), "cuInit");
  int count = 0;
  driver.check(driver.cuDeviceGetCount(&count), "cuDeviceGetCount");
  if (count == 0) throw Error("NO_DEVICE", "the driver found no GPU");
  return count;
}

}  // namespace

const CudaDriver& CudaDriver::open() {
  static std::mutex mutex;
  static const CudaDriver* opened = nullptr;
  const std::lock_guard<std::mutex> lock(mutex);
  if (opened == nullptr) opened = load();
  return *opened;
}

Error CudaDriver::failure(CudaResult result, const char* call) const {
  const char* words = nullptr;
  cuGetErrorString(result, &words);
  return Error(codeOf(result), std::string(call) + " answered " + std::to_string(result) + " (" +
                                   (words != nullptr ? words : "unknown") + ")");
}

CudaReport examineCuda() {
  const CudaDriver& driver = CudaDriver::open();
  CudaReport report;
  const int count = countDevices(driver);
  driver.check(driver.cuDriverGetVersion(&report.driverVersion), "cuDriverGetVersion");
  for (int ordinal = 0; ordinal < count; ordinal++) report.devices.push_back(examine(driver, ordinal));
  return report;
}

CudaDevice examineCudaDevice(int ordinal) {
  const CudaDriver& driver = CudaDriver::open();
  const int count = countDevices(driver);
  if (ordinal < 0 || ordinal >= count)
    throw Error("INVALID", "there is no GPU number " + std::to_string(ordinal) + " among " + std::to_string(count));
  return examine(driver, ordinal);
}

}  // namespace flowturbo
