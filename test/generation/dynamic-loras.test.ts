// Adapters that each request names, against diffusers' results with unfused adapters, through the public API of the built package.

import { cp, mkdtemp, rm } from "node:fs/promises";
import os from "node:os";
import path from "node:path";
import { FlowTurbo, type GenerateOptions, OptionError } from "flowturbo";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { writeSafetensors } from "../../lib/checkpoint/index.js";
import { type FloatTensor, float32 } from "../../lib/common/tensor.js";
import { fixture, fixtureNames, readAll, relativeError } from "../support/fixtures.js";
import { withValues } from "../support/with-values.js";

const prompt = "a red circle above a small blue square";
const size = { width: 32, height: 48, maxSequenceLength: 32 };
const usual = {
  prompt,
  negativePrompt: "blurry, low quality",
  sampler: "euler",
  steps: 4,
  guidanceScale: 4.5,
  ...size,
} as const;

/** How each reference result was made (test/fixtures/README.md). */
const runs: Record<string, NonNullable<GenerateOptions["loras"]>> = {
  lora_a: [{ name: "lora_a", scale: 0.7 }],
  lora_b: [{ name: "lora_b", scale: 0.7 }],
  lora_te: [{ name: "lora_te", scale: 0.7 }],
  lora_ab: [
    { name: "lora_a", scale: 0.7 },
    { name: "lora_b", scale: 0.4 },
  ],
};
const adapters = ["lora_a", "lora_b", "lora_te"];
const fileOf = (folder: string, name: string) => fixture(folder, "adapters", `${name}.safetensors`);

describe.each(fixtureNames)("%s", (name) => {
  let model: FlowTurbo;
  beforeAll(async () => {
    const loras = adapters.map((each) => ({ file: fileOf(name, each), name: each, dynamic: true }));
    model = await FlowTurbo.load(fixture(name, "model"), { loras });
  });
  afterAll(() => model?.dispose());

  it.each(Object.entries(runs))("%s as diffusers", async (file, loras) => {
    const reference = await readAll(fixture(name, `${file}.safetensors`));
    const result = await withValues(model, { ...usual, loras, noise: reference.noise! });
    expect(relativeError(result.latents, reference.latents!)).toBeLessThan(1e-5);
    expect(relativeError(result.pixels, reference.image!)).toBeLessThan(1e-5);
  });
});

let folder: string;
let cache: string;
beforeAll(async () => {
  folder = await mkdtemp(path.join(os.tmpdir(), "flowturbo-dynamic-loras-"));
  cache = path.join(folder, "cache");
});
afterAll(() => rm(folder, { recursive: true, force: true }));

/** Numbers of about that size, no two adapters alike. */
function numbers(seed: number, size: number, ...shape: number[]): FloatTensor {
  const length = shape.reduce((a, b) => a * b, 1);
  return float32(
    shape,
    Float32Array.from({ length }, (_, i) => size * Math.sin(seed * 12.9898 + i * 78.233)),
  );
}

/** An adapter file of the layers given, [out, in, ...] each. */
async function adapter(name: string, rank: number, layers: Record<string, readonly number[]>): Promise<string> {
  const file = path.join(folder, `${name}.safetensors`);
  const tensors: Record<string, FloatTensor> = {};
  for (const [index, [layer, [to, ...from]]] of Object.entries(layers).entries()) {
    const seed = name.length + name.charCodeAt(name.length - 1) + index;
    tensors[`transformer.${layer}.lora_A.weight`] = numbers(seed, 0.5, rank, ...from);
    tensors[`transformer.${layer}.lora_B.weight`] = numbers(seed + 0.3, 0.2, to!, rank, ...from.slice(1).map(() => 1));
  }
  await writeSafetensors(file, tensors);
  return file;
}

/** The fixture with an adapter in its weights: W + scale · alpha / r · B·A in float32, alpha as in the fixture's README. */
async function fused(name: string, lora: string, factor: number): Promise<string> {
  const copy = path.join(folder, `${name}-${lora}`);
  await cp(fixture(name, "model"), copy, { recursive: true });
  const file = path.join("transformer", "diffusion_pytorch_model.safetensors");
  const weights = await readAll(fixture(name, "model", file));
  const matrices = await readAll(fileOf(name, lora));
  for (const [key, down] of Object.entries(matrices)) {
    const layer = key.match(/^transformer\.(.*)\.lora_A\.weight$/)?.[1];
    if (layer === undefined) continue;
    const up = matrices[key.replace("lora_A", "lora_B")]!;
    const { data, shape } = weights[`${layer}.weight`]!;
    const [to, from] = shape as [number, number];
    const [rank] = down.shape as [number];
    for (let o = 0; o < to; o++)
      for (let i = 0; i < from; i++) {
        let sum = 0;
        for (let r = 0; r < rank; r++) sum += up.data[o * rank + r]! * down.data[r * from + i]!;
        data[o * from + i]! += factor * sum;
      }
  }
  await rm(path.join(copy, file));
  await writeSafetensors(path.join(copy, file), weights);
  return copy;
}

describe("a request with a LoRA", () => {
  const name = "medium";
  let [model, merged]: FlowTurbo[] = [];
  beforeAll(async () => {
    const loras = [{ file: fileOf(name, "lora_a"), dynamic: true }];
    model = await FlowTurbo.load(fixture(name, "model"), { loras, cache });
    merged = await FlowTurbo.load(await fused(name, "lora_a", 0.7), { cache });
  });
  afterAll(() => Promise.all([model?.dispose(), merged?.dispose()]));

  const image = fixture(name, "init.png");
  const ways: Record<string, Partial<GenerateOptions>> = {
    "without guidance": { guidanceScale: 1, sampler: "euler", steps: 3 },
    "by Heun, pseudo correctors and refiners": { blocks: "H1P1R1", sampler: undefined, steps: undefined },
    "by a multistep sampler, guided in some steps": { sampler: "dpmpp_2m", steps: 4, guidanceStop: 0.5 },
    "with CFG-Zero*": { sampler: "euler", steps: 3, guidanceMode: "cfg_zero" },
    "with skip-layer guidance": { sampler: "euler", steps: 4, skipLayers: { layers: [1], stop: 1 } },
    "in stages": {
      ...{ width: undefined, height: undefined, sampler: undefined, steps: undefined },
      stages: [
        { width: 32, height: 48, blocks: "H1P1" },
        { width: 48, height: 64, blocks: "H1" },
      ],
    },
    "as an edit": { image, strength: 0.6, width: 64, height: 64 },
    "as an edit of a part": { image, mask: fixture(name, "mask.png"), strength: 0.7, width: 64, height: 64 },
    "with previews": { preview: "fast", onStep: () => {} },
    "in a batch": { prompt: [prompt, "a dog"], count: 2 },
  };
  it.each(Object.entries(ways))("is drawn %s as with the LoRA in the weights", async (_, options) => {
    const request = { ...usual, seed: 1, ...options } as GenerateOptions;
    const result = await withValues(model!, { ...request, loras: [{ name: "lora_a", scale: 0.7 }] });
    const expected = await withValues(merged!, request);
    expect(relativeError(result.latents, expected.latents)).toBeLessThan(1e-5);
    expect(relativeError(result.pixels, expected.pixels)).toBeLessThan(1e-5);
    const without = await withValues(model!, request);
    expect(relativeError(without.latents, expected.latents)).toBeGreaterThan(1e-2);
  });
});

describe("requests together", () => {
  const layers = ["attn.to_q", "attn.to_v", "attn.add_k_proj", "attn.to_out.0"];
  const names = ["one", "two", "three", "four"];
  let model: FlowTurbo;
  beforeAll(async () => {
    const { "proj_out.weight": out } = await readAll(
      fixture("sd3", "model/transformer/diffusion_pytorch_model.safetensors"),
    );
    const width = out!.shape[1]!;
    const shapes = Object.fromEntries(layers.map((layer) => [`transformer_blocks.1.${layer}`, [width, width]]));
    const files = await Promise.all(names.map((each, index) => adapter(each, 2 + 2 * index, shapes)));
    const loras = [...files, fileOf("sd3", "lora_te")].map((file) => ({ file, dynamic: true }));
    model = await FlowTurbo.load(fixture("sd3", "model"), { loras, cache, measureCosts: false });
  });
  afterAll(() => model?.dispose());

  const request = (loras: GenerateOptions["loras"], seed: number) =>
    ({ ...usual, sampler: "heun", steps: 3, seed, loras }) satisfies GenerateOptions;
  const launchesOf = () =>
    Object.fromEntries(Object.entries(model.stats().milliseconds.launches).map(([graph, { count }]) => [graph, count]));

  it("of four adapters share each launch, and each is as it is alone", async () => {
    const requests = names.map((each, seed) => request([{ name: each, scale: 0.5 + seed / 4 }], seed));
    const alone = [];
    for (const each of requests) alone.push(await withValues(model, each));
    const before = launchesOf();
    const together = await Promise.all(requests.map((each) => withValues(model, each)));
    const [graph] = Object.keys(before).filter((name) => name.startsWith("predict"));
    expect(graph).toBe("predict.guidance.lora-8");
    // Four rows in each: as many launches as one of the requests made alone, and those that the first ones made before the last was there.
    const shared = launchesOf()[graph!]! - before[graph!]!;
    expect(shared).toBeGreaterThanOrEqual(before[graph!]! / 4);
    expect(shared).toBeLessThan(before[graph!]! / 2);
    expect(model.stats().rowsPerLaunch[4]).toBeGreaterThan(0);
    const plain = await withValues(model, request(undefined, 0));
    for (const [index, { latents, pixels }] of together.entries()) {
      expect(relativeError(latents, alone[index]!.latents)).toBeLessThan(1e-5);
      expect(relativeError(pixels, alone[index]!.pixels)).toBeLessThan(1e-5);
    }
    expect(relativeError(together[0]!.latents, plain.latents)).toBeGreaterThan(1e-3);
  });

  it("with an adapter and without are launched apart: those without as if there were none", async () => {
    const [adapted, plain] = [request([{ name: "two" }], 5), request(undefined, 5)];
    const alone = [await withValues(model, adapted), await withValues(model, plain)];
    const before = launchesOf();
    const together = await Promise.all([adapted, plain].map((each) => withValues(model, each)));
    for (const [index, { latents }] of together.entries())
      expect(relativeError(latents, alone[index]!.latents)).toBeLessThan(1e-5);
    const after = launchesOf();
    expect(after["predict.guidance"]! - before["predict.guidance"]!).toBe(
      after["predict.guidance.lora-8"]! - before["predict.guidance.lora-8"]!,
    );
  });

  it("at scale 0 is what it is without, bit for bit, also for the text encoders", async () => {
    const plain = await withValues(model, request(undefined, 9));
    const adapted = await withValues(model, request([{ name: "lora_te" }, { name: "one" }], 9));
    const zero = await withValues(
      model,
      request(
        [
          { name: "lora_te", scale: 0 },
          { name: "one", scale: 0 },
        ],
        9,
      ),
    );
    expect(zero.latents.data).toEqual(plain.latents.data);
    expect(zero.pixels.data).toEqual(plain.pixels.data);
    expect(relativeError(adapted.latents, plain.latents)).toBeGreaterThan(1e-3);
  });

  it("of several adapters take the rank that holds them together, in any order the same", async () => {
    const [three, four] = [
      { name: "three", scale: 0.6 },
      { name: "four", scale: -0.4 },
    ];
    const both = await withValues(model, request([three, four], 3));
    const turned = await withValues(model, request([four, three], 3));
    expect(turned.latents.data).toEqual(both.latents.data);
    expect(Object.keys(launchesOf())).toContain("predict.guidance.lora-16");
    const one = await withValues(model, request([three], 3));
    expect(relativeError(one.latents, both.latents)).toBeGreaterThan(1e-3);
  });

  it("draw from embeddings that encode() made with the same LoRA what they draw from the text", async () => {
    const loras = [{ name: "lora_te", scale: 0.7 }, { name: "two" }];
    const expected = await withValues(model, request(loras, 6));
    const { prompt, negativePrompt, ...drawn } = request(loras, 6);
    const texts = { prompt, negativePrompt, maxSequenceLength: size.maxSequenceLength };
    const { maxSequenceLength: _, ...rest } = drawn;
    const promptEmbeds = await model.encode({ ...texts, loras });
    // "two" changes no text encoder.
    expect(promptEmbeds.loras).toEqual([{ name: "lora_te", scale: 0.7 }]);
    const result = await withValues(model, { ...rest, promptEmbeds });
    expect(result.latents.data).toEqual(expected.latents.data);
    expect(result.warnings).toEqual([]);
    const plain = await model.encode(texts);
    expect(plain).not.toHaveProperty("loras");
    const other = await withValues(model, { ...rest, promptEmbeds: plain });
    expect(relativeError(other.latents, expected.latents)).toBeGreaterThan(1e-3);
    expect(other.warnings).toEqual([
      'The LoRA "lora_te" changes text encoders too, and promptEmbeds were encoded without it; give encode() the same loras.',
    ]);
    const scaled = await model.encode({ ...texts, loras: [{ name: "lora_te", scale: 1 }] });
    expect((await model.generate({ ...rest, promptEmbeds: scaled })).warnings).toEqual([
      expect.stringMatching(/with its scale 1 in place of 0.7; give/),
    ]);
    const { loras: _unnamed, ...unadapted } = rest;
    expect((await model.generate({ ...unadapted, promptEmbeds })).warnings).toEqual([
      'promptEmbeds were encoded with the LoRA "lora_te", and the picture is drawn without it; give generate() the same loras.',
    ]);
    await expect(model.encode({ ...texts, loras: [{ name: "tree" }] })).rejects.toThrow(/no dynamic LoRA "tree"/);
    await expect(model.encode({ ...texts, loras: [{ name: "two", scale: 101 }] })).rejects.toThrow(
      /from -100 to 100 for loras/,
    );
  });

  it("say in the pictures which adapters they have", async () => {
    const { images } = await model.generate(request([{ name: "four" }, { name: "one", scale: 0.3 }], 4));
    expect(images[0]!.parameters).toMatchObject({
      loras: [
        { name: "one", scale: 0.3 },
        { name: "four", scale: 1 },
      ],
    });
    const plain = await model.generate(request([{ name: "one", scale: 0 }], 4));
    expect(plain.images[0]!.parameters).not.toHaveProperty("loras");
  });

  it.each<[GenerateOptions["loras"], RegExp]>([
    [
      [{ name: "tree" }],
      /no dynamic LoRA "tree" \(did you mean "three"\?\); .* "one", "two", "three", "four", "lora_te"/,
    ],
    [[{ name: "one" }, { name: "one" }], /"one" is named twice/],
  ])("with %j are refused", async (loras, message) => {
    const error = await model.generate(request(loras, 1)).catch((each) => each);
    expect(error).toBeInstanceOf(OptionError);
    expect(error).toMatchObject({ option: "loras", message: expect.stringMatching(message) });
  });
});

describe("refuses at load", () => {
  const load = (...loras: { file: string; dynamic?: boolean }[]) =>
    FlowTurbo.load(fixture("sd3", "model"), { loras: loras.map((each) => ({ dynamic: true, ...each })), cache });
  const refusal = async (loading: Promise<FlowTurbo>) => {
    const error = await loading.catch((each) => each);
    expect(error).toBeInstanceOf(OptionError);
    return error as OptionError;
  };

  it("an adapter of a layer that is no linear one, which is merged all the same", async () => {
    const weights = await readAll(fixture("sd3", "model/transformer/diffusion_pytorch_model.safetensors"));
    const file = await adapter("patches", 4, { "pos_embed.proj": weights["pos_embed.proj.weight"]!.shape });
    const { option, message } = await refusal(load({ file }));
    expect(option).toBe("loras");
    expect(message).toMatch(/"patches" changes "pos_embed.proj".*load it without dynamic/);
    await (await load({ file, dynamic: false })).dispose();
  });

  it("a rank that no graph has, and ranks of a request that have none together", async () => {
    const width = (await readAll(fixture("sd3", "model/transformer/diffusion_pytorch_model.safetensors")))[
      "proj_out.weight"
    ]!.shape[1]!;
    const shapes = { "transformer_blocks.0.attn.to_q": [width, width] };
    const [large, half, other] = await Promise.all([
      adapter("large", 129, shapes),
      adapter("half", 128, shapes),
      adapter("other", 1, shapes),
    ]);
    expect((await refusal(load({ file: large }))).message).toMatch(
      /"large" has rank 129.*128 at most; load it without/,
    );
    await using model = await load({ file: half }, { file: other });
    const both = model.generate({ ...usual, loras: [{ name: "half" }, { name: "other" }] });
    await expect(both).rejects.toThrow(/"half", "other" have rank 129 together.*128 at most/);
    await using merged = await load({ file: other, dynamic: false });
    await expect(merged.generate({ ...usual, loras: [{ name: "other" }] })).rejects.toThrow(
      /"other" is merged into the weights.*dynamic: true/,
    );
  });

  it("an alpha with which a matrix is more than float32 holds, and says of which LoRAs values overflow", async () => {
    const { "proj_out.weight": out } = await readAll(
      fixture("sd3", "model/transformer/diffusion_pytorch_model.safetensors"),
    );
    const [width] = out!.shape.slice(1) as [number];
    const file = path.join(folder, "vast.safetensors");
    const layer = "transformer_blocks.0.attn.to_out.0";
    const vast = (size: number, alpha: number) =>
      writeSafetensors(file, {
        [`${layer}.lora_A.weight`]: numbers(1, 1, 2, width),
        [`${layer}.lora_B.weight`]: numbers(2, size, width, 2),
        [`${layer}.alpha`]: float32([1], Float32Array.of(alpha)),
      });
    await vast(1e3, 1e38);
    await expect(load({ file })).rejects.toThrow(
      /vast\.safetensors: alpha over the rank of .*to_out\.0\.lora_A.* beyond float32/,
    );
    await vast(1e38, 2);
    await using model = await load({ file });
    const drawn = model.generate({ ...usual, seed: 1, loras: [{ name: "vast", scale: 100 }] });
    await expect(drawn).rejects.toThrow(/block 1 of 4.*dynamic LoRAs \("vast" at 100\): give them smaller scales/);
  });

  it("a name where no adapter is dynamic", async () => {
    await using model = await FlowTurbo.load(fixture("sd3", "model"));
    await expect(model.generate({ ...usual, loras: [{ name: "style" }] })).rejects.toThrow(
      /no dynamic LoRA "style": the model was loaded without any/,
    );
  });
});
