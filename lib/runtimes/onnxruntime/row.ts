/** ONNX Runtime in the table of runtimes. */

import { cpuEmitOptions } from "../../onnx/index.js";
import type { RuntimeRow } from "../runtime.js";
import { capabilities, OnnxRuntime } from "./onnxruntime.js";
import { examineOnnxRuntime } from "./probe.js";
import { resolveWeights } from "./weights.js";

export const onnxruntime: RuntimeRow = {
  name: "onnxruntime",
  runsOn: "the CPU",
  capabilities,
  find: async () => null,
  async open({ threads, weights, logger }, { bytesOf16Bit }) {
    const widening = resolveWeights(weights, bytesOf16Bit);
    const runtime = new OnnxRuntime({ weights: widening, threads, logger });
    try {
      const { version } = await runtime.start();
      const settings = { version, threads: threads ?? null, weights: widening };
      return { runtime, settings, device: null, emitOptions: () => cpuEmitOptions };
    } catch (error) {
      await runtime.dispose();
      throw error;
    }
  },
  examine: () => examineOnnxRuntime(),
};
