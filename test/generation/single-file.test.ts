// Checkpoints in one file through the public API of the built package: the bits of their folders, and diffusers' results.
import { cpSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
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

it("CLIP-L without a projection draws as with the identity", async () => {
  const folder = path.join(cache, "base");
  cpSync(fixture("medium/model"), folder, { recursive: true });
  const change = (part: string, width: (config: Record<string, number>) => number) => {
    const config = path.join(folder, part, "config.json");
    const json = JSON.parse(readFileSync(config, "utf8"));
    const before = json.projection_dim;
    json.projection_dim = width(json);
    writeFileSync(config, JSON.stringify(json));
    return [before, json.projection_dim] as const;
  };
  // As wide as the encoder; what it is wider, the other one's is narrower.
  const [before, side] = change("text_encoder", ({ hidden_size }) => hidden_size!);
  const [, other] = change("text_encoder_2", ({ projection_dim }) => projection_dim! - (side - before));
  const tensors = await readRaw(fixture("medium/single/full.safetensors"));
  const [l, g] = ["clip_l", "clip_g"].map((name) => `text_encoders.${name}.transformer.text_projection.weight`) as [
    string,
    string,
  ];
  const identity = new Float32Array(side * side);
  for (let i = 0; i < side; i++) identity[i * side + i] = 1;
  const [, columns] = tensors[g]!.shape as [number, number];
  const rowBytes = tensors[g]!.bytes.length / tensors[g]!.shape[0]!;
  tensors[g] = { ...tensors[g]!, shape: [other, columns], bytes: tensors[g]!.bytes.subarray(0, other * rowBytes) };
  tensors[l] = { dtype: "F32", shape: [side, side], bytes: Buffer.from(identity.buffer) };
  const [whole, without] = ["identity", "without"].map((name) => path.join(cache, `${name}.safetensors`)) as [
    string,
    string,
  ];
  await writeRaw(whole, tensors);
  const { [l]: _, ...rest } = tensors;
  await writeRaw(without, rest);
  const { noise } = await readAll(fixture("medium", "euler_64.safetensors"));
  await using expected = await FlowTurbo.load(whole, { ...options, base: folder });
  await using model = await FlowTurbo.load(without, { ...options, base: folder });
  const [wanted, drawn] = [await draw(expected, noise!), await draw(model, noise!)];
  expect(relativeError(drawn.latents, wanted.latents)).toBeLessThan(1e-6);
  expect(model.warnings).toEqual(expected.warnings);
});
