// Against diffusers' results, through the public API of the built package.
import { FlowTurbo, type GenerateOptions } from "flowturbo";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { fixture, fixtureNames, readAll, relativeError } from "../support/fixtures.js";
import { withValues } from "../support/with-values.js";

const prompts = ["a red circle above a small blue square", "the photo of a café, 3 dogs & a cat's bowl!"];

/** How each reference result was made (test/fixtures/README.md). */
const runs: Record<string, Partial<GenerateOptions>> = {
  euler_64: { sampler: "euler", steps: 6 },
  euler_128x96_b2: { sampler: "euler", steps: 4, guidanceScale: 3, height: 128, width: 96 },
  euler_noguidance: { sampler: "euler", steps: 5, guidanceScale: 1 },
  turbo_heun: { sampler: "heun", steps: 4 },
  turbo_h1p4: { blocks: "H1P4" },
  turbo_p3: { blocks: "PPP", guidanceScale: 3, height: 96 },
  turbo_h1p2r2: { blocks: "HPPRR" },
  turbo_h2p2r1_noguidance: { blocks: "H2P2R1", guidanceScale: 1 },
};

/** The issue asks for 5e-5 of the largest value; the two implementations differ by rounding alone, ten times less. */
const tolerance = 1e-5;

describe.each(fixtureNames)("%s", (name) => {
  let model: FlowTurbo;
  beforeAll(async () => {
    model = await FlowTurbo.load(fixture(name, "model"));
  });
  afterAll(() => model?.dispose());

  it.each(Object.entries(runs))("%s", async (file, options) => {
    const reference = await readAll(fixture(name, `${file}.safetensors`));
    const noise = reference.noise!;
    const result = await withValues(model, {
      prompt: prompts.slice(0, noise.shape[0]),
      negativePrompt: "blurry, low quality",
      width: 64,
      height: 64,
      maxSequenceLength: 32,
      ...options,
      noise,
    });
    expect(relativeError(result.latents, reference.latents!)).toBeLessThan(tolerance);
    expect(relativeError(result.pixels, reference.image!)).toBeLessThan(tolerance);
    expect(result.images).toHaveLength(noise.shape[0]!);
  });
});

it("draws the embedded model's reference pictures", async () => {
  const reference = await readAll(fixture("shapes/reference.safetensors"));
  await using model = await FlowTurbo.load();
  const result = await withValues(model, {
    prompt: [
      "a large red square",
      "a large purple circle",
      "a yellow triangle",
      "a large orange square on a black background",
      "a red circle above a blue square",
      "a small white triangle left of a green circle",
      "a large white circle on a blue background",
      "an orange square right of a small black circle on a yellow background",
    ],
    blocks: "HPPPPPRR",
    guidanceScale: 2,
    seed: 100,
  });
  expect(relativeError(result.latents, reference.latents!)).toBeLessThan(5e-5);
  // The decoder of this model draws edges of one pixel: it multiplies a difference of the latents by about five.
  expect(relativeError(result.pixels, reference.image!)).toBeLessThan(2e-4);
});
