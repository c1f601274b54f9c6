/** ONNX Runtime in the table of runtimes. */

import { processors, usableThreads } from "../../common/cpu.js";
import { cpuEmitOptions } from "../../onnx/index.js";
import type { RuntimeFinding, RuntimeRow } from "../runtime.js";
import { installRemedy } from "./connection.js";
import { messageOf } from "./executor.js";
import { capabilities, OnnxRuntime } from "./onnxruntime.js";
import { resolveWeights } from "./weights.js";

export const onnxruntime: RuntimeRow = {
  name: "onnxruntime",
  runsOn: "the CPU",
  capabilities,
  async open({ threads, weights, logger }, { bytesOf16Bit }) {
    const widening = resolveWeights(weights, bytesOf16Bit());
    const available = processors();
    const used = threads ?? usableThreads(available) ?? undefined;
    if (threads === undefined && available.quota !== null)
      logger?.debug?.(`Graphs run on ${used} threads: this process may use ${available.quota} processors.`);
    const runtime = new OnnxRuntime({ weights: widening, threads: used, logger });
    try {
      const { version } = await runtime.start();
      const settings = { version, threads: used ?? null, weights: widening };
      return { runtime, settings, device: null, emitOptions: () => cpuEmitOptions };
    } catch (error) {
      await runtime.dispose();
      throw error;
    }
  },
  find: () => findOnnxRuntime(),
};

/**
 * Only a child process that loads it can tell whether ONNX Runtime can be used here. Never rejects.
 * @param host the built host.ts; default: beside this bundle
 */
export async function findOnnxRuntime(host?: URL): Promise<RuntimeFinding> {
  await using runtime = new OnnxRuntime({ weights: "lazy", host });
  const found = { name: runtime.name, version: null, reason: null, remedy: null };
  try {
    return { ...found, available: true, ...(await runtime.start()) };
  } catch (error) {
    return { ...found, available: false, reason: messageOf(error), remedy: installRemedy };
  }
}
