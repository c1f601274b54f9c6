// Compiled, never run: the structures of native/core/vulkan_types.h against those of Khronos' header.

#include <vulkan/vulkan_core.h>

#include <cstddef>

#include "vulkan_types.h"

namespace ours = flowturbo::vulkan;

#define SAME_SIZE(mine, theirs) \
  static_assert(sizeof(ours::mine) == sizeof(theirs) && alignof(ours::mine) == alignof(theirs), #mine)
#define SAME_PLACE(mine, field, theirs, their)                                                        \
  static_assert(offsetof(ours::mine, field) == offsetof(theirs, their) &&                             \
                    sizeof(ours::mine::field) == sizeof(theirs::their),                               \
                #mine "::" #field)
#define SAME_TYPE(mine, theirs) static_assert(static_cast<int>(ours::mine) == static_cast<int>(theirs), #mine)

SAME_SIZE(ApplicationInfo, VkApplicationInfo);
SAME_PLACE(ApplicationInfo, applicationName, VkApplicationInfo, pApplicationName);
SAME_PLACE(ApplicationInfo, apiVersion, VkApplicationInfo, apiVersion);
SAME_TYPE(kApplicationInfo, VK_STRUCTURE_TYPE_APPLICATION_INFO);

SAME_SIZE(InstanceCreateInfo, VkInstanceCreateInfo);
SAME_PLACE(InstanceCreateInfo, applicationInfo, VkInstanceCreateInfo, pApplicationInfo);
SAME_PLACE(InstanceCreateInfo, layerCount, VkInstanceCreateInfo, enabledLayerCount);
SAME_PLACE(InstanceCreateInfo, extensionNames, VkInstanceCreateInfo, ppEnabledExtensionNames);
SAME_TYPE(kInstanceCreateInfo, VK_STRUCTURE_TYPE_INSTANCE_CREATE_INFO);

SAME_SIZE(Limits, VkPhysicalDeviceLimits);
SAME_PLACE(Limits, maxStorageBufferRange, VkPhysicalDeviceLimits, maxStorageBufferRange);

SAME_SIZE(Properties, VkPhysicalDeviceProperties);
SAME_PLACE(Properties, apiVersion, VkPhysicalDeviceProperties, apiVersion);
SAME_PLACE(Properties, driverVersion, VkPhysicalDeviceProperties, driverVersion);
SAME_PLACE(Properties, vendorId, VkPhysicalDeviceProperties, vendorID);
SAME_PLACE(Properties, deviceId, VkPhysicalDeviceProperties, deviceID);
SAME_PLACE(Properties, deviceType, VkPhysicalDeviceProperties, deviceType);
SAME_PLACE(Properties, deviceName, VkPhysicalDeviceProperties, deviceName);
SAME_PLACE(Properties, limits, VkPhysicalDeviceProperties, limits);
SAME_PLACE(Properties, sparse, VkPhysicalDeviceProperties, sparseProperties);

SAME_SIZE(Properties2, VkPhysicalDeviceProperties2);
SAME_PLACE(Properties2, next, VkPhysicalDeviceProperties2, pNext);
SAME_PLACE(Properties2, properties, VkPhysicalDeviceProperties2, properties);
SAME_TYPE(kProperties2, VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_PROPERTIES_2);

SAME_SIZE(DriverProperties, VkPhysicalDeviceDriverProperties);
SAME_PLACE(DriverProperties, driverName, VkPhysicalDeviceDriverProperties, driverName);
SAME_PLACE(DriverProperties, driverInfo, VkPhysicalDeviceDriverProperties, driverInfo);
SAME_TYPE(kDriverProperties, VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_DRIVER_PROPERTIES);

SAME_SIZE(Features2, VkPhysicalDeviceFeatures2);
SAME_PLACE(Features2, features, VkPhysicalDeviceFeatures2, features);
SAME_TYPE(kFeatures2, VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_FEATURES_2);

SAME_SIZE(Storage16BitFeatures, VkPhysicalDevice16BitStorageFeatures);
SAME_PLACE(Storage16BitFeatures, storageBuffer, VkPhysicalDevice16BitStorageFeatures, storageBuffer16BitAccess);
SAME_PLACE(Storage16BitFeatures, uniformAndStorageBuffer, VkPhysicalDevice16BitStorageFeatures,
           uniformAndStorageBuffer16BitAccess);
SAME_TYPE(k16BitStorageFeatures, VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_16BIT_STORAGE_FEATURES);

SAME_SIZE(Float16Int8Features, VkPhysicalDeviceShaderFloat16Int8Features);
SAME_PLACE(Float16Int8Features, shaderFloat16, VkPhysicalDeviceShaderFloat16Int8Features, shaderFloat16);
SAME_TYPE(kFloat16Int8Features, VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_SHADER_FLOAT16_INT8_FEATURES);

SAME_SIZE(MemoryHeap, VkMemoryHeap);
SAME_PLACE(MemoryHeap, size, VkMemoryHeap, size);
SAME_PLACE(MemoryHeap, flags, VkMemoryHeap, flags);
SAME_SIZE(MemoryProperties, VkPhysicalDeviceMemoryProperties);
SAME_PLACE(MemoryProperties, heapCount, VkPhysicalDeviceMemoryProperties, memoryHeapCount);
SAME_PLACE(MemoryProperties, heaps, VkPhysicalDeviceMemoryProperties, memoryHeaps);
SAME_SIZE(MemoryProperties2, VkPhysicalDeviceMemoryProperties2);
SAME_PLACE(MemoryProperties2, properties, VkPhysicalDeviceMemoryProperties2, memoryProperties);
SAME_TYPE(kMemoryProperties2, VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_MEMORY_PROPERTIES_2);

SAME_SIZE(MemoryBudgetProperties, VkPhysicalDeviceMemoryBudgetPropertiesEXT);
SAME_PLACE(MemoryBudgetProperties, budget, VkPhysicalDeviceMemoryBudgetPropertiesEXT, heapBudget);
SAME_PLACE(MemoryBudgetProperties, usage, VkPhysicalDeviceMemoryBudgetPropertiesEXT, heapUsage);
SAME_TYPE(kMemoryBudgetProperties, VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_MEMORY_BUDGET_PROPERTIES_EXT);

SAME_SIZE(ExtensionProperties, VkExtensionProperties);
SAME_PLACE(ExtensionProperties, name, VkExtensionProperties, extensionName);

SAME_TYPE(kSuccess, VK_SUCCESS);
SAME_TYPE(kIncomplete, VK_INCOMPLETE);
SAME_TYPE(kIncompatibleDriver, VK_ERROR_INCOMPATIBLE_DRIVER);
SAME_TYPE(kDeviceLocalHeap, VK_MEMORY_HEAP_DEVICE_LOCAL_BIT);
static_assert(ours::kMaximumHeaps == VK_MAX_MEMORY_HEAPS);
static_assert(ours::version(1, 2) == VK_API_VERSION_1_2);
static_assert(VK_PHYSICAL_DEVICE_TYPE_INTEGRATED_GPU == 1 && VK_PHYSICAL_DEVICE_TYPE_DISCRETE_GPU == 2 &&
              VK_PHYSICAL_DEVICE_TYPE_VIRTUAL_GPU == 3 && VK_PHYSICAL_DEVICE_TYPE_CPU == 4);
