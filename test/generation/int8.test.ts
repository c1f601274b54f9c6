// T5 in int8: what the cache holds, when it is made and cleared, how far the embedding is from the stored weights', and which runtimes refuse it.
import { cp, mkdtemp, readdir, readFile, rm, stat, truncate, utimes } from "node:fs/promises";
import { tmpdir } from "node:os";
import path from "node:path";
import { FlowTurbo, OptionError } from "flowturbo";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import {
  type Checkpoint,
  clearCachedWeights,
  listCachedWeights,
  openCheckpoint,
  quantisedT5,
} from "../../lib/checkpoint/index.js";
import { readElements } from "../../lib/checkpoint/quantised.js";
import { elementCount } from "../../lib/common/tensor.js";
import { OutputError } from "../../lib/errors.js";
import { GraphLibrary } from "../../lib/networks/library.js";
import { relativeBuckets } from "../../lib/networks/t5.js";
import { sessionOptions } from "../../lib/runtimes/onnxruntime/sessions.js";
import { fixture } from "../support/fixtures.js";
import { asFloat8, f32, modelWith, type RawTensors, readRaw, scaledT5, valuesOf } from "../support/quantised.js";

process.env.ORT_DISABLE_TELEMETRY = "1";
const ort = await import("onnxruntime-node");

const t5File = "text_encoder_3/model.safetensors";
const prompt = "a red circle above a small blue square";
let folder: string;
beforeAll(async () => {
  folder = await mkdtemp(path.join(tmpdir(), "flowturbo-int8-"));
});
afterAll(() => rm(folder, { recursive: true, force: true }));
const newCache = () => mkdtemp(path.join(folder, "cache-"));
const t5Of = async (model: string) => (await openCheckpoint(model)).textEncoder3!;
const medium = fixture("medium/model");

describe("the cache's file", () => {
  it("has each block of 16 values within half a unit of its scale, and the rest as it was", async () => {
    const t5 = await t5Of(medium);
    const { weights } = (await quantisedT5(t5, await newCache()))!;
    const raw = await readRaw(fixture("medium/model/text_encoder_3/model.safetensors"));
    const linear = Object.entries(raw).filter(([name]) =>
      /\.(SelfAttention\.[qkvo]|DenseReluDense\.w\w+)\.weight$/.test(name),
    );
    expect(linear).toHaveLength(14);
    for (const [name, tensor] of linear) {
      const stored = weights.find(name)!;
      expect(stored).toMatchObject({ dtype: "I8", shape: tensor.shape });
      const scaleShape = [tensor.shape[0], tensor.shape[1]! / 16];
      expect(stored.scale!.tensor).toMatchObject({ dtype: "F32", shape: scaleShape });
      const codes = await readElements({ ...stored, scale: undefined }, 0, stored.length);
      const scales = await readElements(stored.scale!.tensor, 0, stored.length / 16);
      const wrong = valuesOf(tensor).findIndex((value, i) => {
        const scale = scales[i >> 4]!;
        return !(Math.abs(codes[i]! * scale - value) <= 0.5001 * scale);
      });
      expect(wrong).toBe(-1);
    }
    for (const name of ["shared.weight", "encoder.final_layer_norm.weight"]) {
      const stored = weights.find(name)!;
      expect([...(await readElements(stored, 0, 96))]).toEqual([...valuesOf(raw[name]!).subarray(0, 96)]);
    }
    const [{ file } = { file: "" }] = weights.files;
    expect(weights.names.every((name) => !weights.find(name) || weights.find(name)!.file === file)).toBe(true);
  });

  it("is made once, made again where it is cut off, and apart for other weights", async () => {
    const cache = await newCache();
    const t5 = await t5Of(medium);
    await quantisedT5(t5, cache);
    const [{ file, bytes }] = (await listCachedWeights(cache)) as [{ file: string; bytes: number }];
    const old = new Date(1e12);
    await utimes(file, old, old);
    await quantisedT5(t5, cache);
    expect((await stat(file)).mtimeMs).toBe(1e12);
    await truncate(file, bytes - 4);
    await quantisedT5(t5, cache);
    expect((await stat(file)).size).toBe(bytes);
    await quantisedT5(await t5Of(fixture("large/model")), cache);
    expect(await listCachedWeights(cache)).toHaveLength(2);
    expect(await clearCachedWeights(cache)).toMatchObject({ files: 2 });
    expect(await listCachedWeights(cache)).toEqual([]);
  });

  it("is not left half written by an abort, and a cache that cannot be written is an OutputError", async () => {
    const cache = await newCache();
    const reason = new Error("enough");
    await expect(quantisedT5(await t5Of(medium), cache, { signal: AbortSignal.abort(reason) })).rejects.toBe(reason);
    expect(await readdir(path.join(cache, "weights"))).toEqual([]);
    await expect(quantisedT5(await t5Of(medium), "/proc/none")).rejects.toThrow(OutputError);
  });
});

/** What T5 of a checkpoint makes of the prompt. */
async function encode(checkpoint: Checkpoint): Promise<Float32Array> {
  const graph = new GraphLibrary(checkpoint).get("t5");
  const options = sessionOptions({ root: "/", widening: "lazy" }, { threads: 1 });
  const session = await ort.InferenceSession.create(graph.bytes, options);
  const ids = JSON.parse(await readFile(fixture("medium/token_ids.json"), "utf8")).tokenizer_3[prompt] as number[];
  const buckets = relativeBuckets(checkpoint.textEncoder3!.config, ids.length);
  const { hidden } = await session.run({
    ids: new ort.Tensor("int64", BigInt64Array.from(ids, BigInt), [1, ids.length]),
    relative_buckets: new ort.Tensor("int64", buckets, [ids.length, ids.length]),
  });
  await session.release();
  return hidden!.data as Float32Array;
}

/** Root mean square of the difference, as a part of the reference's. */
function embeddingError(actual: Float32Array, expected: Float32Array): number {
  const square = (values: Float32Array) => values.reduce((sum, value) => sum + value * value, 0);
  return Math.sqrt(square(actual.map((value, i) => value - expected[i]!)) / square(expected));
}

/**
 * Weights as T5 begins with them (transformers' `_init_weights`), so that scores are of the size that they have in a trained encoder. The
 * fixture's own scores are so large that softmax multiplies any difference by five.
 */
function initialised(tensors: RawTensors): RawTensors {
  let state = 1;
  const uniform = () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return (state + 0.5) / 2 ** 32;
  };
  const normal = () => Math.sqrt(-2 * Math.log(uniform())) * Math.cos(2 * Math.PI * uniform());
  const result: RawTensors = {};
  for (const [name, { shape }] of Object.entries(tensors)) {
    const [, columns] = shape as [number, number];
    const count = shape.reduce((a, b) => a * b, 1);
    const deviation = /\.q\.weight$/.test(name)
      ? (columns * 16) ** -0.5
      : name === "shared.weight"
        ? 1
        : columns ** -0.5;
    result[name] = f32(
      shape,
      shape.length === 1 ? new Array(count).fill(1) : Float32Array.from({ length: count }, () => deviation * normal()),
    );
  }
  return result;
}

/** The second block in scaled float8, the rest in float32. */
async function halfInFloat8(tensors: RawTensors): Promise<RawTensors> {
  const isSecond = (name: string) => name.startsWith("encoder.block.1.");
  const scaled = Object.entries(await scaledT5(tensors)).filter(([name]) => isSecond(name));
  const wide = Object.entries(tensors).filter(([name]) => !isSecond(name));
  return Object.fromEntries([
    ...wide.map(([name, each]) => [name, f32(each.shape, valuesOf(each))] as const),
    ...scaled,
  ]);
}

const plainFloat8 = async (tensors: RawTensors): Promise<RawTensors> =>
  Object.fromEntries(
    await Promise.all(
      Object.entries(tensors).map(
        async ([name, each]) => [name, await asFloat8(each.shape, valuesOf(each), "F8_E5M2")] as const,
      ),
    ),
  );

async function bitsandbytesModel(): Promise<string> {
  const model = path.join(folder, "bitsandbytes");
  await cp(medium, model, { recursive: true });
  for (const file of ["config.json", "model.safetensors"])
    await cp(fixture("medium/t5_int8", file), path.join(model, "text_encoder_3", file));
  return model;
}

describe("the embedding", () => {
  it("is within one hundredth of the stored weights', and not theirs", async () => {
    const model = await modelWith(path.join(folder, "initialised"), "medium", t5File, initialised);
    const stored = await openCheckpoint(model);
    const int8 = { ...stored, textEncoder3: await quantisedT5(stored.textEncoder3!, await newCache()) };
    const error = embeddingError(await encode(int8), await encode(stored));
    expect(error).toBeLessThan(0.01);
    expect(error).toBeGreaterThan(0.001);
  });

  it.each([
    ["bfloat16", () => modelWith(path.join(folder, "bfloat16"), "medium", t5File, (tensors) => tensors), 0],
    ["float32 and scaled float8", () => modelWith(path.join(folder, "half"), "medium", t5File, halfInFloat8), 7],
    // transformers leaves the layers "wo" as they are.
    ["int8 of bitsandbytes and others", bitsandbytesModel, 12],
  ] as const)("is that of the values in the file, from %s; those of 8 bits are kept", async (name, make, kept) => {
    const stored = await openCheckpoint(await make());
    const { weights } = stored.textEncoder3!;
    const textEncoder3 = (await quantisedT5(stored.textEncoder3!, await newCache()))!;
    const restored: RawTensors = {};
    let count8Bit = 0;
    for (const each of textEncoder3.weights.names.filter((name) => !name.endsWith(".scales"))) {
      const { scale, ...tensor } = textEncoder3.weights.find(each)!;
      const before = weights.find(each)!;
      const count = elementCount(tensor.shape);
      const values = await readElements(tensor, 0, count);
      const scales = scale && (await readElements(scale.tensor, 0, elementCount(scale.tensor.shape)));
      const perScale = count / (scales?.length ?? 1);
      const exact = scales ? values.map((value, i) => value * scales[Math.floor(i / perScale)]!) : values;
      if (["I8", "F8_E4M3"].includes(before.dtype)) {
        count8Bit++;
        expect(tensor.dtype).toBe(before.dtype);
        expect(values).toEqual(await readElements({ ...before, scale: undefined }, 0, count));
        expect(embeddingError(exact, await readElements(before, 0, count))).toBeLessThan(1e-7);
      }
      restored[each] = f32(tensor.shape, exact);
    }
    expect(count8Bit).toBe(kept);
    const exact = await modelWith(path.join(folder, `${name} restored`), "medium", t5File, () => restored);
    const expected = await encode(await openCheckpoint(exact));
    expect(embeddingError(await encode({ ...stored, textEncoder3 }), expected)).toBeLessThan(1e-5);
  });
});

describe("a model", () => {
  it("draws with it, from the cache the second time, and without T5 as ever", async () => {
    const cache = await newCache();
    const notes: string[] = [];
    const logger = { info: (text: string) => void notes.push(text) };
    const options = { runtime: "onnxruntime", t5Weights: "int8", cache, measureCosts: false, logger } as const;
    for (let round = 0; round < 2; round++) {
      await using model = await FlowTurbo.load(medium, options);
      const { images } = await model.generate({ prompt, steps: 1, width: 64, height: 64 });
      expect(images).toHaveLength(1);
    }
    expect(notes.filter((text) => /weights in int8 are written, once/.test(text))).toHaveLength(1);
    await using without = await FlowTurbo.load(fixture("sd3/model"), options);
    expect(without.runtime.name).toBe("onnxruntime");
  });

  it.each([
    ["scaled float8", () => modelWith(path.join(folder, "scaled"), "medium", t5File, scaledT5), /F8_E4M3/],
    ["plain float8", () => modelWith(path.join(folder, "plain"), "medium", t5File, plainFloat8), /F8_E5M2/],
    ["scaled float8 in one file", async () => fixture("medium/single/t5fp8.safetensors"), /F8_E4M3/],
  ])("keeps a T5 that is in 8 bits already, with a warning: %s", async (_, make, dtype) => {
    const [cache, stored] = [await newCache(), await make()];
    const told: string[] = [];
    const base = stored.endsWith(".safetensors") ? medium : undefined;
    const options = { base, measureCosts: false, cache, weights: "lazy" } as const;
    const logger = { warn: (text: string) => void told.push(text) };
    await using model = await FlowTurbo.load(stored, { ...options, t5Weights: "int8", logger });
    const [warning, ...others] = model.warnings;
    expect(warning).toMatch(/^T5's weights in .* are used as they are stored \(.*\): t5Weights "int8" quantises only/);
    expect(warning).toContain(stored);
    expect(warning).toMatch(dtype);
    expect(others).toEqual([]);
    expect(told).toEqual([warning]);
    expect(await listCachedWeights(cache)).toEqual([]);
    // A GPU would not be passed over for it.
    for (const { reason } of model.runtime.passedOver) expect(reason).not.toMatch(/t5Weights/);
    await using plain = await FlowTurbo.load(stored, options);
    expect(plain.warnings).toEqual([]);
    const request = { prompt, steps: 1, width: 64, height: 64, seed: 1 };
    const [kept, expected] = [await model.generate(request), await plain.generate(request)];
    expect(kept.latents!.data).toEqual(expected.latents!.data);
  });

  it("refuses runtimes on a GPU before anything is made, and auto passes them over", async () => {
    const cache = await newCache();
    for (const runtime of ["cuda", "webgpu", "tensorrt"] as const) {
      const error = await FlowTurbo.load(medium, { runtime, t5Weights: "int8", cache }).catch(
        (reason: unknown) => reason,
      );
      expect(error).toBeInstanceOf(OptionError);
      expect((error as Error).message).toMatch(/does not take t5Weights "int8"; onnxruntime does/);
    }
    expect(await listCachedWeights(cache)).toEqual([]);
    await using model = await FlowTurbo.load(medium, { t5Weights: "int8", cache, measureCosts: false });
    expect(model.runtime.name).toBe("onnxruntime");
    for (const { reason } of model.runtime.passedOver) expect(reason).toMatch(/t5Weights "int8"/);
  });
});
