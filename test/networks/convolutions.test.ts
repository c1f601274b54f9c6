// Linear layers as convolutions: the same values as products, rows that do not depend on each other, and where they are left alone.
import { afterAll, beforeAll, expect, it } from "vitest";
import { type Checkpoint, openCheckpoint } from "../../lib/checkpoint/index.js";
import { elementCount, type FloatTensor, float32 } from "../../lib/common/tensor.js";
import { embeddedModel } from "../../lib/flowturbo.js";
import { GraphLibrary } from "../../lib/networks/library.js";
import { cpuEmitOptions, type EmitOptions, type OnnxGraph } from "../../lib/onnx/index.js";
import { OnnxRuntime } from "../../lib/runtimes/onnxruntime/onnxruntime.js";
import { bundle } from "../runtimes/build.js";
import { fixture, relativeError } from "../support/fixtures.js";

const inConvolutions: EmitOptions = { ...cpuEmitOptions, linear: "conv" };
const emitted = (checkpoint: Checkpoint, options: EmitOptions, name = "predict.guidance") =>
  new GraphLibrary(checkpoint, () => options).get(name);
/** Nodes of one operator: its name is a field of a few bytes of the graph. */
const count = ({ bytes }: OnnxGraph, operator: string) =>
  Buffer.from(bytes)
    .toString("latin1")
    .split(`\x22${String.fromCharCode(operator.length)}${operator}`).length - 1;

let checkpoint: Checkpoint;
let runtime: OnnxRuntime;
let remove: () => void;
beforeAll(async () => {
  checkpoint = await openCheckpoint(embeddedModel);
  const bundles = await bundle();
  remove = bundles.remove;
  runtime = new OnnxRuntime({ host: bundles.host, weights: "folded" });
});
afterAll(async () => {
  await runtime.dispose();
  remove();
});

/** Velocities of rows of noise, each with texts of its own and twice, as guidance has them. */
async function velocities(graph: OnnxGraph, rows: readonly number[]): Promise<FloatTensor> {
  const sizes: Record<string, number> = {
    ...{ rows: rows.length, network_rows: 2 * rows.length, height: 8, width: 8, tokens: 21, patches: 16 },
  };
  const shaped = (dims: readonly (number | string)[]) =>
    dims.map((size) => (typeof size === "number" ? size : sizes[size]!));
  const tensors = [...graph.inputs].map(([name, dims], index) => {
    const shape = shaped(dims as readonly (number | string)[]);
    const row = elementCount(shape) / shape[0]!;
    // The unguided rows come first.
    const rowOf = (at: number) => (dims[0] === 1 ? 0 : rows[Math.floor(at / row) % rows.length]!);
    const value = (at: number) => Math.sin(1 + index + (at % row) * 0.7 + 31 * rowOf(at));
    return [
      name,
      float32(
        shape,
        Float32Array.from({ length: elementCount(shape) }, (_, at) => value(at)),
      ),
    ] as const;
  });
  const name = `${graph.name} of ${rows} as ${count(graph, "Conv")}`;
  runtime.add({ ...graph, name } as never);
  const results = [...graph.outputs].map(
    ([output, dims]) => [output, shaped(dims as readonly (number | string)[])] as const,
  );
  const found = await runtime.run({
    constants: Object.fromEntries(tensors.map(([each, tensor]) => [each, { kind: "value", tensor }])),
    registers: Object.fromEntries(results.map(([output, shape]) => [output, { dtype: "float32", shape }])),
    instructions: [
      {
        ...{ op: "launch", graph: name, label: { kind: "step", name: "step" } },
        inputs: Object.fromEntries(tensors.map(([each]) => [each, each])),
        outputs: Object.fromEntries(results.map(([output]) => [output, output])),
      },
    ],
    results: results.map(([output]) => output),
  });
  const [, velocity] = results.map(([output]) => found[output] as FloatTensor);
  return velocity!;
}

it("have the values that products have", async () => {
  const [products, convolutions] = [emitted(checkpoint, cpuEmitOptions), emitted(checkpoint, inConvolutions)];
  const { numLayers } = checkpoint.transformer.config;
  // Three projections, one back and two of the MLP, for either stream; all but the last block's text.
  expect(count(convolutions, "Conv") - count(products, "Conv")).toBeGreaterThan(10 * (numLayers - 1));
  const expected = await velocities(products, [1]);
  const found = await velocities(convolutions, [1]);
  expect(found).not.toEqual(expected);
  expect(relativeError(found, expected)).toBeLessThan(5e-6);
});

it("give a row the same bits whatever is beside it", async () => {
  const graph = emitted(checkpoint, inConvolutions);
  const [first, second, both] = [
    await velocities(graph, [1]),
    await velocities(graph, [2]),
    await velocities(graph, [1, 2]),
  ];
  // Without guidance and with it: first all rows of the one, then all of the other.
  const size = first.data.length / 2;
  const ofRow = ({ data }: FloatTensor, row: number) => [...data.slice(row * size, (row + 1) * size)];
  for (const guided of [0, 1]) {
    expect(ofRow(both, 2 * guided)).toEqual(ofRow(first, guided));
    expect(ofRow(both, 2 * guided + 1)).toEqual(ofRow(second, guided));
  }
});

it("are for weights of 16 bits alone, and not where a layer is rounded; an adapter's branch goes beside them", async () => {
  const convolutions = (options: EmitOptions, name?: string, of = checkpoint) =>
    count(emitted(of, options, name), "Conv");
  const usual = convolutions(cpuEmitOptions);
  const float = await openCheckpoint(fixture("large", "model"));
  expect(convolutions(inConvolutions, undefined, float)).toBe(convolutions(cpuEmitOptions, undefined, float));
  const weights = { ...checkpoint.transformer.weights, rounding: () => ({ smooth: null }) };
  const rounded = { ...checkpoint, transformer: { ...checkpoint.transformer, weights } } as Checkpoint;
  expect(convolutions(inConvolutions, undefined, rounded)).toBe(usual);
  expect(convolutions(inConvolutions, "predict.guidance.lora-16")).toBeGreaterThan(usual);
});
