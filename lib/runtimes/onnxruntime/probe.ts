/** Whether ONNX Runtime can be used here, for `flowturbo doctor`: only a child process that loads it can tell. */

import type { RuntimeFinding } from "../runtime.js";
import { installRemedy } from "./connection.js";
import { OnnxRuntime } from "./onnxruntime.js";

/** @param host the built host.ts; default: beside this bundle. Never rejects. */
export async function examineOnnxRuntime(host?: URL): Promise<RuntimeFinding> {
  const runtime = new OnnxRuntime({ weights: "lazy", host });
  const found = { name: runtime.name, version: null, reason: null, remedy: null };
  try {
    return { ...found, available: true, ...(await runtime.start()) };
  } catch (error) {
    const reason = error instanceof Error ? error.message : String(error);
    return { ...found, available: false, reason, remedy: installRemedy };
  } finally {
    await runtime.dispose();
  }
}
