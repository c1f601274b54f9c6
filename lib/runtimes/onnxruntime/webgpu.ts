/** ONNX Runtime's WebGPU provider in the table of runtimes: a GPU of any vendor, with nothing to install but its driver. */

import { readdir } from "node:fs/promises";
import { RuntimeUnavailableError } from "../../errors.js";
import type { RuntimeFinding, RuntimeRow } from "../runtime.js";
import { chosenAdapter, findAdapters, findWebGpu, isSoftware } from "./adapters.js";
import { gpuWidening, webGpuEmitOptions } from "./emission.js";
import { capabilities, OnnxRuntime, type OnnxRuntimeOptions } from "./onnxruntime.js";
import { openOnGpu, plainMessage, unsupported } from "./open-gpu.js";
import type { DeviceFeatures } from "./protocol.js";

const name = "webgpu";
const none: DeviceFeatures = { float16: false, attention: false };

export const webgpu: RuntimeRow = {
  name,
  runsOn: "a GPU of any vendor, by ONNX Runtime with WebGPU (Vulkan, Direct3D 12, Metal)",
  capabilities,
  unsupported,
  async open({ named, watchdogMs, listener, logger }, { files }) {
    if (!named && !(await mayHaveGpu()))
      throw new RuntimeUnavailableError(
        name,
        "This machine shows no GPU: there is no /dev/dri/renderD*, /dev/nvidia* or /dev/dxg. Start the container with access to it, or use another runtime.",
      );
    const { adapters, problem } = await findAdapters();
    const adapter = adapters && chosenAdapter(adapters);
    if (adapters && !adapter)
      throw new RuntimeUnavailableError(name, `WebGPU finds no GPU here. ${problem?.cause} ${problem?.remedy}`);
    if (adapter && isSoftware(adapter) && !named)
      throw new RuntimeUnavailableError(
        name,
        `The only graphics adapter is ${adapter.name}, which is software and slower than the runtime onnxruntime. Install the Vulkan driver of your GPU, or ask for the runtime webgpu by name.`,
      );
    let features = none;
    const weights: OnnxRuntimeOptions["weights"] = (graph) => gpuWidening(features.float16 ? ["F16"] : [])(graph);
    const runtime = new OnnxRuntime({ ...settings, weights, files, watchdogMs, listener, logger });
    const { version, features: found } = await openOnGpu(runtime, `WebGPU cannot use ${adapter?.name ?? "a GPU"} here`);
    features = found;
    const { float16, attention } = features;
    const type = float16 ? "16-bit weights in float16" : "in float32, since it has no float16 (shader-f16)";
    logger?.info?.(`WebGPU computes on ${adapter?.name ?? "this machine's GPU"}, ${type}.`);
    return {
      runtime,
      settings: { version, gpu: adapter?.name ?? null, driver: adapter?.driverVersion ?? null, float16, attention },
      device: adapter && {
        name: adapter.name,
        memoryBytes: adapter.memoryBytes,
        largestBuffer: adapter.maxStorageBufferBytes,
        widening: weights,
        holdsScores: !attention,
      },
      emitOptions: webGpuEmitOptions(features),
    };
  },
  async find(): Promise<RuntimeFinding> {
    const found = await findWebGpu();
    if (!found.available) return found;
    // Only ONNX Runtime itself can tell whether it takes an adapter.
    try {
      await using runtime = new OnnxRuntime({ ...settings, weights: "folded" });
      return { ...found, version: (await runtime.start()).version };
    } catch (error) {
      const remedy = "Update the graphics driver, or use another runtime.";
      return { ...found, available: false, reason: plainMessage(error), remedy: found.remedy ?? remedy };
    }
  },
};

/**
 * Whether a driver of a GPU shows itself, on Linux. Asking Vulkan takes a quarter of a second, which a machine without a GPU
 * is not to spend at every start.
 */
async function mayHaveGpu(): Promise<boolean> {
  if (process.platform !== "linux") return true;
  const names = await Promise.all(["/dev", "/dev/dri"].map((folder) => readdir(folder).catch(() => [] as string[])));
  return names.flat().some((each) => /^(renderD|nvidia|dxg|mali|kgsl)/.test(each));
}

// Threads would only do the arithmetic of shapes.
const settings = { name, provider: "webgpu", threads: 1 } as const;
