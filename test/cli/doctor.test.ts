// What `flowturbo doctor` prints of runtimes, libraries and graphics adapters, with a table of runtimes whose rows say what
// a test wants them to find.
import { cp, mkdtemp, rm } from "node:fs/promises";
import os from "node:os";
import path from "node:path";
import { Command } from "commander";
import { afterEach, beforeEach, expect, it, vi } from "vitest";
import { doctorCommand } from "../../lib/cli/doctor.js";
import type { HostMemory } from "../../lib/generation/host-memory.js";
import { runtimes } from "../../lib/runtimes/index.js";
import { findWebGpu } from "../../lib/runtimes/onnxruntime/adapters.js";
import { findCuda } from "../../lib/runtimes/onnxruntime/cuda-provider.js";
import type { AdapterFinding, LibraryFolders, RuntimeFinding, RuntimeRow } from "../../lib/runtimes/runtime.js";
import { fixture } from "../support/fixtures.js";

const rows = { ...runtimes };
let printed: string;
beforeEach(() => {
  printed = "";
  vi.spyOn(process.stdout, "write").mockImplementation((text) => {
    printed += text;
    return true;
  });
});
afterEach(() => {
  vi.restoreAllMocks();
  for (const name of Object.keys(runtimes)) delete runtimes[name];
  Object.assign(runtimes, rows);
  process.exitCode = undefined;
});

/** Makes these the rows, and what they were asked with the result. */
function table(...found: readonly (RuntimeFinding | ((folders: LibraryFolders) => Promise<RuntimeFinding>))[]) {
  const asked: LibraryFolders[] = [];
  for (const name of Object.keys(runtimes)) delete runtimes[name];
  for (const [index, finding] of found.entries())
    runtimes[`row ${index}`] = {
      find: async (folders: LibraryFolders) => {
        asked.push(folders);
        return typeof finding === "function" ? finding(folders) : finding;
      },
    } as unknown as RuntimeRow;
  return asked;
}

async function doctor(...args: readonly string[]): Promise<string> {
  const command = new Command();
  doctorCommand(command);
  printed = "";
  await command.parseAsync(args, { from: "user" });
  return printed;
}

const usable: RuntimeFinding = { name: "usable", available: true, version: "1", reason: null, remedy: null };
const adapter: AdapterFinding = {
  ...{ name: "Radeon 780M", vendor: "AMD", vendorId: 4098, deviceId: 5567, type: "integrated", driver: "radv" },
  ...{ driverVersion: "Mesa 25.1.0", apiVersion: "1.4.309", memoryBytes: 8e9, freeBytes: 6e9, float16: true },
  maxStorageBufferBytes: 4294967295,
};
const software: AdapterFinding = {
  ...{ ...adapter, name: "SwiftShader", vendor: "Google", type: "cpu", driver: null, driverVersion: "5.0.0" },
  ...{ freeBytes: null, float16: false },
};

it("lists graphics adapters with vendor, driver, type, memory and features", async () => {
  const known = Promise.resolve({ adapters: [adapter, software], problem: null });
  table(usable, () => findWebGpu(known));
  const text = await doctor();
  expect(text).toContain(
    "\ngraphics adapter: Radeon 780M (AMD, integrated), driver radv Mesa 25.1.0, Vulkan 1.4.309, 8.00 GB, 6.00 GB free, float16\n" +
      "graphics adapter: SwiftShader (Google, software), driver 5.0.0, Vulkan 1.4.309, 8.00 GB, no float16\nruntimes:\n",
  );
  expect(text).toContain("\n  ✔ webgpu\n");
  const report = JSON.parse(await doctor("--json"));
  expect(report.adapters).toEqual([adapter, software]);
  expect(report.runtimes[1]).toEqual({ name: "webgpu", available: true, version: null, reason: null, remedy: null });
  expect(process.exitCode).toBe(undefined);
});

it("says why there is none, or that there is only software", async () => {
  const problem = { prevents: "running", cause: "There is no driver.", remedy: "Install one." } as const;
  table(usable, () => findWebGpu(Promise.resolve({ adapters: [], problem })));
  expect(await doctor()).toContain("\n  ✘ webgpu: There is no driver.\n      Install one.\n");
  expect(JSON.parse(await doctor("--json")).adapters).toEqual([]);
  table(usable, () => findWebGpu(Promise.resolve({ adapters: [software], problem: null })));
  expect(await doctor()).toMatch(/✔ webgpu: Its only graphics adapter is SwiftShader, which is software.*\n {6}If /);
  table(usable, () => findWebGpu(Promise.resolve({ adapters: null, problem: null })));
  expect(await doctor()).toContain("\n  ✔ webgpu\n");
  expect(JSON.parse(await doctor("--json")).adapters).toBe(null);
});

it("lists the places where the CUDA provider was looked for, and one remedy for each cause", async () => {
  const places = [
    { source: "environment", place: "FLOWTURBO_ONNXRUNTIME_CUDA_DIR", error: "not set" },
    { source: "package", place: "/app/bin", error: "there is no provider" },
    { source: "pip", place: "/site/capi", error: null },
  ] as const;
  const problems = [
    { prevents: "running", cause: "It needs libcudnn.so.9.", remedy: "Run `pip install nvidia-cudnn-cu13`." },
    { prevents: "running", cause: "The driver is too old.", remedy: "Update it." },
  ] as const;
  const cuda = {
    ...{ name: "cuda", available: false, version: "1.30.0", reason: "…", remedy: "…" },
    libraries: { library: "/site/capi/provider.so", places, problems },
    hardware: { driver: "12.8", gpus: [{ name: "L4", memoryBytes: 24e9, sm: "8.9" }] },
  };
  const last = { ...usable, name: "last" };
  table(cuda, last);
  const text = await doctor();
  expect(text).toContain("\nNVIDIA driver: CUDA 12.8\nGPU: L4, 24.00 GB, SM 8.9\n");
  // Those that need many lines come last.
  expect(text).toContain(
    `
  ✔ last 1
  ✘ cuda 1.30.0
      It needs libcudnn.so.9.
        → Run \`pip install nvidia-cudnn-cu13\`.
      The driver is too old.
        → Update it.
      tried environment: FLOWTURBO_ONNXRUNTIME_CUDA_DIR (not set)
      tried package: /app/bin (there is no provider)
      found pip: /site/capi
packages:`,
  );
  const [, json] = JSON.parse(await doctor("--json")).runtimes;
  expect(json).toMatchObject({ name: "cuda", library: "/site/capi/provider.so", places, problems });
});

it("hands the folders of both flags to the rows", async () => {
  const asked = table(usable, (folders) => findCuda(folders));
  const report = JSON.parse(
    await doctor("--json", "--cuda-provider-dir", "/nowhere/cuda", "--tensorrt-dir", "/nowhere/rt"),
  );
  expect(asked[0]).toEqual({ cudaProviderFolder: "/nowhere/cuda", tensorrtFolder: "/nowhere/rt" });
  const cuda = report.runtimes.find(({ name }: RuntimeFinding) => name === "cuda");
  expect(cuda).toMatchObject({ available: false, places: [{ source: "option", place: "/nowhere/cuda" }, {}, {}, {}] });
  await expect(doctor("--cuda-provider-dir", "")).rejects.toThrow(/cudaProviderFolder/);
});

it("ends with 1 where nothing can draw", async () => {
  table({ ...usable, available: false });
  await doctor();
  expect(process.exitCode).toBe(1);
});

it("says whether LoRAs and ControlNets fit a model, without drawing", async () => {
  table(usable);
  const of = (name: string, ...parts: string[]) => fixture(name, ...parts);
  const text = await doctor(
    ...["--model", of("medium", "model"), "--lora", `${of("medium", "adapters/lora_a.kohya.safetensors")}:0.7`],
    ...["--dynamic-lora", `other=${of("large", "adapters/lora_b.safetensors")}`],
    ...["--control-net", `edges=${of("medium", "controlnet")}`, "--control-net", of("medium", "model/vae")],
  );
  expect(text).toMatch(/✔ LoRA lora_a\.kohya: rank 4; \d+ layers of the transformer\n/);
  expect(text).toMatch(/✘ LoRA other: .*lora_b\.safetensors/);
  expect(text).toMatch(/✔ ControlNet edges: 2 blocks with text; 0\.\d+ GB of weights\n/);
  expect(text).toMatch(/✘ ControlNet vae: .*AutoencoderKL/);
  expect(process.exitCode).toBe(1);
  process.exitCode = undefined;
  const json = JSON.parse(await doctor("--json", "--lora", of("medium", "adapters/lora_a.safetensors")));
  expect(json.modelAdapters).toMatchObject([{ kind: "LoRA", name: "lora_a", fits: false, about: null }]);
  expect(json.modelAdapters[0].reason).toMatch(/\S/);
  expect(process.exitCode).toBe(1);
});

it("says what a model would take of the memory on the CPU, for each way to hold its weights", async () => {
  table(usable);
  const model = ["--model", fixture("medium", "model")];
  const text = await doctor(...model);
  expect(text).toMatch(
    /\nmemory of the model on the CPU, about \(\d+\.\d\d GB are free\):\n {2}128 x 128: ✔ lazy 0\.\d+ GB, ✔ folded 0\.\d+ GB, ✔ int8 0\.\d+ GB\n {6}→ --weights folded is the quickest that fits; --weights auto takes folded here\.\n$/,
  );
  expect(await doctor()).not.toContain("memory of the model");
  printed = "";
  const { memory } = JSON.parse(await doctor(...model, "--json"));
  expect(memory).toMatchObject({ auto: "folded", recommended: "folded", sizes: [{ width: 128, height: 128 }] });
  for (const { weights, activations, total } of Object.values<HostMemory>(memory.sizes[0].weights))
    expect(total).toBeGreaterThan(weights + activations);
  expect(process.exitCode).toBe(undefined);
  await expect(doctor("--model", "./nowhere")).rejects.toThrow(/nowhere/);
});

it("names LoRAs as requests do, and refuses two of one name", async () => {
  table(usable);
  const folder = await mkdtemp(path.join(os.tmpdir(), "flowturbo-doctor-"));
  try {
    const inFolder = path.join(folder, "ink", "pytorch_lora_weights.safetensors");
    await cp(fixture("medium", "adapters/lora_a.safetensors"), inFolder, { recursive: true });
    const model = ["--model", fixture("medium", "model")];
    expect(await doctor(...model, "--lora", inFolder)).toMatch(/✔ LoRA ink: rank 4/);
    printed = "";
    const other = fixture("medium", "adapters/lora_b.safetensors");
    const text = await doctor(...model, "--lora", inFolder, "--dynamic-lora", `ink=${other}`);
    expect(text).toMatch(/✔ LoRA ink: rank 4/);
    expect(text).toMatch(/✘ LoRA ink: Two LoRAs of loras have the name "ink": .*Give one of them another name/);
    expect(process.exitCode).toBe(1);
  } finally {
    await rm(folder, { recursive: true });
  }
});
