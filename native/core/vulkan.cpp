#include "vulkan.h"

#include <cstring>
#include <type_traits>

#include "error.h"
#include "shared_library.h"
#include "vulkan_types.h"

namespace flowturbo {
namespace {

using namespace vulkan;

using Function = void (*)();
using GetInstanceFunction = Function (*)(InstanceHandle*, const char*);

void check(Result result, const char* call) {
  // With fewer entries than there are by now, those that were returned are whole.
  if (result != kSuccess && result != kIncomplete)
    throw Error("VULKAN", std::string(call) + " answered " + std::to_string(result));
}

class Instance {
 public:
  explicit Instance(const SharedLibrary& library)
      : getFunction_(library.require<GetInstanceFunction>("vkGetInstanceProcAddr")) {
    ApplicationInfo application;
    application.applicationName = "flowturbo";
    application.apiVersion = version(1, 1);
    InstanceCreateInfo info;
    info.applicationInfo = &application;
    const auto create = find<Result (*)(const InstanceCreateInfo*, const void*, InstanceHandle**)>("vkCreateInstance");
    const Result result = create(&info, nullptr, &handle_);
    // What the loader answers where it knows of no driver.
    if (result == kIncompatibleDriver) handle_ = nullptr;
    else check(result, "vkCreateInstance");
  }
  ~Instance() {
    if (handle_ == nullptr) return;
    const auto destroy = reinterpret_cast<void (*)(InstanceHandle*, const void*)>(getFunction_(handle_, "vkDestroyInstance"));
    if (destroy != nullptr) destroy(handle_, nullptr);
  }
  Instance(const Instance&) = delete;
  Instance& operator=(const Instance&) = delete;

  bool hasDriver() const { return handle_ != nullptr; }

  template <typename Pointer>
  Pointer find(const char* name) const {
    const Function function = getFunction_(handle_, name);
    if (function == nullptr) throw Error("VULKAN", std::string("libvulkan.so.1 has no ") + name);
    return reinterpret_cast<Pointer>(function);
  }

  std::vector<PhysicalDeviceHandle*> devices() const {
    const auto enumerate =
        find<Result (*)(InstanceHandle*, uint32_t*, PhysicalDeviceHandle**)>("vkEnumeratePhysicalDevices");
    uint32_t count = 0;
    check(enumerate(handle_, &count, nullptr), "vkEnumeratePhysicalDevices");
    std::vector<PhysicalDeviceHandle*> devices(count);
    if (count > 0) check(enumerate(handle_, &count, devices.data()), "vkEnumeratePhysicalDevices");
    devices.resize(count);
    return devices;
  }

 private:
  GetInstanceFunction getFunction_;
  InstanceHandle* handle_ = nullptr;
};

class Extensions {
 public:
  Extensions(const Instance& instance, PhysicalDeviceHandle* device) {
    const auto enumerate = instance.find<Result (*)(PhysicalDeviceHandle*, const char*, uint32_t*, ExtensionProperties*)>(
        "vkEnumerateDeviceExtensionProperties");
    uint32_t count = 0;
    check(enumerate(device, nullptr, &count, nullptr), "vkEnumerateDeviceExtensionProperties");
    list_.resize(count);
    if (count > 0) check(enumerate(device, nullptr, &count, list_.data()), "vkEnumerateDeviceExtensionProperties");
    list_.resize(count);
  }
  bool has(const char* name) const {
    for (const ExtensionProperties& extension : list_)
      if (std::strncmp(extension.name, name, sizeof(extension.name)) == 0) return true;
    return false;
  }

 private:
  std::vector<ExtensionProperties> list_;
};

// A driver's text need not end.
template <size_t size>
std::string textOf(const char (&text)[size]) {
  return std::string(text, strnlen(text, size));
}

const char* typeOf(uint32_t type) {
  switch (type) {
    case 1: return "integrated";
    case 2: return "discrete";
    case 3: return "virtual";
    case 4: return "cpu";
    default: return "other";
  }
}

template <typename Structure>
void query(const Instance& instance, PhysicalDeviceHandle* device, const char* name, Structure& structure) {
  instance.find<void (*)(PhysicalDeviceHandle*, Structure*)>(name)(device, &structure);
}

GraphicsAdapter examine(const Instance& instance, PhysicalDeviceHandle* device) {
  Properties2 properties;
  query(instance, device, "vkGetPhysicalDeviceProperties", properties.properties);
  const uint32_t api = properties.properties.apiVersion;
  const Extensions extensions(instance, device);
  const auto hasSince12 = [&](const char* extension) { return api >= version(1, 2) || extensions.has(extension); };

  // What follows asks by functions of Vulkan 1.1. Structures that a driver does not know are not given to it.
  DriverProperties driver;
  Storage16BitFeatures storage;
  Float16Int8Features arithmetic;
  MemoryProperties2 memory;
  MemoryBudgetProperties budget;
  const bool hasBudget = extensions.has("VK_EXT_memory_budget");
  if (api >= version(1, 1)) {
    if (hasSince12("VK_KHR_driver_properties")) properties.next = &driver;
    query(instance, device, "vkGetPhysicalDeviceProperties2", properties);
    Features2 features;
    features.next = &storage;
    if (hasSince12("VK_KHR_shader_float16_int8")) storage.next = &arithmetic;
    query(instance, device, "vkGetPhysicalDeviceFeatures2", features);
    if (hasBudget) memory.next = &budget;
    query(instance, device, "vkGetPhysicalDeviceMemoryProperties2", memory);
  } else {
    query(instance, device, "vkGetPhysicalDeviceMemoryProperties", memory.properties);
  }

  GraphicsAdapter adapter;
  const Properties& base = properties.properties;
  adapter.name = textOf(base.deviceName);
  adapter.vendorId = base.vendorId;
  adapter.deviceId = base.deviceId;
  adapter.type = typeOf(base.deviceType);
  adapter.driverName = textOf(driver.driverName);
  adapter.driverInfo = textOf(driver.driverInfo);
  adapter.driverVersion = base.driverVersion;
  adapter.apiVersion[0] = api >> 22 & 0x7f;
  adapter.apiVersion[1] = api >> 12 & 0x3ff;
  adapter.apiVersion[2] = api & 0xfff;
  adapter.maxStorageBufferRange = base.limits.maxStorageBufferRange;
  adapter.float16 = arithmetic.shaderFloat16 && storage.storageBuffer && storage.uniformAndStorageBuffer;
  if (hasBudget && api >= version(1, 1)) adapter.freeBytes = 0;
  for (size_t heap = 0; heap < memory.properties.heapCount && heap < kMaximumHeaps; heap++) {
    if (!(memory.properties.heaps[heap].flags & kDeviceLocalHeap)) continue;
    adapter.memoryBytes += memory.properties.heaps[heap].size;
    if (adapter.freeBytes >= 0 && budget.budget[heap] > budget.usage[heap])
      adapter.freeBytes += static_cast<double>(budget.budget[heap] - budget.usage[heap]);
  }
  return adapter;
}

}  // namespace

std::vector<GraphicsAdapter> graphicsAdapters() {
  const SharedLibrary library("libvulkan.so.1");
  const Instance instance(library);
  std::vector<GraphicsAdapter> adapters;
  if (!instance.hasDriver()) return adapters;
  for (PhysicalDeviceHandle* device : instance.devices()) adapters.push_back(examine(instance, device));
  return adapters;
}

}  // namespace flowturbo
