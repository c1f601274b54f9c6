// LoRA files of all dialects: what is read of them, merged weights against those that diffusers fuses, and what is refused.
import { execFileSync } from "node:child_process";
import { cp, mkdir, mkdtemp, readdir, readFile, rm, stat, utimes, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import path from "node:path";
import fc from "fast-check";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import {
  type Checkpoint,
  clearCachedWeights,
  type Lora,
  type LowRank,
  listCachedWeights,
  mergeLoras,
  openCheckpoint,
  readLora,
} from "../../lib/checkpoint/index.js";
import { LowRankSum } from "../../lib/checkpoint/lora/product.js";
import { readElements } from "../../lib/checkpoint/quantised.js";
import { type CachedWeights, cachedWeights } from "../../lib/checkpoint/weight-cache.js";
import { narrow } from "../../lib/common/narrow.js";
import { type ComputedDType, elementCount, type StoredTensor } from "../../lib/common/tensor.js";
import { widen } from "../../lib/common/widen.js";
import { CheckpointError, OutputError } from "../../lib/errors.js";
import { type Adapter, type Adapters, dialects, inDialect } from "../support/adapters.js";
import { fixture, fixtureNames, readAll } from "../support/fixtures.js";
import { f32, modelWith, type RawTensor, readRaw, scaledT5, writeRaw } from "../support/quantised.js";

let folder: string;
const checkpoints = new Map<string, Checkpoint>();
beforeAll(async () => {
  folder = await mkdtemp(path.join(tmpdir(), "flowturbo-lora-"));
  for (const name of fixtureNames) checkpoints.set(name, await openCheckpoint(fixture(name, "model")));
});
afterAll(() => rm(folder, { recursive: true, force: true }));
const newCache = () => mkdtemp(path.join(folder, "cache-"));
let files = 0;
const newFile = () => path.join(folder, `adapter-${files++}.safetensors`);

const adapter = (model: string, name: string) => fixture(model, "adapters", `${name}.safetensors`);
const read = (model: string, name: string) => readLora(adapter(model, name), checkpoints.get(model)!);
const valuesOf = (tensor: StoredTensor) => readElements(tensor, 0, elementCount(tensor.shape));

/** scale · up · down of a layer, [out, in], in float64. */
function deltaOf({ down, up, rank, in: width, out, scale }: LowRank): Float64Array {
  const delta = new Float64Array(out * width);
  for (let o = 0; o < out; o++)
    for (let k = 0; k < rank; k++)
      for (let i = 0; i < width; i++) delta[o * width + i]! += scale * up[o * rank + k]! * down[k * width + i]!;
  return delta;
}

/** What a LoRA adds to each layer, by part and name. */
const deltasOf = ({ parts }: Lora) =>
  new Map(
    [...parts].flatMap(([part, layers]) => [...layers].map(([name, each]) => [`${part} ${name}`, deltaOf(each)])),
  );

function expectSame(actual: Lora, expected: Lora, tolerance = 0): void {
  const [own, others] = [deltasOf(actual), deltasOf(expected)];
  expect([...own.keys()].sort()).toEqual([...others.keys()].sort());
  for (const [layer, delta] of own) {
    const other = others.get(layer)!;
    const most = other.reduce((largest, value) => Math.max(largest, Math.abs(value)), 0);
    const worst = delta.reduce((largest, value, i) => Math.max(largest, Math.abs(value - other[i]!)), 0);
    expect(worst, layer).toBeLessThanOrEqual(tolerance * most);
  }
}

describe.each(fixtureNames)("%s", (model) => {
  it.each([
    ["lora_a", "lora_a.kohya"],
    ["lora_a", "lora_a.onetrainer"],
    ["lora_b", "lora_b.kohya"],
    ["lora_te", "lora_te.kohya"],
  ])("%s says the same as %s", async (name, other) => {
    expectSame(await read(model, other), await read(model, name));
  });

  it("has the matrices of diffusers' file as they are, and q, k and v of a stacked one apart", async () => {
    const raw = await readAll(adapter(model, "lora_a"));
    for (const name of ["lora_a", "lora_a.kohya", "lora_a.onetrainer"]) {
      const layers = (await read(model, name)).parts.get("transformer")!;
      expect(layers.size).toBe(Object.keys(raw).length / 2);
      for (const [layer, { down, up, rank, scale }] of layers) {
        expect([...down]).toEqual([...raw[`transformer.${layer}.lora_A.weight`]!.data]);
        expect([...up]).toEqual([...raw[`transformer.${layer}.lora_B.weight`]!.data]);
        expect([rank, scale]).toEqual([4, 1]);
      }
    }
    // alpha / r = 2 / 4, in the metadata of one and in tensors of the other.
    for (const name of ["lora_b", "lora_b.kohya"])
      expect(
        new Set([...(await read(model, name)).parts.get("transformer")!.values()].map(({ scale }) => scale)),
      ).toEqual(new Set([0.5]));
  });

  it("merges to what diffusers' fuse_lora gives", async () => {
    const fused = await readAll(fixture(model, "lora_fused.safetensors"));
    const [a, b, te, all] = await Promise.all(
      ["lora_a", "lora_b", "lora_te", "lora_all"].map((name) => read(model, name)),
    );
    const sets = {
      a: [{ lora: a!, scale: 0.7 }],
      ab: [
        { lora: a!, scale: 0.7 },
        { lora: b!, scale: 0.4 },
      ],
      te: [{ lora: te!, scale: 0.7 }],
      all: [{ lora: all!, scale: 0.6 }],
    };
    const cache = await newCache();
    const merged: Record<string, Checkpoint> = {};
    for (const [key, loras] of Object.entries(sets))
      merged[key] = await mergeLoras(checkpoints.get(model)!, loras, cache);
    const parts = { transformer: "transformer", text_encoder: "textEncoder", text_encoder_2: "textEncoder2" } as const;
    for (const [key, expected] of Object.entries(fused)) {
      const [kind, set, part, ...layer] = key.split(".");
      const weights = merged[set!]![parts[part as keyof typeof parts]]!.weights;
      const tensor = weights.find(`${layer.join(".")}.weight`)!;
      const dtype = tensor.dtype as ComputedDType;
      expect(dtype).toBe({ sd3: "F16", medium: "BF16", large: "F32" }[model]);
      const values = await valuesOf(tensor);
      // Half a unit in the last place where the sum is rounded once. diffusers rounds the products in 16 bits, and then the sum.
      const unit = 2 ** -{ F16: 10, BF16: 7, F32: 23 }[dtype];
      // Of the smallest numbers of float16.
      const leastHalf = dtype === "F16" ? 2 ** -25 : 0;
      const most = expected.data.reduce((largest, value) => Math.max(largest, Math.abs(value)), 0);
      const wrong = values.findIndex((value, i) => {
        const other = expected.data[i]!;
        const bound = kind === "stored" ? unit * most : 0.5001 * unit * Math.abs(other) + 1e-7 * most + leastHalf;
        return !(Math.abs(value - other) <= bound);
      });
      expect(wrong, key).toBe(-1);
      // And bit for bit where no sum is near the middle of two numbers.
      if (kind === "stored" || dtype === "F32") continue;
      const rounded = new Float32Array(values.length);
      widen(narrow(expected.data, dtype), dtype, rounded);
      const other = values.reduce((count, value, i) => count + (value === rounded[i] ? 0 : 1), 0);
      expect(other / values.length, key).toBeLessThan(2e-3);
    }
  });
});

/** The layers of a checkpoint's transformer that an adapter may have. */
function layersOf({ transformer: { weights } }: Checkpoint): Record<string, readonly number[]> {
  return Object.fromEntries(
    weights.names.flatMap((name) => {
      const { shape } = weights.find(name)!;
      return name.endsWith(".weight") && shape.length > 1 ? [[name.replace(/\.weight$/, ""), shape]] : [];
    }),
  );
}

/** Adapters of some layers. Within q, k and v alpha / r is the same, since files that have them in one say it once. */
function randomAdapters(layers: Record<string, readonly number[]>, chosen: readonly string[], seed: number): Adapters {
  let state = seed >>> 0;
  const random = () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return state / 2 ** 32 - 0.5;
  };
  const many = (count: number) => Float32Array.from({ length: count }, random);
  return new Map(
    chosen.map((layer): [string, Adapter] => {
      const [out, ...inner] = layers[layer] as [number, ...number[]];
      const rank = 1 + Math.floor((random() + 0.5) * 4);
      const isFused = /\.(to_[qkv]|add_[qkv]_proj)$/.test(layer);
      return [
        layer,
        {
          ...{ down: many(rank * elementCount(inner)), up: many(out * rank), rank },
          alpha: isFused ? rank * 0.25 : 1 + Math.floor((random() + 0.5) * 8),
        },
      ];
    }),
  );
}

const referenceOf = (adapters: Adapters, layers: Record<string, readonly number[]>): Lora => ({
  ...{ file: "", name: "" },
  parts: new Map([
    [
      "transformer",
      new Map(
        [...adapters].map(([layer, { down, up, rank, alpha }]) => {
          const [out, ...inner] = layers[layer] as [number, ...number[]];
          return [layer, { down, up, rank, out, in: elementCount(inner), scale: alpha / rank }];
        }),
      ),
    ],
  ]),
});

describe("any adapter", () => {
  it.each(dialects.map((dialect) => [dialect.title, dialect] as const))(
    "is read from the names of %s",
    async (_, dialect) => {
      const checkpoint = checkpoints.get("medium")!;
      const layers = layersOf(checkpoint);
      const names = Object.keys(layers);
      const blocks = checkpoint.transformer.config.numLayers;
      const kernels = { "pos_embed.proj": layers["pos_embed.proj"]!.slice(1) };
      await fc.assert(
        fc.asyncProperty(fc.subarray(names, { minLength: 1, maxLength: 12 }), fc.integer(), async (chosen, seed) => {
          const adapters = randomAdapters(layers, chosen, seed);
          const { tensors, metadata } = inDialect(adapters, dialect, { blocks, kernels });
          const lora = await readLora(await writeRaw(newFile(), tensors, metadata), checkpoint);
          expectSame(lora, referenceOf(adapters, layers), 1e-6);
        }),
        { numRuns: 12 },
      );
      const all = randomAdapters(layers, names, 7);
      const { tensors, metadata } = inDialect(all, dialect, { blocks, kernels });
      const lora = await readLora(await writeRaw(newFile(), tensors, metadata), checkpoint);
      expect(lora.parts.get("transformer")!.size).toBe(names.length);
      expectSame(lora, referenceOf(all, layers), 1e-6);
    },
  );

  it("has its rows in the order of a checkpoint in one file, which has halves the other way round", async () => {
    const single = await openCheckpoint(fixture("sd3", "single/full.safetensors"), { base: fixture("sd3", "model") });
    const whole = checkpoints.get("sd3")!;
    const cache = await newCache();
    for (const name of ["lora_b", "lora_b.kohya", "lora_all"]) {
      const [own, other] = [await readLora(adapter("sd3", name), single), await read("sd3", name)];
      const merged = await mergeLoras(single, [{ lora: own, scale: 0.7 }], cache);
      const expected = await mergeLoras(whole, [{ lora: other, scale: 0.7 }], cache);
      const layers = [...other.parts.get("transformer")!.keys()];
      let reversed = 0;
      for (const layer of layers) {
        const isReversed = single.transformer.weights.reversedHalves!.has(layer);
        reversed += isReversed ? 1 : 0;
        const values = [...(await valuesOf(merged.transformer.weights.find(`${layer}.weight`)!))];
        const half = values.length / 2;
        const ordered = isReversed ? [...values.slice(half), ...values.slice(0, half)] : values;
        expect(ordered, layer).toEqual([...(await valuesOf(expected.transformer.weights.find(`${layer}.weight`)!))]);
      }
      expect(reversed).toBe(name === "lora_all" ? 2 : 1);
    }
  });

  it("is read from a folder, by diffusers' name, PEFT's with its settings, or the only one", async () => {
    const checkpoint = checkpoints.get("medium")!;
    const expected = await read("medium", "lora_a");
    for (const name of ["pytorch_lora_weights.safetensors", "mine.safetensors"]) {
      const place = path.join(folder, `folder-${name.length}`);
      await mkdir(place);
      await cp(adapter("medium", "lora_a"), path.join(place, name));
      const lora = await readLora(place, checkpoint);
      expectSame(lora, expected);
      expect(lora.name).toBe(name === "mine.safetensors" ? "mine" : path.basename(place));
      if (name === "mine.safetensors") {
        await cp(adapter("medium", "lora_b"), path.join(place, "other.safetensors"));
        await expect(readLora(place, checkpoint)).rejects.toThrow(/several .safetensors files \(mine.*, other/);
      }
    }
    const peft = path.join(folder, "peft");
    await mkdir(peft);
    const raw = await readRaw(adapter("medium", "lora_a"));
    const renamed = Object.fromEntries(
      Object.entries(raw).map(([name, tensor]) => [name.replace("transformer.", "base_model.model."), tensor]),
    );
    await writeRaw(path.join(peft, "adapter_model.safetensors"), renamed);
    const config = { peft_type: "LORA", r: 4, lora_alpha: 8, alpha_pattern: { "ff.net.2": 2 }, rank_pattern: {} };
    await writeFile(path.join(peft, "adapter_config.json"), JSON.stringify(config));
    const layers = (await readLora(peft, checkpoint)).parts.get("transformer")!;
    for (const [layer, { scale }] of layers) expect(scale, layer).toBe(layer.endsWith("ff.net.2") ? 0.5 : 2);
    await writeFile(path.join(peft, "adapter_config.json"), JSON.stringify({ ...config, use_rslora: true }));
    for (const [layer, { scale }] of (await readLora(peft, checkpoint)).parts.get("transformer")!)
      expect(scale, layer).toBe(layer.endsWith("ff.net.2") ? 1 : 4);
  });

  it("may be one of text encoders in older names of diffusers, and of ComfyUI", async () => {
    const checkpoint = checkpoints.get("large")!;
    const raw = await readRaw(adapter("large", "lora_te"));
    const expected = await read("large", "lora_te");
    const rename = (change: (name: string) => string) =>
      Object.fromEntries(Object.entries(raw).map(([name, tensor]) => [change(name), tensor]));
    const renamings: ((name: string) => string)[] = [
      (name) => name.replace(/lora_A/, "lora_linear_layer.down").replace(/lora_B/, "lora_linear_layer.up"),
      (name) =>
        name
          .replace(/\.([qkv])_proj\.lora_A/, ".to_$1_lora.down")
          .replace(/\.([qkv])_proj\.lora_B/, ".to_$1_lora.up")
          .replace(/\.out_proj\.lora_A/, ".to_out_lora.down")
          .replace(/\.out_proj\.lora_B/, ".to_out_lora.up"),
      (name) => name.replace("text_model.", ""),
      (name) =>
        name.replace(/^text_encoder(_2)?\./, (_, second) => `text_encoders.clip_${second ? "g" : "l"}.transformer.`),
    ];
    for (const change of renamings)
      expectSame(await readLora(await writeRaw(newFile(), rename(change)), checkpoint), expected);
  });

  it("may be one of T5, by sd-scripts' names", async () => {
    const checkpoint = checkpoints.get("large")!;
    const { shape } = checkpoint.textEncoder3!.weights.find("encoder.block.1.layer.1.DenseReluDense.wi_0.weight")!;
    const [out, width] = shape as [number, number];
    const file = await writeRaw(newFile(), {
      "lora_te3_encoder_block_1_layer_1_DenseReluDense_wi_0.lora_down.weight": f32(
        [1, width],
        new Array(width).fill(1),
      ),
      "lora_te3_encoder_block_1_layer_1_DenseReluDense_wi_0.lora_up.weight": f32([out, 1], new Array(out).fill(2)),
      "lora_te3_encoder_block_1_layer_1_DenseReluDense_wi_0.alpha": {
        ...{ dtype: "I64", shape: [] },
        bytes: new Uint8Array(BigInt64Array.of(3n).buffer),
      },
    });
    const layers = (await readLora(file, checkpoint)).parts.get("textEncoder3")!;
    expect([...layers.keys()]).toEqual(["encoder.block.1.layer.1.DenseReluDense.wi_0"]);
    expect([...layers.values()][0]!.scale).toBe(3);
    await expect(
      readLora(file, await openCheckpoint(fixture("large", "model"), { textEncoder3: false })),
    ).rejects.toThrow(/changes the third text encoder \(T5\) \("lora_te3_.*but the model is without it/);
  });
});

describe("a merged checkpoint", () => {
  const merged = async (model: string, name: string, scale: number, cache: string) =>
    mergeLoras(checkpoints.get(model)!, [{ lora: await read(model, name), scale }], cache);

  it("is the same checkpoint where all scales are 0", async () => {
    const cache = await newCache();
    expect(await merged("sd3", "lora_a", 0, cache)).toBe(checkpoints.get("sd3"));
    expect(await listCachedWeights(cache)).toEqual([]);
  });

  it("has what no LoRA changes in the checkpoint's own files, and the rest in one that is written once", async () => {
    const cache = await newCache();
    const base = checkpoints.get("medium")!;
    const first = await merged("medium", "lora_a", 0.7, cache);
    const [written] = await listCachedWeights(cache);
    const layers = (await read("medium", "lora_a")).parts.get("transformer")!;
    for (const name of base.transformer.weights.names) {
      const [own, now] = [base.transformer.weights.find(name)!, first.transformer.weights.find(name)!];
      if (layers.has(name.replace(/\.weight$/, ""))) expect(now.file).toBe(written!.file);
      else expect(now).toEqual(own);
    }
    expect(first.transformer.weights.files).toEqual([
      ...base.transformer.weights.files,
      expect.objectContaining({ file: written!.file, size: written!.bytes }),
    ]);
    expect(first.transformer.weights.bytesByDType).toEqual(base.transformer.weights.bytesByDType);
    expect(first.textEncoder).toBe(base.textEncoder);
    expect([first.schedulesFile, first.loras]).toEqual([
      null,
      [{ name: "lora_a", file: adapter("medium", "lora_a"), scale: 0.7 }],
    ]);
    // Another scale or LoRA is another file; the same LoRA in other names is the same one.
    const old = new Date(1e12);
    await utimes(written!.file, old, old);
    await merged("medium", "lora_a", 0.7, cache);
    await merged("medium", "lora_a.onetrainer", 0.7, cache);
    expect((await stat(written!.file)).mtimeMs).toBe(1e12);
    expect(await listCachedWeights(cache)).toHaveLength(1);
    await merged("medium", "lora_a", 0.8, cache);
    await merged("medium", "lora_b", 0.7, cache);
    expect(await listCachedWeights(cache)).toHaveLength(3);
    expect(await clearCachedWeights(cache)).toMatchObject({ files: 3 });
  });

  it("is made anew for other weights of the same size, and where its file was cut off", async () => {
    const cache = await newCache();
    const copy = path.join(folder, "copy");
    await cp(fixture("sd3", "model"), copy, { recursive: true });
    const open = async () => {
      const checkpoint = await openCheckpoint(copy);
      return mergeLoras(checkpoint, [{ lora: await readLora(adapter("sd3", "lora_a"), checkpoint), scale: 1 }], cache);
    };
    await open();
    const weights = path.join(copy, "transformer/diffusion_pytorch_model.safetensors");
    await utimes(weights, new Date(1e12), new Date(1e12));
    const { transformer } = await open();
    expect(await listCachedWeights(cache)).toHaveLength(2);
    const { file, size } = transformer.weights.files.at(-1)!;
    await writeFile(file, (await readFile(file)).subarray(0, size - 2));
    await open();
    expect((await stat(file)).size).toBe(size);
    // Copies keep the time, and layers of images have one time for all files.
    const other = await readFile(weights);
    const { offset } = checkpoints.get("sd3")!.transformer.weights.find("transformer_blocks.0.attn.to_q.weight")!;
    other.fill(0, offset, offset + 64);
    await writeFile(weights, other);
    await utimes(weights, new Date(1e12), new Date(1e12));
    const changed = (await open()).transformer.weights;
    expect(await listCachedWeights(cache)).toHaveLength(3);
    expect(changed.files.at(-1)!.file).not.toBe(file);
  });

  it("stays as the first of several processes wrote it, where it is whole", async () => {
    const cache = await newCache();
    const whole = await readFile(adapter("sd3", "lora_a"));
    const file = path.join(cache, "weights", `${"a".repeat(32)}.safetensors`);
    const write = (before?: () => Promise<unknown>) =>
      cachedWeights(
        cache,
        {
          ...{ digest: "a".repeat(64), bytes: whole.length, title: "the weights", remedy: "" },
          async *content() {
            await before?.();
            yield whole;
          },
        },
        {},
      );
    let first: CachedWeights | undefined;
    const old = new Date(1e12);
    const second = await write(async () => {
      first = await write();
      await utimes(file, old, old);
    });
    expect(second.version).toEqual({ ...first!.version, mtimeMs: 1e12 });
    expect(await readdir(path.dirname(file))).toEqual([path.basename(file)]);
    // What is not whole is replaced.
    await rm(file);
    await write(() => writeFile(file, whole.subarray(0, 100)));
    expect(await readFile(file)).toEqual(whole);
    expect(await readdir(path.dirname(file))).toEqual([path.basename(file)]);
  });

  it("has weights of 8 bits in 16, without their scales", async () => {
    const name = "encoder.block.0.layer.0.SelfAttention.q";
    const model = await modelWith(path.join(folder, "eight"), "medium", "text_encoder_3/model.safetensors", scaledT5);
    const checkpoint = await openCheckpoint(model);
    const base = checkpoint.textEncoder3!.weights;
    const [rows, columns] = base.find(`${name}.weight`)!.shape as [number, number];
    const file = await writeRaw(newFile(), {
      [`text_encoder_3.${name}.lora_A.weight`]: f32([1, columns], new Array(columns).fill(0.25)),
      [`text_encoder_3.${name}.lora_B.weight`]: f32([rows, 1], new Array(rows).fill(0.5)),
    });
    const before = await valuesOf(base.find(`${name}.weight`)!);
    const { textEncoder3 } = await mergeLoras(
      checkpoint,
      [{ lora: await readLora(file, checkpoint), scale: 1 }],
      await newCache(),
    );
    const weights = textEncoder3!.weights;
    const now = weights.find(`${name}.weight`)!;
    expect([now.dtype, now.scale]).toEqual(["BF16", undefined]);
    const expected = new Float32Array(before.length);
    widen(
      narrow(
        before.map((value) => value + 0.125),
        "BF16",
      ),
      "BF16",
      expected,
    );
    expect([...(await valuesOf(now))]).toEqual([...expected]);
    expect(weights.names).not.toContain(`${name}.scale_weight`);
    const elements = rows * columns;
    const { F8_E4M3 = 0, BF16 = 0, F32 = 0 } = base.bytesByDType;
    expect(weights.bytesByDType).toEqual({
      ...{ ...base.bytesByDType, F8_E4M3: F8_E4M3 - elements, BF16: BF16 + 2 * elements, F32: F32 - 4 },
    });
  });

  it("is not left half written by an abort, and a cache that cannot be written is an OutputError", async () => {
    const cache = await newCache();
    const reason = new Error("enough");
    const loras = [{ lora: await read("large", "lora_a"), scale: 1 }];
    const controller = new AbortController();
    const merging = mergeLoras(checkpoints.get("large")!, loras, cache, {
      signal: controller.signal,
      logger: { info: () => controller.abort(reason) },
    });
    await expect(merging).rejects.toBe(reason);
    expect(await readdir(path.join(cache, "weights"))).toEqual([]);
    const refused = await mergeLoras(checkpoints.get("large")!, loras, "/proc/none").catch((error) => error);
    expect(refused).toBeInstanceOf(OutputError);
    expect(refused.message).toMatch(
      /^Cannot write the transformer's weights with the LoRAs lora_a \(1\) \(\d+ bytes\) to/,
    );
    await expect(
      readLora(adapter("sd3", "lora_a"), checkpoints.get("sd3")!, { signal: AbortSignal.abort(reason) }),
    ).rejects.toBe(reason);
  });

  it("is refused where a sum is beyond the type of the weight", async () => {
    const lora = await read("sd3", "lora_a");
    const cache = await newCache();
    await expect(mergeLoras(checkpoints.get("sd3")!, [{ lora, scale: 1e7 }], cache)).rejects.toThrow(
      /adapters\/lora_a.safetensors the weight "transformer_blocks\.\d.* has the value .*, which F16 cannot hold/,
    );
    expect(await readdir(path.join(cache, "weights"))).toEqual([]);
  });
});

describe("products of low rank", () => {
  it("are those of plain loops, for any rank, width and number of rows, of several at once", () => {
    const size = fc.integer({ min: 1, max: 70 });
    fc.assert(
      fc.property(
        size,
        size,
        fc.array(fc.integer({ min: 1, max: 9 }), { minLength: 1, maxLength: 3 }),
        fc.integer(),
        (rows, columns, ranks, seed) => {
          let state = seed >>> 0;
          const random = () => {
            state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
            return state / 2 ** 32 - 0.5;
          };
          const many = (count: number) => Float32Array.from({ length: count }, random);
          const terms = ranks.map((rank) => ({
            down: many(rank * columns),
            up: many(rows * rank),
            rank,
            factor: random(),
          }));
          const weight = many(rows * columns);
          const expected = Float64Array.from(weight);
          for (const { down, up, rank, factor } of terms)
            for (let at = 0; at < expected.length; at++)
              for (let k = 0; k < rank; k++)
                expected[at]! +=
                  factor * up[Math.floor(at / columns) * rank + k]! * down[k * columns + (at % columns)]!;
          // The later rows apart.
          const add = sums.of(terms, columns);
          const first = Math.floor(rows / 2);
          for (const _ of add(weight.subarray(0, first * columns), 0));
          for (const _ of add(weight.subarray(first * columns), first));
          for (const [at, value] of weight.entries()) expect(Math.abs(value - expected[at]!)).toBeLessThan(2e-6);
        },
      ),
      { numRuns: 60 },
    );
  });
  const sums = new LowRankSum();
});

describe("is refused", () => {
  const q = "transformer.transformer_blocks.0.attn.to_q";
  /** Zeros, or given values. */
  const t = (shape: readonly number[], value = 0): RawTensor => f32(shape, new Array(elementCount(shape)).fill(value));
  const pair = (layer: string, out: number, width: number, rank = 4): Record<string, RawTensor> => ({
    [`${layer}.lora_A.weight`]: t([rank, width], 1),
    [`${layer}.lora_B.weight`]: t([out, rank], 1),
  });
  const kohya = (layer: string, out: number, width: number, rank = 4): Record<string, RawTensor> => ({
    [`${layer}.lora_down.weight`]: t([rank, width], 1),
    [`${layer}.lora_up.weight`]: t([out, rank], 1),
  });
  const widthOf = () => {
    const { numAttentionHeads, attentionHeadDim } = checkpoints.get("sd3")!.transformer.config;
    return numAttentionHeads * attentionHeadDim;
  };
  const cases: Record<
    string,
    [tensors: (width: number) => Record<string, RawTensor>, message: RegExp, metadata?: Record<string, string>]
  > = {
    "a file without tensors": [() => ({}), /is no LoRA: it has no tensors/],
    "a checkpoint": [
      () => ({ "transformer_blocks.0.attn.to_q.weight": t([2, 2]) }),
      /is a checkpoint or a part of one, and no LoRA: pass it as the model/,
    ],
    "a checkpoint of SDXL": [
      () => ({ "model.diffusion_model.input_blocks.0.0.weight": t([2, 2]) }),
      /is a checkpoint or a part of one, and no LoRA: pass it as the model/,
    ],
    "a VAE": [
      () => ({ "decoder.mid_block.resnets.0.conv1.weight": t([2, 2]) }),
      /is a checkpoint or a part of one, and no LoRA/,
    ],
    "a transformer of FLUX": [
      () => ({ "double_blocks.0.img_attn.qkv.weight": t([2, 2]) }),
      /is a checkpoint or a part of one, and no LoRA/,
    ],
    "a ControlNet": [
      () => ({ "controlnet_blocks.0.weight": t([2, 2]), "transformer_blocks.0.attn.to_q.weight": t([2, 2]) }),
      /is a ControlNet, and no LoRA/,
    ],
    "something else": [() => ({ hello: t([2]) }), /is no LoRA: it has tensors such as "hello"/],
    DoRA: [
      (w) => ({ ...pair(q, w, w), [`${q}.dora_scale`]: t([w, 1]) }),
      /is DoRA, .*"transformer\..*dora_scale".*Merge it/,
    ],
    "DoRA of PEFT": [(w) => ({ ...pair(q, w, w), [`${q}.lora_magnitude_vector.weight`]: t([w]) }), /is DoRA/],
    "DoRA by the settings": [
      (w) => pair(q, w, w),
      /says that it is DoRA/,
      { lora_adapter_metadata: '{"transformer.use_dora":true}' },
    ],
    LoKr: [() => ({ "lycoris_transformer_blocks_0_attn_to_q.lokr_w1": t([2, 2]) }), /is LoKr/],
    LoHa: [() => ({ "lora_unet_joint_blocks_0_x_block_attn_qkv.hada_w1_a": t([2, 2]) }), /is LoHa/],
    GLoRA: [() => ({ "lora_unet_joint_blocks_0_x_block_attn_qkv.a1.weight": t([2, 2]) }), /is GLoRA/],
    OFT: [() => ({ "lora_unet_joint_blocks_0_x_block_attn_qkv.oft_blocks": t([2, 2]) }), /is OFT/],
    IA3: [() => ({ "lora_unet_joint_blocks_0_x_block_attn_qkv.on_input": t([1]) }), /is IA3/],
    "LoKr with an adapter's name": [() => ({ [`${q}.lokr_w1.default`]: t([2, 2]) }), /is LoKr/],
    ...Object.fromEntries(
      ["bone_block", "hra_u", "fourierft_spectrum", "randlora_lambda.default", "hira_A.weight", "lora_E"].map((end) => [
        `another kind of PEFT (${end})`,
        [() => ({ [`base_model.model.${q}.${end}`]: t([2, 2]) }), /is an adapter of PEFT of another kind than LoRA/],
      ]),
    ),
    "Tucker's form": [
      (w) => ({
        ...kohya("lora_unet_x_embedder_proj", w, 4),
        "lora_unet_x_embedder_proj.lora_mid.weight": t([4, 4, 2, 2]),
      }),
      /Tucker form \(lora_mid\)/,
    ],
    "a whole difference": [
      () => ({ "diffusion_model.joint_blocks.0.x_block.attn.qkv.diff": t([2, 2]) }),
      /whole differences of weights/,
    ],
    "a difference of a bias": [
      () => ({ "diffusion_model.joint_blocks.0.x_block.attn.qkv.diff_b": t([2]) }),
      /whole differences/,
    ],
    "a bias of PEFT": [(w) => ({ ...pair(q, w, w), [`${q}.lora_B.bias`]: t([w]) }), /a LoRA with biases of its own/],
    "a LoRA of SDXL": [
      () => kohya("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k", 640, 2048),
      /is a LoRA of SDXL, and cannot change/,
    ],
    "a LoRA of SDXL in diffusers' names": [
      () => ({
        ...pair("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", 640, 640),
        ...pair("text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj", 1280, 1280),
      }),
      /is a LoRA of SDXL/,
    ],
    "a LoRA of Stable Diffusion 1": [
      () => kohya("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k", 320, 768),
      /is a LoRA of Stable Diffusion 1,/,
    ],
    "a LoRA of Stable Diffusion 2": [
      () => kohya("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k", 320, 1024),
      /is a LoRA of Stable Diffusion 2,/,
    ],
    "a LoRA of FLUX": [
      () => ({ ...pair(q, 3072, 3072), ...pair("transformer.single_transformer_blocks.0.attn.to_q", 3072, 3072) }),
      /is a LoRA of FLUX/,
    ],
    "a LoRA of FLUX by kohya": [() => kohya("lora_unet_double_blocks_0_img_attn_qkv", 9216, 3072), /is a LoRA of FLUX/],
    "a LoRA of FLUX by XLabs": [
      () => ({
        "double_blocks.0.processor.qkv_lora1.down.weight": t([4, 3072], 1),
        "double_blocks.0.processor.qkv_lora1.up.weight": t([9216, 4], 1),
      }),
      /is a LoRA of FLUX/,
    ],
    "a LoRA of Wan in diffusers' names": [() => pair("transformer.blocks.0.attn1.to_q", 8, 8), /is a LoRA of Wan/],
    "a LoRA of a width that no model of Stable Diffusion 3 has": [
      () => pair(q, 3072, 3072),
      /is a LoRA of another model: of a transformer that is 3072 wide, but the model's is \d+ wide/,
    ],
    "a LoRA of Wan": [() => pair("diffusion_model.blocks.0.self_attn.q", 8, 8), /is a LoRA of Wan/],
    "a LoRA of SD3.5 large": [
      () => pair(q, 2432, 2432),
      /is a LoRA of another model of Stable Diffusion 3: of a transformer that is 2432 wide, as that of Stable Diffusion 3.5 large, but the model's is \d+ wide with \d+ blocks/,
    ],
    "a LoRA of SD3.5 large by kohya": [
      () => kohya("lora_unet_joint_blocks_37_x_block_attn_qkv", 3 * 2432, 2432),
      /of a transformer with at least 38 blocks, as that of Stable Diffusion 3.5 large/,
    ],
    "a LoRA of SD3.5 medium, whose blocks have a second attention": [
      (w) => pair("transformer.transformer_blocks.0.attn2.to_q", w, w),
      /with a second attention \(attn2\) in block 0, as Stable Diffusion 3.5 medium has/,
    ],
    "tensors that no layer has": [
      (w) => ({ ...pair(q, w, w), ...pair("transformer.transformer_blocks.0.attn.to_quiz", w, w), other: t([3]) }),
      /has no layer for the tensors "transformer\.transformer_blocks\.0\.attn\.to_quiz\.lora_A\.weight" \[4, \d+\], "other" \[3\]/,
    ],
    "a norm's": [
      (w) => pair("transformer.transformer_blocks.0.norm1", w, w),
      /has no layer for the tensor "transformer\.transformer_blocks\.0\.norm1\./,
    ],
    "a table of embeddings'": [
      () => pair("text_encoder.text_model.embeddings.token_embedding", 4, 4),
      /has no layer for the tensor "text_encoder/,
    ],
    "the first matrix alone": [
      (w) => ({ [`${q}.lora_A.weight`]: t([4, w]) }),
      /"transformer.*lora_A.weight" is there without its second matrix \(lora_B or lora_up\)/,
    ],
    "the second matrix alone": [
      (w) => ({ [`${q}.lora_B.weight`]: t([w, 4]) }),
      /lora_B.weight" is there without its first matrix/,
    ],
    "an alpha alone": [
      (w) => ({ ...pair(q, w, w), "lora_transformer_transformer_blocks_0_attn_to_k.alpha": t([], 4) }),
      /to_k.alpha" is there without its matrices/,
    ],
    "ranks that differ": [
      (w) => ({ [`${q}.lora_A.weight`]: t([4, w], 1), [`${q}.lora_B.weight`]: t([w, 8], 1) }),
      /ranks of the tensors "transformer.*lora_A.weight" \[4, \d+\] and .*lora_B.weight" \[\d+, 8\] differ: 4 and 8/,
    ],
    "rows that do not fit": [
      (w) => pair(q, w + 2, w),
      /lora_B.weight" \[\d+, 4\] do not fit transformer_blocks\.0\.attn\.to_q of the model's transformer: expected \[rank, \d+\] and \[\d+, rank\]/,
    ],
    "one layer of another width among others that fit": [
      (w) => ({ ...pair(q, w, w), ...pair("transformer.transformer_blocks.0.attn.to_k", w, w + 2) }),
      /to_k.lora_A.weight" \[4, \d+\] and .*do not fit transformer_blocks\.0\.attn\.to_k of the model's transformer/,
    ],
    "rank 0": [(w) => ({ [`${q}.lora_A.weight`]: t([0, w]), [`${q}.lora_B.weight`]: t([w, 0]) }), /do not fit/],
    NaN: [
      (w) => ({ ...pair(q, w, w), [`${q}.lora_A.weight`]: t([4, w], Number.NaN) }),
      /lora_A.weight" has the value NaN at index 0/,
    ],
    "an infinity": [
      (w) => ({ ...pair(q, w, w), [`${q}.lora_B.weight`]: t([w, 4], -Infinity) }),
      /lora_B.weight" has the value -Infinity/,
    ],
    "an alpha that is no number": [
      (w) => ({ ...pair(q, w, w), [`${q}.alpha`]: t([], Number.NaN) }),
      /to_q.alpha" is NaN; expected one number/,
    ],
    "an alpha beyond float32 for the matrices": [
      (w) => pair(q, w, w),
      /alpha over the rank of "transformer.*lora_A.weight" is 2.5e\+299, and times the values of "transformer.*lora_B.weight" beyond float32/,
      { lora_adapter_metadata: '{"transformer.r":4,"transformer.lora_alpha":1e300}' },
    ],
    "matrices of two adapters": [
      (w) => ({ [`${q}.lora_A.one.weight`]: t([4, w], 1), [`${q}.lora_B.two.weight`]: t([w, 4], 1) }),
      /lora_A.one.weight" and "transformer.*lora_B.two.weight" are of two adapters/,
    ],
    "an alpha of several": [
      (w) => ({ ...pair(q, w, w), [`${q}.alpha`]: t([2], 1) }),
      /to_q.alpha" has the shape \[2\]; expected one number/,
    ],
    "8-bit values without a scale": [
      (w) => ({
        ...pair(q, w, w),
        [`${q}.lora_A.weight`]: { dtype: "I8", shape: [4, w], bytes: new Uint8Array(4 * w) },
      }),
      /dtype I8, without a scale/,
    ],
    "one matrix twice": [
      (w) => ({ ...pair(q, w, w), [`${q}.lora_A.other.weight`]: t([4, w], 1) }),
      /are the same matrix of one layer/,
    ],
    "one layer under two names": [
      (w) => ({ ...pair(q, w, w), ...kohya("lora_transformer_transformer_blocks_0_attn_to_q", w, w) }),
      /are for one layer of the transformer, transformer_blocks\.0\.attn\.to_q, under several names/,
    ],
    "metadata that are no JSON": [
      (w) => pair(q, w, w),
      /lora_adapter_metadata is not a JSON object/,
      { lora_adapter_metadata: "{" },
    ],
    "metadata of another rank": [
      (w) => pair(q, w, w),
      /says rank 8 for transformer_blocks\.0\.attn\.to_q, but the tensor "transformer.*lora_A.weight" has the shape \[4, \d+\]/,
      { lora_adapter_metadata: '{"transformer.r":8}' },
    ],
    "metadata with an alpha that is no number": [
      (w) => pair(q, w, w),
      /has "4" as lora_alpha; expected a number/,
      { lora_adapter_metadata: '{"transformer.r":4,"transformer.lora_alpha":"4"}' },
    ],
    "a pattern that could take forever": [
      (w) => pair(q, w, w),
      /has the pattern "\(a\+\)\+\$" in alpha_pattern, which is not understood/,
      { lora_adapter_metadata: '{"transformer.alpha_pattern":{"(a+)+$":4}}' },
    ],
  };
  it.each(Object.entries(cases))("%s", async (_, [tensors, message, metadata]) => {
    const file = await writeRaw(newFile(), tensors(widthOf()), metadata);
    const error = await readLora(file, checkpoints.get("sd3")!).catch((reason) => reason);
    expect(error).toBeInstanceOf(CheckpointError);
    expect(error.message).toMatch(message);
    expect(error.message).toContain(file);
  });

  it("a file that is not there, is cut off, or is a pickle", async () => {
    const checkpoint = checkpoints.get("sd3")!;
    await expect(readLora(path.join(folder, "none.safetensors"), checkpoint)).rejects.toThrow(
      /none.safetensors does not exist/,
    );
    const cut = newFile();
    const whole = await readFile(adapter("sd3", "lora_a"));
    await writeFile(cut, whole.subarray(0, whole.length - 8));
    await expect(readLora(cut, checkpoint)).rejects.toThrow(CheckpointError);
    for (const place of ["owner/name", "https://example.org/style.safetensors"])
      await expect(readLora(place, checkpoint)).rejects.toThrow(
        /is no file here.*LoRAs are not downloaded: download the .safetensors file, and pass its path/,
      );
    await expect(readLora(fixture("sd3", "model"), checkpoint)).rejects.toThrow(/model is a model, and no LoRA/);
    await expect(readLora(path.dirname(checkpoint.folder), checkpoint)).rejects.toThrow(/several .safetensors files/);
    await expect(readLora(await newCache(), checkpoint)).rejects.toThrow(/has no .safetensors file. Pass/);
    const nested = path.join(folder, "nested");
    await mkdir(path.join(nested, "pytorch_lora_weights.safetensors"), { recursive: true });
    await expect(readLora(nested, checkpoint)).rejects.toThrow(/nested has no .safetensors file. Pass/);
    const pickle = path.join(folder, "lora.ckpt");
    await writeFile(pickle, Buffer.from("\x80\x02}q\x00X", "latin1"));
    await expect(readLora(pickle, checkpoint)).rejects.toThrow(/pickle of Python/);
  });

  it.skipIf(process.platform === "win32")("a pipe, which nobody may ever write to", async () => {
    const pipe = newFile();
    execFileSync("mkfifo", [pipe]);
    await expect(readLora(pipe, checkpoints.get("sd3")!)).rejects.toThrow(
      /is not a file; expected a .safetensors file/,
    );
  });

  it("a file of very many layers", async () => {
    const names = Array.from({ length: 150_000 }, (_, i) => `transformer.transformer_blocks.0.attn.to_${i}`);
    const tensors = Object.fromEntries(names.flatMap((name) => Object.entries(pair(name, 1, 1, 1))));
    await expect(readLora(await writeRaw(newFile(), tensors), checkpoints.get("sd3")!)).rejects.toThrow(
      /has no layer for the tensors .* and 149997 more/,
    );
  });

  it("a zero matrix is not: it changes nothing", async () => {
    const w = widthOf();
    const file = await writeRaw(newFile(), { ...pair(q, w, w), [`${q}.lora_B.weight`]: t([w, 4]) });
    const lora = await readLora(file, checkpoints.get("sd3")!);
    expect(await mergeLoras(checkpoints.get("sd3")!, [{ lora, scale: 1 }], await newCache())).toMatchObject({
      transformer: { weights: { files: checkpoints.get("sd3")!.transformer.weights.files } },
    });
  });
});
