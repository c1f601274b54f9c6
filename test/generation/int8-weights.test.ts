// Models whose linear layers are multiplied in 8 bits, through the public API of the built package: how far they are from the same in
// float, that pictures depend on nothing else, what the cache has, and what is refused.
import { mkdtemp, rm, stat, truncate, utimes } from "node:fs/promises";
import { tmpdir } from "node:os";
import path from "node:path";
import { FlowTurbo, type GenerateOptions, type LoadOptions, OptionError, OutputError } from "flowturbo";
import { afterAll, afterEach, beforeAll, describe, expect, it } from "vitest";
import { clearCachedWeights, listCachedWeights } from "../../lib/checkpoint/index.js";
import { float32 } from "../../lib/common/tensor.js";
import { fixture, fixtureNames, relativeError } from "../support/fixtures.js";
import { f32, modelWith, scaledT5, writeRaw } from "../support/quantised.js";

const prompt = "a red circle above a small blue square";
const request = { prompt, steps: 3, width: 64, height: 64, seed: 1, maxSequenceLength: 32 } as const;
const medium = fixture("medium/model");
const large = fixture("large/model");
const fileOf = (name: string) => fixture("medium/adapters", `${name}.safetensors`);

let folder: string;
let cache: string;
const open: FlowTurbo[] = [];
beforeAll(async () => {
  folder = await mkdtemp(path.join(tmpdir(), "flowturbo-int8-"));
  cache = path.join(folder, "cache");
});
afterEach(async () => {
  for (const model of open.splice(0)) await model.dispose();
});
afterAll(() => rm(folder, { recursive: true, force: true }));

async function load(model: string, options: LoadOptions = {}): Promise<FlowTurbo> {
  const loaded = await FlowTurbo.load(model, { runtime: "onnxruntime", measureCosts: false, cache, ...options });
  open.push(loaded);
  return loaded;
}

/** The same model in float and in int8. */
const both = (model: string, options: LoadOptions = {}) =>
  Promise.all([load(model, options), load(model, { ...options, weights: "int8" })]);

async function latentsOf(model: FlowTurbo, options: Partial<GenerateOptions> = {}) {
  return (await model.generate({ ...request, ...options } as GenerateOptions)).latents!;
}

/** Of the result of int8, of float's. Not 0: something was rounded. */
async function errorBetween([float, int8]: readonly FlowTurbo[], options: Partial<GenerateOptions> = {}) {
  return relativeErrorOf(await latentsOf(int8!, options), await latentsOf(float!, options));
}

/** Root mean square of the difference, as a part of the expected one's. */
function relativeErrorOf(actual: { readonly data: Float32Array }, expected: { readonly data: Float32Array }): number {
  const square = (values: Float32Array) => values.reduce((sum, value) => sum + value * value, 0);
  return Math.sqrt(square(actual.data.map((value, i) => value - expected.data[i]!)) / square(expected.data));
}

/** Nets of random weights amplify what is rounded; each product alone is within a hundredth. */
const near = 0.06;
const expectNear = (error: number) => {
  expect(error).toBeGreaterThan(1e-4);
  expect(error).toBeLessThan(near);
};

describe.each(fixtureNames)("%s", (name) => {
  it("has embeddings and pictures near to those in float, with each kind of guidance and the refiner", async () => {
    const models = await both(fixture(name, "model"));
    const [float, int8] = await Promise.all(models.map((model) => model.encode({ prompt })));
    expectNear(relativeErrorOf(int8!.promptEmbeds, float!.promptEmbeds));
    expectNear(relativeErrorOf(int8!.pooledPromptEmbeds, float!.pooledPromptEmbeds));
    const kinds: Partial<GenerateOptions>[] = [
      { steps: 1, sampler: "euler" },
      { guidanceScale: 1 },
      { guidanceMode: "cfg_zero" },
      { skipLayers: { layers: [0], scale: 2, start: 0, stop: 1 } },
      { steps: undefined, blocks: "E2R2" },
    ];
    for (const kind of kinds) expectNear(await errorBetween(models, kind));
  });
});

describe("a picture", () => {
  it("has the same bits alone, beside others, in any batch, and after another load, fresh or cached", async () => {
    const own = path.join(folder, "fresh");
    const first = await load(medium, { weights: "int8", cache: own });
    const beside = await first.generate({ ...request, count: 4 });
    const all = beside.latents!.data;
    const size = all.length / 4;
    const models = [first, await load(medium, { weights: "int8", cache: own })];
    await clearCachedWeights(own);
    models.push(await load(medium, { weights: "int8", cache: own }));
    for (const model of models)
      for (const [index, seed] of beside.seeds.entries()) {
        const { data } = await latentsOf(model, { seed });
        expect(data).toEqual(all.slice(index * size, (index + 1) * size));
      }
    // Requests of other prompts and kinds at the same time.
    const [alone] = await Promise.all([
      latentsOf(first),
      latentsOf(first, { prompt: "two green triangles", seed: 9 }),
      latentsOf(first, { guidanceScale: 1, seed: 5 }),
    ]);
    expect(alone.data).toEqual(all.slice(0, size));
  });
});

describe("the cache", () => {
  it("has a file for each network, which is made once, and again where it is cut off", async () => {
    const own = path.join(folder, "files");
    const notes: string[] = [];
    const options = { weights: "int8", cache: own, logger: { info: (text: string) => void notes.push(text) } } as const;
    const { data } = await latentsOf(await load(large, options));
    const files = await listCachedWeights(own);
    // Transformer, refiner, two CLIPs, T5.
    expect(files).toHaveLength(5);
    expect(
      notes.filter((text) => /^The (transformer|refiner|.+\))'s weights in int8 are written, once/.test(text)),
    ).toHaveLength(5);
    for (const { file } of files) await utimes(file, new Date(1e12), new Date(1e12));
    await truncate(files[0]!.file, files[0]!.bytes - 1);
    expect((await latentsOf(await load(large, options))).data).toEqual(data);
    for (const [index, { file, bytes }] of files.entries()) {
      const { size, mtimeMs } = await stat(file);
      expect([size, mtimeMs === 1e12]).toEqual([bytes, index > 0]);
    }
  });

  it("that cannot be written is an OutputError with the remedy", async () => {
    const loading = FlowTurbo.load(medium, { weights: "int8", runtime: "onnxruntime", cache: "/proc/none" });
    await expect(loading).rejects.toThrow(OutputError);
    await expect(loading).rejects.toThrow(/weights in int8.*Name another folder \(cache\)/);
  });

  it("is not asked where an abort came first", async () => {
    const own = path.join(folder, "aborted");
    const reason = new Error("enough");
    const controller = new AbortController();
    const logger = { info: () => controller.abort(reason) };
    const options = { weights: "int8", runtime: "onnxruntime", cache: own, logger, signal: controller.signal } as const;
    await expect(FlowTurbo.load(medium, options)).rejects.toBe(reason);
    expect(await listCachedWeights(own)).toEqual([]);
  });
});

describe("other forms of a checkpoint", () => {
  it("a file", async () => {
    const models = await both(fixture("medium/single/full.safetensors"), { base: medium });
    expectNear(await errorBetween(models));
    // The names are the network's, whatever the file calls them.
    const folderOf = await load(medium, { weights: "int8" });
    expect(relativeErrorOf(await latentsOf(models[1]!), await latentsOf(folderOf))).toBeLessThan(near);
  });

  it("scaled float8", async () => {
    const model = await modelWith(path.join(folder, "scaled"), "medium", "text_encoder_3/model.safetensors", scaledT5);
    expectNear(await errorBetween(await both(model)));
  });

  it("merged LoRAs, which are in the products", async () => {
    const loras = [{ file: fileOf("lora_all"), scale: 2 }];
    const models = await both(medium, { loras });
    expectNear(await errorBetween(models));
    const without = await load(medium, { weights: "int8" });
    expect(relativeErrorOf(await latentsOf(models[1]!), await latentsOf(without))).toBeGreaterThan(2 * near);
  });

  it("dynamic LoRAs, beside the products", async () => {
    const loras = [{ file: fileOf("lora_a"), name: "a", dynamic: true }];
    const models = await both(medium, { loras });
    const named = { loras: [{ name: "a", scale: 2 }] };
    expectNear(await errorBetween(models, named));
    expect(relativeErrorOf(await latentsOf(models[1]!, named), await latentsOf(models[1]!))).toBeGreaterThan(2 * near);
  });

  it("dynamic LoRAs that do not fit are refused before anything is examined", async () => {
    const [rank, width] = [300, 64];
    const layer = "transformer.transformer_blocks.0.attn.to_q";
    const file = await writeRaw(path.join(folder, "large.safetensors"), {
      [`${layer}.lora_A.weight`]: f32([rank, width], new Array(rank * width).fill(0.01)),
      [`${layer}.lora_B.weight`]: f32([width, rank], new Array(rank * width).fill(0.01)),
    });
    const notes: string[] = [];
    const logger = { info: (text: string) => void notes.push(text) };
    const own = path.join(folder, "refused");
    const loading = load(medium, { weights: "int8", cache: own, loras: [{ file, dynamic: true }], logger });
    await expect(loading).rejects.toThrow(/has rank 300 .*at most/);
    expect(notes).toEqual([]);
  });

  it("ControlNets of load in int8, and those of requests as they are stored", async () => {
    const net = fixture("medium/controlnet");
    const image = fixture("medium/control.png");
    const own = path.join(folder, "controls");
    const models = await both(medium, { controlNets: [{ folder: net, name: "lines" }], cache: own });
    const named = { controls: [{ folder: "lines", image }] };
    expectNear(await errorBetween(models, named));
    const files = await listCachedWeights(own);
    // Transformer, refiner, two CLIPs, T5, the ControlNet.
    expect(files).toHaveLength(6);
    const plain = await load(medium, { weights: "int8", cache: own });
    const byPath = { controls: [{ folder: net, image }] };
    expect(await latentsOf(plain, byPath)).not.toEqual(await latentsOf(models[1]!, named));
    expectNear(await errorBetween([models[0]!, plain], byPath));
    expect(await listCachedWeights(own)).toEqual(files);
  });
});

describe("T5", () => {
  it("is as its own option says, where that says anything", async () => {
    const own = path.join(folder, "t5");
    const contextOf = async (options: LoadOptions) =>
      (await (await load(large, { cache: own, ...options })).encode({ prompt })).promptEmbeds;
    const t5Of = ({ data, shape }: { data: Float32Array; shape: readonly number[] }) => {
      // CLIP's 77 tokens come first.
      const [, , width] = shape as [number, number, number];
      return float32([data.length / width - 77, width], data.slice(77 * width));
    };
    const stored = t5Of(await contextOf({}));
    const blocks = t5Of(await contextOf({ t5Weights: "int8" }));
    const products = t5Of(await contextOf({ weights: "int8" }));
    expect(t5Of(await contextOf({ weights: "int8", t5Weights: "stored" }))).toEqual(stored);
    expect(t5Of(await contextOf({ weights: "int8", t5Weights: "int8" }))).toEqual(blocks);
    expect(relativeError(products, stored)).toBeGreaterThan(1e-4);
    expect(products).not.toEqual(blocks);
  });
});

describe("runtimes", () => {
  it("on a GPU are refused before anything is made, and auto passes them over", async () => {
    const own = path.join(folder, "runtimes");
    for (const runtime of ["cuda", "webgpu", "tensorrt"] as const) {
      const error = await FlowTurbo.load(medium, { runtime, weights: "int8", cache: own }).catch((reason) => reason);
      expect(error).toBeInstanceOf(OptionError);
      expect(error).toMatchObject({ option: "weights" });
      expect(error.message).toMatch(/does not take weights "int8"; onnxruntime does/);
    }
    expect(await listCachedWeights(own)).toEqual([]);
    const model = await load(medium, { runtime: "auto", weights: "int8", cache: own });
    expect(model.runtime.name).toBe("onnxruntime");
    for (const { reason } of model.runtime.passedOver) expect(reason).toMatch(/weights "int8"/);
  });
});
