#include "cuda_driver.h"

#include "error.h"
#include "shared_library.h"

namespace flowturbo {
namespace {

// From CUDA's driver API; its header is not needed for seven functions.
using CudaResult = int;
constexpr CudaResult kSuccess = 0;
constexpr CudaResult kNoDevice = 100;
constexpr int kComputeCapabilityMajor = 75;
constexpr int kComputeCapabilityMinor = 76;

SharedLibrary openDriver() {
  try {
    return SharedLibrary("libcuda.so.1");
  } catch (const Error& error) {
    throw Error("NO_DRIVER", error.what());
  }
}

}  // namespace

CudaReport examineCuda() {
  const SharedLibrary driver = openDriver();
  auto cuInit = driver.require<CudaResult (*)(unsigned)>("cuInit");
  auto cuDriverGetVersion = driver.require<CudaResult (*)(int*)>("cuDriverGetVersion");
  auto cuDeviceGetCount = driver.require<CudaResult (*)(int*)>("cuDeviceGetCount");
  auto cuDeviceGet = driver.require<CudaResult (*)(int*, int)>("cuDeviceGet");
  auto cuDeviceGetName = driver.require<CudaResult (*)(char*, int, int)>("cuDeviceGetName");
  auto cuDeviceTotalMem = driver.require<CudaResult (*)(size_t*, int)>("cuDeviceTotalMem_v2");
  auto cuDeviceGetAttribute = driver.require<CudaResult (*)(int*, int, int)>("cuDeviceGetAttribute");
  auto cuGetErrorString = driver.require<CudaResult (*)(CudaResult, const char**)>("cuGetErrorString");

  const auto check = [&](CudaResult result, const char* call) {
    if (result == kSuccess) return;
    const char* words = nullptr;
    cuGetErrorString(result, &words);
    throw Error(result == kNoDevice ? "NO_DEVICE" : "CUDA", std::string(call) + " answered " + std::to_string(result) +
                                                                 " (" + (words != nullptr ? words : "unknown") + ")");
  };

  CudaReport report;
  check(cuInit(0), "cuInit");
  check(cuDriverGetVersion(&report.driverVersion), "cuDriverGetVersion");
  int count = 0;
  check(cuDeviceGetCount(&count), "cuDeviceGetCount");
  if (count == 0) throw Error("NO_DEVICE", "the driver knows no GPU");
  for (int ordinal = 0; ordinal < count; ordinal++) {
    CudaDevice device;
    int handle = 0;
    check(cuDeviceGet(&handle, ordinal), "cuDeviceGet");
    char name[256] = {};
    check(cuDeviceGetName(name, sizeof name - 1, handle), "cuDeviceGetName");
    device.name = name;
    size_t memory = 0;
    check(cuDeviceTotalMem(&memory, handle), "cuDeviceTotalMem");
    device.memoryBytes = memory;
    check(cuDeviceGetAttribute(&device.major, kComputeCapabilityMajor, handle), "cuDeviceGetAttribute");
    check(cuDeviceGetAttribute(&device.minor, kComputeCapabilityMinor, handle), "cuDeviceGetAttribute");
    report.devices.push_back(std::move(device));
  }
  return report;
}

}  // namespace flowturbo
