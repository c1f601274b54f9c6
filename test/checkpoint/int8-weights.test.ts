// Weights in int8 for products of integers: which layers, what the cache's file holds, when it is made, and what is refused.
import { cp, mkdtemp, readdir, readFile, rm, stat, truncate, utimes, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import path from "node:path";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import {
  clearCachedWeights,
  int8Candidates,
  listCachedWeights,
  openCheckpoint,
  openControlNet,
  type Part,
  quantisedWeights,
} from "../../lib/checkpoint/index.js";
import { readElements } from "../../lib/checkpoint/quantised.js";
import { readSafetensorsHeader } from "../../lib/checkpoint/safetensors.js";
import { locatedWeights, type Weights } from "../../lib/checkpoint/weights.js";
import { versionOf } from "../../lib/common/files.js";
import { narrow } from "../../lib/common/narrow.js";
import { CheckpointError, OutputError } from "../../lib/errors.js";
import { fixture } from "../support/fixtures.js";
import { asFloat8, f32, int8, type RawTensor, type RawTensors, writeRaw } from "../support/quantised.js";

let folder: string;
beforeAll(async () => {
  folder = await mkdtemp(path.join(tmpdir(), "flowturbo-int8-weights-"));
});
afterAll(() => rm(folder, { recursive: true, force: true }));
const newCache = () => mkdtemp(path.join(folder, "cache-"));
const title = "the transformer";

const noise = (seed: number, count: number) =>
  Float32Array.from({ length: count }, (_, i) => {
    const value = Math.sin(seed * 12.9898 + i * 78.233) * 43758.5453;
    return value - Math.floor(value) - 0.5;
  });

/** A part of tensors that were written for it. */
async function partOf(tensors: RawTensors, name = "weights"): Promise<Part<null>> {
  const file = await writeRaw(path.join(folder, `${name}.safetensors`), tensors);
  const located = [...(await readSafetensorsHeader(file))].map(([key, entry]) => [key, { file, entry }] as const);
  return { config: null, weights: locatedWeights(file, [await versionOf(file)], new Map(located)) };
}

/** The values of a layer in units of its scales, and the scales. */
async function quantisedOf(weights: Weights, layer: string) {
  const { codes, scales, smooth } = weights.int8!(layer)!;
  const [inputs, outputs] = codes.shape as [number, number];
  return {
    codes: await readElements(codes, 0, inputs * outputs),
    scales: await readElements(scales, 0, outputs),
    smooth: smooth && (await readElements(smooth, 0, inputs)),
  };
}

/** One value at a time. */
function byHand(values: Float32Array, [outputs, inputs]: readonly [number, number], smooth: Float32Array | null) {
  const codes = new Float32Array(inputs * outputs);
  const scales = new Float32Array(outputs);
  for (let o = 0; o < outputs; o++) {
    const row = Float32Array.from({ length: inputs }, (_, i) => values[o * inputs + i]! / (smooth?.[i] ?? 1));
    scales[o] = row.reduce((most, value) => Math.max(most, Math.abs(value)), 0) / 127;
    for (let i = 0; i < inputs; i++) codes[i * outputs + o] = scales[o] === 0 ? 0 : Math.round(row[i]! / scales[o]!);
  }
  return { codes, scales };
}

describe("the layers that may be in int8", () => {
  it("are those of attention and MLP", async () => {
    const checkpoint = await openCheckpoint(fixture("medium/model"));
    const mmdit = int8Candidates("mmdit", checkpoint.transformer.weights);
    const block = (index: number) =>
      mmdit.flatMap((name) =>
        name.startsWith(`transformer_blocks.${index}.`) ? [name.replace(/^\w+\.\d+\./, "")] : [],
      );
    expect(block(0).sort()).toEqual(
      [
        ...["attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj", "attn.to_add_out", "attn.to_out.0"],
        ...["attn.to_k", "attn.to_q", "attn.to_v", "attn2.to_k", "attn2.to_out.0", "attn2.to_q", "attn2.to_v"],
        ...["ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"],
      ].sort(),
    );
    expect(mmdit.every((name) => name.startsWith("transformer_blocks."))).toBe(true);
    const { textEncoder, textEncoder3 } = checkpoint;
    expect(int8Candidates("clip", textEncoder!.weights)).toHaveLength(6 * textEncoder!.config.numHiddenLayers);
    expect(int8Candidates("t5", textEncoder3!.weights)).toHaveLength(7 * textEncoder3!.config.numLayers);
    const net = await openControlNet(fixture("medium/controlnet"));
    const names = int8Candidates("mmdit", net.weights);
    expect(names).toContain("transformer_blocks.0.attn.to_q");
    expect(names.some((name) => name.startsWith("controlnet_blocks"))).toBe(false);
  });
});

describe("the cache's file", () => {
  const shape = [72, 600] as const;
  // A row of zeros, and one that is far larger than the others.
  const values = noise(1, 72 * 600);
  values.fill(0, 600, 1200);
  for (let i = 0; i < 600; i++) values[2 * 600 + i]! *= 1000;
  const smooth = Float32Array.from({ length: 600 }, (_, i) => 2 ** ((i % 7) - 3));

  const stored: Record<string, () => Promise<RawTensors>> = {
    F32: async () => ({ "a.weight": f32(shape, values) }),
    F16: async () => ({ "a.weight": { dtype: "F16", shape, bytes: narrow(values, "F16") } satisfies RawTensor }),
    BF16: async () => ({ "a.weight": { dtype: "BF16", shape, bytes: narrow(values, "BF16") } satisfies RawTensor }),
    "F8_E4M3 with a scale": async () => ({
      "a.weight": await asFloat8(
        shape,
        values.map((value) => value / 2),
        "F8_E4M3",
      ),
      "a.scale_weight": f32([], [2]),
    }),
    "int8 with scales of rows": async () => ({
      "a.weight": int8(
        shape,
        values.map((value) => Math.round(Math.max(-1, Math.min(1, value)) * 100)),
      ),
      "a.SCB": f32(
        [72],
        noise(2, 72).map((value) => value + 1),
      ),
    }),
  };
  it.each(Object.keys(stored))("has codes and scales of %s as they are by hand", async (dtype) => {
    const part = await partOf(await stored[dtype]!());
    const tensor = part.weights.find("a.weight")!;
    const restored = await readElements(tensor, 0, 72 * 600);
    for (const each of [null, smooth]) {
      const { weights } = await quantisedWeights(part, new Map([["a", each]]), await newCache(), { title });
      const found = await quantisedOf(weights, "a");
      const { codes, scales } = byHand(restored, shape, each);
      expect(found.scales).toEqual(scales);
      expect(found.smooth).toEqual(each ?? undefined);
      // A quotient that is half way between two codes may be rounded to either.
      const wrong = codes.findIndex((code, i) => Math.abs(code - found.codes[i]!) > 1);
      expect(wrong).toBe(-1);
      expect(codes.reduce((count, code, i) => count + (code === found.codes[i] ? 0 : 1), 0)).toBeLessThan(10);
      expect(weights.find("a.weight")).toEqual(tensor);
      expect(weights.int8!("b")).toBeUndefined();
    }
  });

  it("holds several layers, of one piece or of many", async () => {
    const shapes = { a: [72, 600], b: [1028, 300], c: [4, 8] } as const;
    const entries = Object.entries(shapes).map(([name, [outputs, inputs]], index) => {
      return [name, noise(index, outputs * inputs)] as const;
    });
    const part = await partOf(
      Object.fromEntries(entries.map(([name, data]) => [`${name}.weight`, f32(shapes[name as "a"], data)])),
    );
    const layers = new Map(
      entries.map(([name]) => [name, name === "b" ? noise(9, 300).map((value) => value + 1) : null]),
    );
    const { weights } = await quantisedWeights(part, layers, await newCache(), { title });
    for (const [name, data] of entries) {
      const found = await quantisedOf(weights, name);
      const { codes, scales } = byHand(data, shapes[name as "a"], layers.get(name)!);
      expect(found.scales).toEqual(scales);
      expect(found.codes.findIndex((code, i) => Math.abs(code - codes[i]!) > 1)).toBe(-1);
    }
  });

  it("is made once, made again where it is cut off, and apart for other weights, layers and smoothing", async () => {
    const cache = await newCache();
    const part = await partOf({ "a.weight": f32(shape, values), "b.weight": f32(shape, noise(3, 72 * 600)) });
    const make = (layers: [string, Float32Array | null][], of = part) =>
      quantisedWeights(of, new Map(layers), cache, { title });
    await make([["a", null]]);
    const [{ file, bytes }] = (await listCachedWeights(cache)) as [{ file: string; bytes: number }];
    const old = new Date(1e12);
    await utimes(file, old, old);
    await make([["a", null]]);
    expect((await stat(file)).mtimeMs).toBe(1e12);
    const whole = await readFile(file);
    await truncate(file, bytes - 4);
    await make([["a", null]]);
    expect(await readFile(file)).toEqual(whole);
    await make([["a", smooth]]);
    await make([["a", smooth.map((value) => value * 2)]]);
    await make([
      ["a", null],
      ["b", null],
    ]);
    await make([["a", null]], await partOf({ "a.weight": f32(shape, noise(4, 72 * 600)) }, "others"));
    expect(await listCachedWeights(cache)).toHaveLength(5);
    expect(await clearCachedWeights(cache)).toMatchObject({ files: 5 });
  });

  it("is told from that of another version of the weights' file", async () => {
    const cache = await newCache();
    const copy = path.join(folder, "copy.safetensors");
    const part = await partOf({ "a.weight": f32(shape, values) });
    await cp(part.weights.files[0]!.file, copy);
    const [version, header] = [await versionOf(copy), await readSafetensorsHeader(copy)];
    const of = (found: typeof version): Part<null> => ({
      config: null,
      weights: locatedWeights(
        copy,
        [found],
        new Map([...header].map(([name, entry]) => [name, { file: copy, entry }])),
      ),
    });
    await quantisedWeights(of(version), new Map([["a", null]]), cache, { title });
    await quantisedWeights(of({ ...version, mtimeMs: 1 }), new Map([["a", null]]), cache, { title });
    expect(await listCachedWeights(cache)).toHaveLength(2);
    // The same size and time, and other values.
    const bytes = await readFile(copy);
    bytes.fill(0, bytes.length - 72 * 600 * 4, bytes.length - 72 * 600 * 4 + 100);
    await writeFile(copy, bytes);
    await quantisedWeights(of(version), new Map([["a", null]]), cache, { title });
    expect(await listCachedWeights(cache)).toHaveLength(3);
  });

  it("is not left half written by an abort, nor by values that are not finite", async () => {
    const cache = await newCache();
    const reason = new Error("enough");
    const layers = new Map([["a", null]]);
    const part = await partOf({ "a.weight": f32(shape, values) });
    await expect(quantisedWeights(part, layers, cache, { title, signal: AbortSignal.abort(reason) })).rejects.toBe(
      reason,
    );
    for (const wrong of [Number.NaN, Number.POSITIVE_INFINITY]) {
      const broken = await partOf({ "a.weight": f32(shape, values.with(5 * 600 + 3, wrong)) });
      const quantising = quantisedWeights(broken, layers, cache, { title });
      await expect(quantising).rejects.toThrow(CheckpointError);
      await expect(quantising).rejects.toThrow(/"a\.weight" has values that are not finite in row 5/);
    }
    expect(await readdir(path.join(cache, "weights"))).toEqual([]);
  });

  it("that cannot be written is an OutputError with the remedy", async () => {
    const part = await partOf({ "a.weight": f32(shape, values) });
    const quantising = quantisedWeights(part, new Map([["a", null]]), "/proc/none", { title });
    await expect(quantising).rejects.toThrow(OutputError);
    await expect(quantising).rejects.toThrow(/the transformer's weights in int8 \(\d+ bytes\).*weights: "int8"/);
  });

  it("is none for a part without such layers", async () => {
    const part = await partOf({ "a.weight": f32(shape, values) });
    expect(await quantisedWeights(part, new Map(), "/proc/none", { title })).toBe(part);
  });
});
