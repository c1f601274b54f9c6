// The few structures of Vulkan 1.1 that vulkan.cpp passes, as the specification lays them out for 64 bits, so that nothing
// but a compiler is needed to build this package. Fields that are not used are kept together as bytes. native/test/
// vulkan_layout.cpp compares every size and offset with Khronos' own header, where that is installed.
#pragma once

#include <cstddef>
#include <cstdint>

namespace flowturbo::vulkan {

using Result = int32_t;
using Bool = uint32_t;
struct InstanceHandle;
struct PhysicalDeviceHandle;

constexpr Result kSuccess = 0;
constexpr Result kIncomplete = 5;
constexpr Result kIncompatibleDriver = -9;
constexpr uint32_t kDeviceLocalHeap = 1;

constexpr uint32_t version(uint32_t major, uint32_t minor) { return major << 22 | minor << 12; }

// VkStructureType.
enum Type : uint32_t {
  kApplicationInfo = 0,
  kInstanceCreateInfo = 1,
  kFeatures2 = 1000059000,
  kProperties2 = 1000059001,
  kMemoryProperties2 = 1000059006,
  kFloat16Int8Features = 1000082000,
  k16BitStorageFeatures = 1000083000,
  kDriverProperties = 1000196000,
  kMemoryBudgetProperties = 1000237000,
};

struct ApplicationInfo {
  Type type = kApplicationInfo;
  const void* next = nullptr;
  const char* applicationName = nullptr;
  uint32_t applicationVersion = 0;
  const char* engineName = nullptr;
  uint32_t engineVersion = 0;
  uint32_t apiVersion = 0;
};

struct InstanceCreateInfo {
  Type type = kInstanceCreateInfo;
  const void* next = nullptr;
  uint32_t flags = 0;
  const ApplicationInfo* applicationInfo = nullptr;
  uint32_t layerCount = 0;
  const char* const* layerNames = nullptr;
  uint32_t extensionCount = 0;
  const char* const* extensionNames = nullptr;
};

struct Limits {
  uint32_t imagesAndUniforms[7];
  uint32_t maxStorageBufferRange;
  // They contain numbers of 64 bits.
  alignas(8) unsigned char others[472];
};

struct Properties {
  uint32_t apiVersion;
  uint32_t driverVersion;
  uint32_t vendorId;
  uint32_t deviceId;
  uint32_t deviceType;
  char deviceName[256];
  uint8_t pipelineCacheUuid[16];
  Limits limits;
  Bool sparse[5];
};

struct Properties2 {
  Type type = kProperties2;
  void* next = nullptr;
  Properties properties = {};
};

struct DriverProperties {
  Type type = kDriverProperties;
  void* next = nullptr;
  uint32_t driverId = 0;
  char driverName[256] = {};
  char driverInfo[256] = {};
  uint8_t conformanceVersion[4] = {};
};

struct Features2 {
  Type type = kFeatures2;
  void* next = nullptr;
  Bool features[55] = {};
};

struct Storage16BitFeatures {
  Type type = k16BitStorageFeatures;
  void* next = nullptr;
  Bool storageBuffer = 0;
  Bool uniformAndStorageBuffer = 0;
  Bool pushConstant = 0;
  Bool inputOutput = 0;
};

struct Float16Int8Features {
  Type type = kFloat16Int8Features;
  void* next = nullptr;
  Bool shaderFloat16 = 0;
  Bool shaderInt8 = 0;
};

constexpr size_t kMaximumHeaps = 16;

struct MemoryHeap {
  uint64_t size;
  uint32_t flags;
};

struct MemoryProperties {
  uint32_t typeCount;
  struct {
    uint32_t flags;
    uint32_t heap;
  } types[32];
  uint32_t heapCount;
  MemoryHeap heaps[kMaximumHeaps];
};

struct MemoryProperties2 {
  Type type = kMemoryProperties2;
  void* next = nullptr;
  MemoryProperties properties = {};
};

struct MemoryBudgetProperties {
  Type type = kMemoryBudgetProperties;
  void* next = nullptr;
  uint64_t budget[kMaximumHeaps] = {};
  uint64_t usage[kMaximumHeaps] = {};
};

struct ExtensionProperties {
  char name[256];
  uint32_t version;
};

static_assert(sizeof(void*) == 8, "the structures below are those of 64 bits");
static_assert(sizeof(ApplicationInfo) == 48);
static_assert(sizeof(InstanceCreateInfo) == 64);
static_assert(sizeof(Limits) == 504 && offsetof(Limits, maxStorageBufferRange) == 28);
static_assert(sizeof(Properties) == 824 && offsetof(Properties, limits) == 296);
static_assert(sizeof(Properties2) == 840 && offsetof(Properties2, properties) == 16);
static_assert(sizeof(DriverProperties) == 536 && offsetof(DriverProperties, driverName) == 20);
static_assert(sizeof(Features2) == 240 && offsetof(Features2, features) == 16);
static_assert(sizeof(Storage16BitFeatures) == 32 && offsetof(Storage16BitFeatures, storageBuffer) == 16);
static_assert(sizeof(Float16Int8Features) == 24 && offsetof(Float16Int8Features, shaderFloat16) == 16);
static_assert(sizeof(MemoryProperties) == 520 && offsetof(MemoryProperties, heaps) == 264);
static_assert(sizeof(MemoryProperties2) == 536 && offsetof(MemoryProperties2, properties) == 16);
static_assert(sizeof(MemoryBudgetProperties) == 272 && offsetof(MemoryBudgetProperties, usage) == 144);
static_assert(sizeof(ExtensionProperties) == 260);

}  // namespace flowturbo::vulkan
