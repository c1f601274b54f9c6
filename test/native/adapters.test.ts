// Graphics adapters: the structures of Vulkan that the addon passes, what it reads of drivers (SwiftShader, where Debian's
// package chromium is installed, and a loader that is compiled here), and which adapter is chosen.
import { execFileSync, spawnSync } from "node:child_process";
import { existsSync, writeFileSync } from "node:fs";
import path from "node:path";
import { pathToFileURL } from "node:url";
import { afterEach, describe, expect, it } from "vitest";
import {
  chosenAdapter,
  findAdapters,
  findWebGpu,
  type GraphicsAdapter,
  isSoftware,
} from "../../lib/runtimes/onnxruntime/adapters.js";
import { root } from "../support/fixtures.js";
import { hosts } from "../support/hosts.js";
import { describeAddons, temporaryFolder } from "./support.js";

const environment = { ...process.env };
afterEach(() => {
  process.env = { ...environment };
});
const core = path.join(root, "native/core");
const cxx = environment.CXX ?? "c++";

const compiles = (source: string) =>
  spawnSync(cxx, ["-std=c++17", "-fsyntax-only", `-I${core}`, "-x", "c++", source], { encoding: "utf8" });
const header = path.join(temporaryFolder(), "header.cpp");
writeFileSync(header, "#include <vulkan/vulkan_core.h>\n");
const lacksHeader =
  compiles(header).status === 0 ? "" : " (skipped: there is no vulkan/vulkan_core.h, of libvulkan-dev)";
it.skipIf(lacksHeader)(`the structures of Vulkan are those of Khronos' header${lacksHeader}`, () => {
  const { status, stderr } = compiles(path.join(root, "native/test/vulkan_layout.cpp"));
  expect(status, stderr).toBe(0);
});

/** Puts a loader of Vulkan before the system's: with these devices, or with this body of vkCreateInstance. */
function loader(devices: string, create = "return 0;"): void {
  const folder = temporaryFolder();
  const source = path.join(folder, "loader.cpp");
  writeFileSync(
    source,
    `#include <unistd.h>
    #include <cstring>
    #include "vulkan_types.h"
    using namespace flowturbo::vulkan;
    namespace {
    struct Device {
      const char* name; uint32_t vendor, type, api, driver; bool float16, budget; uint64_t local, used;
    };
    const Device all[] = { ${devices} };
    constexpr uint32_t count = sizeof(all) / sizeof(Device);
    Result createInstance(const InstanceCreateInfo* info, const void*, void** instance) {
      *instance = const_cast<Device*>(all);
      if (info->applicationInfo->apiVersion != version(1, 1)) return -1;
      ${create}
    }
    void destroyInstance(void*, const void*) {}
    Result enumerate(void*, uint32_t* number, const Device** found) {
      for (uint32_t index = 0; found && index < count; index++) found[index] = all + index;
      *number = count;
      return 0;
    }
    Result extensions(const Device* device, const char*, uint32_t* number, ExtensionProperties* found) {
      if (found && device->budget) strcpy(found->name, "VK_EXT_memory_budget");
      *number = device->budget ? 1 : 0;
      return 0;
    }
    void properties(const Device* device, Properties* into) {
      strcpy(into->deviceName, device->name);
      into->vendorId = device->vendor; into->deviceId = 7; into->deviceType = device->type;
      into->apiVersion = device->api; into->driverVersion = device->driver;
      into->limits.maxStorageBufferRange = 4294967295u;
    }
    // A driver goes through the structures that it is given.
    template <typename Structure> Structure* given(void* next, Type type) {
      struct Head { Type type; void* next; };
      for (auto* head = static_cast<Head*>(next); head; head = static_cast<Head*>(head->next))
        if (head->type == type) return reinterpret_cast<Structure*>(head);
      return nullptr;
    }
    void properties2(const Device* device, Properties2* into) {
      if (device->api < version(1, 1)) _exit(9);
      properties(device, &into->properties);
      if (auto* driver = given<DriverProperties>(into->next, kDriverProperties)) {
        if (device->api < version(1, 2)) _exit(9);
        // A text that does not end.
        memset(driver->driverName, 'n', sizeof(driver->driverName));
      }
    }
    void features2(const Device* device, Features2* into) {
      if (device->api < version(1, 1)) _exit(9);
      auto* storage = given<Storage16BitFeatures>(into->next, k16BitStorageFeatures);
      storage->storageBuffer = storage->uniformAndStorageBuffer = 1;
      auto* arithmetic = given<Float16Int8Features>(into->next, kFloat16Int8Features);
      if (arithmetic) arithmetic->shaderFloat16 = device->float16;
    }
    void memory(const Device* device, MemoryProperties* into) {
      into->heapCount = 3;
      into->heaps[0] = {device->local, kDeviceLocalHeap};
      into->heaps[1] = {1000, 0};
      into->heaps[2] = {24, kDeviceLocalHeap};
    }
    void memory2(const Device* device, MemoryProperties2* into) {
      if (device->api < version(1, 1)) _exit(9);
      memory(device, &into->properties);
      auto* budget = given<MemoryBudgetProperties>(into->next, kMemoryBudgetProperties);
      if (!budget) return;
      budget->budget[0] = device->local; budget->usage[0] = device->used;
      // More in use than there is room for.
      budget->budget[2] = 10; budget->usage[2] = 20;
    }
    }
    extern "C" void* vkGetInstanceProcAddr(void*, const char* name) {
      const struct { const char* name; void* function; } functions[] = {
        {"vkCreateInstance", (void*)createInstance}, {"vkDestroyInstance", (void*)destroyInstance},
        {"vkEnumeratePhysicalDevices", (void*)enumerate},
        {"vkEnumerateDeviceExtensionProperties", (void*)extensions},
        {"vkGetPhysicalDeviceProperties", (void*)properties}, {"vkGetPhysicalDeviceProperties2", (void*)properties2},
        {"vkGetPhysicalDeviceFeatures2", (void*)features2}, {"vkGetPhysicalDeviceMemoryProperties", (void*)memory},
        {"vkGetPhysicalDeviceMemoryProperties2", (void*)memory2},
      };
      for (const auto& [known, function] : functions) if (strcmp(known, name) == 0) return function;
      return nullptr;
    }`,
  );
  const library = path.join(folder, "libvulkan.so.1");
  execFileSync(cxx, [
    "-std=c++17",
    "-shared",
    "-fPIC",
    `-I${core}`,
    "-Wl,-soname,libvulkan.so.1",
    "-o",
    library,
    source,
  ]);
  process.env.LD_LIBRARY_PATH = folder;
}
const discrete =
  '{ "Fast", 4318, 2, version(1, 3), 580u << 22 | 65u << 14 | 6u << 6, true, true, 8000000000, 3000000000 }';

describeAddons("graphics adapters", () => {
  it("are listed as their drivers describe them", async () => {
    loader(`${discrete}, { "Old", 4660, 1, version(1, 0), version(4, 5) | 6, true, true, 500, 0 },
            { "Plain", 32902, 1, version(1, 1), 1, true, false, 500, 0 }, { "Odd", 4098, 77, version(1, 2), 0, false, false, 0, 0 }`);
    const { adapters, problem } = await findAdapters();
    expect(problem).toBe(null);
    const common = {
      deviceId: 7,
      apiVersion: "1.0.0",
      driver: null,
      freeBytes: null,
      maxStorageBufferBytes: 4294967295,
    };
    expect(adapters).toEqual([
      {
        ...{ ...common, name: "Fast", vendor: "NVIDIA", vendorId: 4318, type: "discrete", apiVersion: "1.3.0" },
        ...{ driver: "n".repeat(256), driverVersion: "580.65.6.0", float16: true },
        ...{ memoryBytes: 8_000_000_024, freeBytes: 5e9 },
      },
      // Vulkan 1.0 cannot say more.
      {
        ...{ ...common, name: "Old", vendor: "vendor 0x1234", vendorId: 4660, type: "integrated" },
        ...{ driverVersion: "4.5.6", float16: false, memoryBytes: 524 },
      },
      // Without the extension that has arithmetic in float16.
      {
        ...{ ...common, name: "Plain", vendor: "Intel", vendorId: 32902, type: "integrated", apiVersion: "1.1.0" },
        ...{ driverVersion: "0.0.1", float16: false, memoryBytes: 524 },
      },
      {
        ...{ ...common, name: "Odd", vendor: "AMD", vendorId: 4098, type: "other", apiVersion: "1.2.0" },
        ...{ driver: "n".repeat(256), driverVersion: "0.0.0", float16: false, memoryBytes: 24 },
      },
    ]);
    expect(await findWebGpu()).toEqual({
      ...{ name: "webgpu", available: true, version: null, reason: null, remedy: null, adapters },
    });
  });

  it.each([
    ["there is no driver", "return kIncompatibleDriver;", /knows of no graphics adapter/, /NVIDIA_DRIVER_CAPABILITIES/],
    ["Vulkan fails", "return -3;", /vkCreateInstance answered -3/, /VK_DRIVER_FILES/],
    [
      "a driver crashes",
      "*static_cast<volatile int*>(nullptr) = 1; return 0;",
      /ended with SIGSEGV/,
      /VK_DRIVER_FILES/,
    ],
    ["a driver exits", "_exit(3);", /ended with code 3/, /VK_DRIVER_FILES/],
  ])("are none where %s", async (_, create, cause, remedy) => {
    loader(discrete, create);
    const found = await findAdapters();
    expect(found.adapters).toEqual([]);
    expect(found.problem!.cause).toMatch(cause);
    expect(found.problem!.remedy).toMatch(remedy);
    expect(await findWebGpu(Promise.resolve(found))).toMatchObject({ available: false, reason: found.problem!.cause });
  });

  it("are none where a driver hangs, and its process is ended", async () => {
    loader(discrete, "for (;;) sleep(1);");
    const { adapters, problem } = await findAdapters({ timeoutMs: 1500 });
    expect(adapters).toEqual([]);
    expect(problem!.cause).toBe("Listing the graphics adapters took more than 1.5 s.");
    await expect.poll(() => hosts("adapters-probe")).toEqual([]);
  });

  it("are none without Vulkan's loader", async () => {
    const folder = temporaryFolder();
    writeFileSync(path.join(folder, "libvulkan.so.1"), "no library");
    process.env.LD_LIBRARY_PATH = folder;
    const { adapters, problem } = await findAdapters();
    expect(adapters).toEqual([]);
    expect(problem!.cause).toMatch(/^Vulkan's loader cannot be opened: .*libvulkan\.so\.1/);
    expect(problem!.remedy).toContain("apt-get install libvulkan1");
  });

  it("are not known without an addon", async () => {
    process.env.FLOWTURBO_ADDON_DIR = temporaryFolder();
    const found = await findAdapters();
    expect(found).toMatchObject({ adapters: null, problem: { cause: expect.stringContaining("no native addon") } });
    expect(await findWebGpu(Promise.resolve(found))).toMatchObject({ available: true, adapters: null });
  });

  it("end nothing else where the probe is missing", async () => {
    const { problem } = await findAdapters({ probe: pathToFileURL("/nowhere/probe.js") });
    expect(problem!.cause).toMatch(/ended with code 1/);
  });

  const icd = "/usr/lib/chromium/vk_swiftshader_icd.json";
  const lacks = existsSync(icd) ? "" : " (skipped: Debian's package chromium is not installed)";
  it.skipIf(lacks)(`are SwiftShader, where only that is named${lacks}`, async () => {
    process.env.VK_DRIVER_FILES = icd;
    process.env.VK_ICD_FILENAMES = icd;
    const { adapters, problem } = await findAdapters();
    expect(problem).toBe(null);
    expect(adapters).toHaveLength(1);
    const [swiftshader] = adapters!;
    expect(swiftshader).toMatchObject({ vendor: "Google", type: "cpu", driver: "SwiftShader driver", float16: false });
    expect(swiftshader!.name).toMatch(/SwiftShader/);
    expect(swiftshader!.memoryBytes).toBeGreaterThan(1e9);
    expect(swiftshader!.maxStorageBufferBytes).toBeGreaterThan(1e8);
    const finding = await findWebGpu();
    expect(finding.available).toBe(true);
    expect(finding.reason).toMatch(/SwiftShader.* is software: used only if the runtime is asked for by name/);
  });
});

describe("the chosen adapter", () => {
  const adapter = (type: GraphicsAdapter["type"], name: string = type) => ({ type, name }) as GraphicsAdapter;
  const choose = (...adapters: readonly GraphicsAdapter[]) => chosenAdapter(adapters)?.name ?? null;

  it("is the first of the best type, as Dawn sorts them", () => {
    const [software, virtual] = [adapter("cpu"), adapter("virtual")];
    expect(choose(virtual, software, adapter("integrated"), adapter("discrete", "a"), adapter("discrete", "b"))).toBe(
      "a",
    );
    expect(choose(adapter("other"), software, adapter("integrated"))).toBe("integrated");
    expect(choose(virtual, software)).toBe("cpu");
    expect(choose(virtual)).toBe("virtual");
    expect(choose()).toBe(null);
    expect([software, virtual].map(isSoftware)).toEqual([true, false]);
  });
});
