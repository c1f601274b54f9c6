// ONNX Runtime's WebGPU provider on SwiftShader: what every runtime must do, and what only values on a device can do wrong.
import { afterAll, afterEach, beforeAll, describe } from "vitest";
import { OnnxRuntime, type OnnxRuntimeOptions } from "../../lib/runtimes/onnxruntime/onnxruntime.js";
import { noSwiftShader, swiftShaderEnv } from "../support/swiftshader.js";
import { type Bundles, bundle } from "./build.js";
import { addGraphs, describeRuntime } from "./contract.js";

/** SwiftShader multiplies matrices a hundred times slower than ONNX Runtime does on the CPU. */
const slow = { size: 128, products: 2 };

let bundles: Bundles;
const opened: OnnxRuntime[] = [];

beforeAll(async () => {
  bundles = await bundle();
});
afterAll(() => bundles?.remove());
afterEach(async () => {
  await Promise.all(opened.splice(0).map((runtime) => runtime.dispose()));
});

function open(options: Partial<OnnxRuntimeOptions> = {}): OnnxRuntime {
  const runtime = new OnnxRuntime({
    ...{ name: "webgpu", provider: "webgpu", weights: "folded", threads: 1, host: bundles.host, env: swiftShaderEnv },
    ...options,
  });
  opened.push(runtime);
  addGraphs(runtime, slow);
  return runtime;
}

describe.skipIf(noSwiftShader)(`WebGPU on SwiftShader${noSwiftShader ? `: ${noSwiftShader}` : ""}`, () => {
  describeRuntime(open, slow);
});
