// ONNX Runtime on the CPU for the tests of one file, from a bundle of the sources.
import { afterAll, beforeAll } from "vitest";
import { OnnxRuntime } from "../../lib/runtimes/onnxruntime/onnxruntime.js";
import { bundle } from "../runtimes/build.js";

/** @returns what gives the runtime while tests run */
export function cpuRuntime(): () => OnnxRuntime {
  let runtime: OnnxRuntime;
  let remove: () => void;
  beforeAll(async () => {
    const bundles = await bundle();
    remove = bundles.remove;
    runtime = new OnnxRuntime({ host: bundles.host, weights: "lazy" });
  });
  afterAll(async () => {
    await runtime?.dispose();
    remove?.();
  });
  return () => runtime;
}
