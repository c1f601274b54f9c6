// ONNX Runtime's WebGPU provider on SwiftShader: what every runtime must do, and what only values on a device can do wrong.
import { afterAll, afterEach, beforeAll, describe, expect, it } from "vitest";
import { float32, int64 } from "../../lib/common/tensor.js";
import { MemoryError } from "../../lib/errors.js";
import { GraphBuilder } from "../../lib/onnx/index.js";
import type { Program } from "../../lib/program/program.js";
import { OnnxRuntime, type OnnxRuntimeOptions } from "../../lib/runtimes/onnxruntime/onnxruntime.js";
import type { CompilableGraph } from "../../lib/runtimes/runtime.js";
import { hosts } from "../support/hosts.js";
import { noSwiftShader, swiftShaderEnv } from "../support/swiftshader.js";
import { type Bundles, bundle } from "./build.js";
import { addGraphs, describeRuntime, double, values } from "./contract.js";
import { program } from "./models.js";

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

  describe("a lack of memory", () => {
    // 4 MB, as often as is asked.
    const tiled = (name: string, times: number): { graph: CompilableGraph; program: Program } => {
      const g = new GraphBuilder(name);
      g.output("y", g.op("Tile", [g.input("x", "float32", ["n"]), g.input("times", "int64", [1])]), ["m"]);
      const x = { kind: "value", tensor: float32([1 << 20], new Float32Array(1 << 20)) } as const;
      const count = { kind: "value", tensor: int64([1], BigInt64Array.of(BigInt(times))) } as const;
      return {
        graph: g.build(),
        program: {
          registers: { y: { dtype: "float32", shape: [times << 20] } },
          constants: { x, count },
          instructions: [
            {
              ...{ op: "launch", graph: name, inputs: { x: "x", times: "count" }, outputs: { y: "y" } },
              label: { kind: "step", name: "tiles" },
            },
          ],
          results: ["y"],
        },
      };
    };

    // More than SwiftShader allocates at once, and than WebGPU has buffers for.
    it.each([300, 600])("for %d blocks of 4 MB is a typed error, and the next call works", async (times) => {
      const [runtime, other] = [open(), open()];
      expect(values((await other.run(program([1], [double("x", "a")], ["a"]))).a)).toEqual([2]);
      const before = hosts();
      expect(before).toHaveLength(1);
      const { graph, program: work } = tiled(`tiled ${times}`, times);
      runtime.add(graph);
      const error = await runtime.run(work).catch((reason) => reason);
      expect(error).toBeInstanceOf(MemoryError);
      expect(hosts()).not.toEqual(before);
      for (const each of [runtime, other])
        expect(values((await each.run(program([1], [double("x", "a")], ["a"]))).a)).toEqual([2]);
      expect(hosts()).toHaveLength(1);
    });
  });
});
