// ControlNets against diffusers (test/fixtures/README.md), through the public API of the built package.
import { FlowTurbo, type GenerateOptions } from "flowturbo";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { fixture, fixtureNames, readAll, relativeError } from "../support/fixtures.js";
import { withValues } from "../support/with-values.js";

const prompts = ["a red circle above a small blue square", "the photo of a café, 3 dogs & a cat's bowl!"];
const common = {
  negativePrompt: "blurry, low quality",
  height: 64,
  width: 64,
  maxSequenceLength: 32,
  sampler: "euler",
} as const;
/** The two implementations differ by rounding alone. */
const tolerance = 1e-5;

const models = new Map<string, FlowTurbo>();
beforeAll(async () => {
  for (const name of fixtureNames)
    models.set(
      name,
      await FlowTurbo.load(fixture(name, "model"), {
        controlNets: [{ folder: fixture(name, "controlnet"), name: "lines" }],
      }),
    );
});
afterAll(async () => {
  for (const model of models.values()) await model.dispose();
});

type Run = readonly [
  file: string,
  model: (typeof fixtureNames)[number],
  options: (at: (file: string) => string) => Partial<GenerateOptions>,
];

const runs: readonly Run[] = [
  ...fixtureNames.map(
    (name): Run => [
      "controlnet",
      name,
      (at) => ({ steps: 6, controls: [{ folder: "lines", image: at("control.png"), scale: 0.8, stop: 0.7 }] }),
    ],
  ),
  // Two networks, each in steps of its own; the second one's table of positions has another size.
  [
    "control_two",
    "sd3",
    (at) => ({
      steps: 6,
      controls: [
        { folder: "lines", image: at("control.png"), scale: 0.8, stop: 0.7 },
        { folder: at("controlnet_own"), image: at("init.png"), scale: 0.5, start: 0.3 },
      ],
    }),
  ],
  [
    "control_inpaint",
    "sd3",
    (at) => ({
      steps: 6,
      controls: [{ folder: at("controlnet_mask"), image: at("init.png"), mask: at("mask_40.png"), scale: 0.9 }],
    }),
  ],
  // Of ten steps an edit leaves six; intervals are parts of ten.
  [
    "control_edit",
    "medium",
    (at) => ({
      ...{ steps: 10, image: at("init.png"), strength: 0.6 },
      controls: [{ folder: "lines", image: at("control.png"), scale: 0.8, start: 0.5, stop: 0.9 }],
    }),
  ],
  [
    "control_stages",
    "medium",
    (at) => ({
      ...{ sampler: undefined, width: undefined, height: undefined },
      stages: [
        { width: 64, height: 64, blocks: "HPR" },
        { width: 128, height: 128, blocks: "HP", sigma: 0.6 },
      ],
      controls: [{ folder: "lines", image: at("control.png"), scale: 0.8, stop: 0.8 }],
    }),
  ],
  [
    "control_skip",
    "medium",
    (at) => ({
      ...{ steps: 6, skipLayers: { layers: [1], scale: 2.8, start: 0.01, stop: 0.9 } },
      controls: [{ folder: "lines", image: at("control.png"), scale: 0.8, stop: 0.7 }],
    }),
  ],
  [
    "control_range",
    "large",
    (at) => ({
      steps: 4,
      controls: [{ folder: "lines", image: at("control.png"), scale: 0.8, pixelRange: "stability_canny" }],
    }),
  ],
];

describe("as diffusers draws with ControlNets", () => {
  it.each(runs)("%s of %s", async (file, name, options) => {
    const { noise, noise_2, ...reference } = await readAll(fixture(name, `${file}.safetensors`));
    const result = await withValues(models.get(name)!, {
      ...{ prompt: prompts[0], ...common, noise: noise_2 ? [noise!, noise_2] : noise },
      ...options((each) => fixture(name, each)),
    });
    expect(relativeError(result.latents, reference.latents!)).toBeLessThan(
      file === "control_stages" ? 5e-5 : tolerance,
    );
    expect(relativeError(result.pixels, reference.image!)).toBeLessThan(file === "control_stages" ? 5e-5 : tolerance);
  });
});
