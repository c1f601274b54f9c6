// Checkpoints in one file through the public API of the built package: the bits of their folders, and diffusers' results.
import { mkdtempSync, rmSync } from "node:fs";
import os from "node:os";
import path from "node:path";
import { FlowTurbo } from "flowturbo";
import { afterAll, expect, it } from "vitest";
import { fixture, readAll, relativeError } from "../support/fixtures.js";
import { withValues } from "../support/with-values.js";

const cache = mkdtempSync(path.join(os.tmpdir(), "flowturbo-single-"));
afterAll(() => rmSync(cache, { recursive: true, force: true }));

it.each(["sd3", "medium"])("%s draws as its folder does, to the bit", async (name) => {
  const { noise, ...reference } = await readAll(fixture(name, "euler_64.safetensors"));
  const options = { cache, runtime: "onnxruntime", measureCosts: false } as const;
  const draw = async (model: FlowTurbo) =>
    withValues(model, {
      prompt: "a red circle above a small blue square",
      ...{ negativePrompt: "blurry, low quality", width: 64, height: 64, maxSequenceLength: 32 },
      ...{ sampler: "euler", steps: 6, noise },
    });
  const folder = fixture(name, "model");
  const file = fixture(name, "single/full.safetensors");
  await using one = await FlowTurbo.load(file, { ...options, base: folder });
  await using whole = await FlowTurbo.load(folder, options);
  const [drawn, expected] = [await draw(one), await draw(whole)];
  expect(drawn.latents.data).toEqual(expected.latents.data);
  expect(drawn.pixels.data).toEqual(expected.pixels.data);
  expect(relativeError(drawn.latents, reference.latents!)).toBeLessThan(5e-5);
  expect(relativeError(drawn.pixels, reference.image!)).toBeLessThan(5e-5);
  expect([one.name, one.folder]).toEqual(["full", file]);
});
