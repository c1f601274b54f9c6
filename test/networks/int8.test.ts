// Linear layers in 8 bits, against the same arithmetic written out, and against the products in float.
import { mkdtemp, realpath, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import path from "node:path";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { type FloatTensor, float32, type StoredTensor, type WeightSource } from "../../lib/common/tensor.js";
import { Layers } from "../../lib/networks/layers.js";
import { cpuEmitOptions, GraphBuilder, type OnnxGraph } from "../../lib/onnx/index.js";
import { relativeError } from "../support/fixtures.js";
import { cpuRuntime } from "./cpu.js";

const runtime = cpuRuntime();
const [inner, outer] = [96, 40];
let folder: string;
let weight: Float32Array;
let bias: Float32Array;

const noise = (seed: number, count: number) =>
  Float32Array.from({ length: count }, (_, i) => {
    const value = Math.sin(seed * 12.9898 + i * 78.233) * 43758.5453;
    return value - Math.floor(value) - 0.5;
  });

/** How much larger than the others the values of a channel may be; its weights are as much smaller. */
const sizeOf = (channel: number) => (channel % 8 === 0 ? 64 : 1);

/** A file of tensors, one behind the other. */
async function stored(name: string, tensors: Record<string, [StoredTensor["dtype"], number[], NodeJS.TypedArray]>) {
  const file = path.join(folder, name);
  const result: Record<string, StoredTensor> = {};
  const parts: Buffer[] = [];
  let offset = 0;
  for (const [key, [dtype, shape, { buffer, byteOffset, byteLength }]] of Object.entries(tensors)) {
    parts.push(Buffer.from(buffer as ArrayBuffer, byteOffset, byteLength));
    result[key] = { name: key, dtype, shape, file, offset, length: byteLength };
    offset += byteLength;
  }
  await writeFile(file, Buffer.concat(parts));
  return result;
}

/** Codes and scales of W · diag(1 / smooth). */
function quantised(smooth: Float32Array | null) {
  const codes = new Int8Array(inner * outer);
  const scales = new Float32Array(outer);
  for (let o = 0; o < outer; o++) {
    const row = Float32Array.from({ length: inner }, (_, i) => weight[o * inner + i]! / (smooth?.[i] ?? 1));
    scales[o] = Math.max(...row.map(Math.abs)) / 127;
    for (let i = 0; i < inner; i++) codes[i * outer + o] = Math.round(row[i]! / scales[o]!);
  }
  return { codes, scales };
}

async function source(kind: "float" | "int8" | "smooth"): Promise<WeightSource> {
  const smooth = kind === "smooth" ? Float32Array.from({ length: inner }, (_, i) => 1 / sizeOf(i)) : null;
  const { codes, scales } = quantised(smooth);
  const tensors = await stored(kind, {
    "layer.weight": ["F32", [outer, inner], weight],
    "layer.bias": ["F32", [outer], bias],
    codes: ["I8", [inner, outer], codes],
    scales: ["F32", [outer], scales],
    ...(smooth && { smooth: ["F32", [inner], smooth] }),
  });
  const int8 = { codes: tensors.codes!, scales: tensors.scales!, smooth: tensors.smooth };
  return {
    origin: folder,
    find: (name) => tensors[name],
    ...(kind !== "float" && { int8: (layer) => (layer === "layer" ? int8 : undefined) }),
  };
}

async function run(kind: "float" | "int8" | "smooth", x: FloatTensor): Promise<FloatTensor> {
  const g = new GraphBuilder(kind);
  const input = g.input("x", "float32", ["rows", "tokens", inner]);
  const layers = new Layers(g, await source(kind), cpuEmitOptions, g.shapeOf(input, 0, 1));
  g.output("y", layers.linear(input, "layer", inner, outer), ["rows", "tokens", outer]);
  return launched(g.build(), x);
}

async function launched(graph: OnnxGraph, x: FloatTensor): Promise<FloatTensor> {
  const [rows, tokens] = x.shape as [number, number];
  const label = { kind: "step", name: graph.name } as const;
  runtime().add(graph);
  const { y } = await runtime().run({
    constants: { x: { kind: "value", tensor: x } },
    registers: { y: { dtype: "float32", shape: [rows, tokens, outer] } },
    instructions: [{ op: "launch", graph: graph.name, label, inputs: { x: "x" }, outputs: { y: "y" } }],
    results: ["y"],
  });
  return y as FloatTensor;
}

/** One token and one output at a time. */
function byHand(x: FloatTensor): FloatTensor {
  const { codes, scales } = quantised(null);
  const tokens = x.data.length / inner;
  const result = new Float32Array(tokens * outer);
  for (let t = 0; t < tokens; t++) {
    const values = x.data.subarray(t * inner, (t + 1) * inner);
    const scale = Math.max(...values.map(Math.abs)) / 127;
    const units = values.map((value) => (scale === 0 ? 0 : Math.round(value / scale)));
    for (let o = 0; o < outer; o++) {
      let sum = 0;
      for (let i = 0; i < inner; i++) sum += units[i]! * codes[i * outer + o]!;
      result[t * outer + o] = sum * scale * scales[o]! + bias[o]!;
    }
  }
  return float32([...x.shape.slice(0, -1), outer], result);
}

beforeAll(async () => {
  folder = await realpath(await mkdtemp(path.join(tmpdir(), "flowturbo-int8-")));
  weight = noise(1, inner * outer).map((value, i) => value / sizeOf(i % inner));
  bias = noise(2, outer);
});
afterAll(() => rm(folder, { recursive: true }));

describe("a linear layer in 8 bits", () => {
  // A token of zeros, and one that is far larger than the others.
  const x = float32([2, 5, inner], noise(3, 2 * 5 * inner));
  x.data.fill(0, inner, 2 * inner);
  for (let i = 0; i < inner; i++) x.data[2 * inner + i]! *= 1000;

  it("is the product of what was rounded", async () => {
    expect(relativeError(await run("int8", x), byHand(x))).toBeLessThan(1e-6);
  });

  it("is near to the product in float, token by token", async () => {
    const [exact, rounded] = [await run("float", x), await run("int8", x)];
    for (let token = 0; token < 10; token++) {
      const of = ({ data }: FloatTensor) => float32([outer], data.slice(token * outer, (token + 1) * outer));
      expect(relativeError(of(rounded), of(exact))).toBeLessThan(0.02);
    }
  });

  it("gives a row the same bits whatever is beside it", async () => {
    const { data: both } = await run("int8", x);
    const { data: alone } = await run("int8", float32([1, 5, inner], x.data.slice(0, 5 * inner)));
    expect(alone).toEqual(both.slice(0, alone.length));
  });

  it("is one of many in a graph, also behind attention", async () => {
    const one = await source("int8");
    // The same weight twice, as two.
    const named = (tensor: StoredTensor | undefined, name: string) =>
      tensor && { ...tensor, name: `${name}.${tensor.name}` };
    const layers = ["first", "second"];
    const of = (name: string) => layers.find((layer) => name.startsWith(layer))!;
    const both = (kind: "float" | "int8"): WeightSource => ({
      origin: folder,
      find: (name) => named(one.find(name.replace(of(name), "layer")), of(name)),
      ...(kind === "int8" && {
        int8: (layer) => {
          const { codes, scales } = one.int8!("layer")!;
          return { codes: named(codes, layer)!, scales: named(scales, layer)! };
        },
      }),
    });
    const results: FloatTensor[] = [];
    for (const kind of ["float", "int8"] as const) {
      const g = new GraphBuilder(`attention ${kind}`);
      const input = g.input("x", "float32", ["rows", "tokens", inner]);
      const l = new Layers(g, both(kind), cpuEmitOptions, g.shapeOf(input, 0, 1));
      const mixed = l.attention(input, input, input, 4, inner / 4, { scale: 1, causal: 5 });
      const sum = l.add(l.linear(mixed, "first", inner, outer), l.linear(input, "second", inner, outer));
      g.output("y", sum, ["rows", "tokens", outer]);
      results.push(await launched(g.build(), x));
    }
    expect(relativeError(results[1]!, results[0]!)).toBeLessThan(0.02);
  });

  it("takes channels that are larger than the others once they are divided out", async () => {
    const outlying = float32(
      x.shape,
      x.data.map((value, i) => value * sizeOf(i % inner)),
    );
    const exact = await run("float", outlying);
    const [plain, smooth] = [await run("int8", outlying), await run("smooth", outlying)];
    expect(relativeError(smooth, exact)).toBeLessThan(relativeError(plain, exact) / 4);
  });
});
