// LoRAs of load: pictures against those of diffusers (test/fixtures/README.md), through the public API of the built package, and what else follows from them.
import { copyFile, cp, mkdir, mkdtemp, readdir, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import path from "node:path";
import { compileEngines, FlowTurbo, type GenerateOptions, type LoadOptions, OptionError } from "flowturbo";
import sharp from "sharp";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { distilledOf, openCheckpoint, writeSafetensors } from "../../lib/checkpoint/index.js";
import type { FloatTensor } from "../../lib/common/tensor.js";
import { examineAdapters } from "../../lib/generation/examine-adapters.js";
import { namedLoras, withMergedLoras } from "../../lib/generation/loras.js";
import { fixture, fixtureNames, readAll, relativeError } from "../support/fixtures.js";
import { modelWith, scaledT5 } from "../support/quantised.js";
import { withValues } from "../support/with-values.js";

process.env.ORT_DISABLE_TELEMETRY = "1";

type LoraSource = NonNullable<LoadOptions["loras"]>[number];

let folder: string;
let cache: string;
beforeAll(async () => {
  folder = await mkdtemp(path.join(tmpdir(), "flowturbo-loras-"));
  cache = path.join(folder, "cache");
});
afterAll(() => rm(folder, { recursive: true, force: true }));

const drawn: GenerateOptions = {
  ...{ prompt: "a red circle above a small blue square", negativePrompt: "blurry, low quality" },
  ...{ width: 32, height: 48, sampler: "euler", steps: 4, guidanceScale: 4.5, maxSequenceLength: 32 },
};

/** A picture with LoRAs, from a reference's noise. */
async function draw(model: string, loras: readonly LoraSource[], reference: string, options: LoadOptions = {}) {
  const { noise } = await readAll(reference);
  await using loaded = await FlowTurbo.load(model, {
    ...{ runtime: "onnxruntime", cache, measureCosts: false, distilled: false, threads: 1 },
    ...options,
    ...(loras.length > 0 && { loras }),
  });
  return withValues(loaded, { ...drawn, noise: noise! });
}

describe.each(fixtureNames)("%s", (name) => {
  const adapter = (file: string) => fixture(name, "adapters", `${file}.safetensors`);
  const result = (file: string) => fixture(name, `${file}.safetensors`);

  it.each<[string, readonly [string, number][], string]>([
    ["diffusers' names", [["lora_a", 0.7]], "lora_a"],
    ["sd-scripts' names", [["lora_a.kohya", 0.7]], "lora_a"],
    ["OneTrainer's names", [["lora_a.onetrainer", 0.7]], "lora_a"],
    ["diffusers' names, alphas in the metadata", [["lora_b", 0.7]], "lora_b"],
    ["sd-scripts' names, one matrix for q, k and v", [["lora_b.kohya", 0.7]], "lora_b"],
    ["text encoders", [["lora_te", 0.7]], "lora_te"],
    ["text encoders in sd-scripts' names", [["lora_te.kohya", 0.7]], "lora_te"],
    [
      "two at once",
      [
        ["lora_a", 0.7],
        ["lora_b", 0.4],
      ],
      "lora_ab",
    ],
    [
      "two at once, in sd-scripts' names",
      [
        ["lora_b.kohya", 0.4],
        ["lora_a.kohya", 0.7],
      ],
      "lora_ab",
    ],
    ["all layers of the transformer and of CLIP", [["lora_all", 0.6]], "lora_all"],
  ])("%s", async (_, loras, reference) => {
    // The sum is rounded to the weights' 16 bits, where the reference keeps it in float32: see the next test for that.
    const inFloat32 = await float32Model(name);
    const sources = loras.map(([file, scale]) => ({ file: adapter(file), scale }));
    const { latents, pixels } = await draw(inFloat32, sources, result(reference));
    const expected = await readAll(result(reference));
    expect(relativeError(latents, expected.latents!)).toBeLessThan(5e-5);
    expect(relativeError(pixels, expected.image!)).toBeLessThan(5e-5);
  });

  it("a scale of 0 gives the bits of none, and nothing is written", async () => {
    const own = path.join(folder, `cache-${name}`);
    const none = await draw(fixture(name, "model"), [], result("lora_a"), { cache: own });
    const zero = [
      { file: adapter("lora_a"), scale: 0 },
      { file: adapter("lora_te"), scale: 0 },
    ];
    const { latents } = await draw(fixture(name, "model"), zero, result("lora_a"), { cache: own });
    expect(latents).toEqual(none.latents);
    expect(await readdir(path.join(own, "weights")).catch(() => [])).toEqual([]);
  });

  it("stored weights are as near as their type lets them be", async () => {
    const { latents } = await draw(fixture(name, "model"), [{ file: adapter("lora_a"), scale: 0.7 }], result("lora_a"));
    const { latents: expected } = await readAll(result("lora_a"));
    expect(relativeError(latents, expected!)).toBeLessThan({ sd3: 5e-3, medium: 3e-2, large: 5e-5 }[name]);
  });
});

/** A copy of a fixture whose weights are stored in float32, so that sums are as exact as the reference's. */
async function float32Model(name: (typeof fixtureNames)[number]): Promise<string> {
  if (name === "large") return fixture(name, "model");
  const to = path.join(folder, `${name}-float32`);
  const made = await mkdir(to).then(
    () => true,
    () => false,
  );
  if (!made) return to;
  await cp(fixture(name, "model"), to, { recursive: true });
  for (const part of ["transformer", "text_encoder", "text_encoder_2"])
    for (const file of await readdir(path.join(to, part)))
      if (file.endsWith(".safetensors")) await rewritten(path.join(to, part, file));
  return to;
}

async function rewritten(file: string): Promise<void> {
  await writeSafetensors(file, await readAll(file));
}

describe("a model with LoRAs", () => {
  const adapter = (file: string) => fixture("medium", "adapters", `${file}.safetensors`);

  it("from one file, whose halves are the other way round, draws what the folder draws", async () => {
    const single = fixture("medium", "single/full.safetensors");
    const base = fixture("medium", "model");
    for (const file of ["lora_b.kohya", "lora_all"]) {
      const sources = [{ file: adapter(file), scale: 0.7 }];
      const own = await draw(single, sources, fixture("medium", "lora_b.safetensors"), { base });
      const whole = await draw(base, sources, fixture("medium", "lora_b.safetensors"));
      expect(relativeError(own.latents, whole.latents)).toBeLessThan(1e-6);
    }
  });

  it("has T5 in 8 bits beside them, stored so or quantised at load", async () => {
    const model = await modelWith(path.join(folder, "eight"), "medium", "text_encoder_3/model.safetensors", scaledT5);
    const sources = [{ file: adapter("lora_a"), scale: 0.7 }];
    for (const options of [{}, { t5Weights: "int8" }] as const) {
      const place = "t5Weights" in options ? fixture("medium", "model") : model;
      const { latents } = await draw(place, sources, fixture("medium", "lora_a.safetensors"), options);
      const { latents: expected } = await readAll(fixture("medium", "lora_a.safetensors"));
      expect(relativeError(latents, expected!)).toBeLessThan(0.2);
    }
  });

  it("names them in its pictures, and writes no path", async () => {
    const sources = [
      { file: adapter("lora_a"), scale: 0.7 },
      { file: adapter("lora_te"), name: "words" },
      { file: adapter("lora_b"), scale: 0 },
    ];
    const { images } = await draw(fixture("medium", "model"), sources, fixture("medium", "lora_a.safetensors"));
    const { comments = [] } = await sharp(await images[0]!.encode("png")).metadata();
    const text = comments.find(({ keyword }) => keyword === "parameters")!.text;
    expect(JSON.parse(text).mergedLoras).toEqual([
      { name: "lora_a", scale: 0.7 },
      { name: "words", scale: 1 },
    ]);
    expect(text).not.toContain(`${path.sep}adapters`);
  });

  it("is taken for a distilled one by a LoRA's name, with the steps in it", async () => {
    const checkpoint = await openCheckpoint(fixture("medium", "model"));
    const named = async (name: string, scale = 1) => {
      const file = path.join(folder, `${name}.safetensors`);
      await cp(adapter("lora_a"), file);
      const merged = await withMergedLoras(checkpoint, await namedLoras([{ file, scale }]), cache, {});
      return distilledOf(merged);
    };
    expect(await named("lora_sd3.5m_turbo_8steps")).toEqual({
      ...{ steps: 8, reason: 'the name "lora_sd3.5m_turbo_8steps" says "turbo"' },
    });
    expect(await named("sd3.5m-turbo-4step")).toMatchObject({ steps: 4 });
    expect(await named("sd3.5-turbo")).toMatchObject({ steps: 8 });
    expect(await named("Hyper-SD3-8steps-CFG")).toBeNull();
    expect(await named("other_turbo_8steps", 0)).toBeNull();
    await using loaded = await FlowTurbo.load(fixture("medium", "model"), {
      ...{ runtime: "onnxruntime", cache, measureCosts: false },
      loras: [{ file: path.join(folder, "sd3.5m-turbo-4step.safetensors") }],
    });
    expect(loaded.defaults).toMatchObject({ distilled: true, sampler: "euler", steps: 4, guidanceScale: 1 });
  });

  it("has no engines of its own for dynamic ones: they are refused, and the rank is asked for", async () => {
    const loras = [{ file: adapter("lora_a"), dynamic: true }];
    const error = await compileEngines(fixture("medium", "model"), { loras }).catch((reason) => reason);
    expect(error).toBeInstanceOf(OptionError);
    expect(error).toMatchObject({ option: "loras", message: expect.stringMatching(/is dynamic.*give lorasRank/) });
  });

  it("may have one whose matrices are zero, which doctor says", async () => {
    const file = path.join(folder, "fresh.safetensors");
    const values = await readAll(adapter("lora_a"));
    const zero = Object.entries(values).map(([name, tensor]): [string, FloatTensor] => [
      name,
      name.includes("lora_B") ? { ...tensor, data: new Float32Array(tensor.data.length) } : tensor,
    ]);
    await writeSafetensors(file, Object.fromEntries(zero));
    const loras = [{ file, dynamic: true }, { file: adapter("lora_a") }];
    const found = await examineAdapters(fixture("medium", "model"), { loras });
    expect(found.map(({ about }) => about)).toEqual([
      "all of its matrices are zero, so that it changes nothing",
      expect.stringMatching(/^rank 4; \d+ layers of the transformer$/),
    ]);
    const none = await draw(fixture("medium", "model"), [], fixture("medium", "lora_a.safetensors"));
    const { latents } = await draw(fixture("medium", "model"), [{ file }], fixture("medium", "lora_a.safetensors"));
    expect(latents).toEqual(none.latents);
  });

  it("is not called usable by doctor where load would refuse its name", async () => {
    const inFolder = path.join(folder, "other");
    await mkdir(inFolder);
    await copyFile(adapter("lora_a"), path.join(inFolder, "style.safetensors"));
    const controlNets = [1, 2].map(() => ({ folder: fixture("medium", "controlnet"), name: "edges" }));
    const loras = [{ file: adapter("lora_b"), name: "style" }, { file: inFolder }];
    const found = await examineAdapters(fixture("medium", "model"), { loras, controlNets });
    expect(found.map(({ name, fits }) => [name, fits])).toEqual([
      ["style", true],
      ["style", false],
      ["edges", true],
      ["edges", false],
    ]);
    expect(found[1]!.reason).toMatch(/Two LoRAs .* "style": .*lora_b.* and .*other/);
    expect(found[3]!.reason).toMatch(/Two ControlNets are called "edges"/);
    const long = path.join(folder, "edges".repeat(30));
    await cp(fixture("medium", "controlnet"), long, { recursive: true });
    const named = await examineAdapters(fixture("medium", "model"), { controlNets: [{ folder: long }] });
    expect(named[0]!.reason).toMatch(/no request can name it. Give it a name/);
    await expect(
      FlowTurbo.load(fixture("medium", "model"), { cache, controlNets: [{ folder: long }] }),
    ).rejects.toThrow(named[0]!.reason!);
  });

  it("refuses two of one name before anything is merged, and what is no LoRA of the model", async () => {
    const own = path.join(folder, "refused");
    const load = (loras: LoraSource[]) => FlowTurbo.load(fixture("medium", "model"), { cache: own, loras });
    const twice = await load([{ file: adapter("lora_a") }, { file: adapter("lora_b"), name: "lora_a" }]).catch(
      (e) => e,
    );
    expect(twice).toBeInstanceOf(OptionError);
    expect(twice).toMatchObject({
      option: "loras",
      message: expect.stringMatching(/Two LoRAs of loras have the name "lora_a"/),
    });
    expect(twice.publicMessage).not.toContain(path.sep);
    await expect(load([{ file: adapter("lora_a") }, { file: fixture("medium", "noise.safetensors") }])).rejects.toThrow(
      /noise.safetensors is no LoRA/,
    );
    const long = path.join(folder, `${"style".repeat(30)}.safetensors`);
    await copyFile(adapter("lora_a"), long);
    await expect(load([{ file: long, dynamic: true }])).rejects.toThrow(/no request can name it. Give it a name/);
    await expect(namedLoras([{ file: long }, { file: long, name: "style", dynamic: true }])).resolves.toHaveLength(2);
    expect(await readdir(own).catch(() => [])).toEqual([]);
  });
});
