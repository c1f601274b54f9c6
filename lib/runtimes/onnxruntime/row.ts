/** ONNX Runtime on the CPU in the table of runtimes. */

import { isIntelAvx512, processors, usableThreads } from "../../common/cpu.js";
import { defaultCacheFolder } from "../../common/files.js";
import { messageOf } from "../../common/text.js";
import { InstallationError } from "../../errors.js";
import { cpuEmitOptions, type EmittedNetwork } from "../../onnx/index.js";
import type { RuntimeFinding, RuntimeRow } from "../runtime.js";
import { capabilities, OnnxRuntime } from "./onnxruntime.js";
import { unsupported } from "./open-gpu.js";
import { optimisedFolder } from "./optimised-folder.js";
import { endSpare, startSpare } from "./spare.js";
import { resolveWeights } from "./weights.js";

export const onnxruntime: RuntimeRow = {
  name: "onnxruntime",
  runsOn: "the CPU",
  capabilities,
  takesInt8Weights: true,
  unsupported,
  begin() {
    startSpare();
    return endSpare;
  },
  async open({ threads, weights, watchdogMs, listener, logger, cache, keepsGraphs = true }, { files, bytesOf16Bit }) {
    const widening = resolveWeights(weights, bytesOf16Bit());
    const available = processors();
    const inConvolutions = isIntelAvx512();
    const used = threads ?? usableThreads(available) ?? undefined;
    if (threads === undefined && available.quota !== null)
      logger?.debug?.(`Graphs run on ${used} threads: this process may use ${available.quota} processors.`);
    const runtime = new OnnxRuntime({
      ...{ weights: widening, files, threads: used, watchdogMs, listener, logger },
      foldsOnlyWhatPays: weights !== "folded",
      ...(keepsGraphs && { optimised: optimisedFolder(cache ?? defaultCacheFolder()) }),
    });
    try {
      const { version } = await runtime.start();
      const held = weights === "int8" ? `int8, others ${widening}` : widening;
      const settings = { version, threads: used ?? null, weights: held };
      const emitOptions = ({ name, bytesOf16Bit, isOfSteps }: EmittedNetwork) =>
        inConvolutions && isOfSteps && runtime.widening(name, bytesOf16Bit) === "folded"
          ? { ...cpuEmitOptions, linear: "conv" as const }
          : cpuEmitOptions;
      return { runtime, settings, device: null, emitOptions };
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
  const found = { name: onnxruntime.name, version: null, reason: null, remedy: null };
  try {
    await using runtime = new OnnxRuntime({ weights: "lazy", host });
    return { ...found, available: true, version: (await runtime.start()).version };
  } catch (error) {
    const { reason, remedy } = error instanceof InstallationError ? error : { reason: messageOf(error), remedy: null };
    return { ...found, available: false, reason, remedy };
  }
}
