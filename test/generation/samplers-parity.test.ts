// Samplers, noise levels and guidance as diffusers 0.42 has them, against its results (test/fixtures/README.md), through the public
// API of the built package.
import { mkdir, mkdtemp, readdir, readFile, rm, symlink, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import path from "node:path";
import { FlowTurbo, type GenerateOptions, OptionError } from "flowturbo";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { fixture, fixtureNames, readAll, relativeError } from "../support/fixtures.js";
import { withValues } from "../support/with-values.js";

const prompts = ["a red circle above a small blue square", "the photo of a café, 3 dogs & a cat's bowl!"];
const given = [1, 0.9, 0.7, 0.4, 0.15];
const small = { height: 48, width: 32 };
const euler = { ...small, sampler: "euler" } as const;

const runs: Record<string, Partial<GenerateOptions>> = {
  dpmpp_2m: { sampler: "dpmpp_2m", steps: 8 },
  unipc: { sampler: "unipc", steps: 8 },
  sigmas_explicit: { ...euler, sigmas: given },
  sigmas_explicit_shift1: { ...euler, sigmas: [...given, 0], shift: 1 },
  grid_beta: { ...euler, steps: 6, grid: "beta" },
  grid_karras: { ...euler, steps: 6, grid: "karras" },
  grid_exponential: { ...euler, steps: 6, grid: "exponential" },
  cfg_zero: { ...euler, steps: 6, guidanceMode: "cfg_zero" },
  guidance_interval: { ...euler, steps: 10, guidanceStart: 0.1, guidanceStop: 0.6 },
};

/** The same by a list of scales: steps 1 to 5 of ten. */
const listed = { ...euler, steps: 10, guidanceScale: [1, 4.5, 4.5, 4.5, 4.5, 4.5, 1, 1, 1, 0] };

async function compare(model: FlowTurbo, name: string, file: string, options: Partial<GenerateOptions>) {
  const reference = await readAll(fixture(name, `${file}.safetensors`));
  const noise = reference.noise!;
  const result = await withValues(model, {
    prompt: prompts.slice(0, noise.shape[0]),
    ...{ negativePrompt: "blurry, low quality", width: 64, height: 64, maxSequenceLength: 32 },
    ...options,
    noise,
  });
  expect(relativeError(result.latents, reference.latents!)).toBeLessThan(1e-5);
  expect(relativeError(result.pixels, reference.image!)).toBeLessThan(1e-5);
  return { result, reference };
}

describe.each(fixtureNames)("%s", (name) => {
  let model: FlowTurbo;
  beforeAll(async () => {
    model = await FlowTurbo.load(fixture(name, "model"));
  });
  afterAll(() => model?.dispose());

  it.each(Object.entries(runs))("%s", async (file, options) => {
    const { result, reference } = await compare(model, name, file, options);
    const levels = [...reference.sigmas!.data];
    // CFG-Zero* leaves out the first step, and its level.
    const expected = file === "cfg_zero" ? levels.slice(1) : levels;
    expect(result.sigmas).toHaveLength(expected.length);
    for (const [index, sigma] of result.sigmas.entries()) expect(sigma).toBeCloseTo(expected[index]!, 6);
  });

  it("an interval by a list of scales, in fewer rows", async () => {
    const { result } = await compare(model, name, "guidance_interval", listed);
    expect(result.evaluations).toEqual({ predictor: 10, refiner: 0, rows: 15 });
  });

  it("what does not fit is named", async () => {
    const refused: [Partial<GenerateOptions>, string, RegExp][] = [
      [{ steps: 4, guidanceScale: [4, 1] }, "guidanceScale", /or 4 \(one for each step\).*received 2/],
      [{ steps: 4, sigmas: [1, 0.5] }, "sigmas", /Expected 4 sigmas.*received 2/],
      [{ sigmas: [1, 0.5, 0.6] }, "sigmas", /number 3, 0.6, is not below number 2, 0.5/],
      [{ sigmas: [1.2, 0.5] }, "sigmas", /from 1 to 0/],
      [{ sigmas: [0] }, "sigmas", /begin above 0/],
      [{ sigmas: [1, 0.5], grid: "beta" }, "sigmas", /Both sigmas and grid/],
      [{ guidanceStart: 0.5, guidanceStop: 0.5 }, "guidanceStart", /below guidanceStop/],
      [{ guidanceMode: "cfg_zero", steps: 1 }, "guidanceMode", /at least 2/],
      [{ guidanceMode: "cfg_zero", blocks: "H1R1" }, "blocks", /first block of "H1R1" is left out/],
      [{ quality: "fast", steps: 3 }, "quality", /Both quality and steps/],
      [{ quality: "fast", sampler: "euler" }, "quality", /of the sampler flowturbo/],
      [{ mu: 1 }, "mu", /does not shift by size/],
      [{ blocks: "E1S1" }, "blocks", /S \(skip\) as block 2, which needs the velocities of 2 evaluations/],
      [{ guidanceScale: [2, 2], deadlineMs: 1000 }, "guidanceScale", /time limit leaves open/],
    ];
    for (const [options, option, message] of refused) {
      const error = await model.generate({ prompt: "x", ...small, ...options }).catch((reason) => reason);
      expect(error).toBeInstanceOf(OptionError);
      expect(error).toMatchObject({ option, message: expect.stringMatching(message) });
    }
  });
});

describe.each(fixtureNames)("%s with a scheduler that shifts by size", (name) => {
  let folder: string;
  /** The checkpoint with other values in its scheduler's config. */
  async function withScheduler(values: object, className?: string): Promise<FlowTurbo> {
    const own = path.join(folder, JSON.stringify([className, values]).replaceAll(/\W+/g, "-"));
    await mkdir(path.join(own, "scheduler"), { recursive: true });
    for (const entry of await readdir(fixture(name, "model")))
      if (entry !== "scheduler") await symlink(fixture(name, "model", entry), path.join(own, entry));
    const file = "scheduler/scheduler_config.json";
    const config = JSON.parse(await readFile(fixture(name, "model", file), "utf8"));
    await writeFile(path.join(own, file), JSON.stringify({ ...config, ...values }));
    if (className) {
      const index = JSON.parse(await readFile(fixture(name, "model", "model_index.json"), "utf8"));
      await rm(path.join(own, "model_index.json"));
      await writeFile(
        path.join(own, "model_index.json"),
        JSON.stringify({ ...index, scheduler: ["diffusers", className] }),
      );
    }
    return FlowTurbo.load(own);
  }
  beforeAll(async () => {
    folder = await mkdtemp(path.join(tmpdir(), "flowturbo-schedulers-"));
  });
  afterAll(() => rm(folder, { recursive: true }));

  it("by the size of the picture", async () => {
    await using model = await withScheduler({ use_dynamic_shifting: true });
    await compare(model, name, "grid_dynamic", { sampler: "euler", steps: 6 });
  });

  it("by a given parameter, linearly", async () => {
    await using model = await withScheduler({ use_dynamic_shifting: true, time_shift_type: "linear" });
    await compare(model, name, "grid_dynamic_linear", { ...euler, steps: 6, mu: 1.5 });
    await expect(model.generate({ prompt: "x", mu: 1, shift: 2 })).rejects.toThrow(/Both shift and mu/);
  });

  const flow = { use_flow_sigmas: true, prediction_type: "flow_prediction", flow_shift: 3, solver_order: 2 };

  it.each([
    ["unipc", "UniPCMultistepScheduler", { solver_order: 3 }],
    ["dpmpp_2m", "DPMSolverMultistepScheduler", { thresholding: true }],
  ] as const)("or is that of %s", async (sampler, className, other) => {
    await using model = await withScheduler(flow, className);
    await compare(model, name, sampler, { sampler, steps: 8 });
    // What its own sampler does not compute matters to no other.
    await using unsupported = await withScheduler({ ...flow, ...other }, className);
    const [[key, value]] = Object.entries(other) as [[string, unknown]];
    const asked = { prompt: "x", ...small, steps: 1 };
    await expect(unsupported.generate({ ...asked, sampler })).rejects.toThrow(
      new RegExp(`${className}, has ${key} ${value}, which the sampler "${sampler}" does not compute. Set ${key} to `),
    );
    await unsupported.generate(asked);
  });

  it("or spaces the noise levels", async () => {
    await using model = await withScheduler({ use_karras_sigmas: true });
    await compare(model, name, "grid_karras", { ...euler, steps: 6 });
  });
});
