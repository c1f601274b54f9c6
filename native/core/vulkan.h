// The graphics adapters of this machine, as Vulkan's loader (libvulkan.so.1) lists them. ONNX Runtime's WebGPU provider
// runs on one of them and does not say which, nor what it has. Nothing is computed here.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace flowturbo {

struct GraphicsAdapter {
  std::string name;
  uint32_t vendorId = 0;
  uint32_t deviceId = 0;
  // "discrete", "integrated", "virtual", "cpu" or "other".
  std::string type;
  // Empty where the driver does not say.
  std::string driverName;
  std::string driverInfo;
  // As the driver encodes its version.
  uint32_t driverVersion = 0;
  // Major, minor and patch of the Vulkan version that it has.
  uint32_t apiVersion[3] = {};
  // Of all heaps that are local to the device.
  uint64_t memoryBytes = 0;
  // What this process may still use of it, as the driver estimates; -1 where it does not say.
  double freeBytes = -1;
  // Whether shaders can compute in float16 and read it from buffers.
  bool float16 = false;
  uint32_t maxStorageBufferRange = 0;
};

// Loads every driver that Vulkan is told of, in the order of the loader: call it in a process that may crash or hang. Empty
// where there is no driver. Throws Error LIBRARY_NOT_LOADED where libvulkan.so.1 cannot be opened, VULKAN where it fails.
std::vector<GraphicsAdapter> graphicsAdapters();

}  // namespace flowturbo
