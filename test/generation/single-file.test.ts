// Checkpoints in one file through the public API of the built package: the bits of their folders, and diffusers' results.
import { mkdtempSync, rmSync } from "node:fs";
import os from "node:os";
import path from "node:path";
import { FlowTurbo } from "flowturbo";
import { afterAll, expect, it } from "vitest";
import type { FloatTensor } from "../../lib/index.js";
import { fixture, readAll, relativeError } from "../support/fixtures.js";
import { readRaw, writeRaw } from "../support/quantised.js";
import { withValues } from "../support/with-values.js";

const cache = mkdtempSync(path.join(os.tmpdir(), "flowturbo-single-"));
afterAll(() => rmSync(cache, { recursive: true, force: true }));

const options = { cache, runtime: "onnxruntime", measureCosts: false } as const;

/** As diffusers drew the references. */
const draw = (model: FlowTurbo, noise: FloatTensor) =>
  withValues(model, {
    prompt: "a red circle above a small blue square",
    ...{ negativePrompt: "blurry, low quality", width: 64, height: 64, maxSequenceLength: 32 },
    ...{ sampler: "euler", steps: 6, noise },
  });

/** The transformer of sd3's file, without what stands beside it. */
async function transformerAlone(): Promise<string> {
  const tensors = await readRaw(fixture("sd3/single/full.safetensors"));
  const own = Object.entries(tensors).filter(([name]) => name.startsWith("model.diffusion_model."));
  const file = path.join(cache, "transformer.safetensors");
  await writeRaw(file, Object.fromEntries(own));
  return file;
}

it.each([
  ["sd3", "full", () => fixture("sd3/single/full.safetensors")],
  ["medium", "full", () => fixture("medium/single/full.safetensors")],
  ["sd3", "transformer", transformerAlone],
] as const)("%s draws as its folder does, to the bit: %s", async (name, part, make) => {
  const { noise, ...reference } = await readAll(fixture(name, "euler_64.safetensors"));
  const folder = fixture(name, "model");
  const file = await make();
  await using one = await FlowTurbo.load(file, { ...options, base: folder });
  await using whole = await FlowTurbo.load(folder, options);
  const [drawn, expected] = [await draw(one, noise!), await draw(whole, noise!)];
  expect(drawn.latents.data).toEqual(expected.latents.data);
  expect(drawn.pixels.data).toEqual(expected.pixels.data);
  expect(relativeError(drawn.latents, reference.latents!)).toBeLessThan(5e-5);
  expect(relativeError(drawn.pixels, reference.image!)).toBeLessThan(5e-5);
  expect([one.name, one.folder]).toEqual([part, file]);
});

it.each(["lazy", "folded"] as const)("T5 in scaled float8 draws what diffusers draws: %s", async (weights) => {
  const { noise, ...reference } = await readAll(fixture("medium/single_t5fp8.safetensors"));
  const file = fixture("medium/single/t5fp8.safetensors");
  await using model = await FlowTurbo.load(file, { ...options, weights, base: fixture("medium/model") });
  const drawn = await draw(model, noise!);
  expect(relativeError(drawn.latents, reference.latents!)).toBeLessThan(5e-5);
  expect(relativeError(drawn.pixels, reference.image!)).toBeLessThan(5e-5);
});
