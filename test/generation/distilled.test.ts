// Distilled checkpoints: how they are recognised, and what is drawn with where a request says nothing.
process.env.ORT_DISABLE_TELEMETRY = "1";

import { cp, mkdtemp, readFile, rm, symlink, writeFile } from "node:fs/promises";
import os from "node:os";
import path from "node:path";
import { FlowTurbo, type GenerateOptions, type LoadOptions, OptionError } from "flowturbo";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { distilledOf, openCheckpoint } from "../../lib/checkpoint/index.js";
import { settleRequest } from "../../lib/generation/request.js";
import { PromptEncoder } from "../../lib/generation/text.js";
import { GraphLibrary } from "../../lib/networks/library.js";
import { distilledDefaults, formatBlocks, parseBlocks } from "../../lib/schedule/index.js";
import { fixture, readAll, relativeError } from "../support/fixtures.js";
import { withValues } from "../support/with-values.js";

let folder: string;
beforeAll(async () => {
  folder = await mkdtemp(path.join(os.tmpdir(), "flowturbo-distilled-"));
});
afterAll(() => rm(folder, { recursive: true, force: true }));

type Json = Record<string, unknown>;

/** A copy of a fixture under another name. */
async function copy(from: string, name: string, edits: Record<string, (json: Json) => void> = {}): Promise<string> {
  const to = path.join(folder, name);
  await cp(fixture(from, "model"), to, { recursive: true });
  for (const [file, edit] of Object.entries(edits)) {
    const json = JSON.parse(await readFile(path.join(to, file), "utf8")) as Json;
    edit(json);
    await writeFile(path.join(to, file), JSON.stringify(json));
  }
  return to;
}

describe("is recognised", () => {
  const found = async (model: string, asked?: boolean) => distilledOf(await openCheckpoint(model), asked);

  it.each([
    ["large", "stable-diffusion-3.5-large-turbo", 4],
    ["medium", "stable-diffusion-3.5-medium-turbo", 8],
    ["large", "stable-diffusion-3.5-large-TurboX", 8],
    ["sd3", "flash-sd3", 4],
    [
      "large",
      "models--stabilityai--stable-diffusion-3.5-large-turbo/snapshots/ec07796fc06b096cc56de9762974a28f4c632eda",
      4,
    ],
  ])("%s as %s: %i steps", async (from, name, steps) => {
    expect(await found(await copy(from, name))).toMatchObject({ steps, reason: expect.stringMatching(/^the name "/) });
  });

  it("by what it was made of, and by its scheduler", async () => {
    const made = await copy("medium", "mine", {
      "model_index.json": (json) => {
        json._name_or_path = "tensorart/stable-diffusion-3.5-medium-turbo";
      },
    });
    expect(await found(made)).toEqual({
      ...{ steps: 8, reason: 'the name "stable-diffusion-3.5-medium-turbo" says "turbo"' },
    });
    const lcm = await copy("large", "mine-too", {
      "model_index.json": (json) => {
        json.scheduler = ["diffusers", "FlowMatchLCMScheduler"];
      },
    });
    expect(await found(lcm)).toEqual({
      ...{ steps: 4, reason: "its scheduler is FlowMatchLCMScheduler", isByScheduler: true },
    });
    expect(await found(lcm, false)).toBeNull();
  });

  it("behind a link with another name", async () => {
    const link = path.join(folder, "current");
    await symlink(await copy("large", "sd3.5l-lightning"), link, "junction");
    expect(await found(link)).toEqual({ steps: 4, reason: 'the name "sd3.5l-lightning" says "lightning"' });
  });

  it("not by parts of words, by folders above, or in the model that comes with the package", async () => {
    expect(await found(await copy("large", "turbo/turbocharged-hyper-flashes"))).toBeNull();
    expect(await found(fixture("large", "model"))).toBeNull();
    expect(await found(fixture("large", "model"), true)).toMatchObject({ steps: 4 });
    const embedded = await FlowTurbo.load(undefined, { runtime: "onnxruntime" });
    expect(embedded.defaults).toEqual({ distilled: false, sampler: "flowturbo", steps: 10, guidanceScale: 4.5 });
    await embedded.dispose();
  });
});

describe("draws by default", () => {
  let model: FlowTurbo;
  const notes: string[] = [];
  const options: LoadOptions = { runtime: "onnxruntime", logger: { info: (text) => notes.push(text) } };
  beforeAll(async () => {
    const cache = path.join(folder, "cache");
    model = await FlowTurbo.load(await copy("medium", "sd3.5m_turbo"), { ...options, cache });
  });
  afterAll(() => model?.dispose());
  const small = { prompt: "a red circle", width: 32, height: 32, seed: 1 };

  it("with Euler, its own steps and no guidance, which it says", async () => {
    expect(model.defaults).toEqual({ distilled: true, sampler: "euler", steps: 8, guidanceScale: 1 });
    expect(notes.filter((note) => note.includes("distilled"))).toEqual([
      expect.stringMatching(/since the name "sd3\.5m_turbo" says "turbo".*euler, 8 steps.*distilled: false/),
    ]);
    const result = await model.generate(small);
    expect([result.blocks, result.evaluations.rows]).toEqual(["E8", 8]);
    const parameters = { sampler: "euler", steps: 8, grid: "diffusers", guidanceScale: 1 };
    expect(result.images[0]!.parameters).toMatchObject(parameters);
  });

  it("what diffusers draws without guidance", async () => {
    const { noise, latents, image } = await readAll(fixture("medium", "euler_noguidance.safetensors"));
    const prompt = "a red circle above a small blue square";
    const size = { width: 64, height: 64, maxSequenceLength: 32 };
    const result = await withValues(model, { prompt, ...size, steps: 5, noise: noise! });
    expect(relativeError(result.latents, latents!)).toBeLessThan(5e-5);
    expect(relativeError(result.pixels, image!)).toBeLessThan(5e-5);
  });

  it("what a request says wins", async () => {
    const drawn = async (given: Partial<GenerateOptions>) => {
      const { blocks, evaluations } = await model.generate({ ...small, ...given });
      return [blocks, evaluations.rows];
    };
    expect(await drawn({ guidanceScale: 3, steps: 2 })).toEqual(["E2", 4]);
    expect(await drawn({ blocks: "H1P1" })).toEqual(["H1P1", 3]);
    expect(await drawn({ sampler: "flowturbo" })).toEqual(["U8", 8]);
    expect(await drawn({ sampler: "heun", steps: 2 })).toEqual(["H2", 4]);
    expect(await drawn({ sigmas: [1, 0.6, 0.3] })).toEqual(["E3", 3]);
    expect(await drawn({ quality: "fast" })).toEqual(["E4", 4]);
    await expect(drawn({ quality: "fast", sampler: "flowturbo" })).rejects.toThrow(/of the sampler euler/);
  });

  it("as fits a time limit, of its own numbers of steps", async () => {
    const result = await model.generate({ ...small, deadlineMs: 60_000, prefer: "quality" });
    expect(result.blocks).toBe("E8");
  });

  it("measures steps without guidance, and is not calibrated", async () => {
    const costs = await model.profile({ sizes: [{ width: 48, height: 48 }], batches: [1], rounds: 1 });
    const graphs = costs.entries.filter(({ size }) => size === "48x48").map(({ graph }) => graph);
    expect(graphs).toContain("predict");
    expect(graphs).not.toContain("predict.guidance");
    await expect(model.calibrate()).rejects.toThrow(OptionError);
    await expect(model.calibrate()).rejects.toThrow(/distilled: false/);
  });
});

it("has a ladder and qualities of its own", async () => {
  const request = async (options: Partial<GenerateOptions>, ladder: string[] | null = null) => {
    const checkpoint = await openCheckpoint(fixture("large", "model"));
    const facts = {
      ...{
        checkpoint,
        calibrated: [],
        defaults: distilledDefaults(4),
      },
      ladder: ladder?.map(parseBlocks) ?? null,
      text: new PromptEncoder(new GraphLibrary(checkpoint)),
      ...{ captured: false, pinBatch: null, allowPaths: false },
    };
    const { candidates, sampler } = settleRequest({ prompt: "x", ...options }, facts);
    return [sampler, ...candidates.map(({ stages: [stage] }) => formatBlocks(stage!.schedule.blocks))];
  };
  expect(await request({ deadlineMs: 1000 })).toEqual(["euler", "E8", "E6", "E4", "E3", "E2", "E1"]);
  expect(await request({ quality: "fast" })).toEqual(["euler", "E2"]);
  expect(await request({ quality: "balanced" })).toEqual(["euler", "E4"]);
  expect(await request({ quality: "best" })).toEqual(["euler", "E8"]);
  // One that was written for the model is taken as it is.
  const written = ["H1P2", "H1"];
  expect(await request({ deadlineMs: 1000 }, written)).toEqual(["flowturbo", "H1P2", "H1"]);
  expect(await request({ quality: "fast" }, written)).toEqual(["flowturbo", "H1"]);
  expect(await request({ deadlineMs: 1000, ladder: ["H1"] })).toEqual(["flowturbo", "H1"]);
  expect(await request({ stages: [{ width: 64, height: 64, blocks: "H2" }] })).toEqual(["flowturbo", "H2"]);
  expect(await request({ image: new Uint8Array(4), strength: 0.5 })).toEqual(["euler", "E2"]);
});

it("a scheduler alone says it for requests that name no sampler", async () => {
  const checkpoint = await openCheckpoint(fixture("large", "model"));
  const guided = (options: Partial<GenerateOptions>) => {
    const facts = {
      ...{ checkpoint, calibrated: [], defaults: distilledDefaults(4, true), ladder: null },
      ...{ text: new PromptEncoder(new GraphLibrary(checkpoint)), captured: false, pinBatch: null, allowPaths: false },
    };
    const { candidates, guidance } = settleRequest({ prompt: "x", ...options }, facts);
    return [formatBlocks(candidates[0].stages[0]!.schedule.blocks), guidance.isOn];
  };
  expect(guided({})).toEqual(["E4", false]);
  expect(guided({ steps: 2 })).toEqual(["E2", false]);
  expect(guided({ guidanceScale: 2 })).toEqual(["E4", true]);
  expect(guided({ sampler: "euler" })).toEqual(["E28", true]);
  expect(guided({ sampler: "euler", guidanceScale: 1, steps: 4 })).toEqual(["E4", false]);
});
