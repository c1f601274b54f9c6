// Linear layers: the same values in each form, and the bias where each runtime has it cheapest.
import { expect, it } from "vitest";
import { openCheckpoint } from "../../lib/checkpoint/index.js";
import { float32 } from "../../lib/common/tensor.js";
import { Layers } from "../../lib/networks/layers.js";
import { cpuEmitOptions, type EmitOptions, GraphBuilder, type OnnxGraph } from "../../lib/onnx/index.js";
import { cudaEmitOptions, webGpuEmitOptions } from "../../lib/runtimes/onnxruntime/emission.js";
import { fixture } from "../support/fixtures.js";
import { cpuRuntime } from "./cpu.js";

const runtime = cpuRuntime();
const layer = "context_embedder";

async function built(name: string, options: EmitOptions) {
  const { transformer } = await openCheckpoint(fixture("sd3", "model"));
  const [to, from] = transformer.weights.find(`${layer}.weight`)!.shape as [number, number];
  const g = new GraphBuilder(name);
  const x = g.input("x", "float32", [1, 3, from]);
  const l = new Layers(g, transformer.weights, options, g.shapeOf(x, 0, 1));
  g.output("y", l.linear(x, layer, from, to), [1, 3, to]);
  return { graph: g.build(), from, to };
}

const adds = ({ bytes }: OnnxGraph) => Buffer.from(bytes).toString("latin1").includes("Add");

it.each(["gemm", "gemm-add", "matmul"] as const)("has its bias, emitted as %s", async (linear) => {
  const { graph, from, to } = await built(linear, { ...cpuEmitOptions, linear });
  runtime().add(graph);
  const { y } = await runtime().run({
    constants: { x: { kind: "value", tensor: float32([1, 3, from], new Float32Array(3 * from)) } },
    registers: { y: { dtype: "float32", shape: [1, 3, to] } },
    instructions: [
      {
        ...{ op: "launch", graph: linear, label: { kind: "step", name: linear } },
        ...{ inputs: { x: "x" }, outputs: { y: "y" } },
      },
    ],
    results: ["y"],
  });
  const values = y!.data as Float32Array;
  expect(values.some((value) => value !== 0)).toBe(true);
  expect(values.slice(to, 2 * to)).toEqual(values.slice(0, to));
  expect(adds(graph)).toBe(linear !== "gemm");
});

it("has its bias behind the product on the CPU, and inside on ONNX Runtime's GPU providers, in one kernel", async () => {
  const network = { dtype: "F16", overflowsInFloat16: false, isConvolutional: false } as Parameters<
    ReturnType<typeof cudaEmitOptions>
  >[0];
  const gpus = [
    cudaEmitOptions({ attention: true, bfloat16: true })(network),
    webGpuEmitOptions({ attention: true, float16: true })(network),
  ];
  expect(adds((await built("CPU", cpuEmitOptions)).graph)).toBe(true);
  for (const options of gpus) expect(adds((await built("GPU", options)).graph)).toBe(false);
});
