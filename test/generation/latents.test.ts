// Latents out: after each step, as diffusers gives them to its callbacks, and in place of pictures.
import { FlowTurbo, type GenerateOptions, OptionError, type StepEvent } from "flowturbo";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { float32 } from "../../lib/common/tensor.js";
import { fixture, readAll, relativeError } from "../support/fixtures.js";

const prompts = ["a red circle above a small blue square", "the photo of a café, 3 dogs & a cat's bowl!"];
const given = { negativePrompt: "blurry, low quality", maxSequenceLength: 32, sampler: "euler" } as const;
const original = fixture("medium/init.png");
const mask = fixture("medium/mask.png");

async function watched(model: FlowTurbo, options: GenerateOptions) {
  const events: StepEvent[] = [];
  const result = await model.generate({ ...options, onStep: (event) => events.push(event) });
  return { result, events };
}

describe("the latents after each step", () => {
  let model: FlowTurbo;
  beforeAll(async () => {
    model = await FlowTurbo.load(fixture("medium/model"), { measureCosts: false });
  });
  afterAll(() => model.dispose());

  const edit = { width: 64, height: 64, image: original, mask, strength: 0.6, steps: 10 };
  it.each<[string, Partial<GenerateOptions>]>([
    ["euler_64", { width: 64, height: 64, steps: 6 }],
    ["euler_128x96_b2", { width: 96, height: 128, steps: 4, guidanceScale: 3 }],
    ["inpaint", edit],
    ["euler_64", { width: 64, height: 64, steps: 6, preview: "fast" }],
    ["inpaint", { ...edit, preview: "decoded", previewCount: 2 }],
  ])("are diffusers': %s", async (name, options) => {
    const { noise } = await readAll(fixture(`medium/${name}.safetensors`));
    const steps = (await readAll(fixture("medium/steps.safetensors")))[name]!;
    const prompt = prompts.slice(0, noise!.shape[0]);
    const { result, events } = await watched(model, {
      ...{ ...given, ...options, prompt, noise: noise!, stepLatents: true, include: ["latents"] },
    });
    expect(events).toHaveLength(steps.shape[0]!);
    const each = steps.data.length / events.length;
    for (const [index, { step, latents, previews }] of events.entries()) {
      expect(step).toBe(index);
      expect(latents!.shape).toEqual(steps.shape.slice(1));
      const expected = float32(latents!.shape, steps.data.slice(index * each, (index + 1) * each));
      expect(relativeError(latents!, expected)).toBeLessThan(1e-5);
      if (options.preview === "fast") expect(previews).toHaveLength(prompt.length);
    }
    expect(events.at(-1)!.latents).toEqual(result.latents);
  });

  it("are those of each stage", async () => {
    const { noise, noise_2, stage_1_latents } = await readAll(fixture("medium/stages.safetensors"));
    const stages = [
      { width: 64, height: 64, blocks: "HPPR" },
      { width: 128, height: 128, blocks: "HP", sigma: 0.6 },
    ];
    const { sampler: _, ...options } = { ...given, stages, noise: [noise!, noise_2!] };
    const { result, events } = await watched(model, {
      ...{ ...options, prompt: prompts[0]!, stepLatents: true, include: ["latents"] },
    });
    expect(relativeError(events[3]!.latents!, stage_1_latents!)).toBeLessThan(1e-5);
    expect(events.map(({ latents }) => latents!.shape[2])).toEqual([8, 8, 8, 8, 16, 16]);
    expect(events.at(-1)!.latents).toEqual(result.latents);
  });
});

describe("with the embedded model", () => {
  let model: FlowTurbo;
  beforeAll(async () => {
    model = await FlowTurbo.load(undefined, { measureCosts: false });
  });
  afterAll(() => model.dispose());
  const small = { prompt: "a red circle", width: 32, height: 32, seed: 5 } as const;
  const picture = { width: 32, height: 32, data: new Uint8Array(3 * 32 * 32).fill(90) };
  const half = { ...picture, data: picture.data.map((_, i) => ((i / 3) % 32 < 16 ? 0 : 255)) };

  it.each<[string, Partial<GenerateOptions>]>([
    ["H, P and R", { blocks: "H1P2R2" }],
    ["C", { blocks: "E2C2" }],
    ["S", { blocks: "E3S1" }],
    ["unipc", { sampler: "unipc", steps: 4 }],
    ["dpmpp_2m, partly guided", { sampler: "dpmpp_2m", steps: 4, guidanceStop: 0.5 }],
    ["CFG-Zero*", { steps: 4, guidanceMode: "cfg_zero" }],
    ["an edit of three pictures", { steps: 4, image: picture, mask: half, keepOriginal: false, count: 3 }],
  ])("the last are the result's, and previews are of the same step: %s", async (_, options) => {
    const both = { ...small, ...options, include: ["latents"] } as const;
    const { result, events } = await watched(model, { ...both, stepLatents: true, preview: "fast" });
    expect(events.at(-1)!.latents).toEqual(result.latents);
    expect(new Set(events.map(({ latents }) => latents!.data.join())).size).toBe(events.length);
    const without = await watched(model, both);
    expect(without.events.map(({ step, latents }) => [step, latents])).toEqual(events.map(({ step }) => [step, null]));
  });

  it("are lost by an event that is overtaken", async () => {
    const seen: boolean[] = [];
    const onStep = async ({ step, latents }: StepEvent) => {
      seen.push(latents !== null);
      if (step === 0) await new Promise((resolve) => setTimeout(resolve, 500));
    };
    await model.generate({ ...small, steps: 4, stepLatents: true, onStep });
    expect(seen).toEqual([true, false, false, true]);
  });

  /** Launches of a call by graph, as the statistics count them. */
  async function launchesOf(options: GenerateOptions) {
    const counts = () =>
      Object.entries(model.stats().milliseconds.launches).map(([name, { count }]) => [name, count] as const);
    const before = new Map(counts());
    const result = await model.generate(options);
    const launches = counts().map(([name, count]) => [name, count - (before.get(name) ?? 0)] as const);
    return { result, launches: Object.fromEntries(launches.filter(([, count]) => count > 0)) };
  }

  it('outputType "latent" leaves out the decoder', async () => {
    const options = { ...small, sampler: "euler", steps: 3, count: 2 } as const;
    const drawn = await model.generate({ ...options, include: ["latents", "pixels"] });
    const { result, launches } = await launchesOf({ ...options, outputType: "latent" });
    expect(Object.keys(launches)).toEqual(["predict.guidance"]);
    expect(result.latents).toEqual(drawn.latents);
    expect([result.images, result.pixels, result.timings.decode]).toEqual([[], null, 0]);
    expect(result).toMatchObject({ seeds: [5, 6], width: 32, height: 32, blocks: "E3" });
    // Of an edit, too, whether or not a part is kept as pixels.
    const edited = { ...options, image: picture, mask: half, outputType: "latent" } as const;
    const kept = await launchesOf(edited);
    expect(kept.launches).not.toHaveProperty("vae_decoder");
    expect((await model.generate({ ...edited, keepOriginal: false })).latents).toEqual(kept.result.latents);
  });

  it('outputType "latent" is refused with pixels', async () => {
    const wrong = model.generate({ ...small, outputType: "latent", include: ["pixels"] });
    await expect(wrong).rejects.toBeInstanceOf(OptionError);
    await expect(wrong).rejects.toMatchObject({ option: "include", message: expect.stringMatching(/leave "pixels"/) });
  });
});
