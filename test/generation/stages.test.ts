// Stages and editing against diffusers' results, and what they promise beyond.
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import os from "node:os";
import path from "node:path";
import { FlowTurbo, type GenerateOptions, OptionError, type StepEvent } from "flowturbo";
import sharp from "sharp";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { judge, score } from "../../bench/shapes/detector.js";
import { caption, drawScenes } from "../../bench/shapes/world.js";
import type { FloatTensor } from "../../lib/common/tensor.js";
import { fixture, fixtureNames, readAll, relativeError } from "../support/fixtures.js";
import { withValues } from "../support/with-values.js";

const prompt = "a red circle above a small blue square";
const negativePrompt = "blurry, low quality";
const tolerance = 1e-5;

let folder: string;
let shapes: FlowTurbo;
beforeAll(async () => {
  folder = mkdtempSync(path.join(os.tmpdir(), "flowturbo-stages-"));
  shapes = await FlowTurbo.load();
});
afterAll(async () => {
  await shapes.dispose();
  rmSync(folder, { recursive: true, force: true });
});

describe.each(fixtureNames)("%s", (name) => {
  let model: FlowTurbo;
  beforeAll(async () => {
    model = await FlowTurbo.load(fixture(name, "model"));
  });
  afterAll(() => model?.dispose());
  const base = { prompt, negativePrompt, maxSequenceLength: 32 };
  const edit = { ...base, sampler: "euler", steps: 10, strength: 0.6, width: 64, height: 64 } as const;

  it("two stages", async () => {
    const reference = await readAll(fixture(name, "stages.safetensors"));
    const result = await withValues(model, {
      ...base,
      stages: [
        { width: 64, height: 64, blocks: "HPPR" },
        { width: 128, height: 128, blocks: "HP", sigma: 0.6 },
      ],
      noise: [reference.noise!, reference.noise_2!],
    });
    expect(relativeError(result.latents, reference.latents!)).toBeLessThan(tolerance);
    expect(relativeError(result.pixels, reference.image!)).toBeLessThan(tolerance);
    expect(result.evaluations).toEqual({ predictor: 7, refiner: 2, rows: 14 });
    expect(result.stages.map(({ width, blocks }) => `${width} ${blocks}`)).toEqual(["64 H1P2R1", "128 H1P1"]);
  });

  it("image to image", async () => {
    const reference = await readAll(fixture(name, "img2img.safetensors"));
    const result = await withValues(model, { ...edit, image: fixture(name, "init.png"), noise: reference.noise! });
    expect(relativeError(result.latents, reference.latents!)).toBeLessThan(tolerance);
    expect(relativeError(result.pixels, reference.image!)).toBeLessThan(tolerance);
  });

  const turbo = () => ({ ...base, image: fixture(name, "init.png"), mask: fixture(name, "mask_40.png") });
  it("inpainting with H, P and R, which puts the velocity back as well", async () => {
    const reference = await readAll(fixture(name, "turbo_inpaint.safetensors"));
    const size = { width: 64, height: 64 };
    const noise = reference.noise!;
    const result = await withValues(model, { ...turbo(), ...size, blocks: "H1P3R2", strength: 0.9, noise });
    expect(relativeError(result.latents, reference.latents!)).toBeLessThan(tolerance);
  });

  it("inpainting in two stages", async () => {
    const reference = await readAll(fixture(name, "stages_inpaint.safetensors"));
    const result = await withValues(model, {
      ...turbo(),
      strength: 1,
      stages: [
        { width: 64, height: 64, blocks: "HPPR" },
        { width: 128, height: 128, blocks: "HPR" },
      ],
      noise: [reference.noise!, reference.noise_2!],
    });
    expect(relativeError(result.latents, reference.latents!)).toBeLessThan(tolerance);
  });

  it("inpainting", async () => {
    const reference = await readAll(fixture(name, "inpaint.safetensors"));
    const image = fixture(name, "init.png");
    const result = await withValues(model, {
      ...edit,
      image,
      mask: fixture(name, "mask.png"),
      noise: reference.noise!,
    });
    expect(relativeError(result.latents, reference.latents!)).toBeLessThan(tolerance);
    expect(relativeError(result.pixels, reference.image!)).toBeLessThan(tolerance);
    // The kept part is the original, pixel for pixel.
    const original = await sharp(image).removeAlpha().raw().toBuffer();
    const mask = await sharp(fixture(name, "mask.png")).greyscale().raw().toBuffer();
    const kept = [...mask.keys()].filter((i) => mask[i]! < 128);
    const { data } = result.images[0]!;
    expect(kept.length).toBeGreaterThan(1000);
    for (const i of kept) for (let c = 0; c < 3; c++) expect(data[3 * i + c]).toBe(original[3 * i + c]);
    // Without keepOriginal it comes through the autoencoder, which leaves its marks.
    const through = await withValues(model, {
      ...edit,
      image,
      mask: fixture(name, "mask.png"),
      keepOriginal: false,
      seed: 1,
    });
    expect(kept.some((i) => through.images[0]!.data[3 * i] !== original[3 * i])).toBe(true);
  });
});

/** The picture at a seed, as an encoded file. */
const drawn = async (text: string, seed: number) => (await shapes.generate({ prompt: text, seed })).images[0]!.toPNG();

/** A mask, white in a rectangle. */
async function maskOf(left: number, top: number, width: number, height: number, size = 64): Promise<Buffer> {
  const white = { create: { width, height, channels: 3 as const, background: "#fff" } };
  return sharp({ create: { width: size, height: size, channels: 3, background: "#000" } })
    .composite([{ input: white, left, top }])
    .png()
    .toBuffer();
}

describe("CFG-Zero* with an original", () => {
  const options = { prompt: "a large blue circle", sampler: "euler", steps: 6, seed: 5 } as const;
  const zero = { ...options, guidanceMode: "cfg_zero" } as const;

  it.each([
    ["euler", "shifted"],
    ["flowturbo", undefined],
    ["unipc", undefined],
  ] as const)("leaves out the first step where strength 1 starts from noise: %s", async (sampler, grid) => {
    const image = await drawn("a large red square", 1);
    const same = { ...zero, sampler, grid };
    const alone = await withValues(shapes, same);
    // 5.7 of 6 steps are all of them.
    for (const strength of [1, 0.95]) {
      const edited = await withValues(shapes, { ...same, image, strength });
      expect(edited.sigmas).toEqual(alone.sigmas);
      expect(edited.evaluations).toEqual({ predictor: 5, refiner: 0, rows: 10 });
      expect(relativeError(edited.latents, alone.latents)).toBeLessThan(1e-5);
    }
  });

  it.each([
    ["a strength that keeps a part", { strength: 0.5 }, 3],
    ["noise levels that begin below 1", { strength: 1, steps: undefined, sigmas: [0.9, 0.5], shift: 1 }, 2],
    ["a sampler that begins below 1", { strength: 1, sampler: "dpmpp_2m" }, 6],
    ["no guidance", { strength: 1, guidanceScale: 1 }, 6],
  ] as const)("leaves out none with %s", async (_, edit, steps) => {
    const image = await drawn("a large red square", 1);
    const result = await withValues(shapes, { ...zero, image, ...edit });
    const usual = await withValues(shapes, { ...options, image, ...edit });
    expect(result.sigmas).toEqual(usual.sigmas);
    expect(result.evaluations.predictor).toBe(steps);
  });

  it("puts the known region back at the level after the step that is left out", async () => {
    const image = await drawn("a large red square", 1);
    const known = (await withValues(shapes, { prompt: "", image, mask: blackMask(), seed: 5 })).latents;
    const isNew = (i: number) =>
      i % 16 >= 4 && i % 16 < 10 && Math.floor(i / 16) % 16 >= 4 && Math.floor(i / 16) % 16 < 12;
    const data = known.data.map((_, i) => Math.sin(7 * i + 1) * 1.4);
    const sigmas = [1, 0.6];
    const start = data.map((noise, i) => (isNew(i) ? noise : 0.4 * known.data[i]! + 0.6 * noise));
    const same = { ...zero, steps: undefined, seed: undefined, sigmas, shift: 1 };
    const noise = { ...known, data } as FloatTensor;
    const mask = await maskOf(16, 16, 24, 32);
    const painted = await withValues(shapes, { ...same, image, mask, strength: 1, noise });
    const expected = await withValues(shapes, { ...same, noise: { ...known, data: start } as FloatTensor });
    expect(painted.sigmas).toEqual([0.6, 0]);
    for (const [i, value] of painted.latents.data.entries())
      expect(Math.abs(value - (isNew(i) ? expected.latents : known).data[i]!)).toBeLessThan(1e-4);
    await expect(shapes.generate({ ...zero, image, strength: 1, steps: 1 })).rejects.toThrow(/give at least 2/);
  });
});

describe("inpainting with any schedule", () => {
  /** Every letter, changes between those that have memory, steps without guidance, and samplers' own blocks. */
  const schedules: [string, Partial<GenerateOptions>][] = [
    ...["E10", "H5", "P10", "H1P9", "H1P7R2", "H2P2R6", "M8", "U8", "D8", "A8", "C6", "E2S1P2S1", "M3A2U3D2"].map(
      (blocks): [string, Partial<GenerateOptions>] => [blocks, { blocks }],
    ),
    ...["M6", "U6", "A6"].map((blocks): [string, Partial<GenerateOptions>] => [
      `${blocks} with guidance in some steps`,
      { blocks, guidanceScale: [4, 1, 3, 1, 1, 4] },
    ]),
    ["the default, with strong guidance", { steps: 8 }],
    ["the default, with mild guidance", { steps: 8, guidanceScale: 2 }],
    ["dpmpp_2m", { sampler: "dpmpp_2m", steps: 8 }],
    ["unipc", { sampler: "unipc", steps: 8 }],
  ];
  it.each(schedules)("%s keeps the known latents", async (_, options) => {
    const image = await drawn("a large red square", 1);
    const mask = await maskOf(16, 16, 24, 32);
    const events: StepEvent[] = [];
    const result = await withValues(shapes, {
      ...{ prompt: "a large blue circle", image, mask, strength: 1, seed: 5, count: 2 },
      ...options,
      preview: "fast",
      onStep: (event) => events.push(event),
    });
    // The encoder alone: nothing to paint returns the original's latents.
    const { latents } = await withValues(shapes, {
      prompt: "",
      image,
      mask: await maskOf(0, 0, 1, 1, 64),
      seed: 5,
      strength: 1,
    }).then(() => withValues(shapes, { prompt: "", image, mask: blackMask(), seed: 5 }));
    const channels = latents.shape[1]!;
    for (let row = 0; row < 2; row++)
      for (let c = 0; c < channels; c++)
        for (let y = 0; y < 16; y++)
          for (let x = 0; x < 16; x++) {
            if (x >= 4 && x < 10 && y >= 4 && y < 12) continue;
            const actual = result.latents.data[((row * channels + c) * 16 + y) * 16 + x]!;
            expect(Math.abs(actual - latents.data[(c * 16 + y) * 16 + x]!)).toBeLessThan(1e-5);
          }
    // On the way x and the velocity are known there too: every estimate of the end, x − σ·v, is the original.
    const previews = events.flatMap((event) => event.previews);
    expect(previews.length).toBeGreaterThan(2);
    const end = previews.at(-1)!;
    for (const { data } of previews)
      for (const [i, value] of data.entries()) {
        const [x, y] = [Math.floor(i / 3) % 16, Math.floor(i / 48)];
        if (x < 4 || x >= 10 || y < 4 || y >= 12) expect(Math.abs(value - end.data[i]!)).toBeLessThanOrEqual(1);
      }
  });

  it.each(["fast", "decoded"] as const)("a black mask is the original, also with %s previews", async (preview) => {
    const image = await drawn("a large red square", 1);
    const steps: StepEvent[] = [];
    const result = await shapes.generate({
      ...{ prompt: "a large blue circle", image, mask: blackMask(), seed: 5, preview },
      onStep: (step) => steps.push(step),
    });
    expect(result.images[0]!.data).toEqual(new Uint8Array(await sharp(image).raw().toBuffer()));
    expect(result.warnings).toEqual([expect.stringMatching(/black everywhere/)]);
    expect(steps).toEqual([]);
  });

  it("paints where the mask is white, by grey or by alpha", async () => {
    const image = await drawn("a large red square", 1);
    const grey = await maskOf(0, 0, 32, 64);
    const alpha = await sharp({
      create: { width: 64, height: 64, channels: 4, background: { r: 0, g: 0, b: 0, alpha: 0 } },
    })
      .composite([
        {
          input: { create: { width: 32, height: 64, channels: 4, background: { r: 9, g: 9, b: 9, alpha: 1 } } },
          left: 0,
          top: 0,
        },
      ])
      .png()
      .toBuffer();
    const options = { prompt: "a large blue circle", image, strength: 1, seed: 3, steps: 4 };
    const [a, b] = [
      await withValues(shapes, { ...options, mask: grey }),
      await withValues(shapes, { ...options, mask: alpha }),
    ];
    expect(a.latents.data).toEqual(b.latents.data);
    const original = await sharp(image).raw().toBuffer();
    const changed = (left: boolean) =>
      [...Array(4096).keys()].some((i) => i % 64 < 32 === left && a.images[0]!.data[3 * i] !== original[3 * i]);
    expect([changed(true), changed(false)]).toEqual([true, false]);
  });

  it("seams no worse than Euler's at equal evaluations", async () => {
    const mask = await maskOf(16, 0, 32, 64);
    const originals: Buffer[] = [];
    for (let seed = 0; seed < 6; seed++) originals.push(await drawn("a large red square", seed));
    const gradient = async (blocks: string) => {
      let sum = 0;
      for (const [seed, image] of originals.entries()) {
        const { images } = await shapes.generate({
          prompt: "a large red square",
          image,
          mask,
          strength: 1,
          blocks,
          seed: 50 + seed,
          keepOriginal: false,
        });
        for (const x of [15, 47])
          for (let y = 0; y < 64; y++)
            for (let c = 0; c < 3; c++)
              sum += Math.abs(images[0]!.data[3 * (y * 64 + x) + c]! - images[0]!.data[3 * (y * 64 + x + 1) + c]!);
      }
      return sum / (6 * 2 * 64 * 3);
    };
    // 10 evaluations of the predictor each. Half a grey level is the noise of six pictures.
    const euler = await gradient("E10");
    expect(await gradient("H1P8")).toBeLessThan(euler * 1.1 + 0.5);
    expect(await gradient("H1P8R2")).toBeLessThan(euler * 1.1 + 0.5);
  }, 180_000);

  it("with a mask that is black everywhere is the original, and says so", async () => {
    const image = await drawn("a large red square", 1);
    const { images, warnings, evaluations } = await shapes.generate({
      prompt: "x",
      image,
      mask: blackMask(),
      count: 2,
      seed: 1,
    });
    const original = await sharp(image).raw().toBuffer();
    for (const picture of images) expect(Buffer.from(picture.data).equals(original)).toBe(true);
    expect(warnings.join()).toMatch(/mask is black everywhere.*this is the original\./);
    expect(evaluations).toEqual({ predictor: 0, refiner: 0, rows: 0 });
  });
});

const black = sharp({ create: { width: 64, height: 64, channels: 3, background: "#000" } }).png();
let blackBytes: Buffer;
beforeAll(async () => {
  blackBytes = await black.toBuffer();
});
const blackMask = () => blackBytes;

describe("originals", () => {
  it("are oriented, flattened on white, resized and cropped to cover", async () => {
    // Twice as wide as high, red left and blue right, stored on its side with an orientation tag.
    const red = { create: { width: 64, height: 64, channels: 3 as const, background: "#f00" } };
    const wide = await sharp({ create: { width: 128, height: 64, channels: 3, background: "#00f" } })
      .composite([{ input: red, left: 0, top: 0 }])
      .png()
      .toBuffer();
    const onItsSide = await sharp(wide)
      .rotate(270)
      .withExif({ IFD0: { Orientation: "6" } })
      .jpeg({ quality: 100 })
      .toBuffer();
    const tagged = await sharp(onItsSide).withMetadata({ orientation: 6 }).jpeg({ quality: 100 }).toBuffer();
    const shown = async (image: Buffer) =>
      (await shapes.generate({ prompt: "x", image, mask: blackMask(), seed: 1 })).images[0]!.data;
    const data = await shown(tagged);
    const at = (x: number, y: number) => [...data.subarray(3 * (y * 64 + x), 3 * (y * 64 + x) + 3)];
    expect(at(10, 32)[0]).toBeGreaterThan(200);
    expect(at(54, 32)[2]).toBeGreaterThan(200);
    const clear = await sharp({
      create: { width: 64, height: 64, channels: 4, background: { r: 0, g: 0, b: 0, alpha: 0 } },
    })
      .png()
      .toBuffer();
    expect([...(await shown(clear)).subarray(0, 3)]).toEqual([255, 255, 255]);
  });

  it("may be paths, encoded bytes or pictures drawn before", async () => {
    const { images } = await withValues(shapes, { prompt: "a large red square", seed: 1 });
    const file = path.join(folder, "original.png");
    await images[0]!.toFile(file);
    const run = (image: GenerateOptions["image"]) =>
      withValues(shapes, { prompt: "a large blue square", image, strength: 0.5, seed: 2, steps: 4 });
    const [a, b, c] = [await run(file), await run(await images[0]!.toPNG()), await run(images[0])];
    expect(a.latents.data).toEqual(b.latents.data);
    expect(a.latents.data).toEqual(c.latents.data);
  });

  it("strength keeps the end of the schedule, as diffusers counts it", async () => {
    const image = await drawn("a large red square", 1);
    const run = async (options: Partial<GenerateOptions>) =>
      (await shapes.generate({ prompt: "x", image, seed: 1, ...options })).stages[0]!;
    expect((await run({ strength: 0.6 })).blocks).toBe("M6");
    expect((await run({ strength: 0.6, blocks: "H1P7R2" })).blocks).toBe("P4R2");
    expect((await run({ strength: 0.6, sampler: "euler", steps: 10 })).blocks).toBe("E6");
    expect((await run({ strength: 0.05, steps: 10 })).blocks).toBe("M1");
    expect((await run({ strength: 1, steps: 10 })).sigmas[0]).toBe(1);
  });
});

describe("stages", () => {
  it("report stage and block, draw noise stage after stage, and keep seeds apart", async () => {
    const events: StepEvent[] = [];
    const stages = [
      { width: 32, height: 32, blocks: "H1P1" },
      { width: 64, height: 48, blocks: "H1R1" },
      { width: 64, height: 64, blocks: "H1", sigma: 0.3 },
    ];
    const batch = await withValues(shapes, {
      prompt: "a red circle",
      stages,
      seed: 7,
      count: 2,
      onStep: (event) => events.push(event),
    });
    expect(events.map(({ step, stage, block }) => `${step} ${stage} ${block}`)).toEqual([
      "0 0 H",
      "1 0 P",
      "2 1 H",
      "3 1 R",
      "4 2 H",
    ]);
    expect(events.every(({ steps, stages }) => steps === 5 && stages === 3)).toBe(true);
    expect(batch.timings.steps).toHaveLength(5);
    expect(batch.timings.upscale).toBeGreaterThan(0);
    expect(batch.stages[2]!.sigmas[0]).toBe(0.3);
    const alone = await withValues(shapes, { prompt: "a red circle", stages, seed: 8 });
    const row = { ...alone.latents, data: batch.latents.data.slice(alone.latents.data.length) } as FloatTensor;
    expect(relativeError(row, alone.latents)).toBeLessThan(1e-5);
  });

  it("go through the autoencoder a few at a time without a difference", async () => {
    // 18 pictures of 256 x 256 are more than go through at once.
    const stages = [
      { width: 32, height: 32, blocks: "H1" },
      { width: 256, height: 256, blocks: "E1" },
    ];
    const many = await withValues(shapes, { prompt: "a red circle", stages, seed: 0, count: 18 });
    const one = await withValues(shapes, { prompt: "a red circle", stages, seed: 17 });
    const row = { ...one.pixels, data: many.pixels.data.slice(17 * one.pixels.data.length) } as FloatTensor;
    expect(relativeError(row, one.pixels)).toBeLessThan(1e-5);
  }, 180_000);

  it("may be many", async () => {
    const stages = Array.from({ length: 12 }, (_, index) => ({
      width: 8 * (index + 1),
      height: 8 * Math.ceil((index + 1) / 2),
      blocks: "E1",
    }));
    const { images, evaluations } = await shapes.generate({ prompt: "a red circle", stages, seed: 1 });
    expect([images[0]!.width, images[0]!.height, evaluations.predictor]).toEqual([96, 48, 12]);
  });

  describe("in latents", () => {
    const rising = (sigma: number, upscale: "pixels" | "latents" | undefined) => [
      { width: 64, height: 64, blocks: "H1P4" },
      { width: 128, height: 128, blocks: "H1P2", sigma, upscale },
    ];

    it("the stage before ends where its noise, repeated, is a part of the next one's", async () => {
      const result = await withValues(shapes, { prompt: "a red circle", stages: rising(0.5, "latents"), seed: 3 });
      const [coarse, fine] = result.stages;
      // At twice the size: σ / (2 − σ).
      expect(coarse!.sigmas.at(-1)).toBeCloseTo(1 / 3, 12);
      expect([coarse!.sigmas[0], coarse!.sigmas.length, fine!.sigmas[0], fine!.sigmas.at(-1)]).toEqual([1, 6, 0.5, 0]);
      expect(result.images[0]!.parameters.stages).toEqual(rising(0.5, "latents"));
      expect([result.timings.upscale > 0, result.timings.edit]).toEqual([true, 0]);
      const plain = await withValues(shapes, { prompt: "a red circle", stages: rising(0.5, "pixels"), seed: 3 });
      expect(plain.stages[0]!.sigmas.at(-1)).toBe(0);
      const default_ = await withValues(shapes, { prompt: "a red circle", stages: rising(0.5, undefined), seed: 3 });
      expect(default_.latents.data).toEqual(plain.latents.data);
    });

    it("draw what the prompts ask for, as the way through pixels does", async () => {
      const scenes = drawScenes(31, 8);
      const prompts = scenes.map(caption);
      for (const upscale of ["pixels", "latents"] as const) {
        const options = { prompt: prompts, stages: rising(0.45, upscale), seed: 40, guidanceScale: 2 };
        const { images } = await shapes.generate(options);
        const verdicts = images.map((image, row) => judge(image, scenes[row]!));
        const { ground, colours, shapes: right } = score(verdicts);
        expect([upscale, ground, colours >= 0.85, right >= 0.85]).toEqual([upscale, 1, true, true]);
      }
    });

    it("rise by any factor, three times in a run, each picture by its own noise", async () => {
      const stages = [
        { width: 32, height: 40, blocks: "H1P1" },
        { width: 48, height: 40, blocks: "H1R1", sigma: 0.7, upscale: "latents" as const },
        { width: 56, height: 64, blocks: "H1", sigma: 0.5, upscale: "latents" as const },
        { width: 64, height: 64, blocks: "H1", sigma: 0.3 },
      ];
      const batch = await withValues(shapes, { prompt: "a red circle", stages, seed: 7, count: 2 });
      const alone = await withValues(shapes, { prompt: "a red circle", stages, seed: 8 });
      const row = { ...alone.latents, data: batch.latents.data.slice(alone.latents.data.length) } as FloatTensor;
      expect(relativeError(row, alone.latents)).toBeLessThan(1e-5);
      // Calls at the same time, which share launches.
      const calls = await Promise.all(
        [7, 8].map((seed) => withValues(shapes, { prompt: "a red circle", stages, seed })),
      );
      for (const [index, { latents }] of calls.entries()) {
        const size = latents.data.length;
        const own = { ...latents, data: batch.latents.data.slice(index * size, (index + 1) * size) } as FloatTensor;
        expect(relativeError(latents, own)).toBeLessThan(1e-5);
      }
      const [first, second, third, last] = batch.stages.map(({ sigmas }) => sigmas);
      // 8 to 12 latents repeats some columns twice, and no row; 12 to 14 and 10 to 16 some of both.
      expect(first!.at(-1)).toBeCloseTo(0.7 / (Math.SQRT2 - (Math.SQRT2 - 1) * 0.7), 12);
      expect(second!.at(-1)).toBeCloseTo(0.5 / 1.5, 12);
      expect([third!.at(-1), last!.at(-1)]).toEqual([0, 0]);
    });

    it("take guidance by steps, counted over all stages, and a shift, which leaves alone where one hands over to the next", async () => {
      const stages = rising(0.5, "latents");
      const shift = 2;
      const guidanceScale = [3, 1, 2, 1, 1, 1, 4, 1];
      const options = { prompt: "a red circle", stages, shift, guidanceScale };
      const result = await withValues(shapes, { ...options, seed: 6 });
      const [coarse, fine] = result.stages.map(({ sigmas }) => sigmas);
      const u = (sigma: number) => sigma / (shift - (shift - 1) * sigma);
      // Even before the shift: from 1 to σ / (2 − σ), and from σ to 0.
      for (const [i, sigma] of coarse!.entries()) expect(u(sigma)).toBeCloseTo(1 + (u(1 / 3) - 1) * (i / 5), 12);
      for (const [i, sigma] of fine!.entries()) expect(u(sigma)).toBeCloseTo(u(1 / 2) * (1 - i / 3), 12);
      // H evaluates twice, P once; with guidance two rows each.
      expect(result.evaluations).toEqual({ predictor: 10, refiner: 0, rows: 4 + 1 + 2 + 1 + 1 + 2 + 2 + 1 });
      const batch = await withValues(shapes, { ...options, seed: 5, count: 2 });
      const own = batch.latents.data.slice(result.latents.data.length);
      expect(relativeError({ ...result.latents, data: own } as FloatTensor, result.latents)).toBeLessThan(1e-5);
      // CFG-Zero* leaves the first step out, and starts at the level after it.
      const zero = await withValues(shapes, {
        ...options,
        seed: 6,
        guidanceMode: "cfg_zero",
        stages: [{ ...stages[0]!, blocks: "H5" }, stages[1]!],
      });
      expect(zero.stages[0]!.sigmas).toEqual(coarse!.slice(1));
      await expect(shapes.generate({ ...options, guidanceScale: [3, 1, 2, 1, 1] })).rejects.toThrow(
        /guidance scale, or 8 /,
      );
    });

    it("take part in editing: strength, and a mask that holds at every size", async () => {
      const image = await drawn("a large red square", 1);
      const stages = [
        { width: 32, height: 32, blocks: "H1P3" },
        { width: 64, height: 64, blocks: "H1P1R1", upscale: "latents" as const },
      ];
      const mask = await maskOf(0, 0, 32, 64);
      const options = { prompt: "a large blue circle", image, strength: 0.5, stages, seed: 2 };
      const result = await withValues(shapes, { ...options, mask });
      expect(result.stages[0]!.blocks).toBe("P2");
      const known = await withValues(shapes, { prompt: "x", image, mask: blackMask(), stages, seed: 1 });
      for (let c = 0; c < known.latents.shape[1]!; c++)
        for (let y = 0; y < 16; y++)
          for (let x = 8; x < 16; x++) {
            const i = (c * 16 + y) * 16 + x;
            expect(Math.abs(result.latents.data[i]! - known.latents.data[i]!)).toBeLessThan(1e-5);
          }
    });
  });

  it("take part in editing: the mask holds at every size", async () => {
    const image = await drawn("a large red square", 1);
    const result = await withValues(shapes, {
      prompt: "a large blue circle",
      image,
      mask: await maskOf(0, 0, 32, 64),
      strength: 1,
      stages: [
        { width: 32, height: 32, blocks: "H1P2" },
        { width: 64, height: 64, blocks: "H1P1R1" },
      ],
      seed: 2,
    });
    const known = await withValues(shapes, { prompt: "x", image, mask: blackMask(), seed: 1 });
    for (let c = 0; c < known.latents.shape[1]!; c++)
      for (let y = 0; y < 16; y++)
        for (let x = 8; x < 16; x++) {
          const i = (c * 16 + y) * 16 + x;
          expect(Math.abs(result.latents.data[i]! - known.latents.data[i]!)).toBeLessThan(1e-5);
        }
  });
});

describe("previews", () => {
  it.each(["fast", "decoded"] as const)("%s ones come close to the final picture", async (preview) => {
    const events: StepEvent[] = [];
    const { images } = await shapes.generate({
      prompt: "a large red square on a blue background",
      seed: 3,
      count: 2,
      preview,
      onStep: (event) => events.push(event),
    });
    expect(events).toHaveLength(10);
    expect(events.every(({ previews }) => previews.length === 2)).toBe(true);
    const size = preview === "fast" ? 16 : 64;
    const last = events.at(-1)!.previews[1]!;
    expect([last.width, last.height]).toEqual([size, size]);
    const final = await sharp(images[1]!.data, { raw: { width: 64, height: 64, channels: 3 } })
      .resize(size, size)
      .raw()
      .toBuffer();
    const error = (of: (i: number) => number) =>
      final.reduce((sum, value, i) => sum + Math.abs(value - of(i)), 0) / final.length;
    const mean = [0, 1, 2].map(
      (c) => final.reduce((sum, value, i) => sum + (i % 3 === c ? value : 0), 0) / (final.length / 3),
    );
    const difference = error((i) => last.data[i]!);
    // The decoder's preview is the picture itself; a linear map must at least beat the picture's mean colour clearly.
    if (preview === "decoded") expect(difference).toBeLessThan(2);
    else expect(difference).toBeLessThan(0.6 * error((i) => mean[i % 3]!));
    expect((await sharp(await last.toPNG()).metadata()).width).toBe(size);
  });

  it("show where the run is heading, from the first block on", async () => {
    // After one Euler step of two, x - sigma v is where one step of one ends.
    const options = { prompt: "a large red square", seed: 4, count: 2 };
    const events: StepEvent[] = [];
    await shapes.generate({ ...options, blocks: "E2", preview: "decoded", onStep: (event) => events.push(event) });
    const { images } = await shapes.generate({ ...options, blocks: "E1" });
    for (const [row, { data }] of images.entries()) {
      const preview = events[0]!.previews[row]!;
      expect(data.every((value, i) => Math.abs(value - preview.data[i]!) <= 1)).toBe(true);
    }
  });

  it("change nothing", async () => {
    const options = { prompt: "a red circle", seed: 3, steps: 4 };
    const [plain, watched] = [
      await withValues(shapes, options),
      await withValues(shapes, { ...options, preview: "fast" }),
    ];
    expect(watched.latents.data).toEqual(plain.latents.data);
  });
});

describe("bad input", () => {
  const image = () => fixture("large/init.png");
  const two = [
    { width: 32, height: 32, blocks: "H1" },
    { width: 64, height: 64, blocks: "H1" },
  ];
  const refused: [string, () => Record<string, unknown>, string, RegExp][] = [
    ["strength of zero", () => ({ image: image(), strength: 0 }), "strength", /above 0 and up to 1.*received 0/],
    ["strength above one", () => ({ image: image(), strength: 1.01 }), "strength", /above 0 and up to 1/],
    ["a mask without an image", () => ({ mask: image() }), "mask", /mask needs an image/],
    ["strength without an image", () => ({ strength: 0.5 }), "strength", /strength needs an image/],
    [
      "strength that leaves only R",
      () => ({ image: image(), strength: 0.2, blocks: "H1P7R2" }),
      "strength",
      /only the last blocks/,
    ],
    [
      "a picture that is not there",
      () => ({ image: path.join(folder, "none.png") }),
      "image",
      /cannot be read.*none\.png/,
    ],
    ["a picture that is none", () => ({ image: Buffer.from("no picture") }), "image", /cannot be read/],
    ["sizes that fall", () => ({ stages: [...two].reverse() }), "stages", /rising sizes.*32 × 32 after 64 × 64/],
    ["sizes that repeat", () => ({ stages: [two[0], two[0]] }), "stages", /both 32 × 32/],
    [
      "one side that falls",
      () => ({ stages: [two[0], { width: 64, height: 24, blocks: "H1" }] }),
      "stages",
      /rising sizes/,
    ],
    [
      "a stage off the grid",
      () => ({ stages: [{ width: 30, height: 32, blocks: "H1" }] }),
      "stages",
      /multiple of 8 for stages\[0\]\.width/,
    ],
    [
      "a stage beyond the table",
      () => ({ stages: [two[0], { width: 512, height: 512, blocks: "H1" }] }),
      "stages",
      /at most 256 for stages\[1\]\.width/,
    ],
    ["an upscale from nothing", () => ({ stages: [{ ...two[0], sigma: 0.5 }] }), "stages", /first stage/],
    [
      "an upscale at full noise",
      () => ({ stages: [two[0], { ...two[1], sigma: 1 }] }),
      "stages",
      /between 0 and 1 for stages\[1\]\.sigma but received 1\./,
    ],
    [
      "an upscale without noise",
      () => ({ stages: [two[0], { ...two[1], sigma: 0 }] }),
      "stages",
      /stages\[1\]\.sigma but received 0\./,
    ],
    ["latents of nothing", () => ({ stages: [{ ...two[0], upscale: "latents" }] }), "stages", /leave out its upscale/],
    [
      "pixels of nothing",
      () => ({ stages: [{ ...two[0], upscale: "pixels" }, two[1]] }),
      "stages",
      /leave out its upscale/,
    ],
    [
      "an upscale of something else",
      () => ({ stages: [two[0], { ...two[1], upscale: "bicubic" }] }),
      "stages",
      /Expected "pixels" or "latents" for stages\[1\]\.upscale but received "bicubic"\./,
    ],
    [
      "latents that are taken over before they are there",
      () => ({
        stages: [
          two[0],
          { width: 48, height: 48, blocks: "H1", sigma: 0.3 },
          { ...two[1], sigma: 0.8, upscale: "latents" },
        ],
      }),
      "stages",
      /Stage 2 starts at sigma 0\.3, but the next one takes its latents over at 0\.6667\. Give a larger stages\[1\]\.sigma, or a smaller stages\[2\]\.sigma\./,
    ],
    ["no stages", () => ({ stages: [] }), "stages", /\{ width, height, blocks, sigma\?, upscale\? \}/],
    ...(
      [
        [0, 0, 0],
        [-2, -2, 12],
        [1.5, 2, 9],
        [2, 2, 11],
      ] as const
    ).map(([width, height, values]): (typeof refused)[number] => [
      `raw values of ${width} × ${height}`,
      () => ({ image: { width, height, data: new Uint8Array(values) } }),
      "image",
      /or \{ width, height, data \} for image/,
    ]),
    ["stages with a width", () => ({ stages: two, width: 64 }), "width", /leave out width or stages/],
    ["stages with blocks", () => ({ stages: two, blocks: "H1" }), "blocks", /leave out blocks or stages/],
    [
      "a stage that starts with R",
      () => ({ stages: [two[0], { ...two[1], blocks: "R1" }] }),
      "stages",
      /stages\[1\]\.blocks: .*start with R/,
    ],
    [
      "noise for one of two stages",
      () => ({ stages: two, noise: { dtype: "float32", shape: [1, 16, 8, 8], data: new Float32Array(1024) } }),
      "noise",
      /2 noise tensors/,
    ],
  ];
  it.each(refused)("%s", async (_, options, option, message) => {
    const work = shapes.generate({ prompt: "x", ...options() } as GenerateOptions);
    await expect(work).rejects.toThrow(message);
    await expect(work).rejects.toBeInstanceOf(OptionError);
    await expect(work).rejects.toMatchObject({ option });
  });

  it("animated, damaged and monstrous pictures", async () => {
    const frames = await Promise.all(
      ["#f00", "#00f"].map((background) =>
        sharp({ create: { width: 8, height: 8, channels: 3, background } })
          .png()
          .toBuffer(),
      ),
    );
    for (const format of ["gif", "webp"] as const) {
      const animated = await sharp(frames, { join: { animated: true } })
        .toFormat(format)
        .toBuffer();
      await expect(shapes.generate({ prompt: "x", image: animated })).rejects.toThrow(
        /still picture for image.*2 frames/,
      );
      await expect(shapes.generate({ prompt: "x", image: frames[0], mask: animated })).rejects.toThrow(
        /still picture for mask/,
      );
    }
    const photo = await sharp({
      create: {
        width: 400,
        height: 400,
        channels: 3,
        background: "#123",
        noise: { type: "gaussian", mean: 128, sigma: 30 },
      },
    })
      .jpeg()
      .toBuffer();
    await expect(shapes.generate({ prompt: "x", image: photo.subarray(0, photo.length >> 1) })).rejects.toThrow(
      /cannot be read/,
    );
    const bomb = await sharp({ create: { width: 11000, height: 10000, channels: 3, background: "#000" } })
      .png()
      .toBuffer();
    writeFileSync(path.join(folder, "bomb.png"), bomb);
    await expect(shapes.generate({ prompt: "x", image: path.join(folder, "bomb.png") })).rejects.toThrow(
      /100 megapixels.*pixel limit/,
    );
  });
});
