// Tiny autoencoders against diffusers' AutoencoderTiny: as the model's own, for previews, and between stages.
import { cpSync, mkdirSync, mkdtempSync, readFileSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import os from "node:os";
import path from "node:path";
import { FlowTurbo, type GenerateOptions, type RgbPicture, type StepEvent } from "flowturbo";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { type Checkpoint, openCheckpoint } from "../../lib/checkpoint/index.js";
import type { FloatTensor } from "../../lib/common/tensor.js";
import { float32 } from "../../lib/common/tensor.js";
import { networksOf } from "../../lib/networks/index.js";
import { GraphLibrary } from "../../lib/networks/library.js";
import { OnnxRuntime } from "../../lib/runtimes/onnxruntime/onnxruntime.js";
import { readSafetensors, type StoredFile, writeSafetensors } from "../checkpoint/safetensors-file.js";
import { bundle } from "../runtimes/build.js";
import { fixture, readAll, relativeError } from "../support/fixtures.js";
import { withValues } from "../support/with-values.js";

const tolerance = 1e-5;
const plain = fixture("sd3", "model");
const tiny = fixture("tiny", "vae");
const folder = mkdtempSync(path.join(os.tmpdir(), "flowturbo-tiny-"));
const own = path.join(folder, "model");
/** The fixture with the tiny autoencoder as its own; `edit` changes that one's config. */
function modelWith(to: string, edit: object = {}): string {
  cpSync(plain, to, { recursive: true });
  rmSync(path.join(to, "vae"), { recursive: true });
  cpSync(tiny, path.join(to, "vae"), { recursive: true });
  const change = (file: string, by: object) =>
    writeFileSync(file, JSON.stringify({ ...JSON.parse(readFileSync(file, "utf8")), ...by }));
  change(path.join(to, "model_index.json"), { vae: ["diffusers", "AutoencoderTiny"] });
  change(path.join(to, "vae/config.json"), edit);
  return to;
}

let reference: Record<string, FloatTensor>;
let tinyModel: FlowTurbo;
let previewed: FlowTurbo;
beforeAll(async () => {
  reference = await readAll(fixture("tiny", "reference.safetensors"));
  const settings = { measureCosts: false, cache: path.join(folder, "cache") };
  tinyModel = await FlowTurbo.load(modelWith(own), settings);
  previewed = await FlowTurbo.load(plain, { ...settings, previewVae: tiny });
});
afterAll(async () => {
  await Promise.all([tinyModel?.dispose(), previewed?.dispose()]);
  rmSync(folder, { recursive: true, force: true });
});

const run = (): GenerateOptions => ({
  ...{ prompt: "a red circle above a small blue square", negativePrompt: "blurry, low quality" },
  ...{ width: 64, height: 64, sampler: "euler", steps: 4, maxSequenceLength: 32, noise: reference.noise! },
});
/** How far a picture is from values in [-1, 1], in levels. */
function levels({ data, width, height }: RgbPicture, values: FloatTensor, row = 0): number {
  const plane = width * height;
  const wanted = (i: number) => values.data[(row * 3 + (i % 3)) * plane + Math.floor(i / 3)]!;
  return data.reduce((most, level, i) => {
    const exact = Math.min(255, Math.max(0, (wanted(i) / 2 + 0.5) * 255));
    return Math.max(most, Math.abs(level - exact));
  }, 0);
}

/** What a graph of a checkpoint makes of values, one row. */
async function runGraph(
  checkpoint: Checkpoint,
  graph: string,
  inputs: Record<string, FloatTensor>,
  output: string,
  shape: readonly number[],
): Promise<FloatTensor> {
  const { host, remove } = await bundle();
  const runtime = new OnnxRuntime({ host, weights: "lazy" });
  try {
    runtime.add(new GraphLibrary(checkpoint).get(graph));
    const names = Object.keys(inputs);
    const results = await runtime.run({
      constants: Object.fromEntries(names.map((name) => [name, { kind: "value", tensor: inputs[name]! }])),
      registers: { [output]: { dtype: "float32", shape } },
      instructions: [
        {
          ...{ op: "launch", graph, inputs: Object.fromEntries(names.map((name) => [name, name])) },
          ...{ outputs: { [output]: output }, label: { kind: "upscale", name: output } },
        },
      ],
      results: [output],
    });
    return results[output] as FloatTensor;
  } finally {
    await runtime.dispose();
    remove();
  }
}

/** The fixture's latents decoded, at 128 × 96 and encoded. */
function joined(checkpoint: Checkpoint): Promise<FloatTensor> {
  const noise = float32([1, 16, 12, 16], new Float32Array(16 * 12 * 16));
  const sigma = float32([1], new Float32Array(1));
  return runGraph(checkpoint, "preview_upscale", { latents: reference.latents!, noise, sigma }, "x", noise.shape);
}

describe("as the model's own", () => {
  it("draws what diffusers' pipeline draws with it", async () => {
    const { latents, pixels } = await withValues(tinyModel, run());
    expect(relativeError(latents, reference.latents!)).toBeLessThan(tolerance);
    expect(relativeError(pixels, reference.image!)).toBeLessThan(tolerance);
  });

  it("encodes originals as diffusers' img2img does", async () => {
    const plane = 64 * 64;
    const data = Uint8Array.from({ length: 3 * plane }, (_, i) =>
      Math.round((reference.pixels!.data[(i % 3) * plane + Math.floor(i / 3)]! + 1) * 127.5),
    );
    const image = { width: 64, height: 64, data };
    // With nothing to paint the latents are the original's.
    const mask = { width: 64, height: 64, data: new Uint8Array(3 * plane) };
    const { latents } = await withValues(tinyModel, { ...run(), image, mask, keepOriginal: false });
    expect(relativeError(latents, reference.encoded!)).toBeLessThan(tolerance);
  });
});

describe("as previewVae", () => {
  it("decodes previews, and pictures not", async () => {
    const previews: RgbPicture[] = [];
    const { latents, pixels } = await withValues(previewed, {
      ...{ ...run(), preview: "decoded" },
      onStep: ({ previews: [picture] }) => void previews.push(picture!),
    });
    expect(previews).toHaveLength(4);
    // Half a level of rounding.
    for (const [step, picture] of previews.entries())
      expect(levels(picture, reference.previews!, step), `${step}`).toBeLessThan(0.51);
    expect(relativeError(latents, reference.latents!)).toBeLessThan(tolerance);
    await using alone = await FlowTurbo.load(plain, { measureCosts: false });
    expect(pixels.data).toEqual((await withValues(alone, run())).pixels.data);
    expect(relativeError(pixels, reference.image!)).toBeGreaterThan(0.1);
  });

  it("goes from one stage to the next as the tiny one alone does", async () => {
    const stages = [
      { width: 64, height: 64, blocks: "E2" },
      { width: 128, height: 96, blocks: "E1", sigma: 0.4 },
    ];
    const options = { prompt: "a red circle", stages, seed: 3 };
    const [a, b] = [await withValues(previewed, options), await withValues(tinyModel, options)];
    expect(relativeError(a.latents, b.latents)).toBeLessThan(tolerance);
    expect(relativeError(a.pixels, b.pixels)).toBeGreaterThan(0.1);
  });

  it("decodes, resizes and encodes as torch does", async () => {
    const checkpoint = await openCheckpoint(plain, { previewVae: tiny });
    const names = networksOf(checkpoint).map(({ name }) => name);
    expect(names).toEqual(expect.arrayContaining(["vae_decoder", "vae_encoder", "preview_decoder", "preview_upscale"]));
    expect(names).not.toContain("upscale");
    expect(relativeError(await joined(checkpoint), reference.joined!)).toBeLessThan(tolerance);
  });
});

describe("TAESD's own files", () => {
  const decoder = fixture("taesd", "taesd3_decoder.safetensors");
  const encoder = fixture("taesd", "taesd3_encoder.safetensors");
  const open = (previewVae: string) => openCheckpoint(plain, { previewVae });
  const put = (name: string, tensors: StoredFile) => {
    const file = path.join(folder, name);
    mkdirSync(path.dirname(file), { recursive: true });
    writeSafetensors(file, tensors);
    return file;
  };

  it("decode and join stages as torch and diffusers do with the same weights", async () => {
    const expected = await readAll(fixture("taesd", "reference.safetensors"));
    const checkpoint = await open(decoder);
    expect(checkpoint.warnings).toEqual([]);
    const image = await runGraph(
      checkpoint,
      "preview_decoder",
      { latents: reference.latents! },
      "image",
      expected.image!.shape,
    );
    expect(relativeError(image, expected.image!)).toBeLessThan(tolerance);
    expect(relativeError(await joined(checkpoint), expected.joined!)).toBeLessThan(tolerance);
  });

  it("draw previews, and leave the joins to the model's own where the encoder is not beside the decoder", async () => {
    const alone = path.join(folder, "alone_decoder.safetensors");
    symlinkSync(decoder, alone);
    const names = networksOf(await open(alone)).map(({ name }) => name);
    expect(names).toEqual(expect.arrayContaining(["preview_decoder", "upscale"]));
    expect(names).not.toContain("preview_upscale");
    const expected = await readAll(fixture("taesd", "reference.safetensors"));
    await using model = await FlowTurbo.load(plain, { previewVae: alone, measureCosts: false });
    const previews: RgbPicture[] = [];
    const onStep = ({ previews: [picture] }: StepEvent) => void previews.push(picture!);
    await model.generate({ ...run(), preview: "decoded", onStep });
    expect(previews).toHaveLength(4);
    // The fixture's latents are those of this run with another decoder.
    expect(levels(previews.at(-1)!, expected.image!)).toBeLessThan(0.51);
    const stages = [
      { width: 64, height: 64, blocks: "E2" },
      { width: 128, height: 96, blocks: "E1", sigma: 0.4 },
    ];
    const options = { prompt: "a red circle", stages, seed: 3 };
    await using without = await FlowTurbo.load(plain, { measureCosts: false });
    const [a, b] = [await withValues(model, options), await withValues(without, options)];
    expect(a.pixels.data).toEqual(b.pixels.data);
  });

  it("are refused where they are of no use", async () => {
    const halves = { decoder: readSafetensors(decoder), encoder: readSafetensors(encoder) };
    const narrow = (tensors: StoredFile, name: string, shape: number[]) => {
      const bytes = Buffer.alloc(4 * shape.reduce((a, b) => a * b));
      return { ...tensors, [name]: { dtype: "F32", shape, bytes } };
    };
    const four = narrow(halves.decoder, "1.weight", [8, 4, 3, 3]);
    put("of_four/taesd_decoder.safetensors", four);
    put("unlike/taesd3_decoder.safetensors", halves.decoder);
    put("twice/taesd3_decoder.safetensors", halves.decoder);
    put("twice/taesd3_encoder.safetensors", halves.decoder);
    put("unlike/taesd3_encoder.safetensors", narrow(narrow(halves.encoder, "9.weight", [4, 8, 3, 3]), "9.bias", [4]));
    const lora = put("lora.safetensors", { "transformer.x.lora_A.weight": halves.decoder["1.bias"]! });
    const pickle = path.join(folder, "taesd3_decoder.pth");
    writeFileSync(pickle, "PK\x03\x04 and so on");
    const cases: [string, RegExp][] = [
      [encoder, /is TAESD's encoder alone.*taesd3_decoder\.safetensors/],
      [
        path.join(folder, "of_four/taesd_decoder.safetensors"),
        /latent_channels is 4, as for Stable Diffusion 1, 2 and XL.*the model's is 16/,
      ],
      [
        path.join(folder, "twice/taesd3_decoder.safetensors"),
        /taesd3_encoder\.safetensors is not the encoder.*it is a decoder/,
      ],
      [path.join(folder, "unlike/taesd3_decoder.safetensors"), /it is one for 4 channels of latents, and not 16/],
      [path.join(tiny, "diffusion_pytorch_model.safetensors"), /AutoencoderTiny without its configuration/],
      [path.join(plain, "vae/diffusion_pytorch_model.safetensors"), /is no decoder of TAESD: .*such as "/],
      [lora, /is a LoRA/],
      [pickle, /is a ZIP archive, as are files of PyTorch/],
    ];
    for (const [file, message] of cases) await expect(open(file), file).rejects.toThrow(message);
    // A layer that is missing is named as the file would name it.
    const { "3.conv.2.weight": _, ...less } = halves.decoder;
    const previewVae = put("less/taesd3_decoder.safetensors", less);
    await expect(FlowTurbo.load(plain, { previewVae, measureCosts: false })).rejects.toThrow(/"3\.conv\.2\.weight"/);
  });
});

it("is refused where it does not fit", async () => {
  const copy = (name: string, edit: object) => {
    const to = path.join(folder, name);
    cpSync(tiny, to, { recursive: true });
    const config = JSON.parse(readFileSync(path.join(to, "config.json"), "utf8"));
    writeFileSync(path.join(to, "config.json"), JSON.stringify({ ...config, ...edit }));
    return to;
  };
  const eight = { ...{ encoder_block_out_channels: [8, 8, 8], decoder_block_out_channels: [8, 8, 8] }, num_encoder_blocks: [1, 2, 1], num_decoder_blocks: [1, 1, 2] }; // biome-ignore format: one line
  const cases: [string, RegExp][] = [
    [path.join(folder, "absent"), /folder or file .*absent for previewVae does not exist/],
    [
      copy("channels", { latent_channels: 4 }),
      /latent_channels is 4, as for .*taesdxl.*, but the model's is 16.*taesd3/,
    ],
    [copy("factor", eight), /pixels for each latent is 4, but the model's is 8/],
    [copy("activation", { act_fn: "gelu" }), /"act_fn"/],
    [
      copy("blocks", { num_encoder_blocks: [1] }),
      /"num_encoder_blocks".*has 1 entries, but encoder_block_out_channels has 4/,
    ],
    [copy("uneven", { decoder_block_out_channels: [8, 8, 8, 16] }), /holds 8 and 16/],
    [
      copy("halves", { encoder_block_out_channels: [8, 8], num_encoder_blocks: [1, 1] }),
      /encoder_block_out_channels has 2/,
    ],
  ];
  for (const [previewVae, message] of cases)
    await expect(openCheckpoint(plain, { previewVae }), previewVae).rejects.toThrow(message);
  // Weights of another shape than the config's.
  const other = copy("other", { num_decoder_blocks: [1, 1, 3, 1] });
  await expect(FlowTurbo.load(plain, { previewVae: other, measureCosts: false })).rejects.toThrow(
    /has no tensor|Expected shape/,
  );
  symlinkSync(tiny, path.join(folder, "link"), "dir");
  expect((await openCheckpoint(plain, { previewVae: path.join(folder, "link") })).previewVae).not.toBeNull();
});

it("of two layouts is read as diffusers reads it, with a warning", async () => {
  const twice = path.join(folder, "twice");
  cpSync(tiny, twice, { recursive: true });
  const file = "diffusion_pytorch_model.safetensors";
  const { names } = (await openCheckpoint(plain, { previewVae: twice })).previewVae!.weights;
  const index = { metadata: {}, weight_map: Object.fromEntries(names.map((name) => [name, file])) };
  writeFileSync(path.join(twice, `${file}.index.json`), JSON.stringify(index));
  const { warnings } = await openCheckpoint(plain, { previewVae: twice });
  expect(warnings).toContainEqual(expect.stringMatching(/twice.*index\.json is read, as diffusers does/));
});
