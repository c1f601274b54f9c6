/** What the rows of ONNX Runtime's GPU providers have in common. */

import { thisPlatform } from "../../common/platform.js";
import { messageOf } from "../../common/text.js";
import { InstallationError, RuntimeUnavailableError } from "../../errors.js";
import { whyUnsupported } from "./binaries.js";
import type { OnnxRuntime } from "./onnxruntime.js";
import type { DeviceFeatures } from "./protocol.js";

/** Why onnxruntime-node has no binaries for this platform; null where it has them. */
export function unsupported(): InstallationError | null {
  const found = whyUnsupported(thisPlatform());
  return found && new InstallationError("onnxruntime-node", found.reason, found.remedy);
}

/** What ONNX Runtime says, without the place in its sources and the condition there. */
export function plainMessage(error: unknown): string {
  const [line] = messageOf(error).trim().split("\n") as [string];
  return line.replace(/^\/onnxruntime_src\/.* was false\. /, "").trim();
}

/**
 * Waits until a runtime's device answers; disposes of a runtime whose device does not.
 * @param what begins the message of the error, such as "WebGPU cannot use Intel Arc here"
 * @throws RuntimeUnavailableError, and what `OnnxRuntime.start` throws
 */
export async function openOnGpu(
  runtime: OnnxRuntime,
  what: string,
): Promise<{ readonly version: string; readonly features: DeviceFeatures }> {
  try {
    const { version, features } = await runtime.start();
    return { version, features: features! };
  } catch (error) {
    await runtime.dispose();
    if (!(error instanceof RuntimeUnavailableError)) throw error;
    const detail = plainMessage(error).replace(/\.$/, "");
    const remedy = "`flowturbo doctor` lists adapters and libraries; update the GPU's driver, or use another runtime.";
    throw new RuntimeUnavailableError(runtime.name, `${what}: ${detail}. ${remedy}`, { cause: error });
  }
}
