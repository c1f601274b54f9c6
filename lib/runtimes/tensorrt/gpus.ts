/**
 * NVIDIA's driver and its GPUs, as the addons see them. All runtimes on NVIDIA's GPUs ask here, so that each names the same
 * cause with the same remedy.
 */

import type { Problem, RuntimeFinding } from "../runtime.js";
import { type Addon, type Cuda, findAddon, type NativeError, smOf, smText } from "./addon.js";
import { tensorRtKinds } from "./flavours.js";

/** Driver and GPUs, or what is wrong with them. Never rejects. */
export async function examineCuda(addon: Addon): Promise<Cuda | Problem> {
  try {
    return await addon.cuda().promise;
  } catch (cause) {
    const error = cause as NativeError;
    const [what, remedy] = problems[error.code] ?? [
      "The NVIDIA driver answered an error",
      "Check nvidia-smi; the driver and its kernel module may differ in version.",
    ];
    return { prevents: "running", cause: `${what}: ${error.message}.`, remedy };
  }
}

/** The same from whichever addon there is; null where there is none to ask. */
export async function examineGpus(): Promise<Cuda | Problem | null> {
  for (const kind of tensorRtKinds) {
    const addon = findAddon(kind);
    if ("describe" in addon) return examineCuda(addon);
  }
  return null;
}

/** What `flowturbo doctor` says of them. */
export function hardwareOf(cuda: Cuda): NonNullable<RuntimeFinding["hardware"]> {
  return {
    driver: cudaText(cuda.driverVersion),
    gpus: cuda.devices.map((gpu) => ({ name: gpu.name, memoryBytes: gpu.memoryBytes, sm: smText(smOf(gpu)) })),
  };
}

/** 12080 → "12.8" */
export function cudaText(version: number): string {
  return `${Math.floor(version / 1000)}.${Math.floor((version % 1000) / 10)}`;
}

/** By the addon's code: what is wrong, and the remedy. */
const problems: Record<string, readonly [what: string, remedy: string]> = {
  NO_DRIVER: [
    "There is no NVIDIA driver",
    "Install NVIDIA's driver (in a container, start it with access to the GPU).",
  ],
  NO_DEVICE: ["The NVIDIA driver found no GPU", "Check nvidia-smi, and CUDA_VISIBLE_DEVICES if it is set."],
};
