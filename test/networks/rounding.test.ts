// What a compared layer says that it would be off by in 8 bits, against the same arithmetic written out, and a rounded layer against 8 bits.
import { mkdtemp, realpath, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import path from "node:path";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import {
  type FloatTensor,
  float32,
  type Rounding,
  type StoredTensor,
  type WeightSource,
} from "../../lib/common/tensor.js";
import { Layers } from "../../lib/networks/layers.js";
import { comparisonOutput } from "../../lib/networks/rounding.js";
import { cpuEmitOptions, GraphBuilder, shapeWith } from "../../lib/onnx/index.js";
import { relativeError } from "../support/fixtures.js";
import { cpuRuntime } from "./cpu.js";

const runtime = cpuRuntime();
const [inner, outer, rows, tokens] = [48, 20, 2, 7];
let folder: string;
let tensors: Record<string, StoredTensor>;

const noise = (seed: number, count: number) =>
  Float32Array.from({ length: count }, (_, i) => {
    const value = Math.sin(seed * 12.9898 + i * 78.233) * 43758.5453;
    return value - Math.floor(value) - 0.5;
  });
const weight = noise(1, inner * outer);
const bias = noise(2, outer);
// One channel is far larger than the others, one is all zeros, and so is one token.
const x = float32(
  [rows, tokens, inner],
  noise(3, rows * tokens * inner).map((value, i) => {
    const [channel, token] = [i % inner, Math.floor(i / inner)];
    return channel === 5 || token === 3 ? 0 : channel === 9 ? 80 * value : value;
  }),
);

beforeAll(async () => {
  folder = await realpath(await mkdtemp(path.join(tmpdir(), "flowturbo-rounding-")));
  const file = path.join(folder, "weights");
  await writeFile(file, Buffer.concat([Buffer.from(weight.buffer), Buffer.from(bias.buffer)]));
  const [length, rest] = [weight.byteLength, bias.byteLength];
  tensors = {
    "layer.weight": { name: "layer.weight", dtype: "F32", shape: [outer, inner], file, offset: 0, length },
    "layer.bias": { name: "layer.bias", dtype: "F32", shape: [outer], file, offset: length, length: rest },
  };
});
afterAll(() => rm(folder, { recursive: true }));

/** All outputs of a graph of the one layer. */
async function outputsOf(name: string, rounding: Rounding | undefined): Promise<Record<string, FloatTensor>> {
  const source: WeightSource = { origin: folder, find: (each) => tensors[each], rounding: () => rounding };
  const g = new GraphBuilder(name);
  const input = g.input("x", "float32", ["rows", "tokens", inner]);
  const layers = new Layers(g, source, cpuEmitOptions, g.shapeOf(input, 0, 1));
  g.output("y", layers.linear(input, "layer", inner, outer), ["rows", "tokens", outer]);
  const graph = g.build();
  runtime().add(graph);
  const names = [...graph.outputs.keys()];
  const shape = (dimensions: Parameters<typeof shapeWith>[0]) => shapeWith(dimensions, { rows, tokens });
  return (await runtime().run({
    constants: { x: { kind: "value", tensor: x } },
    registers: Object.fromEntries(
      [...graph.outputs].map(([output, of]) => [output, { dtype: "float32", shape: shape(of) }]),
    ),
    instructions: [
      {
        ...{ op: "launch", graph: name, label: { kind: "step", name }, inputs: { x: "x" } },
        outputs: Object.fromEntries(names.map((output) => [output, output])),
      },
    ],
    results: names,
  })) as Record<string, FloatTensor>;
}

/** Each row of values in whole units of 1/127 of its largest magnitude. */
function rounded(values: Float32Array): Float32Array {
  const result = new Float32Array(values.length);
  for (let at = 0; at < values.length; at += inner) {
    const row = values.subarray(at, at + inner);
    const unit = Math.max(...row.map(Math.abs)) / 127;
    for (let i = 0; i < inner; i++) result[at + i] = unit === 0 ? 0 : Math.round(row[i]! / unit) * unit;
  }
  return result;
}

function product(input: Float32Array, factors: Float32Array): Float32Array {
  return Float32Array.from({ length: rows * tokens * outer }, (_, at) => {
    const [token, o] = [Math.floor(at / outer), at % outer];
    let sum = bias[o]!;
    for (let i = 0; i < inner; i++) sum += input[token * inner + i]! * factors[o * inner + i]!;
    return sum;
  });
}

const byChannel = (values: Float32Array, factor: (channel: number) => number) =>
  values.map((value, i) => value * factor(i % inner));
const squares = (values: Float32Array) => values.reduce((sum, value) => sum + value ** 2, 0);
const peak = (values: Float32Array, channel: number) =>
  Math.max(1e-5, ...values.filter((_, i) => i % inner === channel).map(Math.abs));
const smooth = Float32Array.from({ length: inner }, (_, i) => Math.sqrt(peak(weight, i) / peak(x.data, i)));
const smoothed = () =>
  product(rounded(byChannel(x.data, (i) => smooth[i]!)), rounded(byChannel(weight, (i) => 1 / smooth[i]!)));

describe("a layer that is compared", () => {
  it("says what it is off by, with scaled channels and without, and gives its result in float32", async () => {
    const outputs = await outputsOf("compared", "compared");
    const plain = await outputsOf("plain", undefined);
    expect(Object.keys(plain)).toEqual(["y"]);
    expect(outputs.y!.data).toEqual(plain.y!.data);
    const names = Object.keys(outputs).filter((name) => comparisonOutput(name));
    expect(names.map((name) => comparisonOutput(name))).toEqual([
      { layer: "layer", holds: "errors" },
      { layer: "layer", holds: "smooth" },
    ]);
    expect(comparisonOutput("velocity_next")).toBeNull();
    const exact = product(x.data, weight);
    const off = (values: Float32Array) => squares(values.map((value, i) => value - exact[i]!));
    const expected = [off(product(rounded(x.data), rounded(weight))), off(smoothed()), squares(exact)];
    const errors = outputs[names[0]!]!.data;
    for (const [i, value] of expected.entries()) expect(errors[i]! / value).toBeCloseTo(1, 2);
    expect(expected[1]!).toBeLessThan(expected[0]! / 10);
    const found = outputs[names[1]!]!;
    expect(relativeError(found, float32([inner], smooth))).toBeLessThan(1e-5);
  });
});

describe("a layer that is rounded", () => {
  it("computes what 8 bits would, with scaled channels and without", async () => {
    const shape = [rows, tokens, outer];
    const { y: one } = await outputsOf("rounded", { smooth: null });
    expect(relativeError(one!, float32(shape, product(rounded(x.data), rounded(weight))))).toBeLessThan(1e-3);
    const { y: other } = await outputsOf("smooth", { smooth });
    expect(relativeError(other!, float32(shape, smoothed()))).toBeLessThan(1e-3);
  });
});
