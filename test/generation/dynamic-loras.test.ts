// Adapters that each request names, against diffusers' results with unfused adapters, through the public API of the built package.
import { FlowTurbo, type GenerateOptions, OptionError } from "flowturbo";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
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
