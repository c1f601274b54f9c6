// Skip-layer guidance against diffusers' pipeline (test/fixtures/README.md), through the public API of the built package.
import { FlowTurbo, type GenerateOptions, OptionError } from "flowturbo";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { fixture, fixtureNames, readAll, relativeError } from "../support/fixtures.js";
import { withValues } from "../support/with-values.js";

const prompts = ["a red circle above a small blue square", "the photo of a café, 3 dogs & a cat's bowl!"];
const common = { negativePrompt: "blurry, low quality", height: 48, width: 32, maxSequenceLength: 32 };
const interval = { scale: 2.8, start: 0.01, stop: 0.5 };

/** Runs of the references, with how many rows of the network each picture takes. */
const runs: Record<string, { readonly options: Partial<GenerateOptions>; readonly rows: number }> = {
  slg: { options: { sampler: "euler", steps: 8, skipLayers: { layers: [1], ...interval } }, rows: 16 + 3 },
  slg_dpmpp: {
    options: { sampler: "dpmpp_2m", steps: 8, skipLayers: { layers: [2, 0], scale: 1.7, start: 0.1, stop: 0.8 } },
    rows: 16 + 6,
  },
};

describe.each(fixtureNames)("%s", (name) => {
  let model: FlowTurbo;
  beforeAll(async () => {
    model = await FlowTurbo.load(fixture(name, "model"));
  });
  afterAll(() => model?.dispose());

  it.each(Object.entries(runs))("%s", async (file, { options, rows }) => {
    const reference = await readAll(fixture(name, `${file}.safetensors`));
    const noise = reference.noise!;
    const prompt = prompts.slice(0, noise.shape[0]);
    const result = await withValues(model, { ...common, ...options, prompt, noise });
    expect(relativeError(result.latents, reference.latents!)).toBeLessThan(1e-5);
    expect(relativeError(result.pixels, reference.image!)).toBeLessThan(1e-5);
    expect(result.evaluations.rows).toBe(rows);
  });

  it("is nothing at scale 0", async () => {
    const options = { ...common, prompt: "x", seed: 5, steps: 8, include: ["latents"] as const };
    const plain = await model.generate(options);
    const zero = await model.generate({ ...options, skipLayers: { layers: [1], ...interval, scale: 0 } });
    expect(zero.latents).toEqual(plain.latents);
    expect(zero.images[0]!.parameters.skipLayers).toBeUndefined();
  });

  it("is drawn again from what a picture says", async () => {
    const skipLayers = { layers: [2, 1, 1], ...interval };
    const first = await model.generate({ ...common, prompt: "x", seed: 5, steps: 6, skipLayers });
    const { parameters } = first.images[0]!;
    expect(parameters.skipLayers).toEqual({ layers: [1, 2], ...interval });
    const again = await model.generate({
      ...{ ...common, prompt: "x", seed: 5, steps: 6 },
      skipLayers: parameters.skipLayers as typeof skipLayers,
    });
    expect(again.images[0]!.data).toEqual(first.images[0]!.data);
  });

  it("is of all schedules that a time limit chooses among, or of none", async () => {
    const options = { ...common, prompt: "x", seed: 5, skipLayers: { layers: [1] }, deadlineMs: 1 };
    const error = await model.generate({ ...options, ladder: ["E4", "E6", "E8"] }).catch((reason) => reason);
    // Those of four steps have none with the usual interval.
    expect(error).toMatchObject({ code: "ERR_FLOWTURBO_DEADLINE_IMPOSSIBLE", blocks: "E6" });
    const refused = await model.generate({ ...options, ladder: ["E3", "E4"] }).catch((reason) => reason);
    expect(refused).toMatchObject({ option: "skipLayers", message: expect.stringContaining("no guided step") });
  });

  it("what does not fit is named", async () => {
    const refused: [Partial<GenerateOptions>, RegExp][] = [
      [
        { skipLayers: { layers: [3] } },
        /from 0 to 2 for skipLayers\.layers, since the transformer has 3, .*received 3/,
      ],
      [{ skipLayers: { layers: [] } }, /for skipLayers\.layers but received \[\]/],
      [{ skipLayers: { layers: [1], start: 0.5, stop: 0.5 } }, /skipLayers\.start \(0\.5\) below skipLayers\.stop/],
      [{ skipLayers: { layers: [1] }, guidanceScale: 1 }, /guidanceScale above 1, or leave out skipLayers/],
      [{ skipLayers: { layers: [1] }, steps: 4 }, /no guided step .* of 4 steps, .* between 0\.04 and 0\.8 have it/],
      [{ skipLayers: { layers: [1], stop: 0.5 }, steps: 10, guidanceStart: 0.5 }, /no guided step/],
      [
        { skipLayers: { layers: [1], start: 0, stop: 1 }, image: fixture("sd3", "init.png"), strength: 1e-110 },
        /this strength leaves none; give a larger strength/,
      ],
      [{ skipLayers: { layers: [1] }, steps: 3 }, /between 0\.03 and 0\.6 have it/],
    ];
    for (const [options, message] of refused) {
      const error = await model.generate({ prompt: "x", ...common, ...options }).catch((reason) => reason);
      expect(error).toBeInstanceOf(OptionError);
      expect(error).toMatchObject({ option: "skipLayers", message: expect.stringMatching(message) });
    }
  });
});
